"""Items of held-out text: made by fixed rules, answered by models that know or do not know, scored from tables."""

from __future__ import annotations

import json
import random
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from release.cards.tables import text_items as card_table
from release.checks.scores import score_problems
from release.facts.score_facts import compute_scores
from stages.evaluation import item_makers, model_evaluation, text_items
from stages.evaluation.text_items import TextItems
from stages.formats.table import KEPT, content_hash, read_table, write_json, write_rows
from stages.tasks.synthetic import passkeys
from tests.fixtures import release_fixtures
from tests.fixtures.run_fixtures import RecordingReport

WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "inlet",
    "jetty",
    "knoll",
    "larch",
    "marsh",
    "north",
    "olive",
    "pearl",
    "quill",
]
CONFIG = {
    "kinds": {"words": 6, "lines": 6, "options": 4, "retrieval-8": 3, "retrieval-64": 3, "completion": 4},
    "prefix_bytes": 96,
    "choice_bytes": 16,
}


def prose(number: int) -> str:
    rng = random.Random(number)
    return "\n".join(" ".join(rng.sample(WORDS, 6)) + "." for _ in range(12))


def manual(number: int) -> str:
    rng = random.Random(1000 + number)
    options = [f"  --{word}\n      {' '.join(rng.sample(WORDS, 5))} {word}" for word in rng.sample(WORDS, 6)]
    return "Usage of a program with some options, all of them listed here.\n\n" + "\n\n".join(options) + "\n"


def program(number: int) -> str:
    name = WORDS[number % len(WORDS)]
    return textwrap.dedent(f"""\
        class {name.title()}:
            def {name}(self, values, limit={number}):
                total = sum(values[:limit])
                if not isinstance(total, int):
                    return max(values, key=lambda value: abs(value - limit))
                return dict(zip(values, reversed(values)))
        """)


def rows(source: str, texts: Sequence[str], split: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{source}/{split}/{n}", "text": text, "source": source, "license": "CC0-1.0", "origin": "made up",
         "content_hash": content_hash(text), "prompt_chars": 0, "split": split}
        for n, text in enumerate(texts)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def dedup(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A corpus of prose, manuals and programs, half of it held out."""
    folder = tmp_path_factory.mktemp("dedup")
    for source, make in {"prose": prose, "manuals": manual, "programs": program}.items():
        held_out = rows(source, [make(n) for n in range(8)], "heldout")
        trained = rows(source, [make(n) for n in range(8, 16)], "train")
        write_rows(folder / f"kept/{source}/part-00000.parquet", KEPT, [*held_out, *trained])
    return write_manifest(folder, "dedup")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, dedup: Artifact) -> Artifact:
    folder = tmp_path_factory.mktemp("made")
    config = text_items.TextItemsConfig.model_validate(CONFIG)
    text_items.run(config, {"dedup": dedup}, folder, folder, RecordingReport())
    return write_manifest(folder, "text-items")


def items_of(artifact: Artifact, *kinds: str) -> list[Any]:
    rows = read_table(artifact / "questions.parquet").to_pylist()
    return [{**row, "texts": json.loads(row["choices"])} for row in rows if not kinds or row["kind"] in kinds]


def test_items_are_the_same_twice_and_of_a_smaller_number_the_first(run_stage: Any, dedup: Artifact, made: Any) -> None:
    again = run_stage(text_items.STAGE, CONFIG, {"dedup": dedup})
    fewer = run_stage(text_items.STAGE, {**CONFIG, "kinds": {"words": 3}}, {"dedup": dedup})

    assert again.digest == made.digest
    words = [row["prefix"] for row in items_of(made, "words")]
    assert len(words) == 6 and [row["prefix"] for row in items_of(fewer)] == words[:3]


def test_items_follow_their_documents(dedup: Artifact, made: Artifact) -> None:
    texts = {row["id"]: row for path in (dedup / "kept").rglob("*.parquet") for row in read_table(path).to_pylist()}
    items = items_of(made)

    # One item of a kind and document, so that the items are independent.
    assert len({(row["id"], row["kind"]) for row in items}) == len(items)
    assert Counter(row["kind"] for row in items) == {
        "words": 6, "lines": 6, "options": 4, "retrieval-8": 3, "retrieval-64": 3, "completion": 4,
    }  # fmt: skip
    for row in items_of(made, "words", "lines", "options"):
        document, choices = texts[row["id"]], row["texts"]
        assert document["split"] == "heldout" and document["source"] == row["source"]
        assert {len(choice.encode()) for choice in choices} == {16} and len(row["prefix"].encode()) <= 96
        assert row["prefix"] + choices[row["answer"]] in document["text"]
        for n, choice in enumerate(choices):
            assert choice in document["text"] and choice[0].isspace()
            assert n == row["answer"] or row["prefix"] + choice not in document["text"]
            others = [other.encode() for other in choices if other != choice]
            assert len(others) == 3 and not any(item_makers.is_near_copy(choice.encode(), other) for other in others)
    assert all("--" in row["prefix"].splitlines()[-1] for row in items_of(made, "options"))


def test_one_of_four_keys_is_stated_at_the_distance(made: Artifact) -> None:
    for row in items_of(made, "retrieval-8", "retrieval-64"):
        stated = [choice.strip() in row["prefix"] for choice in row["texts"]]
        assert sum(stated) == 1 and stated[row["answer"]] and len(set(row["texts"])) == 4
        between = row["prefix"].partition(passkeys.STATEMENT.format(row["texts"][row["answer"]].strip()))[2]
        assert between.endswith(passkeys.QUESTION)
        assert len(between) - len(passkeys.QUESTION) == int(row["kind"].partition("-")[2])


def test_a_line_of_python_is_right_if_the_text_parses_with_it(made: Artifact) -> None:
    for row in items_of(made, "completion"):
        assert row["source"] == "programs" and row["texts"] == [] and not item_makers.parses(row["prefix"])
        assert row["baseline"] == item_makers.parses(row["prefix"] + row["baseline_output"])
    assert item_makers.parses("def f(x):\n    if x") is False and item_makers.parses("def f(x):\n    if x:")
    assert item_makers.parses("a = (1,") is False and item_makers.parses("a = (1,)")
    assert item_makers.parses("\0") is False and item_makers.parses("(" * 10_000) is False


@pytest.mark.parametrize("text", [b"", b"short", b"one line with nothing else " * 2, b"\n" * 400, b"same line\n" * 90])
def test_a_document_without_four_different_places_gives_no_item(text: bytes) -> None:
    rng = random.Random(0)

    assert all(item_makers.from_document(text, rng, before, 96, 16) is None for before in item_makers.BEFORE.values())
    assert item_makers.completion(text, rng, 96) is None
    assert item_makers.retrieval(text[:30], rng, 31) is None


def test_a_cut_never_divides_a_character() -> None:
    text = "\n".join(f"{word} grüßt {other} über die Brücke" for word in WORDS for other in WORDS[:3]).encode()

    items = [item_makers.from_document(text, random.Random(n), item_makers.BEFORE["words"], 61, 17) for n in range(40)]

    for item in items:
        assert item is not None
        prefix, choices = item
        assert prefix.decode() and len(prefix) in (60, 61)
        assert all(len(choice.decode().encode()) == 17 for choice in choices)


class Oracle:
    """A model over characters that knows which texts go on: a character costs less after a beginning that it follows."""

    context = 10_000

    def __init__(self, documents: Sequence[str], gain: float) -> None:
        self.documents, self.gain = documents, gain

    def bits(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
        texts = [("".join(map(chr, ids)), start) for ids, start in rows]
        known = [start > 0 and any(text in document for document in self.documents) for text, start in texts]
        return [
            (8 - self.gain * knows) * (len(text) - start) for knows, (text, start) in zip(known, texts, strict=True)
        ]

    def continue_greedily(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        texts = ["".join(map(chr, ids)) for ids in prompts]
        ends = [next(d.partition(t)[2] for d in self.documents if t in d) if self.gain else "\n" for t in texts]
        return [[ord(letter) for letter in end[:max_new_tokens]] for end in ends]


class Characters:
    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(("gain", "right"), [(3.0, True), (0.0, False)])
def test_a_model_that_knows_the_texts_is_always_right_and_a_tie_is_a_guess(
    dedup: Artifact, made: Artifact, monkeypatch: pytest.MonkeyPatch, gain: float, right: bool
) -> None:
    monkeypatch.setattr(text_items, "token_ids", lambda tokenizer, text: [ord(letter) for letter in text])
    texts = [row["text"] for path in (dedup / "kept").rglob("*.parquet") for row in read_table(path).to_pylist()]
    # Functions stand in classes there, and without their indentation in the items.
    oracle: Any = Oracle([*texts, *(textwrap.dedent(text.partition("\n")[2]) for text in texts)], gain)
    items = [row for row in text_items.read_items(made.path) if not row["kind"].startswith("retrieval")]

    answers = text_items.answer_items(oracle, Characters(), items)
    scores = text_items.summary(answers)

    assert {kind: row["chance"] for kind, row in scores.items()} == {
        "words": 0.25, "lines": 0.25, "options": 0.25, "completion": 0.0,
    }  # fmt: skip
    if right:
        assert all(row["accuracy"]["value"] == 1 for row in scores.values())
        assert scores["words"]["accuracy"]["low"] < 0.7 and scores["words"]["accuracy"]["high"] == 1
    else:
        firsts = [json.loads(item["choices"])[0] if item["kind"] != "completion" else "" for item in items]
        assert [row["output"] for row in answers] == firsts and scores["completion"]["accuracy"]["value"] == 0
        assert len({item["answer"] for item in items}) == 4


def test_a_long_beginning_is_cut_at_its_start(made: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_items, "token_ids", lambda tokenizer, text: [ord(letter) for letter in text])
    seen: list[tuple[list[int], int]] = []

    class Short(Oracle):
        context = 40

        def bits(self, rows: Sequence[tuple[list[int], int]]) -> list[float]:
            seen.extend(rows)
            return super().bits(rows)

        def continue_greedily(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
            assert [len(ids) + max_new_tokens for ids in prompts] == [40]
            return [[]]

    word, line = items_of(made, "words")[0], items_of(made, "completion")[0]
    text_items.answer_items(Short([], 0), Characters(), [word, line])  # type: ignore[arg-type]

    assert {len(ids) for ids, start in seen if start} == {40}
    assert "".join(map(chr, seen[1][0])) == (word["prefix"] + word["texts"][0])[-40:]


def test_scores_follow_from_the_table_and_verify_judges_again(run_stage: Any, made: Artifact, tmp_path: Path) -> None:
    artifacts = {"text-items": made}
    for role, node in {"model": "export-mid", "dedup": "dedup", "items": "items"}.items():
        release_fixtures.make_node(node, tmp_path / role)
        artifacts[role] = write_manifest(tmp_path / role, node)

    artifact = run_stage(model_evaluation.STAGE, {"heldout_documents": 2, "max_new_tokens": 8}, artifacts)

    scores = artifact.json("scores.json")
    assert compute_scores(artifact.path) == scores and scores["text_items"]["words"]["accuracy"]["n"] == 6
    evaluation = tmp_path / "evaluation"
    for source, name in ((made.path, "text_items"), (artifact.path, "mid")):
        (evaluation / name).mkdir(parents=True)
        for path in source.glob("*.parquet"):
            (evaluation / name / path.name).write_bytes(path.read_bytes())
    write_json(evaluation / "mid/scores.json", scores)
    assert score_problems(evaluation) == []
    other = items_of(made)[0]
    changed = {name: other[name] for name in text_items.ITEMS} | {"baseline": 1 - other["baseline"]}
    write_rows(evaluation / "text_items/questions.parquet", text_items.ITEMS, [changed])
    assert score_problems(evaluation) == [
        f"evaluation/mid/text_items.parquet: {other['id']} of {other['kind']} was judged otherwise"
    ]


def test_the_card_shows_a_guess_the_n_grams_and_each_model() -> None:
    share = {"value": 0.5, "se": 0.1, "n": 20, "low": 0.3, "high": 0.7}
    part = {"accuracy": share, "baseline": {**share, "value": 0.4}, "chance": 0.25}
    scores: Any = {"base": {"text_items": {"words": part}}, "mid": {"text_items": {"words": part}}, "sft": {}}

    lines = card_table(scores)

    assert lines[-4:-2] == [
        "| words | 20 | a guess | 0.250 |",
        "| words | 20 | byte n-grams | 0.400 (0.300 to 0.700) |",
    ]
    assert len(lines) == 8 and lines[-1].endswith("| 0.500 (0.300 to 0.700) |")
    assert card_table({"base": {}}) == []  # type: ignore[typeddict-item]


def test_wrong_settings_and_too_little_text_are_refused(run_stage: Any, dedup: Artifact) -> None:
    with pytest.raises(
        ValidationError, match="is no kind of items; known are words, lines, options, completion and retrieval-<bytes>"
    ):
        TextItems(kinds={"retrieval": 4})
    with pytest.raises(ValidationError, match="needs documents of 65537 bytes, which are read up to 65536; lower"):
        TextItems(kinds={"retrieval-65537": 4})
    assert TextItems(kinds={"retrieval-65536": 4})
    with pytest.raises(AtomError, match="give 0 items of kind completion, and two are needed"):
        run_stage(text_items.STAGE, {"kinds": {"completion": 4}, "without": ["programs"]}, {"dedup": dedup})


def test_the_baseline_reads_no_more_training_text_than_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(2):
        texts = [f"{part} text {n:03d}" for n in range(50)]
        write_rows(tmp_path / f"prose/part-{part:05d}.parquet", KEPT, rows("prose", texts, "train"))
    write_rows(tmp_path / "prose/part-00002.parquet", KEPT, rows("prose", ["held out"], "heldout"))
    monkeypatch.setattr(text_items, "BASELINE_BYTES", 3 * 31)

    texts = list(text_items._training_text(tmp_path, ["prose"]))

    assert texts == [f"{part} text {n:03d}".encode() for part in range(2) for n in range(3)]
    monkeypatch.undo()
    assert len(list(text_items._training_text(tmp_path, ["prose"]))) == 100
