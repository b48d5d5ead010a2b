"""A run knows from its creation that it is for Slurm: after a submission that Slurm refused nothing of it runs here, and
its files survive a crash of the machine."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import execution, main
from pipeline.core import json_files
from pipeline.core.errors import AtomError
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.launch import cluster_profile, slurm_client, submission_lock
from tests.fixtures import home_fixtures

REFUSAL = (
    "sbatch: error: invalid partition specified: low\nsbatch: error: Batch job submission failed: Invalid partition"
)
PROGRAMS = {
    "sbatch": 'case "$*" in *--test-only*) exit 0 ;; esac; [ -e "$PLACE/taken" ] || { cat "$PLACE/refusal" >&2; exit 1; }\n'
    'echo x >> "$PLACE/jobs"; echo "Submitted batch job $(wc -l < "$PLACE/jobs")"',
    "squeue": "", "sacct": "", "srun": "", "scontrol": "", "sinfo": "",
    "scancel": '[ ! -e "$PLACE/away" ] || exit 1; echo "$*" >> "$PLACE/cancelled"',
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an empty home folder, and programs in the place of Slurm's, which refuse what is submitted."""
    (tmp_path / "bin").mkdir()
    for name, line in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nPLACE={tmp_path}\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "refusal").write_text(REFUSAL)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")

    def on_this_host(*arguments: Any) -> None:
        raise AssertionError("the stage would run on this host")

    monkeypatch.setattr(execution, "LocalLauncher", on_this_host)
    return tmp_path


def atom(*words: str) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(main.app, list(words))


def submit(until: str = "acquire-sums") -> Result:
    return atom("submit", "atom-smoke", "--cluster", "dev", "--until", until)


def test_retry_after_a_refused_submission_submits_and_runs_nothing_here(place: Path) -> None:
    """The partition was missing, and is there again. The run had no job."""
    refused = submit()
    sentence = "Slurm refused stage acquire-sums: invalid partition specified: low; Batch job submission failed"
    assert refused.exit_code and sentence in str(refused.exception)
    (stage,) = json.loads(atom("status", "--json").output)["stages"]
    assert stage["state"] == "refused" and stage["message"].startswith(sentence), stage
    assert stage["message"].endswith("; then `atom retry` submits the run again")
    (row,) = json.loads(atom("runs", "--json").output)["runs"]
    assert row["state"] == "refused" and row["message"] == stage["message"]
    look = atom("watch", "--once", "--free-gb", "0")
    assert look.exit_code == 1 and f"refused: stage acquire-sums: {sentence}" in look.output
    again = atom("retry")
    assert again.exit_code and sentence in str(again.exception), "a refused retry is no local run either"
    (place / "taken").touch()
    assert "1 stage submitted" in atom("retry").output
    assert json.loads(atom("status", "--json").output)["stages"][0]["job"] == "1"
    launchers = {run.body["launcher"] for run in runs.runs(Store(place / "home"))}
    assert launchers == {"slurm"}


def test_a_submission_that_is_refused_in_the_middle_leaves_no_job(place: Path) -> None:
    program = (place / "bin/sbatch").read_text().replace("[ -e", '[ "$(wc -l < "$PLACE/jobs")" -lt 2 ] || [ -e')
    (place / "jobs").touch()
    (place / "bin/sbatch").write_text(program)
    assert submit("filter").exit_code
    assert (place / "cancelled").read_text() == "1 2\n"
    stages = json.loads(atom("status", "--json").output)["stages"]
    assert {stage["state"] for stage in stages} == {"refused"} and not any("job" in stage for stage in stages)
    store = Store(place / "home")
    assert not list(submission_lock.folder(store).glob("*.json")), "no claim stays"


def test_jobs_that_slurm_does_not_cancel_are_named(place: Path) -> None:
    (place / "bin/sbatch").write_text(
        (place / "bin/sbatch").read_text().replace("[ -e", '[ ! -e "$PLACE/jobs" ] || [ -e')
    )
    (place / "away").touch()
    assert submit("filter").exit_code
    (run,) = runs.runs(Store(place / "home"))
    assert "the jobs before it may still be queued, since scancel failed" in run.body["refused"]
    assert run.body["refused"].endswith("; `atom cancel` cancels them")


def test_a_stopped_submission_is_refused_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.launch import slurm

    def stop(*arguments: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "start", stop)
    submit()
    (run,) = runs.runs(Store(place / "home"))
    assert run.body["refused"] == (
        "the submission was stopped (KeyboardInterrupt); then `atom retry` submits the run again"
    )


def test_a_profile_of_a_cluster_is_not_run_here(place: Path) -> None:
    result = atom("run", "atom-smoke", "--until", "acquire-sums", "--cluster", "dev")
    assert isinstance(result.exception, AtomError), result.exception
    assert str(result.exception) == (
        "cluster profile dev is of a Slurm cluster, and `atom run` would run every stage on this host; use `atom submit`, "
        "or a profile with a section `local`"
    )
    body = "name: both\npower: {watts_per_core: 8}\nlocal: {jobs: 1}\n"
    (place / "both.yaml").write_text(
        body + "slurm: {cpu: {partition: a, minutes: 9}, train: {partition: a, minutes: 9}}\n"
    )
    assert cluster_profile.load(str(place / "both.yaml")).model_fields_set >= {"local", "slurm"}
    with pytest.raises(AssertionError, match="on this host"):
        result = atom("run", "atom-smoke", "--until", "acquire-sums", "--cluster", str(place / "both.yaml"))
        raise result.exception or AssertionError


DAMAGES = {"empty": "", "cut": '{"id": ', "another": '{"id": "two"}'}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_latest_run_is_a_sentence_and_no_older_run_is_taken(damage: str, place: Path) -> None:
    """As after a crash of the disk: `retry` would find an older run, all of whose stages are sealed."""
    store, graph = Store(place / "home"), home_fixtures.graphs(place)[0]
    earlier, latest = (runs.start(graph, store, ["items"], "dev", {"launcher": "slurm"}) for _ in range(2))
    os.utime(earlier.folder / "run.json", (1.0, 1.0))
    (latest.folder / "run.json").write_text(DAMAGES[damage])
    advice = f"{latest.id} is the latest run: name another, such as {earlier.id}, or remove its folder"
    for command in ("status", "retry", "cancel", "watch --once", "sync"):
        result = atom(*command.split())
        assert isinstance(result.exception, json_files.Damaged), (command, result.output)
        assert str(result.exception).endswith(advice) and str(latest.folder) in str(result.exception)
    with pytest.warns(UserWarning, match="that run is left out"):
        assert runs.find(store, earlier.id) == earlier
    json_files._reported.clear()
    os.utime(latest.folder / "run.json", (0.5, 0.5))
    with pytest.warns(UserWarning, match="that run is left out"):
        assert runs.find(store, None) == earlier, "an older one that is damaged is only reported"


def test_the_files_of_a_run_are_on_disk_before_a_job_is_submitted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their content and their names: after a crash of the machine a name may lead to an empty file, or to none."""
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    (place / "taken").touch()
    assert submit().exit_code == 0
    (run,) = runs.runs(Store(place / "home"))
    home = place / "home"
    assert {str(run.folder), str(home / "logs"), str(home / "jobs"), str(run.folder / "jobs.jsonl")} <= set(flushed)
    names = {Path(path).name.rsplit(".", 1)[0] for path in flushed}
    recipes = {f".{path.name}" for path in run.folder.rglob("*.yaml")}
    key = run.body["nodes"][0]["key"]
    assert recipes and {".run.json", f".{key}.json", *recipes} <= names
    code = home / "code" / run.body["code"]
    assert str(home / "code") in flushed and synced, "its files, all at once"
    assert code.is_dir()


def test_slurm_that_is_away_leaves_no_run(place: Path) -> None:
    (place / "bin/squeue").write_text("#!/bin/sh\nexit 1\n")
    result = submit()
    assert isinstance(result.exception, slurm_client.NoAnswer)
    assert runs.runs(Store(place / "home")) == []
