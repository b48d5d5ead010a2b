"""The engine: knows recipes, artifacts, graphs and machines. Knows no model."""
