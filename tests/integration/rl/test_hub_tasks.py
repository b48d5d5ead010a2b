"""The task source `hub` over HTTP: rows of the local Hub become tasks with checked answers; and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import home_folder
from stages.rl.protocols import Response, make_verifier
from stages.rl.rollout.tasks import TasksConfig
from tests.fixtures.hub_fixtures import REPO, Hub, hub
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

__all__ = ["hub"]

SUMS = [{"question": f"How much is {n} plus {n}?", "answer": f"It is twice {n}.\n#### {2 * n}"} for n in range(8)]
CODE = [
    {"text": "Double a number.", "code": "def double(x):\n    return 2 * x", "setup": "import math",
     "tests": ["assert double(2) == 4", "assert math.isclose(double(0.5), 1.0)"]},
    {"text": "Sort the tuple.", "code": "def order(t):\n    return tuple(sorted(t))", "setup": "",
     "tests": ["assert tuple(order((2, 1))) == (1, 2)", "assert tuple(order((5, 3))) == (3, 5)"]},
    {"text": "Its solution is wrong.", "code": "def wrong(x):\n    return x", "setup": "", "tests": ["assert wrong(1) == 2"]},
    {"text": "Its test passes a function.", "code": "def call(f):\n    return f()", "setup": "",
     "tests": ["assert call(lambda: 1) == 1"]},
    {"text": "Its test passes what is no number.", "code": "def half(x):\n    return x / 2", "setup": "",
     "tests": ["assert not abs(half(3) - 1.5) > 0.01"]},
    {"text": "Its one test says what to return.", "code": "def cube(x):\n    return x ** 3", "setup": "", "tests": ["assert cube(2) == 8"]},
    {"text": "Two functions.", "code": "def a(): return 1\ndef b(): return 1", "setup": "", "tests": ["assert a() == b()"]},
]  # fmt: skip


def settings(commit: str, **changes: Any) -> dict[str, Any]:
    return {
        "source": "hub", "repo": REPO, "revision": commit, "pattern": "data/train*", "format": "jsonl",
        "verifier": "math-verify", "kind": "sums", "count": 5, "license": "MIT", "license_evidence": "the card",
        "question_field": "question", "answer_field": "answer", "answer_after": "####", **changes,
    }  # fmt: skip


def source(commit: str, **changes: Any) -> Any:
    return TasksConfig.model_validate({"sources": [settings(commit, **changes)], "seed": 0}).sources[0]


def commit_rows(hub: Hub, rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return hub.commit(
        {"data/train.jsonl": lines.encode(), "data/test.jsonl": b'{"question": "never", "answer": "1"}\n'}
    )


def test_mathematics(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows for the same commit, though the branch has moved; each with its place, and an answer that scores."""
    rows = [*SUMS, {"question": "Unanswered?", "answer": "nobody knows"}, {"question": None, "answer": "#### 1"},
            {"question": "What does <think> mean?", "answer": "#### 1"}]  # fmt: skip
    commit = commit_rows(hub, rows)
    assert len(list(source(commit, count=50).rows(0, set()))) == len(SUMS)
    tasks = list(source(commit).rows(0, set()))
    assert list(home_folder().glob("hub-slots/*/lease.*")), "reading took a slot"
    # The environment of a stage turns downloads off.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit_rows(hub, [])
    assert tasks == list(source(commit).rows(0, set())) != list(source(commit).rows(1, set()))
    assert [task["id"] for task in tasks] == [f"sums/1/{n:06d}" for n in range(5)]
    verifier = make_verifier("math-verify")
    for task in tasks:
        path, _, line = task["origin"].partition(f"/datasets/{REPO}/blob/{commit}/")[2].rpartition(":")
        stated = rows[int(line) - 1]
        assert path == "data/train.jsonl" and task["license"] == "MIT"
        assert task["question"] == task["responses_create_params"]["input"][0]["content"] == stated["question"]
        answers = [Response.parse(text, finished=True) for text in (f"It is {task['expected_answer']}.", "It is -1.")]
        assert [parts["reward"] for parts in verifier.score([(task, answer) for answer in answers])] == [1.0, 0.0]
    verifier.close()


@NEEDS_BUBBLEWRAP
def test_code_with_tests(hub: Hub) -> None:
    """Of seven rows two are tasks: a solution that fails, a test that cannot leave a process, one that any function with
    `nan` passes, one that the value in the question passes, and one of two functions are left out."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(CODE), sink)
    commit = hub.commit({"data/train-0.parquet": sink.getvalue()})
    fields = {"question_field": "text", "answer_field": "tests", "solution_field": "code", "setup_field": "setup"}
    code = source(
        commit, format="parquet", verifier="python-tests", kind="code", answer_after=None, pattern="*.parquet", **fields
    )
    tasks = {task["entry_point"]: task for task in code.rows(0, set())}
    assert set(tasks) == {"double", "order"}
    double = tasks["double"]
    assert "Name the function double." in double["responses_create_params"]["input"][0]["content"]
    verifier = make_verifier("python-tests")
    answers = ["```python\ndef double(x):\n    return x + x\n```", "```python\ndef double(x):\n    return x\n```"]
    scored = verifier.score([(double, Response.parse(answer, finished=True)) for answer in answers])
    verifier.close()
    assert [parts["reward"] for parts in scored] == [1.0, 0.0]


def test_what_is_refused(hub: Hub) -> None:
    commit = commit_rows(hub, SUMS)
    for changes, words in (
        ({"revision": "main"}, "revision"),
        ({"verifier": "python-tests", "answer_after": None}, "solution_field is missing"),
        ({"setup_field": "setup"}, "setup_field = setup has no effect with verifier = math-verify"),
    ):
        with pytest.raises(ValueError, match=words):
            source(commit, **changes)
    with pytest.raises(AtomError, match=f"of 8 rows of {REPO} only 0 are tasks, with a question in question"):
        list(source(commit, answer_after="ANSWER:").rows(0, set()))
    with pytest.raises(RecipeError, match=r"has no file that matches 'none\*'"):
        list(source(commit, pattern="none*").rows(0, set()))
    damaged = commit_rows(hub, SUMS[::-1])
    size = sum(len(json.dumps(row)) + 1 for row in SUMS)
    hub.damage("data/train.jsonl", b"{}".ljust(size))
    with pytest.raises(AtomError, match="but is pinned to"):
        list(source(damaged).rows(0, set()))


def test_the_key_holds_the_commit_and_not_the_folder() -> None:
    one, two = source("0" * 40), source("0" * 40, path="/elsewhere")
    assert identity(one) == identity(two) != identity(source("1" * 40))
