SLICE_BYTES = 2**28
"""Largest size of the fp32 logits that are compared at one time."""
WHOLE_BYTES = 5 * 10**8
"""Largest model, in bytes of fp32, that transformers loads as a whole; of a larger one it loads a layer at a time."""
PARITY_TOKENS = 4096
"""Longest row of the parity check of a model whose context is more than twice as long."""


def parity_tokens(context_length: int) -> int | None:
    """`ExportConfig.parity_tokens` for a context. The work of a row grows with its length and with its square, and the
    check computes on one core."""
    return PARITY_TOKENS if context_length > 2 * PARITY_TOKENS else None


def parity_lengths(longest: int) -> list[int]:
    """Tokens of the rows of the parity check."""
    return [longest, *(max(2, longest // part) for part in (2, 5, 8, 16))]
