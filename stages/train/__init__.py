"""Training of a model by Megatron-core, in any layout of ranks."""

TRAINING_LIBRARIES = ("torch._inductor",)
"""Modules that torch imports when deterministic algorithms are switched on, which takes a second."""
