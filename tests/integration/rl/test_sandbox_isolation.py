"""Any program after any program, or beside it, in one pool: how it ends is how it ends in a fresh pool."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stages.rl.sandbox import Outcome
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP, PARTS, copy, pool_of, program_of  # noqa: F401 - a fixture

pytestmark = [
    NEEDS_BUBBLEWRAP,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="calls the kernel by x86-64's numbers"),
]

PROGRAMS = st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5, unique=True).map(tuple)
OBSERVE = (
    *(name for name in PARTS if name.startswith("my ")), "devices", "libraries", "locks", "hints", "pages", "abstract socket", "ports",
    "system v", "keys", "names", "room for processes",
)  # fmt: skip
"""Parts that see what the others would leave behind."""


def ending(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.status, outcome.exit_code, outcome.stdout


@pytest.fixture(scope="module", params=["here", "user"])
def pools(request: pytest.FixtureRequest, copy: Path) -> Iterator[Any]:  # noqa: F811
    """(a pool of one worker, a pool of two, fresh(names): the program's ending in a pool of its own)."""

    @cache
    def fresh(names: tuple[str, ...]) -> tuple[Any, ...]:
        with pool_of(request.param, copy, 1) as alone:
            return ending(alone.run([program_of(names)])[0])

    with pool_of(request.param, copy, 1) as pool, pool_of(request.param, copy, 2) as pair:
        yield pool, pair, fresh


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(first=PROGRAMS, second=PROGRAMS)
def test_no_verdict_depends_on_the_program_before_or_beside(pools: Any, first: Any, second: Any) -> None:
    pool, pair, fresh = pools
    pool.run([program_of(first)])
    assert ending(pool.run([program_of(second)])[0]) == fresh(second)
    assert [ending(o) for o in pair.run([program_of(first), program_of(second)])] == [fresh(first), fresh(second)]


def test_nothing_is_to_be_seen_of_any_part(pools: Any) -> None:
    pool, _, fresh = pools
    expected = fresh(OBSERVE)
    assert expected[0] == "ok" and expected[2].count("\n") == len(OBSERVE), expected
    names = list(PARTS)
    for batch in (names[n : n + 6] for n in range(0, len(names), 6)):
        pool.run([program_of([name]) for name in batch])
        assert ending(pool.run([program_of(OBSERVE)])[0]) == expected, f"after {', '.join(batch)}"
