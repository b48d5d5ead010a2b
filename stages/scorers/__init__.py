"""Scorers: functions from an answer to a reward, or to right or wrong. Each version is one frozen file.

    SCORERS["exact", "1"](row, answer, finished) -> {"reward": 1.0, "finished": 1.0}

A file is never edited after its version has scored an output: published outputs name the scorer and its version, and
`atom verify` scores them again with that file while it exists. `tests/unit/test_scorers.py` pins every digest. A new
version is a new file, one line in SCORERS and one in LATEST. A frozen file imports the standard library only.

Scorers with further requirements (a sandbox, other packages, a model) are in stages/rl; they have versions as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stages.scorers import courtesy_v1, exact_v1, instructions_v1, problems_v1, response_v1

Score = Callable[[Mapping[str, Any], str, bool], dict[str, float]]
"""(row of the task, what `answer_of` takes of the text, whether it ended by itself) -> parts by name.

`reward` is the total.
"""
PROBLEMS = ("problems", "1")
"""Scores outputs of base models; it takes the expected answer and the whole output."""
SCORERS: dict[tuple[str, str], Score] = {
    ("courtesy", "1"): courtesy_v1.score,
    ("exact", "1"): exact_v1.score,
    ("instructions", "1"): instructions_v1.score,
}
"""The scorers of conversations, by name and version."""
LATEST = {"courtesy": "1", "exact": "1", "instructions": "1"}
"""The versions that score new outputs."""
answer_of = response_v1.answer_of
"""Returns the part of a text that scorers of conversations score."""
answer_of_problem, score_problem = problems_v1.answer_of, problems_v1.score


def digest(name: str, version: str) -> str:
    """SHA-256 of the file of a scorer."""
    return hashlib.sha256(Path(__file__).with_name(f"{name}_v{version}.py").read_bytes()).hexdigest()
