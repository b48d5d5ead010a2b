"""The table of failures against recorded disturbances: what Slurm, srun or an exception said, and the sentence about it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.core.errors import Kind
from pipeline.graph.run import CUT_OFF
from pipeline.launch import diagnoses
from pipeline.launch.diagnoses import FAILURES
from pipeline.launch.rendezvous import Decision, Verdict
from pipeline.launch.slurm_client import Job
from pipeline.tracking import status


def end_message(job: Job, recorded: str, verdict: Verdict | None) -> str:
    return status.end_message(job, recorded, verdict)


ENDED = {
    "time limit": ("TIMEOUT", "0:0", "n[1-2]", "its time limit came on n[1-2] before it saved; raise"),
    "deadline": ("DEADLINE", "0:0", "n1", "its time limit came on n1 before it saved"),
    "preemption": ("PREEMPTED", "0:0", "n[1-2]", "a job of higher priority took n[1-2], and Slurm did not queue this one"),
    "node failure": ("NODE_FAIL", "1:0", "n[1-2]", "Slurm lost a node of n[1-2]; see `sinfo -R`, and `atom retry`"),
    "node that did not boot": ("BOOT_FAIL", "0:0", "n3", "Slurm lost a node of n3"),
    "launch failure": ("FAILED", "0:53", "n1", "node n1 could not start the job's script (exit code 0:53); see that it mou"),
    "no home folder": ("FAILED", "69:0", "n1", "node n1 does not see the run in $ATOM_HOME; mount it there as on"),
    "another exit code": ("FAILED", "2:0", "n1", "failed exit code 2"),
    "unknown state": ("SOMETHING_NEW", "0:0", "n1", "something_new exit code 0"),
}  # fmt: skip
"""Final states of jobs that left no outcome: state, exit code, nodes; how the sentence begins."""


@pytest.mark.parametrize("name", ENDED)
def test_a_job_that_left_no_outcome(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm, which may know a job 7
    state, code, nodes, sentence = ENDED[name]
    job = Job("7", state, f"exit code {code[0]}", nodes, code=code)
    for recorded in ("", CUT_OFF):
        text = end_message(job, recorded, None)
        assert text.startswith(sentence) or (
            text == CUT_OFF and recorded and name in ("another exit code", "unknown state")
        )
        assert "\n" not in text and "{" not in text


def test_what_was_recorded_counts_more() -> None:
    job = Job("7", "TIMEOUT", nodes="n1", code="0:0")
    assert end_message(job, "recipe r: no", None) == "recipe r: no"
    failed, again = (
        Verdict(decision, "its own words", Kind.MACHINE) for decision in (Decision.FAILED, Decision.RESTART)
    )
    assert end_message(job, CUT_OFF, failed) == "its own words"
    assert end_message(job, "", again).startswith("its time limit came on n1"), "of an earlier moment"
    assert end_message(Job("7", "FAILED", "exit code 2", code="2:0"), "", again) == "its own words"


OUT_OF_MEMORY = [
    "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch",
    "srun: error: n2: task 1: Out Of Memory",
    "slurmstepd: error: StepId=7.0 exceeded memory limit (314572800 > 104857600), being killed",
]
OTHER = [
    "srun: error: n2: task 1: Killed",
    "srun: error: n1: task 0: Exited with exit code 127",
    "slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-28T12:00:00 DUE TO TIME LIMIT ***",
    "srun: Force Terminated StepId=7.0",
]
DEVICE = [
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
    "CUDA error: system not yet initialized",
]
BUGS = [
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "Expected all tensors to be on the same device",
]


def test_patterns_are_the_same_for_grep_and_for_python() -> None:
    def grep(pattern: str, line: str) -> bool:
        return subprocess.run(["grep", "-qE", pattern], input=line, text=True).returncode == 0

    for pattern, lines, others in (
        (FAILURES["memory"].pattern, OUT_OF_MEMORY, [*OTHER, *DEVICE]),
        (FAILURES["device"].pattern, DEVICE, [*BUGS, *OTHER]),
    ):
        for line in (*lines, *others):
            expected = line in lines
            assert (re.search(pattern, line) is not None, grep(pattern, line)) == (expected, expected), line


def test_an_error_of_a_device_is_found_behind_others() -> None:
    try:
        try:
            raise RuntimeError(f"{DEVICE[0]}\nCompile with TORCH_USE_CUDA_DSA")
        except RuntimeError as error:
            raise ValueError("a step failed") from error
    except ValueError as error:
        assert diagnoses.of_error(error) == (FAILURES["device"], DEVICE[0])
    for line in BUGS:
        assert diagnoses.of_error(RuntimeError(line)) is None
    loop = RuntimeError("a")
    loop.__cause__ = RuntimeError("b")
    loop.__cause__.__cause__ = loop
    assert diagnoses.of_error(loop) is None


def test_each_row_is_told_apart_and_names_a_remedy() -> None:
    names = [row.name for row in FAILURES.values()]
    assert len(names) == len(set(names))
    states = [state for row in FAILURES.values() for state in row.states]
    assert len(states) == len(set(states))
    for row in FAILURES.values():
        text = row.text(detail="why")
        assert "{" not in text and "\n" not in text
        assert row.sentence == "{detail}" or ";" in text, "what to do"
    assert {row.name for row in FAILURES.values() if row.bad_node and row.kind.final} == set(), (
        "a final failure blames no node"
    )
