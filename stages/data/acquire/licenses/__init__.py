"""Licenses: from the strings of a source to SPDX, and the licenses that a source allows."""
