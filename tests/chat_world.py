"""Small artifacts around conversations: real items and tasks, a random exported model, a corpus by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import release_world
from train_world import Reporter

from pipeline.core.store import Artifact, write_manifest
from stages.data.table import KEPT, ORDER, content_hash, read_table, write_rows
from stages.evaluation import eval_set as items_stage
from stages.rl.rollout import tasks as tasks_stage

ITEMS = {
    "problems": {"add": 6, "sort": 4},
    "seed": 0,
    "chat": {"validation": {"add": 3}, "courtesies": 12, "courtesies_validation": 2},
}
TASKS = {"sources": [{"source": "problems", "task": "add", "levels": [3], "count": 30}], "seed": 0}
TEXT = "The parser reads one line after the other and gives back what it has found so far, which may be nothing."


def sealed(stage: Any, config: dict[str, Any], inputs: dict[str, Artifact], out: Path) -> Artifact:
    out.mkdir(parents=True)
    stage.run(stage.config.model_validate(config), inputs, out, out, Reporter())
    return write_manifest(out, out.name)


def model(out: Path, seed: int) -> Artifact:
    release_world.save_model(out / "model", seed)
    return write_manifest(out, f"export-{seed}")


def corpus(folder: Path, texts: dict[str, list[str]]) -> dict[str, Artifact]:
    """{"dedup", "order-pretrain"}: kept documents of each source, of which the order reads all but the last one."""
    kept_rows, order = [], []
    for source, source_texts in texts.items():
        rows = [
            {"id": f"{source}/{n}", "text": text, "source": source, "license": "CC0-1.0", "origin": "by hand",
             "content_hash": content_hash(text), "prompt_chars": 0, "split": "train"}
            for n, text in enumerate(source_texts)
        ]  # fmt: skip
        write_rows(folder / "dedup" / "kept" / f"{source}.parquet", KEPT, rows)
        kept_rows += rows[:-1]
    for n, row in enumerate(kept_rows):
        place = {"step": n + 1, "row": 0, "segment": 0, "source": row["source"], "ordinal": n, "id": row["id"]}
        order.append({**place, "offset": 0, "length": 5, "loss_from": 0})
    write_rows(folder / "order" / "order.parquet", ORDER, order)
    artifacts = {"dedup": folder / "dedup", "order-pretrain": folder / "order"}
    return {role: write_manifest(path, role) for role, path in artifacts.items()}


def make(folder: Path, texts: dict[str, list[str]] | None = None) -> dict[str, Artifact]:
    """items, tasks-rlvr, dedup, order-pretrain and two exported models, `model` and `before`."""
    artifacts = {"items": sealed(items_stage.STAGE, ITEMS, {}, folder / "items")}
    artifacts["tasks-rlvr"] = sealed(tasks_stage.STAGE, TASKS, {"items": artifacts["items"]}, folder / "tasks-rlvr")
    artifacts |= corpus(folder, texts or {"prose": [f"{n}. {TEXT}" for n in range(12)]})
    return artifacts | {"model": model(folder / "export-a", 1), "before": model(folder / "export-b", 2)}


def table(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(artifact / name).to_pylist()
    return rows
