"""Stage `benchmark-changes`: what each model of a release gained or lost on the task sets, and whether that is noise.

    atom run my-recipe --only benchmark-changes

Two models answer the same items, so their difference is that of each item, and its standard error is over these: it is
smaller than that of two unrelated means (Miller 2024, arXiv 2411.00640, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Key
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.confidence import clustered, half_width
from stages.evaluation.harness import CUT_OFF, metric_key
from stages.evaluation.scores import BenchmarkChange, BenchmarkChanges
from stages.formats.table import read_table, write_json

VERSION = 1
ROLE = "harness-"
BETTER, WORSE, UNCLEAR = "better", "worse", "no clear change"
# Share of differing items on which chance alone would lead to a verdict.
SIGNIFICANCE = 0.05
Items = dict[tuple[str, int], float]


class ChangesConfig(Config):
    """The models that were measured."""

    models: Annotated[tuple[Key, ...], Field(min_length=2, max_length=100)]
    """names of the models, in the order of training"""


def run(config: ChangesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Compares each model of inputs["harness-<model>"] with the one before it, and the last one with the first.

    Seals `changes.json`, which follows from their tables of items.
    """
    folders = {name: inputs[f"{ROLE}{name}"] for name in config.models}
    tables = {name: read_table(folder / "items.parquet").to_pylist() for name, folder in folders.items()}
    result = changes(tables, {name: folder.json("tasks.json") for name, folder in folders.items()})
    write_json(out / "changes.json", result)
    for row in result["changes"]:
        name = f"{row['set']} {row['task'] or 'in all'}, {row['metric']}"
        report.note(f"{row['before']} to {row['after']}: {name}: {row['change']['value']:+.4f}, {row['verdict']}")


def changes(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], stated: Mapping[str, Mapping[str, Any]]
) -> BenchmarkChanges:
    """Returns the content of `changes.json`.

    Args:
        tables: The rows of `items.parquet` of stage `harness`, by model, in the order of training.
        stated: The contents of `tasks.json`, by model.
    """
    names = list(tables)
    pairs = list(pairwise(names))
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    values = {name: _values(rows, stated[name]) for name, rows in tables.items()}
    return {
        "models": names,
        "changes": [
            _change(before, after, key, values[before][key], values[after][key], stated[after][key[0]])
            for before, after in pairs
            for key in values[after]
            if key in values[before]
        ],
    }


def _values(
    rows: Sequence[Mapping[str, Any]], task_sets: Mapping[str, Any]
) -> dict[tuple[str, str, str], dict[tuple[str, int], float]]:
    """Returns the values of the metrics that cards show by item; by set, task and metric, with "" for all tasks."""
    values: dict[tuple[str, str, str], Items] = {}
    for row in rows:
        stated = task_sets[row["set"]]
        if row["metric"] != CUT_OFF and is_shown(f"{row['metric']},{row['filter']}", stated):
            key = row["set"], "" if stated["pooled"] else row["task"], metric_key(row)
            values.setdefault(key, {})[row["task"], row["number"]] = row["value"]
    return values


def is_shown(metric: str, stated: Mapping[str, Any]) -> bool:
    """Returns True if cards show a metric, `acc,none` for instance, of a set; `stated` is its row of `tasks.json`."""
    return metric in (stated.get("metrics") or [metric])


def _change(
    before: str, after: str, key: tuple[str, str, str], old: Items, new: Items, stated: Mapping[str, Any]
) -> BenchmarkChange:
    task_set, task, metric = key
    differences = [new[item] - old[item] for item in sorted(new) if item in old]
    change = clustered(differences)
    half, sign = half_width(change), -1 if metric.split(",")[0] in stated["lower"] else 1
    verdict = UNCLEAR
    if abs(change["value"]) > half and not _is_chance(differences):
        verdict = BETTER if sign * change["value"] > 0 else WORSE
    return {
        "set": task_set,
        "task": task,
        "metric": metric,
        "before": before,
        "after": after,
        "change": change,
        "low": change["value"] - half,
        "high": change["value"] + half,
        "verdict": verdict,
    }


def _is_chance(differences: Sequence[float]) -> bool:
    """Returns True if right and wrong answers changed places about as often (the exact test of McNemar).

    Of few changed answers, the interval says too much: four more right ones, and none less, are chance one time in
    eight. Values between right and wrong have their interval alone.
    """
    from scipy.stats import binomtest

    if not set(differences) <= {-1.0, 0.0, 1.0}:
        return False
    changed = [difference for difference in differences if difference]
    return not changed or bool(binomtest(changed.count(1.0), len(changed)).pvalue > SIGNIFICANCE)


def pooled(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each metric of a set with its mean over the items of all tasks, from the tasks' figures.

    The tasks are fixed, so the standard error is within them.
    """
    metrics = dict.fromkeys(metric for figures in tasks.values() for metric in figures)
    for metric in metrics:
        figures = [each[metric] for each in tasks.values() if metric in each]
        n = sum(each["n"] for each in figures)
        value = sum(each["n"] * each["value"] for each in figures) / n
        error = sum((each["n"] * each["se"]) ** 2 for each in figures) ** 0.5 / n
        yield metric, {"value": value, "se": error, "n": n}


STAGE = Stage(
    "benchmark-changes",
    VERSION,
    ChangesConfig,
    run,
    estimate=lambda config: Estimate(
        cpu_seconds=5.0 * len(config.models), memory_bytes=1_000_000_000, disk_bytes=10**6
    ),
)
