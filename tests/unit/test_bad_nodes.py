"""Which node a failure is attributed to, what remembers it, and what the job's script does about the next start."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, Failure, Kind
from pipeline.core.store import Store
from pipeline.graph.run import NodeStatus, Run
from pipeline.launch import bad_nodes, preflight, slurm
from pipeline.launch.attempt import Task
from pipeline.launch.bad_nodes import BadNode
from pipeline.launch.cluster_profile import Slurm
from pipeline.launch.diagnoses import report_failure
from pipeline.launch.job import JobLimits, avoid_node
from pipeline.launch.rendezvous import Decision, Verdict
from pipeline.tracking import status
from tests.fixtures.batch_fixtures import SLURM, script
from tests.fixtures.preflight_fixtures import ranks

COMMANDS = {
    # $PLACE/down: the nodes on which Python does not start; dead: those that do not answer.
    "srun": """
case "$*" in
    *"sh -c echo"*) echo "$*" >> "$PLACE/probed"; grep -vxFf "$PLACE/dead" "$PLACE/nodes"; exit ;;
    *"-c import os, pipeline"*) echo "$*" >> "$PLACE/probed" ;;
    *) cat "$PLACE/says" >&2; exit 1 ;;
esac
out=$(grep -o -- '--output [^ ]*-%t' <<< "$*"); out=${out#--output }
i=0; for node in $(grep -vxFf "$PLACE/dead" "$PLACE/nodes"); do
    grep -qx "$node" "$PLACE/down" && cat "$PLACE/answer" > "${out/\\%t/$i}" || echo "ready $node" > "${out/\\%t/$i}"
    i=$((i + 1))
done""",
    "squeue": 'cat "$PLACE/state"',
    "scontrol": 'case "$1 $2" in "show job") cat "$PLACE/job"; exit ;; esac; '
    'case "$1 $3" in "show "*[[]*) ;; "show "*) tr , "\\n" <<< "$3"; exit ;; esac; '
    '[ "$1" = show ] && { cat "$PLACE/nodes"; exit; }; echo "$*" >> "$PLACE/requests"; '
    '[ "$1" = requeue ] || { cat "$PLACE/refusal" >&2; [ -z "$(cat "$PLACE/refusal")" ]; }',
    "sbatch": 'echo "$*" >> "$PLACE/tested"; ! grep -qE -- "--exclude=[^ ]*($(cat "$PLACE/needed"))" <<< "$*"',
    # the job, its script and its step
    "sacct": 'case "$*" in *MaxRSS) printf "\\n302040K\\n8K\\n" ;; *) printf "200M|2\\n|1\\n|2\\n" ;; esac',
    "sleep": "",
}
"""Commands in the place of Slurm's, which keep what they are given."""


def run_script(
    place: Path,
    start: int = 0,
    nodes: str = "n1 n2",
    down: str = "",
    says: str = "",
    script_text: str = "",
    **files: str,
) -> str:
    """Runs the script of a job at that start; returns its requests to scontrol."""
    for folder in ("bin", "slurm"):
        (place / folder).mkdir(exist_ok=True)
    for name, line in COMMANDS.items():
        (place / "bin" / name).write_text(f"#!/bin/bash\nPLACE={place}/slurm\n{line}\n")
        (place / "bin" / name).chmod(0o755)
    words = {
        "answer": "bash: python: not found",
        "state": "RUNNING",
        "needed": "none",
        "dead": "none",
        "refusal": "",
        "job": "ExcNodeList=(null)",
        "nodes": nodes.replace(" ", "\n"),
        "down": down.replace(" ", "\n"),
    }
    for name, text in {**words, "says": says, **files}.items():
        (place / "slurm" / name).write_text(f"{text}\n")
    requests = place / "slurm/requests"
    requests.unlink(missing_ok=True)
    environment = {"PATH": f"{place / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start)}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": str(len(nodes.split()))}
    environment["SLURMD_NODENAME"] = nodes.split()[0]
    text = script_text or batch(place).text()
    subprocess.run(["bash", "-c", text], env=environment, stderr=subprocess.DEVNULL, check=False, timeout=60)
    return requests.read_text() if requests.exists() else ""


def batch(place: Path, **changed: Any) -> Any:
    settings = Slurm.model_validate({**SLURM, "forward": ["PATH"], **changed})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
        return script(settings, place)


def begun(place: Path, start: int, *nodes: str) -> None:
    """Has the ranks of a start begun on these nodes."""
    folder = Path(f"{batch(place).launches_folder}/7.{start}")
    folder.mkdir(parents=True, exist_ok=True)
    for rank, node in enumerate(nodes):
        (folder / f"started-{rank}").write_text(node + "\n")


def verdict(place: Path, start: int = 0) -> Verdict:
    recorded = Verdict.read(Path(f"{batch(place).launches_folder}/7.{start}"))
    assert recorded is not None
    return recorded


def avoided(place: Path) -> list[str]:
    return [entry.node for entry in bad_nodes.read(Store(place))]


def test_a_node_on_which_python_does_not_start_is_left_out_of_the_next_start(tmp_path: Path) -> None:
    assert run_script(tmp_path, down="n2") == "requeue 7\nupdate jobid=7 excnodelist=n2\n"
    recorded = verdict(tmp_path)
    assert (recorded.decision, recorded.kind) == (Decision.RESTART, Kind.MACHINE)
    assert recorded.text.startswith("Python did not start on n2 (bash: python: not found); ")
    (entry,) = bad_nodes.read(Store(tmp_path))
    assert entry.evidence == recorded.text and (entry.run, entry.stage, entry.job) == ("tiny-1", "pretrain", "7")
    tested = (tmp_path / "slurm/tested").read_text()
    assert tested.startswith("--test-only --dependency=0 --exclude=n2 "), "that of the script may be forgotten"
    assert abs(entry.until - time.time() - 86400) < 60
    assert "atom nodes clear n2" in entry.sentence and "job 7" in entry.sentence
    assert bad_nodes.clear(Store(tmp_path), ["n2"]) == ["n2"]
    begun(tmp_path, 1, "n1", "n3")
    assert run_script(tmp_path, 1, "n1 n3") == "requeue 7\nupdate jobid=7 excnodelist=\n", "the job has it no more"


def test_an_answer_that_is_cut_within_a_character_stays_readable(tmp_path: Path) -> None:
    run_script(tmp_path, down="n2", answer="x" + "é" * 150)
    assert verdict(tmp_path).text.startswith("Python did not start on n2 (x); ")
    assert avoided(tmp_path) == ["n2"]


def test_the_evidence_is_what_pyxis_could_not_do(tmp_path: Path) -> None:
    """What pyxis 0.24.0 printed of a file that is no image."""
    failed = "slurmstepd-n2: error: pyxis: failed to create container filesystem for image: /images/bad.sqsh"
    run_script(tmp_path, down="n2", answer=f"slurmstepd-n2: error: pyxis: child 7 failed with error code: 1\n{failed}")
    assert verdict(tmp_path).text.startswith(f"Python did not start on n2 ({failed}); ")


def test_what_fails_on_every_node_is_not_the_fault_of_nodes(tmp_path: Path) -> None:
    assert run_script(tmp_path, down="n1 n2") == "", "it is not started again"
    recorded = verdict(tmp_path)
    assert (recorded.decision, recorded.kind) == (Decision.FAILED, Kind.USER)
    assert recorded.text.startswith("Python starts on none of n1,n2 (bash: python: not found); correct python")
    assert avoided(tmp_path) == []


def test_a_job_of_one_node_tries_another_one_first(tmp_path: Path) -> None:
    assert run_script(tmp_path, nodes="n1", down="n1") == "requeue 7\nupdate jobid=7 excnodelist=n1\n"
    assert avoided(tmp_path) == ["n1"]
    assert run_script(tmp_path, 1, nodes="n2", down="n2") == ""
    assert verdict(tmp_path, 1).decision is Decision.FAILED and avoided(tmp_path) == []


def test_a_node_that_the_job_needs_is_kept_and_one_sentence_says_so(tmp_path: Path) -> None:
    assert run_script(tmp_path, down="n2", needed="n2") == "requeue 7\n"
    (kept,) = Path(batch(tmp_path).launches_folder).glob("*-kept")
    assert kept.read_text() == (
        "node n2 is bad, but the job could not start without it, so it is not avoided; have it repaired\n"
    )
    assert avoided(tmp_path) == ["n2"], "other jobs avoid it"


def test_that_slurm_refuses_the_nodes_to_avoid_is_shown(tmp_path: Path) -> None:
    run_script(tmp_path, down="n2", refusal="Unable to contact slurm controller")
    (kept,) = Path(batch(tmp_path).launches_folder).glob("*-kept")
    refused = "Slurm did not take excnodelist=n2 for the next start (Unable to contact slurm controller)\n"
    assert kept.read_text() == refused
    begun(tmp_path, 1, "n1", "n3")
    run_script(tmp_path, 1, "n1 n3")
    assert not kept.exists(), "it is of the last start alone"


def test_expired_entries_are_removed_by_the_next_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = (BadNode(until, node, "dust", "tiny-1", "sft", "7") for until, node in ((1, "n1"), (2**40, "n2")))
    bad_nodes.record(store, old)
    assert avoided(tmp_path) == [] and (tmp_path / "nodes/n1.json").exists()
    bad_nodes.record(store, new)
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == ["n2.json"]


def test_marks_of_an_array_are_none_of_its_tasks(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    run = Run("tiny-1", tmp_path / "logs/tiny-1", {})
    ranks = run.node_folder("pretrain") / "shards/ranks"
    (ranks / "7.1").mkdir(parents=True)
    Verdict(Decision.SEALED, "3 shards are done").write(ranks / "7.1")
    (ranks / "7-avoided").touch()
    (ranks / "7-kept").write_text("node n2 is bad\n")
    run.note_job("pretrain", "9", False, "6", 5)
    node = status._add_array_state(NodeStatus("pretrain", "k", "waiting"), run.jobs()["pretrain"], run, {})
    assert (node.state, node.done, node.total) == ("waiting", 3, 5) and not recwarn.list
    assert status.kept_nodes(run) == ["pretrain: node n2 is bad"]


def test_a_job_that_slurm_ends_blames_nobody(tmp_path: Path) -> None:
    assert run_script(tmp_path, down="n1 n2", state="COMPLETING") == ""
    assert avoided(tmp_path) == [] and Verdict.read(Path(f"{batch(tmp_path).launches_folder}/7.0")) is None


KILLED = (
    "srun: error: n2: task 1: Killed\nsrun: Terminating StepId=7.0\nsrun: error: n1: task 0: Killed\n"
    "srun: Force Terminated StepId=7.0"
)
"""Of Slurm 24.11.5, as are those below: the rank of n2 was killed, and srun then killed that of n1."""


def survived(place: Path, start: int, rank: int = 1) -> None:
    """Has a rank recorded its end, after that of another one."""
    launch = Path(f"{batch(place).launches_folder}/7.{start}")
    if rank:
        (launch / f"end-{rank}.json").write_text("{}")
    else:
        Verdict(Decision.RESTART, "stopped on request (SIGTERM)", Kind.STOPPED).write(launch)


def test_a_node_that_loses_a_rank_in_two_starts_in_a_row_is_bad_once_a_job(tmp_path: Path) -> None:
    for start in range(2):
        begun(tmp_path, start, "n1", "n2")
        survived(tmp_path, start, rank=0)
    assert run_script(tmp_path, 0, says=KILLED) == "requeue 7\n"
    assert avoided(tmp_path) == []
    assert run_script(tmp_path, 1, says=KILLED) == "requeue 7\nupdate jobid=7 excnodelist=n2\n"
    assert avoided(tmp_path) == ["n2"]
    elsewhere = KILLED.replace("n2", "n3")
    for start in (2, 3):
        begun(tmp_path, start, "n1", "n3")
        survived(tmp_path, start, rank=0)
        run_script(tmp_path, start, "n1 n3", says=elsewhere)
    assert avoided(tmp_path) == ["n2"], "the rank dies elsewhere, too"


def test_the_first_node_is_blamed_by_what_the_other_ranks_recorded(tmp_path: Path) -> None:
    says = (
        KILLED.replace("n2: task 1", "n9: task 9")
        .replace("n1: task 0", "n2: task 1")
        .replace("n9: task 9", "n1: task 0")
    )
    for start in range(2):
        begun(tmp_path, start, "n1", "n2")
        survived(tmp_path, start)
        run_script(tmp_path, start, says=says)
        assert verdict(tmp_path, start).text.startswith("node n1 lost a rank (Killed); ")
    assert avoided(tmp_path) == ["n1"]


UNCLEAR = {
    "another task failed first": "srun: error: n2: task 1: Exited with exit code 1\nsrun: Terminating StepId=7.0\n"
    "srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=7.0",
    "the step was cancelled": "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
    "srun: error: n1: task 0: Killed\nsrun: Terminating StepId=7.0\nsrun: error: n2: task 1: Killed",
    "the job was requeued": "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\n"
    "srun: got SIGCONT\nsrun: forcing job termination\nsrun: error: n1: task 0: Killed\n"
    "srun: Terminating StepId=7.0\nsrun: error: n2: task 1: Killed",
    "Slurm lost a node": "srun: error: Node failure on n3\nsrun: got SIGCONT\nsrun: forcing job termination\n"
    "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.\nsrun: error: n1: task 0: Killed\n"
    "srun: Terminating StepId=7.0\nsrun: error: n2: task 1: Killed",
    "several nodes in one line": "srun: error: n[1-2]: tasks 0-1: Killed\nsrun: error: n1: task 0: Killed",
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_no_node_is_blamed_for_ranks_that_srun_or_slurm_killed(name: str, tmp_path: Path) -> None:
    for start in range(3):
        begun(tmp_path, start, "n1", "n2")
        survived(tmp_path, start)
        run_script(tmp_path, start, says=UNCLEAR[name])
        assert "lost a rank" not in verdict(tmp_path, start).text
    assert avoided(tmp_path) == []
    assert not list(batch(tmp_path).launches_folder.glob("7-lost")), "the job may still blame a node"


def test_no_node_is_blamed_if_all_ranks_were_killed_at_once(tmp_path: Path) -> None:
    """By `scancel --signal=KILL` of the step: no rank recorded anything."""
    for start in range(3):
        begun(tmp_path, start, "n1", "n2")
        run_script(tmp_path, start, says=KILLED)
    assert avoided(tmp_path) == []


def test_the_task_that_failed_first_is_named(tmp_path: Path) -> None:
    begun(tmp_path, 0, "n1", "n2")
    run_script(tmp_path, says=UNCLEAR["another task failed first"])
    assert verdict(tmp_path).text == (
        "the stage left no decision on n[1-2], srun's exit code is 1, and the first task that ended was on n2 (Exited "
        "with exit code 1); see its log"
    )


def test_a_node_without_the_home_folder_is_named_at_once_and_left_out(tmp_path: Path) -> None:
    """srun starts the ranks by a shell that looks for a file of the run; no Python is started to find out."""
    begun(tmp_path, 0, "n1")
    says = UNCLEAR["another task failed first"].replace("exit code 1", "exit code 69")
    assert run_script(tmp_path, says=says) == "requeue 7\nupdate jobid=7 excnodelist=n2\n"
    assert verdict(tmp_path).text == (
        "node n2 does not see the run in $ATOM_HOME; mount it there as on the other nodes"
    )
    assert avoided(tmp_path) == ["n2"] and not (tmp_path / "slurm/probed").exists()


def test_a_first_node_without_the_home_folder_excludes_itself_and_is_blamed_by_the_next_start(tmp_path: Path) -> None:
    run_file = batch(tmp_path).run_file
    away = run_file.rename(run_file.with_name("away"))
    batch_text = batch(tmp_path).text()
    run_file.unlink()
    requests = run_script(tmp_path, nodes="n1 n2", script_text=batch_text)
    assert requests == "requeue 7\nupdate jobid=7 excnodelist=n1,n1\n"
    assert not batch(tmp_path).launches_folder.exists()
    away.rename(run_file)
    begun(tmp_path, 1, "n3", "n4")
    run_script(tmp_path, 1, "n3 n4", says="srun: error: n3: task 0: Exited with exit code 1", job="ExcNodeList=n1,n1")
    (entry,) = bad_nodes.read(Store(tmp_path))
    assert entry.node == "n1" and entry.evidence.startswith("node n1 does not see the run in $ATOM_HOME")
    assert bad_nodes.clear(Store(tmp_path), ["n1"]) == ["n1"]
    run_script(tmp_path, 3, "n3 n4", job="ExcNodeList=n1,n1")
    assert avoided(tmp_path) == [], "the job still has its list, but the node was repaired"


@pytest.mark.parametrize("excluded", ["n1", "n1,n5", "(null)"])
def test_a_node_that_a_person_excluded_is_not_blamed_after_a_start_without_a_launch(
    excluded: str, tmp_path: Path
) -> None:
    """Such a start waited for a server, or Slurm ended it before its script."""
    begun(tmp_path, 1, "n3", "n4")
    run_script(tmp_path, 1, "n3 n4", job=f"ExcNodeList={excluded}")
    assert avoided(tmp_path) == []


def test_a_node_that_the_submission_lists_twice_is_not_blamed(tmp_path: Path) -> None:
    """As it does if a bad node is one that the profile excludes."""
    batch_text = batch(tmp_path, train={**SLURM["train"], "exclude": "n1,n1"}).text()
    run_script(tmp_path, 1, "n3 n4", job="ExcNodeList=n1,n1", script_text=batch_text)
    assert avoided(tmp_path) == []


def test_a_dead_node_is_not_probed_and_not_blamed(tmp_path: Path) -> None:
    """A job with spare nodes goes on without it: a probe of all nodes would wait for it."""
    begun(tmp_path, 0, "n1")
    assert run_script(tmp_path, dead="n2", down="n2") == "requeue 7\n"
    assert verdict(tmp_path).text == "the stage left no decision on n[1-2], srun's exit code is 1; see its log"
    asking, probe = (tmp_path / "slurm/probed").read_text().splitlines()
    assert "--no-kill" in asking and "--nodes=2" in asking
    assert "--no-kill" in probe and "--nodelist=n1 --nodes=1 --ntasks=1 " in probe
    assert avoided(tmp_path) == []
    (tmp_path / "slurm/probed").unlink()
    assert run_script(tmp_path, 1, "n1 n2 n3", dead="n2", down="n3") == "requeue 7\nupdate jobid=7 excnodelist=n3\n"
    assert "--nodelist=n1,n3 --nodes=2 --ntasks=2 " in (tmp_path / "slurm/probed").read_text().splitlines()[1]
    assert verdict(tmp_path, 1).text.startswith("Python did not start on n3 (bash: python: not found); ")


def test_a_job_that_slurm_ends_blames_no_node_for_lost_ranks(tmp_path: Path) -> None:
    for start in range(2):
        begun(tmp_path, start, "n1", "n2")
        run_script(tmp_path, start, says=KILLED, state="COMPLETING")
    assert avoided(tmp_path) == []


def test_memory_is_named_and_is_no_nodes_fault(tmp_path: Path) -> None:
    killed = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\nsrun: error: n2: task 1: Out Of Memory"
    for start in range(2):
        begun(tmp_path, start, "n1", "n2")
        run_script(tmp_path, start, says=killed)
        assert verdict(tmp_path, start).text == (
            "memory of n2 ran out; raise memory_gb of the profile, or split the stage over more ranks"
        )
    assert avoided(tmp_path) == []


def test_evidence_of_any_characters_is_one_line_of_json(tmp_path: Path) -> None:
    run_script(tmp_path, down="n2", answer='a "b" \\ & {nodes} $(id) `id`\t\x01c\nsecond line')
    (entry,) = bad_nodes.read(Store(tmp_path))
    assert entry.evidence.startswith('Python did not start on n2 (a "b" \\ & {nodes} $(id) `id`c); ')
    assert len((bad_nodes.folder(Store(tmp_path)) / "n2.json").read_text().splitlines()) == 1


def entry(node: str, seconds: int = 60) -> BadNode:
    return BadNode(int(time.time()) + seconds, node, "its clock is wrong", "tiny-1", "sft", "9")


def test_entries_expire_and_damaged_ones_count_for_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert bad_nodes.read(store) == []
    for node, seconds in (("n2", 60), ("n1", 60), ("old", -1)):
        bad_nodes.record(store, entry(node, seconds))
    (bad_nodes.folder(store) / "cut.json").write_text('{"until": 1')
    (bad_nodes.folder(store) / "other.json").write_text(json.dumps(entry("n9").__dict__))
    with pytest.warns(UserWarning, match=r"cut\.json is damaged .*that node is not avoided"):
        assert avoided(tmp_path) == ["n1", "n2"]
    with pytest.raises(AtomError, match=re.escape("node n3 is not avoided; those that are: n1, n2 (atom nodes)")):
        bad_nodes.clear(store, ["n1", "n3"])
    assert avoided(tmp_path) == ["n1", "n2"] and bad_nodes.clear(store, []) == ["n1", "n2"]
    assert avoided(tmp_path) == []


def test_what_is_submitted_avoids_bad_nodes_beside_those_of_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(
        f'#!/bin/bash\necho x >> {tmp_path}/calls; text=$(cat); ! grep -q "^#SBATCH --exclude=.*n3\\|^#SBATCH --dependency" <<< "$text"\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    settings = Slurm.model_validate({**SLURM, "train": {**SLURM["train"], "exclude": "n7"}})
    job = script(settings, tmp_path, dependencies=["5"])
    avoidance = slurm.Avoidance([entry("n1"), entry("n3"), entry("n4")])
    chosen = avoidance.apply(job)
    assert chosen.sbatch_options["exclude"] == "n7,n1,n4" and chosen.sbatch_options["dependency"] == "afterok:5"
    sentence = "node n3 is bad, but stage {} could not start without it, so it is not avoided; have it repaired"
    assert avoidance.kept == [sentence.format("pretrain")]
    assert (tmp_path / "calls").read_text() == "x\n" * 4, "for all of them, and then for each"
    other = avoidance.apply(replace(job, stage="sft", sbatch_options={**job.sbatch_options, "job-name": "atom-sft"}))
    assert other.sbatch_options["exclude"] == "n7,n1,n4" and avoidance.kept[1:] == [sentence.format("sft")]
    assert (tmp_path / "calls").read_text() == "x\n" * 4, "Slurm is not asked again for a job that requests the same"
    assert slurm.Avoidance([entry("n1")]).apply(job).sbatch_options["exclude"] == "n7,n1"
    assert (tmp_path / "calls").read_text() == "x\n" * 5, "once, if it can start without all"


def test_a_rank_names_its_node_for_a_fault_of_a_device_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    store = Store(tmp_path)
    ecc = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronous")
    failure = report_failure(ecc, "pretrain", "pretrain", store)
    assert (failure.kind, failure.bad_node) == (Kind.MACHINE, "n5")
    assert "a GPU of node n5 failed (CUDA error: uncorrectable ECC error encountered)" in failure.text
    for error in (RuntimeError("CUDA error: device-side assert triggered"), ValueError("ECC error"), KeyError("Xid (")):
        failure = report_failure(error, "pretrain", "pretrain", store)
        assert (failure.kind, failure.bad_node) == (Kind.BUG, ""), error
    task = Task(str(tmp_path), "tiny-1", "pretrain", "pretrain", {}, {}, "pretrain-0123456789ab", 0.0, 1)
    limits = JobLimits(None, 3, 0.0, None, (), 3600)
    avoid_node(failure, task, limits, store)
    assert avoided(tmp_path) == []
    avoid_node(Failure("its GPU is gone", bad_node="n5"), task, JobLimits(None, 3, 0.0, None), store)
    assert avoided(tmp_path) == [], "the profile says never"
    avoid_node(Failure("its GPU is gone", bad_node="n5"), task, limits, store)
    assert avoided(tmp_path) == ["n5"]


def test_a_failed_preflight_check_blames_the_node_unless_all_share_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    scratch = preflight.check(tmp_path, ranks(tmp_path), 0.0, "/sys")
    assert scratch is not None and scratch.bad_node == "n7"
    full = preflight.check(tmp_path, ranks(tmp_path), 1e9, None)
    assert full is not None and full.bad_node == "", "every node sees that disk"
