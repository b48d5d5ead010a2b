"""The engine: recipes, artifacts, graphs and machines. It contains no model code."""
