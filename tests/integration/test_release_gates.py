"""The gates on what training taught: over all held-out text, and on each source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from release.assembly.data_facts import DataFacts, read_data_facts
from release.assembly.score_facts import CONTAMINATION, compute_scores
from release.checks import gates
from release.checks.check import BuildContext
from tests.fixtures import release_fixtures

LIMITS = {"min_accuracy_gain": 0.0, "bits_per_byte_tolerance": 0.05}
LEARNING = ("pretraining_lowers_bits_per_byte", "midtraining_raises_accuracy", "midtraining_keeps_bits_per_byte")
POST_TRAINING = ("rlvr_raises_pass_at_1", "rlhf_keeps_skills", "dpo_is_preferred", "contamination_report")


def run(names: tuple[str, ...], context: BuildContext) -> list[gates.GateResult]:
    """What came of these gates, as far as they are asked of a release."""
    return [result for name in names if (result := gates.run_gate(name, context)) is not None]


def failures(names: tuple[str, ...], context: BuildContext) -> dict[str, str]:
    """{gate: detail} of those that failed."""
    return {result.name: result.detail for result in run(names, context) if not result.ok}


@pytest.mark.parametrize(
    "phase, scores, gate",
    [
        ("base", (9.0, 4), "pretraining_lowers_bits_per_byte"),
        ("mid", (3.0, 4), "midtraining_raises_accuracy"),
        ("mid", (3.2, 15), "midtraining_keeps_bits_per_byte"),
    ],
)
def test_training_that_does_not_teach_is_refused(built: Path, tmp_path: Path, phase: str, scores, gate: str) -> None:
    data = read_data_facts(built / "dataset")
    context = BuildContext(built, release_fixtures.release_info(), LIMITS, data)
    assert len(run(LEARNING, context)) == len(LEARNING) and not failures(LEARNING, context)
    release_fixtures.make_evaluation(tmp_path, *scores)
    data.evaluation[phase] = compute_scores(tmp_path)
    assert list(failures(LEARNING, context)) == [gate]


def test_one_source_that_gets_worse_is_refused(built: Path) -> None:
    def judged(phase: str, source: str, value: float) -> list[str]:
        data = read_data_facts(built / "dataset")
        data.evaluation[phase]["bits_per_byte"][source]["value"] = value
        failed = failures(LEARNING, BuildContext(built, release_fixtures.release_info(), LIMITS, data))
        assert all(source in detail for detail in failed.values())
        return list(failed)

    assert judged("mid", "sums", 3.2) == ["midtraining_keeps_bits_per_byte"]
    assert judged("mid", "sums", float("nan")) == ["midtraining_keeps_bits_per_byte"]
    assert judged("mid", "sums", 3.09) == []
    assert judged("init", "sums", 3.0) == ["pretraining_lowers_bits_per_byte"]

    data = read_data_facts(built / "dataset")
    del data.order["pretrain"].parts[0].by_source["sums"]  # pre-training need not improve on what it never read
    data.evaluation["init"]["bits_per_byte"]["sums"]["value"] = 3.0
    assert not failures(LEARNING, BuildContext(built, release_fixtures.release_info(), LIMITS, data))
    del data.evaluation["mid"]["bits_per_byte"]["sums"]
    assert list(failures(LEARNING, BuildContext(built, release_fixtures.release_info(), LIMITS, data))) == [
        "midtraining_keeps_bits_per_byte"
    ]


def chat_context(folder: Path, planted: int = 40, contaminated: int = 0, **changed: tuple[float, float]):
    """A release with these (value, standard error) of pass@1 by model and of the win rate, and a contamination report."""
    right = {"sft": (0.4, 0.02), "rlvr": (0.6, 0.01), "dpo": (0.59, 0.01), **changed}
    win, se = right.pop("win", (0.6, 0.02))
    test = {name: {"problems_all": {"samples": {"accuracy": {"value": v, "se": e}}}} for name, (v, e) in right.items()}
    rate = {"value": win, "low": win - 1.96 * se, "high": win + 1.96 * se}
    counts = {"clean": 100 - contaminated, "overlap": 0, "contaminated": contaminated}
    detector = {"recall": {"planted": planted, "found": round(0.95 * planted)}}
    release_fixtures.write_json(
        folder / "dataset" / CONTAMINATION, {"detector": detector, "items": {"test": counts, "fresh": counts}}
    )
    data = DataFacts(chat={"test": test, "preferences": {"dpo": {"win_rate": rate}}})
    limits = {"chat": {"min_gain": 0.1, "min_win_rate": 0.5, "skill_tolerance": 0.05}}
    return BuildContext(folder, release_fixtures.release_info(), limits, data)


@pytest.mark.parametrize(
    "changed, gate",
    [
        ({}, None),
        ({"rlvr": (0.45, 0.01), "dpo": (0.45, 0.01)}, "rlvr_raises_pass_at_1"),
        ({"rlvr": (0.52, 0.01), "sft": (0.4, 0.03), "dpo": (0.52, 0.01)}, "rlvr_raises_pass_at_1"),  # no sure gain
        ({"dpo": (0.54, 0.01)}, "rlhf_keeps_skills"),
        ({"dpo": (0.56, 0.01)}, "rlhf_keeps_skills"),  # perhaps within the bound, perhaps not
        ({"win": (0.53, 0.02)}, "dpo_is_preferred"),
        ({"planted": 0}, "contamination_report"),
        ({"contaminated": 6}, "contamination_report"),
    ],
    ids=str,
)
def test_post_training_that_does_not_teach_is_refused(tmp_path: Path, changed, gate: str | None) -> None:
    context = chat_context(tmp_path, **changed)
    assert [result.name for result in run(POST_TRAINING, context)] == list(POST_TRAINING)
    failed = failures(POST_TRAINING, context)
    assert list(failed) == ([gate] if gate else []), failed
    assert all("run again" in detail or "items" in detail for detail in failed.values())


def test_a_detector_that_misses_and_a_fresh_set_that_does_not_follow_are_refused(tmp_path: Path) -> None:
    context = chat_context(tmp_path)
    path = tmp_path / "dataset" / CONTAMINATION
    report = json.loads(path.read_text())
    report["detector"]["recall"]["found"] = 35
    path.write_text(json.dumps(report))
    failed = failures((*POST_TRAINING, "fresh_set"), context)
    assert set(failed) == {"fresh_set", "contamination_report"} and "misses too much" in failed["contamination_report"]


def test_no_contamination_report_is_refused(tmp_path: Path) -> None:
    context = chat_context(tmp_path)
    (tmp_path / "dataset" / CONTAMINATION).unlink()
    assert "no contamination report" in failures(POST_TRAINING, context)["contamination_report"]


def test_a_release_without_conversations_has_no_gates_on_them(built: Path) -> None:
    context = BuildContext(built, release_fixtures.release_info(), LIMITS, read_data_facts(built / "dataset"))
    assert run((*POST_TRAINING, "fresh_set"), context) == []
