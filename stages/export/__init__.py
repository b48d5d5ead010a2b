SLICE_BYTES = 2**28
"""Largest size of the fp32 logits that are compared at one time."""
