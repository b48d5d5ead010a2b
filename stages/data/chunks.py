"""The chunks of the documents of a phase, from which its rows are built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RecipeError
from stages.data.table import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

Chunks = dict[str, "NDArray[Any]"]
"""Columns ordinal, id, offset, length and loss_from of the chunks of one source, each of shape [chunks]."""


def chunk(tokens: int, loss_from: int, sequence_length: int) -> list[tuple[int, int, int]]:
    """(offset, length, targets without loss) of the chunks of one document that carry loss.

    `loss_from` is the first token of the document that carries loss. A chunk of length n has n - 1 targets.
    """
    chunks = []
    for offset in range(0, tokens - 1, sequence_length):
        length = min(sequence_length + 1, tokens - offset)
        without_loss = min(max(loss_from - offset - 1, 0), length - 1)
        if without_loss < length - 1:
            chunks.append((offset, length, without_loss))
    return chunks


def read_chunks(path: Path, phase: str, mix: Mapping[str, float], sequence_length: int) -> dict[str, Chunks]:
    """The chunks of the training split by source, from the table of documents at `path`.

    Raises RecipeError if the shares of the mix do not sum to 1, or a source of it is unknown or empty.
    """
    import numpy as np

    if abs(sum(mix.values()) - 1) > 1e-6:
        raise RecipeError(f"{phase}.mix: shares sum to {sum(mix.values()):.6g}, not 1; adjust them")
    table = read_table(path, ["source", "split", "ordinal", "id", "tokens", "loss_from"]).to_pylist()
    rows: dict[str, list[tuple[int, str, int, int, int]]] = {document["source"]: [] for document in table}
    for document in table:
        if document["split"] == "train" and document["source"] in mix:
            for offset, length, without_loss in chunk(document["tokens"], document["loss_from"], sequence_length):
                rows[document["source"]].append((document["ordinal"], document["id"], offset, length, without_loss))
    chunks = {}
    for name in mix:
        if name not in rows:
            kept = ", ".join(rows)
            raise RecipeError(
                f"{phase}.mix names the source {name}, of which curation left no document (it left {kept}); see "
                "the dispositions, then loosen its steps or take it out of the mix"
            )
        if not rows[name]:
            raise RecipeError(f"{phase}.mix: source {name} has no training tokens; remove it from the mix")
        ordinals, ids, offsets, lengths, counts_without_loss = zip(*rows[name], strict=True)
        chunks[name] = {
            "ordinal": np.array(ordinals),
            "id": np.array(ids, dtype=object),
            "offset": np.array(offsets),
            "length": np.array(lengths),
            "loss_from": np.array(counts_without_loss),
        }
    return chunks
