"""Makes Python look less often for objects that refer to each other in cycles."""

import atexit
import gc

ALLOCATIONS = 20_000
"""New objects after which the youngest are looked at; Python's own number is 700, or 2,000 from 3.13 on."""


def collect_rarely() -> None:
    """To be called before PyTorch, Megatron or transformers are imported: they leave half a million objects that never
    end, and with Python's own numbers the collector walks over them again and again, for a fifth of the time of the
    imports, and once more when the process ends. Memory of tensors does not wait for the collector, unless they are
    part of a cycle. At the end of the process, objects in cycles are no longer finalized: files must be closed."""
    gc.set_threshold(ALLOCATIONS, 10, 10)
    atexit.register(gc.freeze)
