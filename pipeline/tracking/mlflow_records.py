"""What MLflow gets of a stage: parameters and inputs of a start, points of curves, scores and usage of a product."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.core import provenance
from pipeline.core.events import Point, curves_of
from pipeline.core.figures import estimates, scores_of
from pipeline.core.provenance import Statement
from pipeline.core.store import Artifact
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch.start_file import StartSettings

BATCH, PARAMS_PER_BATCH = 1000, 100
LONGEST_PARAMETER, LONGEST_TAG = 500, 5000
SPEED = "step_tokens_per_s"
"""The curve from which the utilization of the GPUs is computed."""
ERROR_TAGS = ("atom.error", "atom.error_kind")


def log(client: Any, run: str, params: Mapping[str, str], metrics: list[Any], tags: Mapping[str, str]) -> None:
    """Sends any number of each."""
    from mlflow.entities import Param, RunTag

    every = [Param(name, value) for name, value in params.items()]
    client.log_batch(
        run, metrics=metrics[:BATCH], tags=[RunTag(name, value[:LONGEST_TAG]) for name, value in tags.items()]
    )
    for i in range(BATCH, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[i : i + BATCH])
    for i in range(0, len(every), PARAMS_PER_BATCH):
        client.log_batch(run, params=every[i : i + PARAMS_PER_BATCH])


def start_tags(start: StartSettings) -> dict[str, str]:
    """How a stage was started. A later start overwrites these."""
    texts = {name: start[name] for name in ("job", "nodes", "layout", "ranks", "gpus", "start")}
    return {
        **{f"atom.{name}": str(value) for name, value in texts.items() if value is not None},
        **{f"atom.operation.{name}": value for name, value in flat(start["operation"]).items()},
    }


def run_tags(run: Run) -> dict[str, str]:
    """The tags of a run and of all of its stages."""
    tags = {"atom.run": run.id, "atom.version": run.body["version"]}
    if (commit := run.body.get("commit")) is not None:
        # MLflow's page shows the first of these
        tags |= {"mlflow.source.git.commit": commit, "atom.commit": commit, "atom.dirty": str(run.body.get("dirty"))}
    return tags


def error_tags(node: NodeStatus) -> dict[str, str]:
    """Why a stage has failed."""
    return dict(
        zip(ERROR_TAGS, (node.message or node.reason or "the cause is not known", node.kind or "unknown"), strict=True)
    )


def restarts(start: StartSettings) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric("restarts", float(start["start"] - 1), round(start["time"] * 1000), start["start"])]


def points(rows: Iterable[Point], start: StartSettings | None) -> list[Any]:
    """The points of a log of metrics. `mfu`, the share of the GPUs' peak that the model's FLOPs of a step reach, is
    added where the profile states the peak."""
    from mlflow.entities import Metric

    peak = flops = 0.0
    if start is not None and start["peak_flops"] and start["flops_per_token"]:
        peak, flops = start["peak_flops"] * start["ranks"], start["flops_per_token"]
    metrics = []
    for row in rows:
        curves = curves_of(row)
        if peak and SPEED in curves:
            curves["mfu"] = curves[SPEED] * flops / peak
        metrics += [
            Metric(name, float(value), round(row["time"] * 1000), row["step"]) for name, value in curves.items()
        ]
    return metrics


def scores(artifact: Artifact, prefix: str = "") -> list[Any]:
    """The scores of a product. With a prefix, for the run that has it: the estimates alone."""
    from mlflow.entities import Metric

    numbers = scores_of(artifact)
    chosen = estimates(numbers) if prefix else numbers
    return [Metric(metric_name(f"{prefix}{name}"), value, 0, 0) for name, value in chosen.items()]


def metric_name(name: str) -> str:
    """The name in characters that MLflow accepts: `gsm8k/exact_match_strict` for `gsm8k/exact_match,strict`."""
    parts = (re.sub(r"[^\w\-. ]", "_", part, flags=re.ASCII) for part in name.split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:250]


def usage(body: Statement) -> list[Any]:
    from mlflow.entities import Metric

    numbers = {name: value for name, value in provenance.usage(body).items() if isinstance(value, (int, float))}
    return [Metric(name, float(value), 0, 0) for name, value in sorted(numbers.items())]


def started_inputs(start: StartSettings) -> list[Any]:
    """The artifacts that a started stage reads."""
    return _datasets((role, row["key"], row["digest"]) for role, row in start["inputs"].items())


def sealed_inputs(body: Statement) -> list[Any]:
    """The artifacts that went into a product."""
    keys, digests = provenance.material_keys(body), provenance.materials_of(body)
    return _datasets((role, keys[role], digest) for role, digest in digests.items())


def _datasets(rows: Iterator[tuple[str, str, str]]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                key, digest[:36], "atom", json.dumps({"uri": f"atom:artifact/{key}", "digest": {"sha256": digest}})
            ),
            [InputTag("mlflow.data.context", role)],
        )
        for role, key, digest in rows
    ]


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix.rstrip("."): str(value)[:LONGEST_PARAMETER]}
