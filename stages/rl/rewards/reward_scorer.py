"""The scores of an exported reward model: the log-probability that `<|endoftext|>` follows an answer.

The verifier `reward-model` scores with it in its own process, and a server (reward_server.py) on GPUs of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import AtomError

if TYPE_CHECKING:
    import torch

# Answers that are scored at once, on a core and on a GPU.
ROWS, GPU_ROWS = 64, 8


class RewardScorer:
    """An exported reward model.

    Attributes:
        model: The model of transformers.
        longest: Its context, in tokens.
        dtype: Name of the type in which it computes.
        rows: Rows that it scores at once.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        """Loads the model.

        Args:
            folder: Folder of the export.
            device: Device that holds it in fp32; None for a process of its own, which spreads it in bf16 over all GPUs
                that it sees, and computes in fp32 without any.

        Raises:
            AtomError: The model is to be spread over several GPUs, and a package is missing.
        """
        import torch
        from transformers import AutoModelForCausalLM

        gpus = torch.cuda.device_count() if device is None and torch.cuda.is_available() else 0
        dtype = torch.bfloat16 if gpus else torch.float32
        placed = {}
        if gpus > 1:
            if find_spec("accelerate") is None:  # with which transformers spreads a model
                raise AtomError(
                    "a reward model on several GPUs needs the package accelerate; install it, or give it one GPU"
                )
            placed = {"device_map": "auto"}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **placed).eval()
        if not placed:
            self.model = self.model.to(device or ("cuda" if gpus else "cpu"))
        self.device = self.model.device
        self.longest = int(self.model.config.max_position_embeddings)
        self.dtype = str(dtype).removeprefix("torch.")
        self.rows = ROWS if self.device.type == "cpu" else GPU_ROWS

    def scores(self, rows: Sequence[Sequence[int]], pad: int, end: int) -> list[float]:
        """Returns the log-probability of the token `end` after each of the rows, which are one batch."""
        import torch

        last = torch.tensor([len(row) - 1 for row in rows])
        width = int(last.max()) + 1
        # Padding on the right changes nothing before it, since attention is causal.
        padded = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        # Logits of the last tokens alone: those of all would take more memory than the model's layers.
        positions, places = torch.unique(last, return_inverse=True)
        with torch.inference_mode():
            logits = self.model(padded.to(self.device), logits_to_keep=positions.to(self.device)).logits
            chosen = logits[torch.arange(len(rows)), places.to(logits.device)].cpu()
        result: list[float] = torch.log_softmax(chosen.double(), -1)[:, end].tolist()
        return result


def batches(rows: Sequence[Sequence[int]], longest: int, size: int) -> Iterator[list[int]]:
    """Yields the numbers of rows that are scored at once.

    Rows of similar length share a batch, so that little of it is padding; longer ones than `longest` are in none.
    """
    order = sorted((i for i in range(len(rows)) if len(rows[i]) <= longest), key=lambda i: (len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
