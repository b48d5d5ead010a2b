"""The gates on what training taught: over all held-out text, and on each source."""

from __future__ import annotations

from pathlib import Path

import pytest
import release_world as world

from release import build as builder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(world.build_input(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(
    "phase, scores, gate",
    [
        ("base", (9.0, 4), "pretraining_lowers_bits_per_byte"),
        ("mid", (3.0, 4), "midtraining_raises_accuracy"),
        ("mid", (3.2, 15), "midtraining_keeps_bits_per_byte"),
    ],
)
def test_training_that_does_not_teach_is_refused(release: Path, tmp_path: Path, phase: str, scores, gate: str) -> None:
    from release import facts, gates

    data = facts.data_facts(release / "dataset")
    limits = {"min_accuracy_gain": 0.0, "bits_per_byte_tolerance": 0.05}
    context = gates.Context(release, {}, limits, data, {}, [])
    assert all(g.ok for g in gates.learning(context))
    world.make_evaluation(tmp_path, *scores)
    data["evaluation"][phase] = facts.scores_of(tmp_path)
    assert [g.name for g in gates.learning(context) if not g.ok] == [gate]


def test_one_source_that_gets_worse_is_refused(release: Path) -> None:
    from release import facts, gates

    def judged(phase: str, source: str, value: float) -> list[str]:
        data = facts.data_facts(release / "dataset")
        data["evaluation"][phase]["bits_per_byte"][source]["value"] = value
        limits = {"min_accuracy_gain": 0.0, "bits_per_byte_tolerance": 0.05}
        failed = [g for g in gates.learning(gates.Context(release, {}, limits, data, {}, [])) if not g.ok]
        assert all(source in g.detail for g in failed)
        return [g.name for g in failed]

    assert judged("mid", "sums", 3.2) == ["midtraining_keeps_bits_per_byte"]
    assert judged("mid", "sums", float("nan")) == ["midtraining_keeps_bits_per_byte"]
    assert judged("mid", "sums", 3.09) == []
    assert judged("init", "sums", 3.0) == ["pretraining_lowers_bits_per_byte"]

    data = facts.data_facts(release / "dataset")
    del data["order"]["pretrain"]["parts"][0]["by_source"][
        "sums"
    ]  # pre-training need not improve on what it never read
    data["evaluation"]["init"]["bits_per_byte"]["sums"]["value"] = 3.0
    limits = {"min_accuracy_gain": 0.0, "bits_per_byte_tolerance": 0.05}
    assert all(g.ok for g in gates.learning(gates.Context(release, {}, limits, data, {}, [])))
    del data["evaluation"]["mid"]["bits_per_byte"]["sums"]
    assert [g.ok for g in gates.learning(gates.Context(release, {}, limits, data, {}, []))] == [True, True, False]
