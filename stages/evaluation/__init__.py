"""Measurements of models, and the comparison of test items with training data. No torch at import."""
