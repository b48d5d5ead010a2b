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
    dispositions = metrics.stream(dataset / "dispositions.parquet", ["source", "id", "kept_hash"])
    stated = {(r["source"], r["id"]): r["kept_hash"] for r in dispositions}
    tokens = metrics.stream(dataset / "tokens/documents.parquet", ["source", "id", "content_hash"])
    tokenized = {(r["source"], r["id"]): r["content_hash"] for r in tokens}
    problems = []
    for path in sorted((dataset / "kept").glob("*.parquet")):
        for row in metrics.stream(path, ["id", "text", "content_hash"]):
            if hashlib.sha256(row["text"].encode()).hexdigest() != row["content_hash"]:
                problems.append(f"kept/{path.name}: the text of {row['id']} is not what its content hash says")
            key = (path.stem, row["id"])
            if stated.pop(key, None) != row["content_hash"]:
                problems.append(f"dispositions.parquet: the kept hash of {row['id']} is not that of kept/{path.name}")
            if tokenized.pop(key, None) != row["content_hash"]:
                problems.append(
                    f"tokens/documents.parquet: the content hash of {row['id']} is not that of kept/{path.name}"
                )
    problems += [
        f"dispositions.parquet: {key} has a kept hash, but is not kept"
        for (_, key), kept_hash in stated.items()
        if kept_hash
    ]
    problems += [f"tokens/documents.parquet: {key} is no kept document" for _, key in tokenized]
    return problems


def order(dataset: Path) -> list[str]:
    """Every segment of the order lies inside a training document, and no held-out document was trained on."""
    columns = ["source", "split", "ordinal", "id", "tokens"]
    earlier = sorted((dataset / "earlier").glob("order-*/order.parquet"))
    current = dataset / "tokens/documents.parquet"
    # An earlier run may have had other documents: then they are beside its order.
    tables = [*(dataset / "earlier").glob("tokenize-*/documents.parquet"), current]
    problems = []
    for path in sorted((dataset / "order").glob("*/order.parquet")) + earlier:
        training_documents = {
            (row["source"], row["ordinal"], row["id"]): row["tokens"]
            for table in (tables if path in earlier else [current])
            for row in metrics.stream(table, columns)
            if row["split"] == "train"
        }
        name, previous = path.relative_to(dataset).as_posix(), (0, 0, -1)
        for row in metrics.stream(path, ["step", "row", "segment", "source", "ordinal", "id", "offset", "length"]):
            tokens = training_documents.get((row["source"], row["ordinal"], row["id"]))
            if tokens is None:
                problems.append(
                    f"{name}: step {row['step']} row {row['row']} is {row['id']}, which is no training document"
                )
            elif not 0 <= row["offset"] < row["offset"] + row["length"] <= tokens:
                problems.append(f"{name}: step {row['step']} row {row['row']} reaches beyond the end of {row['id']}")
            position = (row["step"], row["row"], row["segment"])
            if position <= previous:
                problems.append(f"{name}: step {row['step']} row {row['row']} is out of order or doubled")
            previous = position
    return problems


def weights(folder: Path) -> list[str]:
    """Every tensor can be read and is finite; an optimizer has the tensors of its model."""
    import torch
    from safetensors import safe_open

    problems = []
    tensors: dict[tuple[Path, str], set[str]] = {}  # by folder, of model and optimizer
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        with safe_open(path, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                if not torch.isfinite(f.get_tensor(key)).all():
                    problems.append(f"{name}: tensor {key} is not finite")
                tensors.setdefault((path.parent, path.stem.split("-")[0]), set()).add(key)
    for (model_folder, kind), names in tensors.items():
        tensor_names = {name.split(".", 1)[1] for name in names}
        if kind == "optimizer" and tensor_names != tensors.get((model_folder, "model")):
            name = model_folder.relative_to(folder).as_posix()
            problems.append(f"{name}: its optimizer has other tensors than the model beside it")
    return problems


def reload(models: list[Path]) -> list[str]:
    """Plain transformers in a fresh interpreter loads each, and its chat template round-trips."""
    from release.checks.gates import run_reload

    for name in ("torch", "transformers"):  # the fresh interpreter would call their absence a fault of the model
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    size = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    limits = RELOAD_MEMORY + 8 * size, RELOAD_SECONDS * len(models) + size // RELOAD_BYTES_PER_SECOND
    problems = []
    for model, report in zip(models, run_reload(models, limits), strict=True):
        messages = report["problems"] or _compare_with_goldens(model, report["goldens"])
        problems += [f"{model.name}: {text}" for text in messages]
    return problems


def _compare_with_goldens(model: Path, outputs: dict[str, Any]) -> list[str]:
    """What tokenizer, template and weights give here is what they gave in the build; logits within GOLDEN_BOUND."""
    try:
        golden = metrics.read_json(registry.require_file(model, GOLDENS))
    except registry.Absent:
        return []
    problems = []
    for expected, actual in zip(golden["rows"], outputs["rows"], strict=True):
        for field in ("text", "ids", "greedy"):
            if expected[field] != actual[field]:
                problems.append(f"{GOLDENS}: the {field} of {expected['text']!r} are {actual[field]!r} here")
        if not all(abs(a - b) <= GOLDEN_BOUND for a, b in zip(expected["logits"], actual["logits"], strict=True)):
            problems.append(f"{GOLDENS}: logits after {expected['text']!r} differ by more than {GOLDEN_BOUND:g}")
    return problems


def code(folder: Path) -> list[str]:
    """The published source files are those that the statements of the published artifacts name, stale ones apart."""
    release = metrics.read_json(folder / "evidence/release.json")
    current = {artifact["key"] for node, artifact in release["nodes"].items() if node not in release["stale"]}
    digests_by_module: dict[str, set[str]] = {}
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = metrics.read_json(path)
        if not {subject["name"] for subject in body["subject"]} & current:
            continue
        for item in body["predicate"]["buildDefinition"]["resolvedDependencies"]:
            if item.get("uri", "").startswith("atom:code/"):
                digests_by_module.setdefault(item["name"], set()).add(item["digest"]["sha256"])
    problems = []
    for module, digests in sorted(digests_by_module.items()):
        stem = folder / "code" / module.replace(".", "/")
        source_file = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)
        if source_file is None:
            problems.append(f"code: {module}, which the statements name, is not there")
        elif sha256_file(source_file) not in digests:
            problems.append(f"{source_file.relative_to(folder).as_posix()} is not the file that the statements name")
    return problems
