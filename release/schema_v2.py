"""Format 2: the names in its files, and the corresponding present names.

Only this module has the names that later formats dropped. It only reads. It is never deleted: releases of format 2 stay
published. The left column has the names in the files, which never change; the right column has the present names. A
renaming in the code changes the right column, adds a module for the new format to `schema.READERS`, and raises
`layout.FORMAT`. A name that is not listed here is the same in both.

Format 1 had the same names and fewer files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT = 2
CARDS = 2
"""The card schema of a repository without a stated one."""

PHASES = {
    "pretrain": "pretrain",
    "midtrain": "midtrain",
    "longcontext": "longcontext",
    "sft": "sft",
    "rlvr": "rlvr",
    "rlhf": "dpo",
    "reward": "reward",
    "online": "online-rlhf",
}
"""Training phases. Their names are in folders, in `state.json` and in the `phase` of an order."""
MODELS = {
    "init": "init",
    "base": "base",
    "mid": "mid",
    "long": "long",
    "sft": "sft",
    "rlvr": "rlvr",
    "rlhf": "dpo",
    "online": "online-rlhf",
}
"""Exported models. Their names are in folders and in the names of nodes."""
NODES = {
    "items": "items",
    "filter": "filter",
    "curate": "dedup",
    "tokenizer": "tokenizer",
    "tokenize": "tokenize",
    "judge": "export-reward",
    "fresh": "fresh",
    "contamination": "contamination",
}
"""Nodes of the graph other than phases."""
OF_PHASE = ("order", "tasks")
OF_MODEL = ("fresh-solve", "export", "evaluate", "solve", "prefer")
"""Nodes with the name `<kind>-<phase>` or `<kind>-<model>`."""

FIELDS: dict[str, dict[str, str]] = {
    "release.json": {
        name: name
        for name in (
            "format", "name", "version", "title", "description", "namespace", "contact", "languages",
            "weights", "data_compilation", "code", "commit", "dirty", "stale", "nodes", "key", "digest",
        )
    }
    | {"licence": "license"},
    "scores.json": {
        name: name
        for name in (
            "bits_per_byte", "bits_per_byte_all", "accuracy", "accuracy_all", "passkey", "passkey_by_depth",
            "loss_by_position", "problems", "problems_all", "judged", "greedy", "samples", "at", "pass", "maj",
            "tokens", "truncated", "reasoning", "reward", "model", "before", "win_rate", "without_ties", "wins", "ties",
            "losses", "sides", "parts", "examples", "value", "se", "n", "low", "high", "documents", "bytes",
        )
    },
    "training.jsonl": {
        name: name
        for name in (
            "step", "tokens", "loss", "lr", "grad_norm", "skipped", "excluded", "spike", "experts",
            "expert_max_violation", "router_entropy", "reward",
        )
    }
    | {"clipped": "clip_fraction", "weight": "importance_ratio", "answer_tokens": "completion_length"},
    "state.json": {name: name for name in ("step", "phase", "tokens", "config", "optimizer_step", "data_position")}
    | {"heldout": "heldout_fraction"},
}  # fmt: skip
"""Fields of JSON files, at any depth. `training.jsonl` also applies to the log of each phase under `training/` of a
model repository, and `scores.json` to the scores under its `evaluation/`."""
COLUMNS: dict[str, dict[str, str]] = {
    "items.parquet": {"score": "score", "code_digest": "code_digest"},
    "answers.parquet": {"verifier": "verifier", "verifier_version": "verifier_version"},
    "pairs.parquet": {"verifier": "verifier", "verifier_version": "verifier_version"},
    "rollouts.parquet": {"verifier": "verifier", "verifier_version": "verifier_version"},
    "dispositions.parquet": {"rule": "rule", "kept_hash": "kept_hash"},
    "order.parquet": {"segment": "segment", "ordinal": "ordinal"},
}
"""Columns of tables, by the name of the file."""

COMPARED = ("model", "before")

SCORERS = dict.fromkeys(
    (
        "6b8f17b4256c23e33e74eb3e2b636bb49275cfac484590f5e763ba157147e1c6",
        "6c5fbebd6ed544968764e455aafc94bff03be8ced980d14fdcae531daa993330",
        "bd9bd72f37091cdba7c042858b7fb45544d486ee5500e0e3313048dbe64724db",
        "cb0b2477e0cb624418d47cf3026121a4a0915a0e6901c960e7d2154850756739",
    ),
    ("problems", "1"),
)
"""{digest: scorer}. `items.parquet` named its scorer only by the digest of `stages/data/problems.py`, which contained
it. All these files have the same functions `answer_of` and `score`."""


def phase(name: str) -> str:
    """The present name of a phase: `longcontext-2`."""
    return _numbered(name, PHASES)


def model(name: str) -> str:
    """The present name of an exported model: `long-2`."""
    return _numbered(name, MODELS)


def node(name: str) -> str:
    """The present name of a node such as `export-rlhf`, `rlhf@2`, `acquire-docstrings`."""
    if "@" in name:
        trained, _, step = name.partition("@")
        return f"{phase(trained)}@{step}"
    for kinds, present_name in ((OF_PHASE, phase), (OF_MODEL, model)):
        for kind in kinds:
            if name.startswith(f"{kind}-"):
                return f"{kind}-{present_name(name.removeprefix(f'{kind}-'))}"
    return NODES.get(name) or phase(name)


def _numbered(name: str, present_names: Mapping[str, str]) -> str:
    if name in present_names:
        return present_names[name]
    kind, dash, number = name.rpartition("-")
    return f"{present_names.get(kind, kind)}{dash}{number}" if number.isdigit() else name


def release(body: Mapping[str, Any]) -> dict[str, Any]:
    """The content of evidence/release.json, with present names."""
    renamed: dict[str, Any] = fields("release.json", dict(body))
    if isinstance(nodes := renamed.get("nodes"), dict):
        renamed["nodes"] = {node(name): value for name, value in nodes.items()}
    if isinstance(stale := renamed.get("stale"), list):
        renamed["stale"] = [node(name) for name in stale]
    return renamed


def fields(file: str, value: Any) -> Any:
    """The content of a JSON file, with the present names of its fields. file: its name, as in FIELDS."""
    names = FIELDS.get(file, {})
    if any(name != today for name, today in names.items()):
        value = _renamed(value, names)
    if file == "scores.json" and isinstance(value, dict):  # the scores of a comparison name two models
        value = value | {name: model(value[name]) for name in COMPARED if isinstance(value.get(name), str)}
    return value


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(name, name): _renamed(part, names) for name, part in value.items()}
    return [_renamed(part, names) for part in value] if isinstance(value, list) else value


def column(table: str, today: str) -> str:
    """The name in a table of the column with this present name. table: the name of its file."""
    return next((name for name, now in COLUMNS.get(table, {}).items() if now == today), today)


def scorer(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The scorer of a row of `items.parquet` that does not name one, by the digest of its code; None if unknown."""
    return SCORERS.get(str(row.get("code_digest")))


REPLAY = """
import json, os, sys
from pathlib import Path

release, phase, first, last, folder = sys.argv[1:]
import release as carried
code = os.path.realpath(os.environ["PYTHONPATH"])
if not os.path.realpath(carried.__file__).startswith(code + os.sep):
    sys.exit("the code that ran is not the one that the release carries")

from release import replay
from release.replay_source import Source

def show(text):
    print("ATOM " + " ".join(text.split()), flush=True)

folder = Path(folder)
plan = replay.Plan(Source(Path(release)), phase, int(first), int(last))
show("tokenizing the kept documents")
tokens = plan.tokens(folder)
plan.lay_down(folder / "work")
show(f"training steps {int(first) + 1} to {last}")
made = replay._train(plan, {"tokens": tokens, "order": plan.order()}, folder, show)
state, diverges = plan.otherwise(made)
environment, fingerprint = plan.changes()
materials = plan.files(plan.start) | plan.source.digests(*plan.order_files)
materials |= {f"{tokens.key}/{row.path}": row.sha256 for row in tokens.rows}
result = {
    "made": str(Path(made).relative_to(folder)), "state": list(state), "diverges": diverges, "ranks": plan.ranks,
    "environment": list(environment), "fingerprint": fingerprint, "materials": materials,
    "subject": plan.files(plan.end),
}
(folder / "result.json").write_text(json.dumps(result))
"""
"""Replays steps by the code that a release of format 2 carries: `release/replay.py` had these functions then."""
