"""The record of a start, and the comparison of steps that are trained again with the log of the attempt before."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.core import environment, provenance
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.launch.attempt import StartRecords, prediction_key
from stages.train import log
from stages.train.log import LogReplay
from tests.fixtures import ROOT, train_fixtures
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.train_fixtures import fresh


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(log.start_path(folder / "work", None).read_text())
    return record


def killed(corpus: Path, folder: Path) -> tuple[int, Path]:
    """A run that is killed at step 11, the step of its last work checkpoint, and its log."""
    assert fresh(corpus, folder, 11, signal.SIGKILL).wait() == -signal.SIGKILL
    newest = max(int(p.parent.name[5:]) for p in folder.glob("work/attempt-*/checkpoints/*/complete.json"))
    (log,) = folder.glob("work/attempt-*/training.jsonl")
    return newest, log


@at_length("training", 15)
def test_steps_after_a_kill_are_compared_with_the_log(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    newest, log = killed(corpus, tmp_path)
    lost = [line for line in map(json.loads, log.read_text().splitlines()) if line["step"] > newest]
    assert lost and lost[-1]["step"] == 11
    run = fresh(corpus, tmp_path)
    assert run.wait() == 0, run.stderr.read()
    output = run.stdout.read()
    assert (
        f"steps {newest + 1} to 11 came out as in the log of the attempt before: {len(lost)} lines, each equal"
        in output
    )
    record = record_of(tmp_path)
    expected = {"first": newest + 1, "last": 11, "lines": len(lost), "deviating": 0, "deviations": []}
    assert record["replayed"] == expected and record["restored_step"] == newest and record["device"]["type"] == "cpu"


def test_a_deviation_is_named_and_training_goes_on(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """As after a change of the machine: here the log of the killed attempt is changed."""
    newest, log = killed(corpus, tmp_path)
    lines = log.read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    (row,) = (line for line in changed if line["step"] == newest + 1 and "loss" in line)
    before, row["loss"] = row["loss"], 1.25
    log.write_text(
        "".join(json.dumps(line, sort_keys=True) + "\n" for line in changed) + '{"step": 1'
    )  # cut by the kill
    run = fresh(corpus, tmp_path)
    assert run.wait() == 0, run.stderr.read()
    assert f"first at step {newest + 1}: loss was 1.25, is {before}; training goes on" in run.stdout.read()
    replayed = record_of(tmp_path)["replayed"]
    assert replayed["lines"] == sum(line["step"] > newest for line in changed) > 1, "the others are equal"
    assert (
        replayed["deviations"] == [{"step": newest + 1, "fields": {"loss": [1.25, before]}}]
        and replayed["deviating"] == 1
    )
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(undisturbed), "the new lines are published"


def test_a_first_start_has_nothing_to_compare(undisturbed: Path) -> None:
    record = record_of(undisturbed.parent)
    assert record["restored_step"] is None and record["replayed"]["first"] is None and record["replayed"]["lines"] == 0


WORK = """
import sys
from pathlib import Path
from pipeline.launch.attempt import Task
from pipeline.launch.worker import work
from tests.fixtures import train_fixtures
inputs = {"tokens": "tokenize-test", "order": "order-test"}
config = train_fixtures.config()
print(work(Task(sys.argv[1], "run", "pretrain", "pretrain", config, inputs, sys.argv[2], 1.0, 1)))
"""


@at_length("training", 11)
def test_the_statement_of_a_phase_has_its_starts(corpus: Path, tmp_path: Path) -> None:
    store, key = Store(tmp_path / "home"), "pretrain-0123456789ab"
    for name in ("tokens", "order"):
        folder = corpus / name
        shutil.copytree(folder, store.artifacts / Artifact.open(folder).key)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", WORK, str(store.home), key]
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert process.stdout.splitlines()[-1:] == ["sealed"], process.stdout + process.stderr
    ((_, body),) = provenance.read(store.ledger, key)
    (record,) = provenance.starts(body)
    assert record["commit"] == environment.git_commit(ROOT)[0] and isinstance(record["dirty"], bool)
    assert record["restored_step"] is None and record["device"] == provenance.environment_of(body)["device"]
    assert record["startedOn"] == body["predicate"]["runDetails"]["metadata"]["startedOn"]
    assert record["prediction"] is None and record["replayed"]["lines"] == 0


def test_many_deviations_are_counted_and_the_first_are_named() -> None:
    calls = []
    replay = LogReplay([{"step": n, "loss": 1.0} for n in range(1, 31)], lambda: calls.append(1))
    for n in range(1, 33):
        replay.compare(
            {"step": n, "loss": 1.0 if n < 6 else 2.0, "tokens": n} if n == 6 else {"step": n, "loss": n / 1}
        )
    record = replay.record()
    assert calls == [1] and record["lines"] == 30 and record["deviating"] == 29
    assert len(record["deviations"]) == log.MOST_DEVIATIONS
    assert re.search(r"in 29 of 30 lines, first at step 2: loss was 1.0, is 2.0", replay.sentence())
    stopped = LogReplay([{"step": 1}, {"step": 2}])
    stopped.compare({"step": 1})
    stopped.stop()
    stopped.compare({"step": 9})
    assert stopped.record()["deviating"] == 0 and not stopped.active


def test_lines_of_a_damaged_log_are_left_out(tmp_path: Path) -> None:
    from stages.train.checkpoint.work_checkpoint import _lines_after

    attempts = []
    for number, rest in enumerate(
        (b'{"step": 2}\n{"step": 3}\n{"st', b'{"step": 2}\n{"st\xffep": 3}\n[4]\n{"step": 5}\n')
    ):
        attempts.append(tmp_path / f"attempt-{number}")
        attempts[-1].mkdir()
        (attempts[-1] / "training.jsonl").write_bytes(b'{"step": 1}\n' + rest)
    log = b'{"step": 1}\n'
    assert _lines_after(log, attempts[:1]) == [{"step": 2}, {"step": 3}]
    assert _lines_after(log, attempts) == [{"step": 2}], "the longest log counts, up to its damage"
    assert _lines_after(b'{"step": 9}\n', attempts) == [] and _lines_after(log, [tmp_path / "none"]) == []


def test_a_killed_start_stays_in_the_records(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "pretrain-0123456789ab"
    folder = store.work(key)
    folder.mkdir(parents=True)
    StartRecords(folder, 1).add(store, key, time.time())
    prediction = tmp_path / "draft"
    prediction.mkdir()
    (prediction / "prediction.json").write_text("{}")
    sealed = store.seal(prediction, prediction_key(key), lambda artifact: None)
    assert sealed.digest == write_manifest(store.artifacts / sealed.key, sealed.key).digest
    records = StartRecords(folder, 2)
    records.add(store, key, time.time())
    log.write_start(log.start_path(folder / "state", 2), 8, {"type": "cpu"}, LogReplay([]))
    first, second = records.read()
    assert (first["start"], first["prediction"]) == (1, None) and "restored_step" not in first
    assert (second["start"], second["prediction"], second["restored_step"]) == (2, sealed.digest, 8)
