"""Curation of all sources together: every acquired document is kept, or removed by one rule.

Stages, in their order: `filter` (`filter_stage.py`), `duplicates` (`duplicates_stage.py`), `representatives`
(`representatives_stage.py`) and `dedup` (`dedup_stage.py`). The steps of a source are in `filters/`.
"""
