"""Checks that read everything: each document, each row of the order, each tensor, each answer."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from pipeline.core.store import sha256_file
from release.assembly import metrics
from release.checks import registry
from release.layout import GOLDENS

GOLDEN_BOUND = 1e-3
"""Of logits in fp32, which another processor adds up in another order."""
RELOAD_MEMORY, RELOAD_SECONDS, RELOAD_BYTES_PER_SECOND = 400 << 20, 10, 5_000_000
"""What a model may take that is loaded in transformers, beyond what its weights need."""


def documents(dataset: Path) -> list[str]:
    """The content hash of every kept document is that of its text, and every table gives it the same one."""
    fates = metrics.stream(dataset / "dispositions.parquet", ["source", "id", "kept_hash"])
    stated = {(r["source"], r["id"]): r["kept_hash"] for r in fates}
    tokens = metrics.stream(dataset / "tokens/documents.parquet", ["source", "id", "content_hash"])
    tokenized = {(r["source"], r["id"]): r["content_hash"] for r in tokens}
    wrong = []
    for path in sorted((dataset / "kept").glob("*.parquet")):
        for row in metrics.stream(path, ["id", "text", "content_hash"]):
            if hashlib.sha256(row["text"].encode()).hexdigest() != row["content_hash"]:
                wrong.append(f"kept/{path.name}: the text of {row['id']} is not what its content hash says")
            key = (path.stem, row["id"])
            if stated.pop(key, None) != row["content_hash"]:
                wrong.append(f"dispositions.parquet: the kept hash of {row['id']} is not that of kept/{path.name}")
            if tokenized.pop(key, None) != row["content_hash"]:
                wrong.append(
                    f"tokens/documents.parquet: the content hash of {row['id']} is not that of kept/{path.name}"
                )
    wrong += [
        f"dispositions.parquet: {key} has a kept hash, but is not kept" for (_, key), said in stated.items() if said
    ]
    wrong += [f"tokens/documents.parquet: {key} is no kept document" for _, key in tokenized]
    return wrong


def order(dataset: Path) -> list[str]:
    """Every segment of the order lies inside a training document, and no held-out document was trained on."""
    columns = ["source", "split", "ordinal", "id", "tokens"]
    earlier = sorted((dataset / "earlier").glob("order-*/order.parquet"))
    current = dataset / "tokens/documents.parquet"
    # An earlier run may have had other documents: then they are beside its order.
    tables = [*(dataset / "earlier").glob("tokenize-*/documents.parquet"), current]
    wrong = []
    for path in sorted((dataset / "order").glob("*/order.parquet")) + earlier:
        known = {
            (row["source"], row["ordinal"], row["id"]): row["tokens"]
            for table in (tables if path in earlier else [current])
            for row in metrics.stream(table, columns)
            if row["split"] == "train"
        }
        name, last = path.relative_to(dataset).as_posix(), (0, 0, -1)
        for row in metrics.stream(path, ["step", "row", "segment", "source", "ordinal", "id", "offset", "length"]):
            tokens = known.get((row["source"], row["ordinal"], row["id"]))
            if tokens is None:
                wrong.append(
                    f"{name}: step {row['step']} row {row['row']} is {row['id']}, which is no training document"
                )
            elif not 0 <= row["offset"] < row["offset"] + row["length"] <= tokens:
                wrong.append(f"{name}: step {row['step']} row {row['row']} reaches beyond the end of {row['id']}")
            here = (row["step"], row["row"], row["segment"])
            if here <= last:
                wrong.append(f"{name}: step {row['step']} row {row['row']} is out of order or doubled")
            last = here
    return wrong


def weights(folder: Path) -> list[str]:
    """Every tensor can be read and is finite; an optimizer has the tensors of its model."""
    import torch
    from safetensors import safe_open

    wrong = []
    tensors: dict[tuple[Path, str], set[str]] = {}  # by folder, of model and optimizer
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        with safe_open(path, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                if not torch.isfinite(f.get_tensor(key)).all():
                    wrong.append(f"{name}: tensor {key} is not finite")
                tensors.setdefault((path.parent, path.stem.split("-")[0]), set()).add(key)
    for (place, kind), names in tensors.items():
        owned = {name.split(".", 1)[1] for name in names}
        if kind == "optimizer" and owned != tensors.get((place, "model")):
            at = place.relative_to(folder).as_posix()
            wrong.append(f"{at}: its optimizer has other tensors than the model beside it")
    return wrong


def reload(models: list[Path]) -> list[str]:
    """Plain transformers in a fresh interpreter loads each, and its chat template round-trips."""
    from release.checks.gates import run_reload

    for name in ("torch", "transformers"):  # the fresh interpreter would call their absence a fault of the model
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    limits = RELOAD_MEMORY + 8 * size, RELOAD_SECONDS * len(models) + size // RELOAD_BYTES_PER_SECOND
    wrong = []
    for model, found in zip(models, run_reload(models, limits), strict=True):
        told = found["problems"] or _against_goldens(model, found["goldens"])
        wrong += [f"{model.name}: {text}" for text in told]
    return wrong


def _against_goldens(model: Path, found: dict[str, Any]) -> list[str]:
    """What tokenizer, template and weights give here is what they gave in the build; logits within GOLDEN_BOUND."""
    try:
        golden = metrics.read_json(registry.there(model, GOLDENS))
    except registry.Absent:
        return []
    wrong = []
    for then, now in zip(golden["rows"], found["rows"], strict=True):
        for what in ("text", "ids", "greedy"):
            if then[what] != now[what]:
                wrong.append(f"{GOLDENS}: the {what} of {then['text']!r} are {now[what]!r} here")
        if not all(abs(a - b) <= GOLDEN_BOUND for a, b in zip(then["logits"], now["logits"], strict=True)):
            wrong.append(f"{GOLDENS}: logits after {then['text']!r} differ by more than {GOLDEN_BOUND:g}")
    return wrong


def code(folder: Path) -> list[str]:
    """The published source files are those that the statements of the published artifacts name, stale ones apart."""
    release = metrics.read_json(folder / "evidence/release.json")
    current = {made["key"] for node, made in release["nodes"].items() if node not in release["stale"]}
    said: dict[str, set[str]] = {}
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = metrics.read_json(path)
        if not {subject["name"] for subject in body["subject"]} & current:
            continue
        for item in body["predicate"]["buildDefinition"]["resolvedDependencies"]:
            if item.get("uri", "").startswith("atom:code/"):
                said.setdefault(item["name"], set()).add(item["digest"]["sha256"])
    wrong = []
    for module, digests in sorted(said.items()):
        stem = folder / "code" / module.replace(".", "/")
        found = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)
        if found is None:
            wrong.append(f"code: {module}, which the statements name, is not there")
        elif sha256_file(found) not in digests:
            wrong.append(f"{found.relative_to(folder).as_posix()} is not the file that the statements name")
    return wrong
