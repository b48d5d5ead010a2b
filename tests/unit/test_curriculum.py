"""The curriculum asks where there is signal, leaves no level out, and goes on where a checkpoint left it."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pipeline.core.errors import RecipeError
from stages.rl.rollout import curriculum as module
from stages.rl.rollout.curriculum import Curriculum
from stages.tasks import bin_of, to_row

ROWS = [
    to_row(f"{kind}/{level}/{n}", f"{kind} {level} {n}", "exact", kind, level)
    for kind, levels in (("add", (0, 1, 2)), ("sort", (3,)))
    for level in levels
    for n in range(10)
]


def test_a_uniform_one_draws_every_bin_alike() -> None:
    curriculum = Curriculum(ROWS, "test", 0, uniform=True)
    drawn = Counter(bin_of(row) for step in range(200) for row in curriculum.draw(8, step, 0))
    assert set(drawn) == {bin_of(row) for row in ROWS} and min(drawn.values()) > 0.8 * max(drawn.values())


@pytest.fixture
def newest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass rate of a bin is that of its newest group."""
    monkeypatch.setattr(module, "NEWEST", 1.0)


def test_weights_are_size_times_the_variance_of_a_coin_and_never_nothing(newest_alone: None) -> None:
    curriculum = Curriculum([*ROWS, to_row("sort/3/10", "sort 3 10", "exact", "sort", 3)], "test", 0)
    add, sort = ROWS[0], ROWS[-1]
    assert curriculum.weights() == {"add/0": 10, "add/1": 10, "add/2": 10, "sort/3": 11}
    curriculum.update(add, 0.5)
    curriculum.update(sort, 1.0)
    assert curriculum.weights() == {"add/0": 10, "add/1": 10, "add/2": 10, "sort/3": pytest.approx(0.55)}
    curriculum.update(add, 0.0)
    assert curriculum.weights()["add/0"] == pytest.approx(0.5)
    drawn = Counter(bin_of(row) for step in range(200) for row in curriculum.draw(8, step, 0))
    assert set(drawn) == {"add/0", "add/1", "add/2", "sort/3"}, "a level of which nothing passes stops no other"


def test_signal_is_asked_more_often(newest_alone: None) -> None:
    curriculum = Curriculum(ROWS, "test", 0)
    curriculum.update(ROWS[0], 0.5)
    curriculum.update(ROWS[-1], 0.95)
    drawn = Counter(bin_of(row) for step in range(200) for row in curriculum.draw(8, step, 0))
    assert drawn["sort/3"] / drawn["add/0"] == pytest.approx(0.19, abs=0.04)


def test_a_bin_is_walked_through_before_anything_comes_again() -> None:
    curriculum = Curriculum(ROWS, "test", 0)
    names = [row["id"] for step in range(10) for row in curriculum.draw(4, step, 0) if bin_of(row) == "sort/3"]
    epochs = [names[i : i + 10] for i in range(0, len(names) - 9, 10)]
    assert epochs and all(len(set(epoch)) == 10 for epoch in epochs)
    assert len(epochs) == 1 or epochs[0] != epochs[1]


def test_it_goes_on_from_its_state() -> None:
    one, other = (Curriculum(ROWS, "test", 0) for _ in range(2))
    for step in range(5):
        for row in one.draw(4, step, 0):
            one.update(row, step / 5)
    other.load(json.loads(json.dumps(one.copy())))
    for step in range(5, 10):
        rows = one.draw(4, step, 0)
        assert rows == other.draw(4, step, 0)
        for row in rows:
            one.update(row, 0.5)
            other.update(row, 0.5)
    assert one.state == other.state
    snapshot = one.copy()
    one.draw(4, 11, 0)
    assert snapshot != one.state, "a copy does not change with the curriculum"


def test_no_task_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match="no task to draw from"):
        Curriculum([], "test", 0)


def test_the_exponent_of_size_is_between_all_bins_alike_and_in_proportion() -> None:
    rows = [
        to_row(f"{kind}/{n}", f"{kind} {n}", "exact", kind, 0)
        for kind, k in (("few", 4), ("many", 16))
        for n in range(k)
    ]
    weights = [Curriculum(rows, "test", 0, size_exponent=power).weights() for power in (0.0, 0.5, 1.0)]
    assert [w["many/0"] / w["few/0"] for w in weights] == [1, 2, 4]
