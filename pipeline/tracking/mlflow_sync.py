"""MLflow: a parent run per run, a child per stage, filled from the files that stages write.

The files are authoritative. This module only forwards their content and records its position in `mlflow.json`. It may
be called again at any time: after an outage of the tracking server the next call sends the missing rows.

    python -m pipeline.tracking.mlflow_sync HOME RUN [whole]

runs beside `atom run` and beside each Slurm job (`Companion` in pipeline/core/process.py). One process of a run at
a time sends, for all jobs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files, process, provenance
from pipeline.core.errors import ORDERLY, AtomError
from pipeline.core.events import POINT, Point, Tail, curves_of
from pipeline.core.json_files import Damaged
from pipeline.core.lease import Lease
from pipeline.core.process import NO_TRACKING
from pipeline.core.store import Artifact, Store
from pipeline.graph import flat_fields
from pipeline.graph import run as runs
from pipeline.graph.flat_fields import estimates, recipe_settings, scores_of
from pipeline.graph.run import NodeStatus, Run, status

# The most metrics and the most params that MLflow takes in one request.
BATCH, PARAMS_PER_BATCH = 1000, 100


def send_batch(
    client: Any,
    run: str,
    params: Mapping[str, str] | None = None,
    metrics: Sequence[Any] = (),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Sends the tags, and any number of params and metrics in as many requests as MLflow wants.

    MLflow cuts long values itself.
    """
    from mlflow.entities import Param, RunTag

    param_entities = [Param(name, value) for name, value in (params or {}).items()]
    client.log_batch(run, tags=[RunTag(name, value) for name, value in (tags or {}).items()])
    for i in range(0, len(metrics), BATCH):
        client.log_batch(run, metrics=metrics[i : i + BATCH])
    for i in range(0, len(param_entities), PARAMS_PER_BATCH):
        client.log_batch(run, params=param_entities[i : i + PARAMS_PER_BATCH])


def run_tags(run: Run) -> dict[str, str]:
    """Returns the tags of a run and of all of its stages."""
    tags = {"atom.run": run.id, "atom.version": run.body["version"]}
    if (commit := run.body.get("commit")) is not None:
        # MLflow's page shows the first of these.
        tags |= {"mlflow.source.git.commit": commit, "atom.commit": commit, "atom.dirty": str(run.body.get("dirty"))}
    return tags


def curve_metrics(rows: Iterable[Point]) -> list[Any]:
    """Returns the points of a log of metrics."""
    from mlflow.entities import Metric

    return [
        Metric(name, float(value), round(row["time"] * 1000), row["step"])
        for row in rows
        for name, value in curves_of(row).items()
    ]


def score_metrics(artifact: Artifact, prefix: str = "") -> list[Any]:
    """Returns the scores of a product for the run of its stage; with a prefix, the estimates for the parent run."""
    from mlflow.entities import Metric

    numbers = scores_of(artifact)
    chosen = estimates(numbers) if prefix else numbers
    return [Metric(metric_name(f"{prefix}{name}"), value, 0, 0) for name, value in chosen.items()]


def metric_name(name: str) -> str:
    """Returns the name in characters that MLflow accepts: `gsm8k/exact_match_strict` for `gsm8k/exact_match,strict`."""
    parts = (re.sub(r"[^\w\-. ]", "_", part, flags=re.ASCII) for part in name.split("/"))
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:250]


def as_params(values: Any) -> dict[str, str]:
    """Returns settings as texts by their dotted names."""
    return {name: str(value) for name, (value, _) in flat_fields.flat(values) if name}


class _Progress(TypedDict):
    """The part of a stage that MLflow has received."""

    offset: Annotated[int, Field(ge=0, lt=2**63)]
    """bytes of `metrics.jsonl` that were sent"""
    id: NotRequired[str]
    """id of its child run"""
    status: NotRequired[str]
    """status of the child run; absent while it is `RUNNING`"""
    ended: NotRequired[bool]
    """true once everything of the sealed stage was sent"""


class _State(TypedDict):
    """The content of mlflow.json."""

    nodes: dict[str, _Progress]
    """what was sent, by name of the node"""
    uri: NotRequired[str]
    """the tracking URI without user, password and query"""
    parent: NotRequired[str]
    """id of the parent run"""
    experiment: NotRequired[str]
    """id of the experiment"""
    described: NotRequired[bool]
    """true once the settings of the recipe were sent"""


STATE: TypeAdapter[Any] = TypeAdapter(_State)
# Seconds between two transfers.
EVERY = 5.0
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # One retry and a short timeout, because the next transfer begins a few seconds later anyway.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # below, MLflow prints each value that it cuts
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(store: Store) -> str:
    """Returns MLFLOW_TRACKING_URI if set, else that of an SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.home / 'mlflow.db'}"


def shown_uri(store: Store) -> str:
    """Returns the tracking URI without user, password and query."""
    return redacted(tracking_uri(store))


def redacted(text: str) -> str:
    """Returns the text with user, password and query removed from every URI."""
    return re.sub(r"(\w+://)\S*@", r"\1", re.sub(r"(\w+://[^\s?]+)\?[^\s)]*", r"\1", text))


class Forwarder:
    """Sends a run's files to MLflow. `sync` passes on the client's exceptions; callers handle them."""

    def __init__(self, run: Run, store: Store) -> None:
        self.run, self.store = run, store
        self.path = run.folder / "mlflow.json"
        try:
            self.state: dict[str, Any] = json_files.read(self.path, STATE)
        except FileNotFoundError:
            self.state = {"nodes": {}}
        except Damaged as error:
            raise Damaged(self.path, error.why, "remove it, and `atom sync` sends everything again") from error

    def sync(self, over: bool = False) -> None:
        """Brings MLflow up to date with the present files.

        Args:
            over: True if the run has ended: then its parent run ends, with the status of its stages.
        """
        client = self._client()
        parent = self._parent(client)
        nodes = status(self.run, self.store)
        for node in nodes:
            progress = self.state["nodes"].setdefault(node.name, {"offset": 0})
            if progress.get("ended"):
                continue
            if (self.run.node_folder(node.name) / "events.jsonl").exists():
                self._child(client, parent, node, progress)
            if node.state == "sealed":
                client.log_batch(parent, metrics=score_metrics(self.store.manifest(node.key), f"{node.name}/"))
                progress["ended"] = True
                self._save()
        if over:
            client.set_terminated(parent, outcome_of(nodes))

    def _client(self) -> Any:
        uri = tracking_uri(self.store)
        if uri == NO_TRACKING:
            raise AtomError(f"MLFLOW_TRACKING_URI = {NO_TRACKING}, so nothing is sent; unset it, or name a store")
        # Before the import, because MLflow reads some of them when it is imported.
        os.environ.update({k: v for k, v in MLFLOW_ENVIRONMENT.items() if k not in os.environ})
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        # To another store than last time, everything is sent.
        if self.state.setdefault("uri", redacted(uri)) != redacted(uri):
            self.state = {"nodes": {}, "uri": redacted(uri)}
        return MlflowClient(tracking_uri=uri)

    def _save(self) -> None:
        atomic_files.write(self.path, json.dumps(self.state))

    def _parent(self, client: Any) -> str:
        if "parent" not in self.state:
            name = self.run.body["recipe"]
            experiment = client.get_experiment_by_name(name)
            self.state["experiment"] = experiment.experiment_id if experiment else client.create_experiment(name)
            run = client.create_run(self.state["experiment"], run_name=self.run.id, tags=run_tags(self.run))
            self.state["parent"] = run.info.run_id
            # At once: after an error further down, the next transfer must not create a second parent.
            self._save()
        parent = str(self.state["parent"])
        if not self.state.get("described"):
            send_batch(client, parent, params=as_params(recipe_settings(self.run)))
            self.state["described"] = True
            self._save()
        return parent

    def _child(self, client: Any, parent: str, node: NodeStatus, progress: dict[str, Any]) -> None:
        if "id" not in progress:
            tags = {**run_tags(self.run), "mlflow.parentRunId": parent, "atom.key": node.key}
            run = client.create_run(self.state["experiment"], run_name=node.name, tags=tags)
            progress["id"] = run.info.run_id
            self._save()
        self._metrics(client, node.name, progress)
        if node.state == "sealed":
            self._sealed(client, progress["id"], self.store.open(node.key))
        self._set_status(client, progress, node)

    def _set_status(self, client: Any, progress: dict[str, Any], node: NodeStatus) -> None:
        """Sets the status of a stage once for each change, with the sentence of a failure."""
        status = child_status(node)
        if status == progress.get("status", "RUNNING"):
            return
        failure = node.message or node.reason or "the cause is not known"
        client.set_tag(progress["id"], "atom.error", redacted(failure) if status in ("FAILED", "KILLED") else "")
        if status == "RUNNING":
            client.update_run(progress["id"], status=status)
        else:
            client.set_terminated(progress["id"], status)
        progress["status"] = status
        self._save()

    def _metrics(self, client: Any, name: str, progress: dict[str, Any]) -> None:
        tail = Tail(self.run.node_folder(name) / "metrics.jsonl", POINT, progress["offset"], whole=True)
        has_more = True
        while has_more:
            send_batch(client, progress["id"], metrics=curve_metrics(tail.read()))
            has_more = tail.has_more
            # Recorded after the rows are sent: after a kill some are sent again, and none is lost.
            if tail.offset != progress["offset"]:
                progress["offset"] = tail.offset
                self._save()

    def _sealed(self, client: Any, child: str, artifact: Artifact) -> None:
        """Sends the settings, the scores and the usage of a finished stage."""
        from mlflow.entities import Metric

        sealed_statement = provenance.sealed(self.store.ledger, artifact)
        if sealed_statement is None:
            return
        path, body = sealed_statement
        usage = provenance.usage(body).items()
        metrics = [Metric(name, float(value), 0, 0) for name, value in usage if isinstance(value, (int, float))]
        tags = {"atom.digest": artifact.digest, "atom.statement": path.stem}
        params = as_params(provenance.parameters_of(body)["config"])
        send_batch(client, child, params, [*metrics, *score_metrics(artifact)], tags)


def child_status(node: NodeStatus) -> str:
    """Returns MLflow's status of a stage."""
    if node.state == "sealed":
        return "FINISHED"
    if node.state not in ("failed", "lost", "cancelled", "damaged"):
        return "RUNNING"
    return "KILLED" if node.kind in ORDERLY or node.state == "cancelled" else "FAILED"


def outcome_of(nodes: list[NodeStatus]) -> str:
    """Returns MLflow's status of a run whose stages will not go on by themselves.

    A run that stopped without a failure was killed.
    """
    statuses = {child_status(node) for node in nodes}
    if statuses == {"FINISHED"}:
        return "FINISHED"
    return "FAILED" if "FAILED" in statuses else "KILLED"


def send(run: Run, store: Store, over: bool = False) -> str | None:
    """Sends the new rows of a run.

    Returns:
        The error in one line, without passwords; None without one.
    """
    try:
        Forwarder(run, store).sync(over)
    except AtomError as error:
        return redacted(str(error))
    except Exception as error:  # whatever a tracking server does, the run goes on
        return redacted(f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return None


def follow(home: Path, run_id: str, whole: bool) -> None:
    """Sends the new rows of a run every few seconds, and the rest after the end of this process's input.

    The process that holds the lease sends for all jobs of the run. At the end of its job, another one leaves the rest
    to it, unless the run is over.

    Args:
        home: The home.
        run_id: The run.
        whole: True if the run ends with the input; else it does if the input is `over`.
    """
    store = Store(home)
    run = runs.find(store, run_id)
    folder = run.folder / "mlflow"
    # Exists once the run is over, for every process that may send.
    over_file = folder / "over"
    lease = Lease.take(folder)
    # The input ends with the process that started this one, also if that process is killed.
    while not select.select([sys.stdin], [], [], EVERY)[0]:
        if lease is None or lease.lost:
            lease = Lease.take(folder)
        if lease is not None:
            send(run, store, over_file.exists())

    over = whole or sys.stdin.read() == "over"
    if over:
        over_file.touch()
    # At the end of a run its rest is sent here, once no other process sends.
    while lease is None and over:
        time.sleep(0.5)
        lease = Lease.take(folder)
    if lease is not None:
        problem = send(run, store, over_file.exists())
        lease.release()
        if problem:
            print(
                f"MLflow at {shown_uri(store)} did not accept everything ({problem}); nothing is lost: "
                f"`atom sync {run.id}` sends it later",
                flush=True,
            )


if __name__ == "__main__":
    process.collect_rarely()
    try:
        follow(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "whole")
    except (AtomError, OSError) as error:  # such as a full disk, of which the run itself has a sentence
        print(f"nothing more is sent to MLflow ({error}); `atom sync {sys.argv[2]}` sends it later", flush=True)
