"""Curation: the steps of a data recipe as datatrove blocks, deduplication, decontamination, dispositions."""
