"""Tokens and their order: token shards of the kept documents, and the rows of every step of a phase.

Stages: `tokenize` (`tokenize_stage.py`) and `order` (`order_stage.py`). The other modules are the functions that
compute an order from its settings, so that any step and any document can be looked up.
"""
