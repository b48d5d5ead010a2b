"""Task sets of this project, in the form of lm-evaluation-harness: their YAML files."""
