"""Curation of all sources together: decontamination, deduplication, and a disposition for every document."""
