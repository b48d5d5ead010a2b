"""What the script of a Slurm job does when its launch ends: start again, in the allocation or in the queue, or end."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import json_files
from pipeline.core.errors import Failure, Kind
from pipeline.core.store import Store
from pipeline.launch import bad_nodes, job
from pipeline.launch.cluster_profile import Slurm
from pipeline.launch.diagnoses import FAILURES
from pipeline.launch.rendezvous import Decision, Verdict
from tests.fixtures.batch_fixtures import SLURM, STUBS, end_of, script


def test_preemptions_of_an_array_task_are_no_failed_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a preemptible partition a task is started again and again by Slurm itself, and may then still fail."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path, tasks=3)
    launches = batch.launches_folder
    for start in range(9):  # Slurm preempted them: no decision, or that of a stop
        (launches / f"7.{start}").mkdir(parents=True)
        (launches / f"7.{start}/started-0").write_text("n1\n")
    Verdict(Decision.RESTART, "interrupted", Kind.STOPPED).write(launches / "7.3")
    ids = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    assert end_of(tmp_path, batch.text(), 9, **ids) == (1, "requeue 6_2\n")
    for start in (4, 5):
        Verdict(Decision.RESTART, "its node failed", Kind.MACHINE).write(launches / f"7.{start}")
    code, requeued = end_of(tmp_path, batch.text(), 10, **ids)
    assert (code, requeued) == (2, "requeue 6_2\n"), "the third failed start was the one before"
    assert job._failed_starts(launches / "7.10") == 3


@pytest.mark.parametrize(
    ("decision", "starts", "end"),
    [
        ("sealed\n\nsealed\n", 0, (0, "")),
        ("done\n\nsealed\n", 0, (0, "")),
        ("failed\nuser\nrecipe r: no\n", 0, (2, "")),
        ("failed\ncheck\nother weights\n", 0, (1, "")),
        ("again\nmachine\nits node failed\n", 0, (1, "requeue 7\n")),
        (None, 0, (1, "requeue 7\n")),
        (None, 3, (2, "")),
    ],
    ids=["sealed", "done", "user", "check", "again", "no decision", "no decision, often"],
)
def test_what_rank_0_decided_is_done(
    decision: str | None, starts: int, end: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path)
    for start in range(starts):
        (batch.launches_folder / f"7.{start}").mkdir(parents=True)
    launch = Path(f"{batch.launches_folder}/7.{starts}")
    if decision is not None:
        launch.mkdir(parents=True)
        (launch / "decision").write_text(decision)
    assert end_of(tmp_path, batch.text(), starts) == end
    verdict = Verdict.read(launch)
    assert verdict is not None
    if decision is None:
        assert verdict.text == FAILURES["no_python"].text(nodes="n1", detail="it printed nothing")
        assert verdict.decision is (Decision.RESTART if end[1] else Decision.FAILED)


def launched(
    home: Path,
    outcomes: str,
    answer: str,
    nodes: str = "n1 n2",
    says: str = "",
    began: str = "n1 n2",
    start: int = 0,
    **settings: Any,
) -> tuple[list[str], str]:
    """Runs the script of a job whose launches end with these decisions, `-` for none, one after the other.

    answer: of squeue. nodes: those that answer; began: those on which a rank began. says: what srun reports of each
    launch. Returns the options of srun for
    each launch after the first one, and what scontrol is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
        batch = script(Slurm.model_validate({**SLURM, **settings}), home)
    (home / "outcomes").write_text("\n".join(outcomes.split()) + "\n")
    (home / "answering").write_text("".join(f"{node}\n" for node in nodes.split()))
    line = f"""case "$*" in
        *pipeline.launch.job*)  # Python starts
            out=$(grep -o -- '--output [^ ]*-%t' <<< "$*"); sed "s/^/ready /" $PLACE/answering > "${{out#--output }}"
            exit 0 ;;
        *SLURMD_NODENAME*) cat $PLACE/answering; exit 0 ;;
        *"scontrol requeue"*) exit 0 ;;  # which watches the first node
    esac
    echo "$ATOM_RELAUNCH $*" >> $PLACE/launched
    echo "{says}" >&2
    launch={batch.launches_folder}/7.{start}${{ATOM_RELAUNCH:+.$ATOM_RELAUNCH}}
    mkdir -p $launch; for node in {began}; do echo $node > $launch/started-$((rank++)); done
    outcome=$(sed -n $(wc -l < $PLACE/launched)p $PLACE/outcomes)
    [ "$outcome" = - ] || printf '%s\\n\\nas it is\\n' $outcome > $launch/decision
    exit 1"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUBS, "srun", line)
        patch.setitem(STUBS, "sleep", "echo $1 >> $PLACE/slept")
        patch.setitem(STUBS, "squeue", f"""case "$*" in *EndTime*) echo "{answer}" ;; *) echo RUNNING ;; esac""")
        _, requeued = end_of(home, batch.text(), start, SLURM_JOB_NUM_NODES="2")
    first, *others = (home / "launched").read_text().splitlines()
    assert first.startswith(" --unbuffered") and "--overlap" not in first
    return [re.sub(r" --unb.*bad-exit=1| sh -c .* -u -m.*", "", each) for each in others], requeued


LATER, SOON = (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds)) for seconds in (3600, 170))


@pytest.mark.parametrize(
    ("outcomes", "answer", "launches", "requeued"),
    [
        ("relaunch sealed", f"RUNNING N/A {LATER} 2", 1, ""),
        ("relaunch relaunch relaunch relaunch", f"RUNNING N/A {LATER} 2", 3, "requeue 7\n"),
        ("- - sealed", f"RUNNING N/A {LATER} 2", 1, "requeue 7\n"),
        ("- relaunch - sealed", f"RUNNING N/A {LATER} 2", 3, ""),
        ("failed", f"RUNNING N/A {LATER} 2", 0, ""),
        ("again", f"RUNNING N/A {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"RUNNING N/A {SOON} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"RUNNING {LATER} {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", f"COMPLETING N/A {LATER} 2", 0, "requeue 7\n"),
        ("relaunch sealed", "", 0, "requeue 7\n"),
    ],
    ids=["once", "limit", "unknown", "mixed", "final", "stopped", "late", "preempted", "canceled", "controller"],
)
def test_ranks_start_again_in_the_same_allocation(
    outcomes: str, answer: str, launches: int, requeued: str, tmp_path: Path
) -> None:
    expected = [f"{number} --overlap --mem=0 --nodelist=n1,n2" for number in range(1, launches + 1)]
    assert launched(tmp_path, outcomes, answer) == (expected, requeued)


def test_launches_that_end_within_a_minute_are_followed_by_a_growing_pause(tmp_path: Path) -> None:
    launched(tmp_path, "relaunch relaunch relaunch relaunch", f"RUNNING N/A {LATER} 2")
    assert (tmp_path / "slept").read_text().split()[:3] == ["0", "30", "60"]


def test_a_launch_that_did_not_begin_on_each_node_is_explained_at_once(tmp_path: Path) -> None:
    """A node on which Python does not start costs each launch a minute, and no rank was lost."""
    answer = f"RUNNING N/A {LATER} 2"
    assert launched(tmp_path, "- sealed", answer, nodes="n1", began="n1") == ([], "requeue 7\n")


def test_without_launches_in_the_allocation_the_job_is_requeued(tmp_path: Path) -> None:
    answer = f"RUNNING N/A {LATER} 2"
    assert launched(tmp_path, "relaunch", answer, restarts_in_allocation=0) == ([], "requeue 7\n")


def test_a_node_that_loses_a_rank_in_two_launches_of_one_start_is_bad(tmp_path: Path) -> None:
    says = "srun: error: n2: task 1: Killed"
    answer = f"RUNNING N/A {LATER} 2"
    for outcomes, relaunches in (("relaunch", 0), ("relaunch relaunch", 1)):
        home = tmp_path / str(relaunches)
        home.mkdir()
        launches, requeued = launched(home, outcomes, answer, says=says, restarts_in_allocation=relaunches)
        assert (len(launches), requeued) == (relaunches, "requeue 7\n")
        assert [entry.node for entry in bad_nodes.read(Store(home))] == ["n2"] * relaunches


def test_a_node_is_blamed_for_any_two_launches_in_a_row(tmp_path: Path) -> None:
    """The launches before the requeue ended otherwise, and the one that fails for good counts, too."""
    answer = f"RUNNING N/A {LATER} 2"
    says = """$([ "$ATOM_RELAUNCH" = 2 ] && echo srun: error: n1: task 0: Killed || echo srun: error: n2: task 1: Killed)"""
    launches, requeued = launched(tmp_path, "relaunch relaunch again", answer, says=says)
    assert (len(launches), requeued) == (2, "requeue 7\n")
    assert [entry.node for entry in bad_nodes.read(Store(tmp_path))] == ["n2"]
    (tmp_path / "final").mkdir()
    says = "srun: error: n2: task 1: Killed"
    assert launched(tmp_path / "final", "relaunch failed", answer, says=says) == (
        ["1 --overlap --mem=0 --nodelist=n1,n2"],
        "",
    )
    assert [entry.node for entry in bad_nodes.read(Store(tmp_path / "final"))] == ["n2"]


def test_a_rank_without_memory_is_not_launched_again_in_the_allocation(tmp_path: Path) -> None:
    answer, says = f"RUNNING N/A {LATER} 2", "srun: error: n2: task 1: Out Of Memory"
    assert launched(tmp_path, "relaunch sealed", answer, says=says) == ([], "requeue 7\n")


def test_a_node_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    answer = f"RUNNING N/A {LATER} 3"
    assert launched(tmp_path, "relaunch sealed", answer, "n1") == ([], "requeue 7\n")
    (tmp_path / "spare").mkdir()
    train = {**SLURM["train"], "spare_nodes": 1}
    launches, requeued = launched(tmp_path / "spare", "relaunch sealed", answer, "n10 n1", train=train)
    assert launches == ["1 --overlap --mem=0 --nodelist=n1,n10 --nodes=2 --ntasks=2"] and not requeued
    options = script(Slurm.model_validate({**SLURM, "train": train})).sbatch_options
    assert (options["nodes"], options["no-kill"]) == (3, True)
    options = script(Slurm.model_validate({**SLURM, "train": train}), ranks=1).sbatch_options
    assert options["nodes"] == 1 and "no-kill" not in options, "one node has no spare"


@pytest.mark.parametrize(("starts", "end"), [(0, (1, "requeue 7\n")), (3, (2, ""))])
def test_a_node_on_which_the_setup_fails_does_not_run_the_stage(
    starts: int, end: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate({**SLURM, "setup": ["A=1", "test -e /no/such/driver", "true"]}), tmp_path)
    for start in range(starts):
        (batch.launches_folder / f"7.{start}").mkdir(parents=True)
    assert end_of(tmp_path, batch.text(), starts) == end
    verdict = Verdict.read(Path(f"{batch.launches_folder}/7.{starts}"))
    assert verdict is not None and verdict.kind is Kind.MACHINE
    assert re.fullmatch(
        r"line 2 of setup of the cluster profile failed with exit code 1 on node \S+; see .*", verdict.text
    )
    assert not (tmp_path / "environment").exists(), "srun was not called"


def test_a_job_that_dies_after_it_began_is_started_again_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempts are counted from its events, not here."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path)
    for start in range(90, 95):
        (batch.launches_folder / f"7.{start}").mkdir(parents=True)
    (batch.launches_folder / "7.90/started-0").touch()
    assert end_of(tmp_path, batch.text(), 93) == (1, "requeue 7\n")
    (tmp_path / "requeued").unlink()
    assert end_of(tmp_path, batch.text(), 94) == (2, "")


def test_starts_without_a_launch_use_up_no_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a start waited for a server, or Slurm ended it before its script."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path)
    for requeued, start in enumerate((5, 9, 17), start=1):
        assert end_of(tmp_path, batch.text(), start) == (1, "requeue 7\n" * requeued)
    (tmp_path / "requeued").unlink()
    assert end_of(tmp_path, batch.text(), 20) == (2, ""), "three launches failed before"
    (batch.launches_folder / "7.5/started-0").touch()
    (batch.launches_folder / "7.20/decision").unlink()
    assert end_of(tmp_path, batch.text(), 20) == (1, "requeue 7\n"), "rank 0 began three launches ago"


def test_a_node_is_blamed_for_two_launches_in_a_row_with_a_wait_in_between(tmp_path: Path) -> None:
    says, answer = "srun: error: n2: task 1: Killed", f"RUNNING N/A {LATER} 2"
    launched(tmp_path, "again", answer, says=says)
    assert bad_nodes.read(Store(tmp_path)) == []
    launched(tmp_path, "again again", answer, says=says, start=3)
    assert [entry.node for entry in bad_nodes.read(Store(tmp_path))] == ["n2"]


def test_starts_that_can_write_nothing_are_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a job would be queued again without an end."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    batch = script(Slurm.model_validate(SLURM), tmp_path)
    batch.launches_folder.parent.mkdir(parents=True)
    batch.launches_folder.write_text("no folder can be made here")
    assert end_of(tmp_path, batch.text(), 2) == (1, "requeue 7\n")
    (tmp_path / "requeued").unlink()
    assert end_of(tmp_path, batch.text(), 3) == (2, "")


def test_a_task_that_finished_a_shard_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    array = script(Slurm.model_validate(SLURM), tmp_path, tasks=2)
    text = array.text()
    ids = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    launch = Path(f"{array.launches_folder}/7.8")
    for start in range(5, 9):
        launch.with_name(f"7.{start}").mkdir(parents=True)
    (launch / "further").touch()
    assert end_of(tmp_path, text, 8, **ids) == (1, "requeue 5_1\n")
    (tmp_path / "requeued").unlink()
    (launch / "further").unlink()
    for start in range(5, 8):
        Verdict(Decision.RESTART, "its node failed", Kind.MACHINE).write(launch.with_name(f"7.{start}"))
    (launch / "decision").unlink()
    assert end_of(tmp_path, text, 8, **ids) == (2, "")


def test_a_verdict_is_read_as_it_was_written(tmp_path: Path) -> None:
    for verdict in (
        Verdict(Decision.DONE, "sealed"),
        Verdict.of(Decision.RESTART, Failure("a disk\nfailed", Kind.MACHINE)),
    ):
        verdict.write(tmp_path)
        assert Verdict.read(tmp_path) == verdict
    (tmp_path / "decision").write_text("perhaps\n\n\n")
    with pytest.warns(json_files.DamagedFile, match="it holds no decision"):
        assert Verdict.read(tmp_path) is None
    assert Verdict.read(tmp_path / "none") is None
