"""Readers: from files (or a seed) to documents with stable ids."""
