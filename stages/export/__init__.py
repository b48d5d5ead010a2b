SLICE_BYTES = 2**28
"""Largest size of the fp32 logits that are compared at one time."""
WHOLE_BYTES = 5 * 10**8
"""Largest model, in bytes of fp32, that transformers loads as a whole; of a larger one it loads a layer at a time."""


def parity_lengths(longest: int) -> list[int]:
    """Tokens of the rows of the parity check."""
    return [longest, *(max(2, longest // part) for part in (2, 5, 8, 16))]
