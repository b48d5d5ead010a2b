"""Packages as sources of documents: Debian binary packages and source distributions of PyPI."""
