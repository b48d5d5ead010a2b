"""Tasks in long texts that need several statements: what an independent reader answers is the answer, items have their
length, evaluation shares no key with training, and scores reach the card."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact
from release.assembly.score_facts import compute_scores
from release.cards import tables
from stages.data import acquire
from stages.data.sources import Source
from stages.data.synthetic import passkeys, retrieval
from stages.evaluation import long_context, model_evaluation
from stages.evaluation.long_context import ContextSection, RetrievalSection
from stages.evaluation.pieces import compute
from tests.fixtures.long_context_fixtures import CONFIG, SECTION, inputs, loaded, long_documents  # noqa: F401
from tests.fixtures.passkey_fixtures import passkey_source
from tests.fixtures.run_fixtures import at_length

pytestmark = pytest.mark.numeric

TASKS = {"lengths": [700, 900], "per_length": 2}
"""Lengths in bytes, which are the tokens of the test's tokenizer."""
TEXTS = [(f"Some words of text {n}, and further ones.\nA line. " * 8, f"t{n}.py") for n in range(50)]


def solve(text: str) -> str:
    """The answer to the question at the end of a text, from its statements alone. Written apart from the generator."""
    body, _, question = text.rpartition("\n")
    keys = re.findall(r"\nThe pass key of the (\w+) is (\d+)\.\n", body)
    if match := re.fullmatch(r"The pass keys of the (\w+), in the order of the text, are", question):
        return ", ".join(key for name, key in keys if name == match[1])
    if match := re.fullmatch(r"The pass key of the (\w+) is", question):
        links = dict(re.findall(r"\nThe (\w+) has the pass key of the (\w+)\.\n", body))
        name = match[1]
        while name in links:
            name = links[name]
        return dict(keys)[name]
    if question == "What was delivered most often is the":
        ((first, most), (_, second), *_) = Counter(re.findall(r"\nOne (\w+) was delivered\.\n", body)).most_common()
        if most == second:
            raise ValueError("no thing is the most common one")
        return first
    coins = dict(re.findall(r"\nUnder the (\w+) are (\d) coins\.\n", body))
    match = re.fullmatch(r"The coins under the (\w+) and under the (\w+) are together", question)
    assert match is not None
    return str(sum(int(coins[name]) for name in match.groups()))


def pair_of(text: str) -> tuple[str, str] | None:
    names = re.search(r"The coins under the (\w+) and under the (\w+) are together", text)
    return (names[1], names[2]) if names else None


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_documents_can_be_answered_and_never_from_one_statement_alone(kind: retrieval.Kind) -> None:
    rng = random.Random(1)
    for text, prompt_chars, place in retrieval.draw(TEXTS, 60, (900, 3000), [kind], rng):
        assert text[prompt_chars:] == f" {solve(text[:prompt_chars])}" and place in {name for _, name in TEXTS}
        assert 900 <= len(text) <= 3000
        assert not any(passkeys.is_for_evaluation(key) for key in re.findall(r"\d{6}", text))
        if pair := pair_of(text):
            assert not retrieval.is_pair_for_evaluation(*pair)
    for evaluation in (False, True):
        tasks = [retrieval.draw_task(kind, rng, evaluation) for _ in range(60)]
        for task in tasks:
            text = "".join(task.statements) + task.question
            assert f" {solve(text)}" == task.answer
            keys = re.findall(r"\d{6}", text)
            assert {passkeys.is_for_evaluation(key) for key in keys} <= {evaluation}
            if pair := pair_of(text):
                assert retrieval.is_pair_for_evaluation(*pair) == evaluation
            others = [text for n, text in enumerate(task.statements) if n not in task.needed]
            if kind != "most_common":  # the others do not hold the answer
                assert task.answer.strip().split(", ")[0] not in re.findall(r"\d{6}", "".join(others))
        needed = Counter(place for task in tasks for place in task.needed[:1])
        assert len(needed) > 1  # no fixed place gives the answer away


def test_items_have_their_length_and_are_the_same_twice(loaded: Any) -> None:
    section = RetrievalSection(**TASKS)
    filler = loaded.encode("abcdefghi " * 200)
    for length in section.lengths:
        items = list(long_context.retrieval_items(section, length, loaded.encode, filler))
        assert items == list(long_context.retrieval_items(section, length, loaded.encode, filler))
        assert len({item[0] for item in items}) == len(items) == 2 * len(retrieval.KINDS)
        for name, kind, depth, answer, ids, answer_ids in items:
            text = loaded.tokenizer.decode(ids)
            assert len(ids) == length and name.startswith(f"{kind}/{length}/") and 0 <= depth <= 1
            assert ids[-len(answer_ids) :] == answer_ids == loaded.encode(f" {answer}")
            assert solve(text.removesuffix(f" {answer}")) == answer
            assert all(passkeys.is_for_evaluation(key) for key in re.findall(r"\d{6}", text))


class Solver:
    """Answers from the last `reach` tokens before the answer."""

    context = 10_000

    def __init__(self, loaded: Any, reach: int) -> None:
        self.loaded, self.reach = loaded, reach

    def likeliest(self, ids: Any, count: int) -> list[int]:
        text = self.loaded.tokenizer.decode(ids[:-count][-self.reach :])
        try:
            answer = self.loaded.encode(f" {solve(text)}")
        except (KeyError, ValueError):
            answer = []
        return [*answer, *[0] * count][:count]


def test_a_reader_earns_by_its_reach(loaded: Any, tmp_path: Path) -> None:
    """Scores and card of a reader of the whole text, and of one that sees only its end."""
    section = ContextSection(**SECTION, retrieval={**TASKS, "per_length": 3})
    rows: dict[str, Any] = {}
    for name, reach in (("mid", 120), ("long-1", 10_000)):
        pieces = long_context.pieces(section, loaded.tokenizer, loaded.encode, long_documents)
        wanted = [piece for piece in pieces if piece.name.startswith("retrieval-")]
        assert [piece.name for piece in wanted] == ["retrieval-700", "retrieval-900"] and section.pieces == len(pieces)
        solver: Any = Solver(loaded, reach)
        (tmp_path / name).mkdir()
        answers = [row for part in compute(wanted, tmp_path / name, lambda solver=solver: solver) for row in part]
        rows[name] = {"retrieval": long_context.summarize_retrieval(answers)}
    assert all(row["value"] == 1.0 for task in rows["long-1"]["retrieval"].values() for row in task.values())
    blind = [row["value"] for task in rows["mid"]["retrieval"].values() for row in task.values()]
    assert sum(blind) / len(blind) < 0.6
    card = tables.retrieval(rows)
    assert card[0] == "| task | tokens of the text | mid-training | long context 1 |"
    assert any(line.startswith("| multi key | 700 |") and line.endswith("| 1.000±0.000 |") for line in card)


def test_the_stage_seals_the_table_and_its_scores(run_stage: Any, inputs: dict[str, Artifact]) -> None:
    context = {**SECTION, "retrieval": {**TASKS, "kinds": ["sum", "multi_key"], "lengths": [600], "per_length": 1}}
    artifact = run_stage(model_evaluation.STAGE, {**CONFIG, "context": context}, inputs)
    rows = pq.read_table(artifact / "retrieval.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["sum/600/000", "multi_key/600/000"]
    scores = artifact.json("scores.json")
    assert {task: row["600"]["n"] for task, row in scores["retrieval"].items()} == {"sum": 1, "multi_key": 1}
    assert compute_scores(artifact.path) == scores
    without = model_evaluation.EvaluateConfig(**CONFIG, context=SECTION)
    assert "retrieval" not in identity(without)["context"]  # keys of earlier recipes stay


def test_bad_sections_cost_one_sentence(loaded: Any, tmp_path: Path) -> None:
    for lengths, words in (([100], r"retrieval.lengths names 100 tokens, but a task of \w+ alone takes \d+; leave"),
                           ([9000], "names 9000 tokens, but all held-out text has")):  # fmt: skip
        section = ContextSection(**SECTION, retrieval={**TASKS, "lengths": lengths})
        pieces = long_context.pieces(section, loaded.tokenizer, loaded.encode, long_documents)
        wanted = [piece for piece in pieces if piece.name.startswith("retrieval")]
        solver: Any = Solver(loaded, 1)
        with pytest.raises(AtomError, match=words):
            list(compute(wanted, tmp_path / words[:20], lambda solver=solver: solver))
    with pytest.raises(ValueError, match="kinds names a kind twice"):
        RetrievalSection(**TASKS, kinds=["sum", "sum"])
    with pytest.raises(ValueError, match=r"lengths = \[900, 700\] are not increasing"):
        RetrievalSection(per_length=1, lengths=[900, 700])


@at_length("data-plane", 17)
def test_long_documents_are_made_from_the_library(run_stage: Any) -> None:
    reader = {"reader": "retrieval", "count": 10, "min_chars": 2000, "max_chars": 9000}
    settings = passkey_source(**reader)
    first, second = (run_stage(acquire.STAGE, {"source": settings, "seed": 3}, {}) for _ in range(2))
    assert first.digest == second.digest
    rows = pq.read_table(first / "documents/part-00000.parquet").to_pylist()
    assert len(rows) == 10 and all(2000 <= len(row["text"]) <= 9000 for row in rows)
    for row in rows:
        assert row["text"][row["prompt_chars"] :] == f" {solve(row['text'][: row['prompt_chars']])}"
    for change, words in (({"min_chars": 100}, "min_chars = 100 leaves no room for the statements"),
                          ({"max_chars": 1500}, "max_chars = 1500 is below min_chars = 2000")):  # fmt: skip
        with pytest.raises((RecipeError, ValueError), match=words):
            Source.model_validate({**settings, "reader": {**reader, **change}})
