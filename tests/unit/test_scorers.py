"""Scorers are frozen: the digest of every version is pinned, and every version still scores as it did."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

from stages import scorers
from stages.rl.protocols import Response, make_verifier

FOLDER = Path(scorers.__file__).parent
FROZEN = {
    "courtesy_v1": "2e9bbb628630aa0f34143b46d40565802b4766d479cbf41160f18801366e2383",
    "exact_v1": "066a604c0731c14a478321ebe966d8cd1b4fad02ece22735bc13113026bba5dc",
    "instructions_v1": "3fe8f19531c994d5ab15893132aac61702db8bfec40b6840bcee012a2f7c0381",
    "problems_v1": "fffb07d89c2057bfce019690c623e5f15d89a72a8409699bd9bfddf856c71703",
    "response_v1": "76448209380258deb45a2073a611438bea25c6ca0178ba2e233645afbb7857cd",
}
"""A line is only ever added: a published score names the file that gave it."""


def test_no_version_of_a_scorer_is_changed_or_removed() -> None:
    digests = {path.stem: scorers.digest(*path.stem.rsplit("_v", 1)) for path in FOLDER.glob("*_v*.py")}
    assert digests == FROZEN, "a frozen scorer was edited; put the change into a new version, and pin that"


def test_frozen_files_import_the_standard_library_only() -> None:
    for path in FOLDER.glob("*_v*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] in sys.stdlib_module_names for name in names), path.name


def test_new_outputs_are_scored_by_the_latest_version() -> None:
    for name, version in scorers.LATEST.items():
        known = [int(number) for other, number in scorers.SCORERS if other == name]
        assert int(version) == max(known), name
        current = make_verifier(name)
        assert (current.name, current.version) == (name, version)


ROWS: dict[str, dict[str, Any]] = {
    "exact": {"id": "a", "expected_answer": "933"},
    "instructions": {"id": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
    "courtesy": {"id": "a", "act": "thank", "who": "baker", "what": "bread"},
}
TEXTS = [
    "347+586:7+6=13:933",
    "<think>\n9, 3\n</think>\n\n933",
    "<think>933",
    "Dear baker, thank you for the bread. Have a nice day!",
    "Dear nurse, thank you for the bread.",
    "",
]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_verifier_scores_as_its_frozen_file(name: str) -> None:
    """What a release states is what verification computes again."""
    current = make_verifier(name)
    scorer = name, current.version
    for finished in (True, False):
        responses = [Response.parse(text, finished) for text in TEXTS]
        earned = current.score([(ROWS[name], response) for response in responses])
        rescored = [scorers.SCORERS[scorer](ROWS[name], scorers.answer_of(text), finished) for text in TEXTS]
        assert earned == rescored


@pytest.mark.parametrize(
    ("name", "text", "reward"),
    [
        ("exact", TEXTS[0], 1.0),
        ("exact", TEXTS[1], 1.0),
        ("exact", TEXTS[2], 0.0),
        ("courtesy", TEXTS[3], 1.0),
        ("courtesy", TEXTS[4], 0.2 / 3),
        ("instructions", TEXTS[3], 0.0),
        ("instructions", TEXTS[0], 1.0),
    ],
)
def test_version_1_scores_as_when_it_was_frozen(name: str, text: str, reward: float) -> None:
    scorer = (name, "1")
    parts = scorers.SCORERS[scorer](ROWS[name], scorers.answer_of(text), True)
    assert parts["reward"] == pytest.approx(reward)
    assert scorers.SCORERS[scorer](ROWS[name], scorers.answer_of(text), False)["reward"] == 0.0


def test_the_scorer_of_evaluation_problems() -> None:
    assert scorers.score_problem("933", "347+586:7+6=13:933<|endoftext|>:1") == 1
    assert scorers.score_problem("933", "9330") == 0
