"""Model, data, checkpoint and evidence cards, rendered from the facts of a release."""
