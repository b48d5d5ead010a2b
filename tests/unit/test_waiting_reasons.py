"""Each reason for which Slurm lets a job wait has its own sentence, and those that need a person are alerts. The reasons are
those of Slurm's own list: as recorded, and as the installed Slurm has it."""

from __future__ import annotations

import pytest

from pipeline.graph.run import NodeStatus
from pipeline.launch import diagnoses, slurm_client
from pipeline.launch.slurm_client import Job
from pipeline.operations import alerts
from tests.fixtures import slurm_reason_fixtures
from tests.fixtures.slurm_reason_fixtures import CONTROLLER, TABLE, explained, installed, reasons, recorded


def test_each_reason_has_the_sentence_and_the_alert_of_the_table() -> None:
    """After a change that is meant: python -m tests.fixtures.slurm_reason_fixtures."""
    assert TABLE.read_text().splitlines() == list(slurm_reason_fixtures.table())


@pytest.mark.parametrize("reason", [reason for reason in reasons() if reason != "None"])
def test_a_reason_is_known_and_quoted(reason: str) -> None:
    row, sentence = explained(reason)
    matching = [each.name for each in diagnoses.WAITING_REASONS if each.fits(reason)]
    assert matching == [row.name], "one row, so that their order does not matter"
    assert sentence.endswith(f" ({reason})")
    assert "{" not in sentence and "\n" not in sentence


@pytest.mark.parametrize("reason", ["PartitionFrozen", "QOSMaxQubitsPerJob", "ReqNodeNotAvail, Gone fishing", "Held"])
def test_a_new_reason_is_unknown(reason: str) -> None:
    row, sentence = explained(reason)
    assert row is diagnoses.UNKNOWN and not row.alert
    assert sentence == f"Slurm names a reason that atom does not know; see `scontrol show job 7` ({reason})"


def test_no_reason_is_recognized_by_a_part_of_it() -> None:
    for reason in (reason for reason in reasons() if reason != "None"):
        for other in (f"{reason}Again", f"No{reason}"):
            if other not in reasons():
                row, _ = explained(other)
                open_ended = row.name == "unavailable nodes" or "has ended" in other
                assert row is diagnoses.UNKNOWN or open_ended, other


def test_the_installed_slurm_has_no_reason_that_is_taken_for_another() -> None:
    names = installed("job_state_reason_string")
    if not names:
        pytest.skip("there is no Slurm on this machine")
    new = set(names) - set(recorded("reasons.txt"))
    assert {explained(name)[0].name for name in new} <= {"unknown"}, new
    controller = CONTROLLER.read_bytes()
    assert [text for text in recorded("texts.txt") if text.encode() not in controller] == []


def test_each_state_of_slurm_is_one_of_a_living_job_or_has_a_sentence() -> None:
    for state in [*recorded("states.txt"), *installed("job_state_string", flags=True)]:
        ended = state == "COMPLETED" or state == "FAILED" or diagnoses.of_job(state, "0:0") is not None
        assert (state in slurm_client.LIVING) != ended, state


def test_only_a_job_that_waits_is_explained() -> None:
    assert diagnoses.explain(Job("7", "RUNNING", "Priority")) is None
    assert diagnoses.explain(Job("7", "PENDING", "")) is None
    held = diagnoses.explain(Job("7", "REQUEUE_HOLD", "job requeued in held state"))
    assert held is not None and held[0].alert


def status(reason: str, number: int) -> NodeStatus:
    row, sentence = explained(reason)
    name = f"stage{number}"
    alert = row.name if row.alert else None
    return NodeStatus(name, f"{name}-0", "pending", reason=sentence, alert=alert)


@pytest.mark.parametrize("line", TABLE.read_text().splitlines())
def test_what_needs_a_person_is_one_alert(line: str) -> None:
    """One for all jobs that wait for the same."""
    reason, alert, sentence = line.split("\t")
    stages = [status(reason, number) for number in range(3)]
    found = list(alerts._of_jobs(stages))
    assert len(found) == bool(alert)
    for each in found:
        assert each.text == f"stage stage0: {sentence}; the same holds for 2 stages more"
