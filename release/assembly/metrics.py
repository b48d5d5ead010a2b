"""The numbers of a release, computed from the files that it publishes, never typed and never copied from a summary.

Scores come from the per-item tables, the funnel from the dispositions, parameters from the tensors. `verify` calls the
same functions on a stranger's copy and compares with what the cards say.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release import schema
from release.assembly import training
from release.layout import when
from release.untrusted import tensor_header

Facts = dict[str, Any]
CONTAMINATION = "evaluation/contamination/report.json"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_manifests(release: Path) -> dict[str, Facts]:
    """{node: manifest} of evidence/manifests."""
    return {path.stem: read_json(path) for path in sorted((release / "evidence/manifests").glob("*.json"))}


BATCH, ORDER_BATCH = 4096, 65536
"""Rows that are unpacked at once of a table, and of an order, whose rows are short."""


def rows(path: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a published table, as `stream` gives them."""
    return list(stream(path, columns))


def stream(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a published table, a few of which are held at once; columns have today's names, whatever the
    release's format calls them. Raises CheckFailed if it lacks a column."""
    for batch in _batches(path, columns, BATCH):
        yield from batch.to_pylist()


def _batches(path: Path, columns: list[str] | None, size: int) -> Iterator[Any]:
    """The rows of a table as Arrow's batches. Raises CheckFailed if it lacks a column."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        stored = schema.columns(path, columns if columns is not None else schema.today(path, names))
        if missing := sorted(set(stored.values()) - set(names)):
            raise CheckFailed(f"{path.name} has no column {missing[0]}")
        for batch in file.iter_batches(batch_size=size, columns=list(stored.values())):
            yield batch.select(list(stored.values())).rename_columns(list(stored))


def scores(path: Path) -> Facts:
    """A published scores.json, or its copy in a model repository, in today's names."""
    current: Facts = schema.fields(path, "scores.json", read_json(path))
    return current


def canary(items: str) -> dict[str, str]:
    """A string by which evaluation items can be found in a training corpus; its GUID follows from their digest."""
    guid = uuid.uuid5(uuid.NAMESPACE_URL, f"sha256:{items}")
    return {"canary": f"Evaluation data; it should never appear in a training corpus. canary GUID {guid}"}


@dataclass
class _Fates:
    """What became of the documents of one source. splits: of those that were kept; rules: of those that were not."""

    documents: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    licenses: set[str] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        self.documents += 1
        self.bytes += row["bytes"]
        self.licenses.add(row["license"])
        if row["disposition"] == "kept":
            self.kept_bytes += row["bytes"]
            self.splits[row["split"]] += 1
        elif row["disposition"] == "removed":
            self.rules[row["rule"]] += 1


def data_facts(dataset: Path) -> Facts:
    """What was read, kept and removed, under which license, in which order: from the dataset repository alone."""
    counts: dict[str, _Fates] = {}
    for row in stream(dataset / "dispositions.parquet", ["source", "license", "bytes", "disposition", "split", "rule"]):
        counts.setdefault(row["source"], _Fates()).add(row)
    sources: Facts = {}
    for name in sorted(counts):
        fates = counts[name]
        declared_path = dataset / "sources" / f"{name}.json"
        declared = read_json(declared_path) if declared_path.exists() else {}
        sources[name] = {
            "documents_in": fates.documents,
            "kept": fates.splits.total(),
            "removed": dict(sorted(fates.rules.items())),
            "by_split": dict(sorted(fates.splits.items())),
            "bytes_in": fates.bytes,
            "bytes_kept": fates.kept_bytes,
            "licenses": sorted(fates.licenses),
            "origin": declared.get("origin", ""),
            "license_evidence": declared.get("license_evidence", ""),
        }
    tokens: dict[str, Counter[str]] = {name: Counter() for name in sources}
    for row in stream(dataset / "tokens" / "documents.parquet", ["source", "split", "tokens"]):
        tokens[row["source"]][row["split"]] += row["tokens"]
    for name, by_split in tokens.items():
        sources[name]["tokens"] = dict(sorted(by_split.items()))
    return {
        "sources": sources,
        "order": {
            phase: order_facts([*earlier_orders(dataset, phase), p])
            for phase, p in _by_name((dataset / "order").glob("*/order.parquet"), schema.phase)
        },
        "problems": dict(
            sorted(Counter(r["task"] for r in stream(dataset / "evaluation/items.parquet", ["task"])).items())
        ),
        "chat": chat_facts(dataset / "evaluation"),
        "evaluation": {
            model: scores_of(p) for model, p in _by_name((dataset / "evaluation").glob("*/scores.json"), schema.model)
        },
    }


ABOUT = ("test", "fresh", "preferences")
"""What models that converse are measured on, as the folders are called."""


def chat_facts(evaluation: Path) -> Facts:
    """By what was asked and model: the scores recomputed from the tables. Empty if no model converses."""
    from stages.evaluation import pass_at_k, win_rate

    facts: Facts = {}
    for benchmark in ABOUT:
        summarize = win_rate.summary if benchmark == "preferences" else pass_at_k.summary
        scored = {
            schema.model(p.parent): summarize(rows(p)) | _compared_models(p) for p in chat_tables(evaluation, benchmark)
        }
        if scored:
            facts[benchmark] = {name: scored[name] for name in sorted(scored, key=when)}
    return facts


def chat_tables(evaluation: Path, benchmark: str) -> list[Path]:
    """The tables of what was asked, one a model."""
    return sorted((evaluation / benchmark).glob(f"*/{'pairs' if benchmark == 'preferences' else 'answers'}.parquet"))


def _compared_models(table: Path) -> Facts:
    """The two models of a comparison, whose names no table holds."""
    stated = scores(table.with_name("scores.json"))
    return {name: stated[name] for name in ("model", "before") if name in stated}


def _by_name(files: Iterable[Path], name_of: Callable[[Path], str]) -> list[tuple[str, Path]]:
    """(name, folder) of the folders of files, which are named after phases or models, in the order of training."""
    return sorted(((name_of(file.parent), file.parent) for file in files), key=lambda pair: when(pair[0]))


def earlier_orders(dataset: Path, phase: str) -> list[Path]:
    """The orders of earlier runs that a phase followed before its own, the first one first."""
    metas = {p.parent: read_json(p) for p in (dataset / "earlier").glob("order-*/meta.json")}
    phase_orders = [folder for folder, meta in metas.items() if schema.reader(folder).phase(meta["phase"]) == phase]
    return sorted(phase_orders, key=lambda folder: int(metas[folder].get("first_step", 1)))


def order_facts(folders: list[Path]) -> Facts:
    """Steps of one phase, and what each part of them read: one part, unless it went on from an earlier run.

    folders: the order indices that were followed one after the other, each up to where the next begins.
    """
    first_steps = [int(read_json(folder / "meta.json").get("first_step", 1)) for folder in folders]
    ends: list[int | None] = [step - 1 for step in first_steps[1:]] + [None]
    parts = [_part(folder, end) for folder, end in zip(folders, ends, strict=True)]
    return {"steps": parts[-1]["last_step"], "parts": parts}


def _part(folder: Path, end: int | None) -> Facts:
    """What the steps of an order index up to `end` read.

    by_source: predicted tokens, documents, and the rows that hold any of them: several sources can share a row that is
    packed. packed, for such an order only: all rows, their predicted tokens and how full they are. long, by source:
    what the order stage tells of up-weighted long documents. A segment of n tokens predicts n - 1 of them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    meta = read_json(folder / "meta.json")
    tokens: Counter[str] = Counter()
    rows_of: dict[str, set[int]] = {}
    ids_of: dict[str, set[str]] = {}
    first, last = 1 << 62, 0
    for batch in _batches(folder / "order.parquet", ["step", "row", "source", "id", "length"], ORDER_BATCH):
        table = pa.Table.from_batches([batch])
        if end is not None:
            table = table.filter(pc.field("step") <= end)
        if not table.num_rows:
            continue
        steps = pc.min_max(table["step"]).as_py()
        first, last = min(first, steps["min"]), max(last, steps["max"])
        for total in table.group_by("source").aggregate([("length", "sum"), ("length", "count")]).to_pylist():
            tokens[total["source"]] += total["length_sum"] - total["length_count"]
        for source, step, row in _distinct(table, ["source", "step", "row"]):
            rows_of.setdefault(source, set()).add(step << 32 | row)
        for source, key in _distinct(table, ["source", "id"]):
            ids_of.setdefault(source, set()).add(key)
    by_source = {
        name: {"tokens": tokens[name], "rows": len(rows_of[name]), "documents": len(ids_of[name])}
        for name in sorted(rows_of)
    }
    part: Facts = {"first_step": first, "last_step": last, "by_source": by_source}
    if meta.get("pack"):
        rows, predicted, length = len(set().union(*rows_of.values())), tokens.total(), meta["sequence_length"]
        part["packed"] = {
            "rows": rows,
            "sequence_length": length,
            "tokens": predicted,
            "fill": predicted / (rows * length),
        }
        part["long"] = {name: row["long"] for name, row in sorted(meta["sources"].items()) if "long" in row}
    return part


def _distinct(table: Any, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Each combination of values in these columns once."""
    groups = table.group_by(columns).aggregate([])
    return zip(*(groups[column].to_pylist() for column in columns), strict=True)


def scores_of(folder: Path) -> Facts:
    """The scores of one phase, recomputed from its tables: two, or four with those of long contexts."""
    from stages.evaluation.bits_per_byte import summary

    tables = [folder / f"{name}.parquet" for name in ("documents", "items", "passkey", "positions")]
    return summary(*(rows(path) for path in tables if path.is_file() or path in tables[:2]))


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """{tensor: shape} from the header of a safetensors file, without reading the tensors. Raises CheckFailed."""
    return {name: entry["shape"] for name, entry in tensor_header(path, follow=True).items()}


def model_facts(model: Path) -> Facts:
    """Architecture, parameters (total, and active for one token), parity, scores and training logs of one model
    repository. The last of its scores are its own, those before are of the models that it came from."""
    config = read_json(model / "config.json")
    shapes: dict[str, list[int]] = {}
    for path in sorted(model.glob("*.safetensors")):
        shapes |= tensor_shapes(path)
    sizes = {name: _product(shape) for name, shape in shapes.items()}
    total, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts * (config["num_experts"] - config["num_experts_per_tok"]) // config["num_experts"]
    keys = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings", "vocab_size",
    )  # fmt: skip
    return {
        "architecture": config["architectures"][0],
        "config": {key: config[key] for key in keys},
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "parameters": {"total": total, "active": total - idle, "tensors": len(shapes)},
        "parity": read_json(model / "parity.json"),
        "rope": config["rope_parameters"],
        "scores": _scores_by_model(model / "evaluation"),
        "chat": {
            benchmark: _scores_by_model(folder)
            for benchmark in ABOUT
            if (folder := model / "evaluation" / benchmark).is_dir()
        },
        "contamination": read_json(path) if (path := model / CONTAMINATION).exists() else None,
        "training": {
            phase: training.log_facts(training.read(log, training.FIGURES))
            for phase, log in training.logs(model).items()
        },
    }


def _scores_by_model(folder: Path) -> dict[str, Facts]:
    files = {schema.model(path): path for path in folder.glob("*.json")}
    return {model: scores(files[model]) for model in sorted(files, key=when)}


def checkpoint_facts(checkpoints: Path) -> list[Facts]:
    """Every published checkpoint with its state, by phase and step."""
    checkpoint_rows = []
    for path in checkpoints.glob("*/state.json"):
        phase, _, step = path.parent.name.rpartition("-step-")
        state = schema.fields(path, "state.json", read_json(path))
        phase = schema.reader(path).phase(phase)
        checkpoint_rows.append({"branch": path.parent.name, "phase": phase, "step": int(step), "state": state})
    return sorted(checkpoint_rows, key=lambda row: (when(row["phase"]), row["step"]))


def context_of(checkpoints: list[Facts], phase: str) -> int:
    """The context length that a phase was trained for, in tokens, as the state of its last checkpoint says.

    checkpoints: what `checkpoint_facts` gives.
    """
    states = [row["state"] for row in checkpoints if row["phase"] == phase]
    return int(states[-1]["config"]["model"]["context_length"])


def interventions(checkpoints: list[Facts]) -> list[Facts]:
    """Where a phase went on from a checkpoint of an earlier run, and which settings are others from there on.

    checkpoints: what `checkpoint_facts` gives. by: key of the phase that trained the steps `first` to `step`; changes:
    [setting, before, after].
    """
    states = {(row["phase"], row["step"]): row["state"] for row in checkpoints}
    changes_by_step: dict[tuple[str, int], Facts] = {}
    for (phase, _), state in sorted(states.items()):
        settings = _settings(state)
        source_key, _, step = settings.pop("continue_from", "").partition("@")
        if source_key:
            previous = _settings(states[phase, int(step)])
            previous.pop("continue_from", None)
            names = sorted(
                name for name in previous.keys() | settings.keys() if previous.get(name) != settings.get(name)
            )
            changes = [[name, previous.get(name), settings.get(name)] for name in names]
            changes_by_step[phase, int(step)] = {
                "phase": phase,
                "step": int(step),
                "by": source_key,
                "changes": changes,
            }
    rows = sorted(changes_by_step.values(), key=lambda row: (when(row["phase"]), row["step"]))
    last_steps: dict[str, int] = {}
    for row in rows:
        row["first"] = last_steps.get(row["phase"], 0) + 1
        last_steps[row["phase"]] = row["step"]
    return rows


def _settings(state: Facts) -> dict[str, Any]:
    config = dict(state.get("config", {}))
    return _flat(config.pop("phase", {})) | _flat(config)


def _flat(config: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, as the recipe's section has them."""
    if not isinstance(config, dict):
        return {name: config}
    return {k: v for part, value in config.items() for k, v in _flat(value, f"{name}.{part}".strip(".")).items()}


def _product(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
