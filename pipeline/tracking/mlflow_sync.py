"""MLflow: a parent run per run, a child per stage, filled from the files that stages write.

The files are authoritative. This module only forwards their content and records its position in `mlflow.json`. It may
be called again at any time: after an outage of the tracking server the next call sends the missing rows.

Beside a Slurm job it runs as a process of its own (`Companion`); one job of a run at a time sends for all jobs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, collector, json_files, provenance
from pipeline.core.errors import AtomError, Kind
from pipeline.core.events import POINT, Tail
from pipeline.core.json_files import Damaged
from pipeline.core.lease import Lease, holder
from pipeline.core.store import Artifact, Store
from pipeline.graph import run as runs
from pipeline.graph.run import NodeStatus, Run, status
from pipeline.launch import start_file
from pipeline.launch.start_file import StartSettings
from pipeline.tracking import mlflow_records as records


class _Progress(TypedDict):
    offset: Annotated[int, Field(ge=0, lt=2**63)]
    id: NotRequired[str]
    ended: NotRequired[bool]
    start: NotRequired[int]
    status: NotRequired[str]


class _State(TypedDict):
    nodes: dict[str, _Progress]
    uri: NotRequired[str]
    parent: NotRequired[str]
    experiment: NotRequired[str]
    scored: NotRequired[list[str]]
    outcome: NotRequired[str]


STATE: TypeAdapter[Any] = TypeAdapter(_State)
NO_TRACKING = "none"
"""The MLFLOW_TRACKING_URI with which nothing is sent."""
SQLITE = b"SQLite format 3\0"
SMALL = 1_000_000
MOST_ABANDONED = 20
"""Of the latest runs that are looked at."""
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
}


def tracking_uri(store: Store) -> str:
    """MLFLOW_TRACKING_URI if set, else an SQLite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.home / 'mlflow.db'}"


def is_off() -> bool:
    return os.environ.get("MLFLOW_TRACKING_URI") == NO_TRACKING


def shown_uri(store: Store) -> str:
    """The tracking URI without user, password and query."""
    return redacted(tracking_uri(store))


def redacted(text: str) -> str:
    """The text with user, password and query removed from every URI."""
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

    def sync(self) -> None:
        """Brings MLflow up to date with the present files."""
        client = self._client()
        parent = self._parent(client)
        for node in status(self.run, self.store):
            if (self.run.node_folder(node.name) / "events.jsonl").exists():
                self._child(client, parent, node)
            if node.state == "sealed" and node.name not in self.state.setdefault("scored", []):
                client.log_batch(parent, metrics=records.scores(self.store.manifest(node.key), f"{node.name}/"))
                self.state["scored"].append(node.name)
                self._save()

    def finish(self, outcome: str) -> None:
        """The last sync, and the parent's end: FINISHED, FAILED or KILLED."""
        self.sync()
        self._client().set_terminated(self.state["parent"], outcome)
        self.state["outcome"] = outcome
        self._save()

    def _client(self) -> Any:
        if is_off():
            raise AtomError(f"MLFLOW_TRACKING_URI = {NO_TRACKING}, so nothing is sent; unset it, or name a store")
        _require_sqlite(tracking_uri(self.store), self.store.home / "mlartifacts")
        os.environ.update({k: v for k, v in MLFLOW_ENVIRONMENT.items() if k not in os.environ})
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        uri = tracking_uri(self.store)
        public_uri = shown_uri(self.store)
        if self.state.setdefault("uri", public_uri) != public_uri:  # a different store than last time: send everything
            self.state = {"nodes": {}, "uri": public_uri}
        return MlflowClient(tracking_uri=uri)

    def _save(self) -> None:
        atomic_files.write(self.path, json.dumps(self.state))

    def _parent(self, client: Any) -> str:
        if "parent" not in self.state:
            from pipeline.graph.settings import recipe_settings  # which jobs of Slurm need not import

            name = self.run.body["recipe"]
            existing = client.get_experiment_by_name(name)
            is_local = self.state["uri"].startswith("sqlite:")
            artifact_location = (self.store.home / "mlartifacts" / name).as_uri() if is_local else None
            experiment = (
                existing.experiment_id
                if existing
                else client.create_experiment(name, artifact_location=artifact_location)
            )
            tags = records.run_tags(self.run)
            self.state["parent"] = client.create_run(experiment, run_name=self.run.id, tags=tags).info.run_id
            self.state["experiment"] = experiment
            params = records.flat(recipe_settings(self.run))
            records.log(client, self.state["parent"], params, [], {})
            for file in sorted((self.run.folder / "recipes").glob("*")):
                client.log_artifact(self.state["parent"], str(file), "recipe")
            self._save()
        return str(self.state["parent"])

    def _child(self, client: Any, parent: str, node: NodeStatus) -> None:
        progress = self.state["nodes"].setdefault(node.name, {"offset": 0})
        if progress.get("ended"):
            return
        if "id" not in progress:
            tags = {**records.run_tags(self.run), "mlflow.parentRunId": parent, "atom.key": node.key}
            run = client.create_run(self.state["experiment"], run_name=node.name, tags=tags)
            progress["id"] = run.info.run_id
            self._save()
        start = start_file.read(self.run.node_folder(node.name))
        if start is not None and start["start"] != progress.get("start"):
            params = records.flat(start["config"])
            records.log(client, progress["id"], params, records.restarts(start), records.start_tags(start))
            if inputs := records.started_inputs(start):
                client.log_inputs(progress["id"], datasets=inputs)
            progress["start"] = start["start"]
            self._save()
        self._metrics(client, node.name, progress, start)
        if node.state == "sealed":
            self._sealed(client, progress["id"], self.store.open(node.key), has_start="start" in progress)
        self._end(client, progress, node)

    def _end(self, client: Any, progress: dict[str, Any], node: NodeStatus) -> None:
        """Sets the status of a stage, once for each change: FINISHED, FAILED or KILLED with the error, or RUNNING again
        after one of these."""
        text = child_status(node)
        if text == progress.get("status", "RUNNING"):
            return
        if text in ("FAILED", "KILLED"):
            tags = {name: redacted(text) for name, text in records.error_tags(node).items()}
            records.log(client, progress["id"], {}, [], tags)
        elif progress.get("status", "RUNNING") != "RUNNING":
            for tag in records.ERROR_TAGS:
                client.delete_tag(progress["id"], tag)
        if text == "RUNNING":
            client.update_run(progress["id"], status=text)
        else:
            client.set_terminated(progress["id"], text)
        progress["status"], progress["ended"] = text, text == "FINISHED"
        self._save()

    def _metrics(self, client: Any, name: str, progress: dict[str, Any], start: StartSettings | None) -> None:
        tail = Tail(self.run.node_folder(name) / "metrics.jsonl", POINT, progress["offset"], whole=True)
        has_more = True
        while has_more:
            points = records.points(tail.read(), start)
            has_more = tail.has_more
            for i in range(0, len(points), records.BATCH):
                client.log_batch(progress["id"], metrics=points[i : i + records.BATCH])
            if tail.offset != progress["offset"]:
                progress["offset"] = tail.offset
                self._save()

    def _sealed(self, client: Any, child: str, artifact: Artifact, has_start: bool) -> None:
        """Sends the data of a finished stage: scores, usage, small result files; params and inputs with digests unless
        its start has sent them."""
        sealed_statement = provenance.sealed(self.store.ledger, artifact)
        if sealed_statement is None:
            return
        path, body = sealed_statement
        params = {} if has_start else records.flat(provenance.parameters_of(body)["config"])
        tags = {"atom.digest": artifact.digest, "atom.statement": path.stem}
        records.log(client, child, params, [*records.usage(body), *records.scores(artifact)], tags)
        if not has_start and (inputs := records.sealed_inputs(body)):
            client.log_inputs(child, datasets=inputs)
        client.log_artifact(child, str(path), "statement")
        for row in artifact.rows:
            if row.path.endswith((".json", ".jsonl")) and "/" not in row.path and row.size < SMALL:
                client.log_artifact(child, str(artifact / row.path))
        client.log_artifact(child, str(artifact / "manifest.json"))


def child_status(node: NodeStatus) -> str:
    """MLflow's status of a stage."""
    if node.state == "sealed":
        return "FINISHED"
    if node.state not in ("failed", "lost", "cancelled", "damaged"):
        return "RUNNING"
    return "KILLED" if node.kind == Kind.STOPPED or node.state == "cancelled" else "FAILED"


def outcome_of(nodes: list[NodeStatus]) -> str:
    """MLflow's status of a run whose stages will not go on by themselves. A run that stopped without a failure was
    killed."""
    statuses = {child_status(node) for node in nodes}
    return "FINISHED" if statuses == {"FINISHED"} else "FAILED" if "FAILED" in statuses else "KILLED"


def end_abandoned(run: Run, store: Store) -> None:
    """Ends earlier local runs in MLflow whose `atom run` was killed before it could."""
    earlier = [each for each in runs.runs(store) if each.id != run.id and not each.on_slurm]
    for each in earlier[-MOST_ABANDONED:]:
        driver = holder(each.folder / "driver")
        if (each.folder / "mlflow.json").exists() and not (driver is not None and driver.alive):
            forwarder = Forwarder(each, store)
            if "outcome" not in forwarder.state and forwarder.state.get("uri") == shown_uri(store):
                forwarder.finish(outcome_of(status(each, store)))


@cache
def _require_sqlite(uri: str, artifact_folder: Path) -> None:
    """Raises Damaged if the path for an SQLite file is something else: MLflow would retry for a minute, and wait
    forever for a pipe.

    Only called before SQLite opens the file, because closing it here would release SQLite's locks on it.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    try:
        with json_files.open_file(path) as file:
            if file.read(len(SQLITE)) not in (b"", SQLITE):
                raise Damaged(path, "it is no SQLite database")
    except FileNotFoundError:
        pass
    except Damaged as error:
        raise Damaged(path, error.why, "move it away") from error
    if os.path.lexists(artifact_folder) and not os.path.isdir(artifact_folder):
        raise Damaged(artifact_folder, "it is no folder", "move it away")


class Background:
    """Forwards every few seconds from a thread of its own. An error is reported once and never affects the run."""

    EVERY = 5.0
    LAST_CHANCE = 60.0

    def __init__(self, run: Run, store: Store) -> None:
        self.run, self.store = run, store
        self.problem: str | None = None
        self._outcome: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        are_earlier_ended = False
        while True:
            is_last = self._stop.wait(self.EVERY)
            self.problem = _send(self.run, self.store, (self._outcome or "FAILED") if is_last else "")
            if is_last:
                return
            if self.problem is None and not are_earlier_ended and not is_off():
                self.problem, are_earlier_ended = _attempted(lambda: end_abandoned(self.run, self.store)), True

    def close(self, outcome: str) -> str | None:
        """Sends the rest and ends the parent run. Returns a sentence if data is missing in MLflow."""
        self._outcome = outcome
        self._stop.set()
        self._thread.join(self.LAST_CHANCE)
        if self._thread.is_alive():
            self.problem = f"no answer within {self.LAST_CHANCE:.0f} seconds"
        return self.problem


class Companion:
    """A process beside a Slurm job that sends its run to the tracking server in MLFLOW_TRACKING_URI. A file of SQLite
    is not used, because many hosts cannot write it on a shared file system. Its errors never affect the job."""

    LAST_CHANCE = 60.0
    QUICK = 2.0

    def __init__(self, home: Path, run: str) -> None:
        self.process: subprocess.Popen[str] | None = None
        if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http:", "https:")):
            return
        # Slurm signals every process of a job; this one ends when the job closes its input or dies
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM, signal.SIGINT})
        try:
            command = [sys.executable, "-m", "pipeline.tracking.mlflow_sync", str(home), run]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)

    def close(self, outcome: str, quick: bool = False) -> None:
        """Lets it send the rest. outcome: of the whole run, FINISHED or FAILED; empty: the run continues. quick: with a
        short timeout, because idle nodes stay allocated meanwhile."""
        if self.process is None:
            return
        seconds = self.QUICK if quick else self.LAST_CHANCE
        try:
            self.process.communicate(outcome, timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            message = f"no answer within {seconds:.0f} seconds"
            print(f"MLflow did not accept everything ({message}); `atom sync` sends it later", file=sys.stderr)

    def kill(self) -> None:
        """Ends it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def run_companion(home: Path, run: str) -> None:
    """The main function of that process: the companion that holds the turn sends the new rows of all jobs of the run
    every few seconds. When its own job ends, it sends once more, or waits until the holder of the turn has done so."""
    store = Store(home)
    run_record = runs.find(store, run)
    folder = run_record.folder / "mlflow"
    own_id = uuid.uuid4().hex
    end_file, begun_file, sent_file = folder / f"end-{own_id}", folder / f"begun-{own_id}", folder / "sent"
    job_is_over, outcome, lease, problem = False, "", None, None
    while True:
        if not job_is_over and select.select([sys.stdin], [], [], Background.EVERY)[0]:
            job_is_over, outcome = True, sys.stdin.read()
        elif job_is_over:
            time.sleep(0.5)
        if lease is not None and lease.lost:
            lease = None
        lease = lease or Lease.take(folder)
        if job_is_over and not end_file.exists():
            end_file.touch()
            if outcome:
                (folder / "outcome").write_text(outcome)
        if lease is not None:
            begun_file.touch()
            problem = _send(run_record, store, _read_if_exists(folder / "outcome"))
            os.replace(begun_file, sent_file)  # its time is the start of the last transfer
        if job_is_over and (lease is not None or _is_newer(sent_file, end_file)):
            break
    end_file.unlink()
    if lease is not None:
        lease.release()
    if problem:
        print(f"MLflow did not accept everything ({problem}); `atom sync {run}` sends it later", file=sys.stderr)


def _send(run: Run, store: Store, outcome: str) -> str | None:
    """Sends the new rows; returns the error in one line, without passwords."""
    if is_off():
        return None

    def send() -> None:
        forwarder = Forwarder(run, store)
        if outcome:
            forwarder.finish(outcome)
        else:
            forwarder.sync()

    return _attempted(send)


def _attempted(send: Callable[[], None]) -> str | None:
    """Returns the error of a transfer in one line, without passwords."""
    try:
        send()
    except AtomError as error:
        return redacted(str(error))
    except Exception as error:  # the stage continues after any error of a tracking server; the caller reports it
        return redacted(f"{type(error).__name__}: {error}".splitlines()[0][:300])
    return None


def _read_if_exists(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _is_newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns > other.stat().st_mtime_ns


if __name__ == "__main__":
    collector.collect_rarely()
    run_companion(Path(sys.argv[1]), sys.argv[2])
