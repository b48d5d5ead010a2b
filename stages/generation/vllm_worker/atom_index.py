"""The index of a policy's weights in a shared folder.

The ranks that write the folder and vLLM's workers that read it both use this file. It imports no module of this
project, because the workers have none.

The folder has the form of a sharded model on the Hub: safetensors files, and `model.safetensors.index.json`, which is
written last. Its entry `tensors` states type, shape and SHA-256 of each tensor, from which the policy's digest follows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Refused(ValueError):
    """A refusal of weights. Its sentence stands between brackets, since vLLM quotes it within its own."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"[[{sentence}]]")


def row_of(tensor: torch.Tensor) -> dict[str, Any]:
    """Returns the entry of a tensor."""
    # NumPy has no bfloat16, so the bytes are hashed.
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "sha256": hashlib.sha256(content.data).hexdigest()}


def policy_digest(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns `tensors-sha256:…`, over a line `<name> <type> <shape> <SHA-256>` for each tensor, by name."""
    hasher = hashlib.sha256()
    for name, row in sorted(rows.items()):
        hasher.update(f"{name} {row['dtype']} {list(row['shape'])} {row['sha256']}\n".encode())
    return f"tensors-sha256:{hasher.hexdigest()}"


def tensors(folder: Path, digest: str, part: int = 0, parts: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a policy, layer by layer.

    The tensors are divided into `parts`; this process checks those of `part`. A file is open from its first to its last
    one: the pages that were read of an open file count as memory. A model with tied embeddings has its table twice,
    since a server keeps two copies.

    Raises:
        Refused: The folder does not hold the policy of that digest, complete.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        raise Refused(f"it does not see {folder / INDEX}; mount the run's work folder there") from None
    rows, files = index["tensors"], index["weight_map"]
    if rows.keys() != files.keys():
        raise Refused(f"the index of {folder} names other tensors than it describes")
    if policy_digest(rows) != digest:
        raise Refused(f"{folder} holds the policy {policy_digest(rows)}, not {digest}")
    remaining = Counter(files.values())
    opened: dict[str, tuple[ExitStack, Any]] = {}
    for number, name in enumerate(sorted(files, key=_by_layer)):
        file = files[name]
        try:
            if file not in opened:
                stack = ExitStack()
                opened[file] = stack, stack.enter_context(safe_open(folder / file, "pt"))
            tensor = opened[file][1].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise Refused(f"it cannot read {folder / file} ({error})") from None
        # Each worker checks a share of the tensors. All read the same files, and one refusal is enough.
        if number % parts == part and row_of(tensor) != rows[name]:
            raise Refused(f"{name} in {folder / file} is not the tensor of the index")
        yield name, tensor
        if name == TABLE and HEAD not in files:
            yield HEAD, tensor
        remaining[file] -= 1
        if not remaining[file]:
            opened.pop(file)[0].close()


def _by_layer(name: str) -> list[tuple[bool, int, str]]:
    """Returns a key that orders numbers in names by their value."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
