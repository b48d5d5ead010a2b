"""The entities that MLflow gets: parameters and inputs of a start, points of curves, scores and usage of a product."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.core import provenance
from pipeline.core.events import Point, curves_of
from pipeline.core.figures import estimates, scores_of
from pipeline.core.provenance import Statement
from pipeline.core.store import Artifact
from pipeline.graph import settings
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch.start_records import StartSettings

BATCH, PARAMS_PER_BATCH = 1000, 100
LONGEST_DIGEST = 36
SPEED = "step_tokens_per_s"
"""The curve from which the utilization of the GPUs is computed."""
ERROR_TAGS = ("atom.error", "atom.error_kind")


def log(
    client: Any,
    run: str,
    params: Mapping[str, str] | None = None,
    metrics: Sequence[Any] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Sends any number of each, in as many requests as MLflow wants. It cuts long values itself."""
    from mlflow.entities import Param, RunTag

    every = [Param(name, value) for name, value in (params or {}).items()]
    client.log_batch(run, tags=[RunTag(name, value) for name, value in (tags or {}).items()])
    for i in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[i : i + BATCH])
    for i in range(0, len(every), PARAMS_PER_BATCH):
        client.log_batch(run, params=every[i : i + PARAMS_PER_BATCH])


def start_tags(start: StartSettings) -> dict[str, str]:
    """The tags about a start. A later start overwrites them."""
    texts = {name: start[name] for name in ("job", "nodes", "layout", "ranks", "gpus", "start")}
    return {
        **{f"atom.{name}": str(value) for name, value in texts.items() if value is not None},
        **{f"atom.operation.{name}": value for name, value in params(start["operation"]).items()},
    }


def run_tags(run: Run) -> dict[str, str]:
    """The tags of a run and of all of its stages."""
    tags = {"atom.run": run.id, "atom.version": run.body["version"]}
    if (commit := run.body.get("commit")) is not None:
        # MLflow's page shows the first of these
        tags |= {"mlflow.source.git.commit": commit, "atom.commit": commit, "atom.dirty": str(run.body.get("dirty"))}
    return tags


def error_tags(node: NodeStatus) -> dict[str, str]:
    """The tags about the failure of a stage."""
    sentence, kind = ERROR_TAGS
    return {sentence: node.message or node.reason or "the cause is not known", kind: node.kind or "unknown"}


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


def inputs(start: StartSettings) -> list[Any]:
    """The artifacts that a started stage reads, as datasets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    datasets = []
    for role, row in start["inputs"].items():
        source = json.dumps({"uri": f"atom:artifact/{row['key']}", "digest": {"sha256": row["digest"]}})
        dataset = Dataset(row["key"], row["digest"][:LONGEST_DIGEST], "atom", source)
        datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
    return datasets


def params(values: Any) -> dict[str, str]:
    """Settings as texts by their dotted names."""
    return {name: str(value) for name, (value, _) in settings.flat(values) if name}
