"""Traced programs: Python computes their intermediate values and their output alike."""

from __future__ import annotations

import contextlib
import io
import random
from itertools import pairwise
from typing import Any

import pytest

from stages.tasks.synthetic import problems


@pytest.mark.parametrize("level", [None, *range(1, 9)])
def test_python_executes_a_traced_program_alike(level: int | None) -> None:
    rng = random.Random(7)
    for _ in range(100):
        problem = problems.trace(rng, level)
        *assignments, last = problem.question.split(";")
        variables: dict[str, Any] = {}
        values, printed = [], io.StringIO()
        for line in assignments:
            exec(line, variables)  # noqa: S102 - written by this project
            values.append(f"{line[0]}={variables[line[0]]}")
        with contextlib.redirect_stdout(printed):
            exec(last, variables)  # noqa: S102
        assert problem.steps.split(";") == values[1:-1] and printed.getvalue().strip() == problem.answer
        assert len(values) - 2 in ([level] if level else range(1, 5))
        assert all(before[2:] != after[2:] for before, after in pairwise(values))
    with pytest.raises(ValueError, match="trace has the levels 1 to 8"):
        problems.trace(rng, 9)
