"""Acquisition: sources become tables of documents with their id, origin and license.

Stages: `acquire` (`acquire_stage.py`) reads files or generates documents from a seed; `generate` (`generate_stage.py`)
lets a language model write them from the documents of another source. The readers are in `readers/`; `packages/`,
`web/` and `licenses/` read what some of them need: archives, pages, and the license of each document.
"""
