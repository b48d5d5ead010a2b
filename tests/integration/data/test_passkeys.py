"""Passkey documents and whole library files: what stands where, what is set apart for evaluation, what curation does."""

from __future__ import annotations

import ast
import itertools
import random
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, write_manifest
from stages.data.acquire import acquire_stage
from stages.data.acquire.readers.base import Document, Unreadable
from stages.data.acquire.readers.python_stdlib import StdlibSource, read
from stages.data.curate import filter_stage
from stages.data.curate.settings import CurationSettings
from stages.data.order.tokenize_stage import encode
from stages.data.recipe import load
from stages.formats.table import DOCUMENTS, FAILED, ITEMS, content_hash, split_of, write_rows
from stages.tasks.synthetic import passkeys
from tests.fixtures.dedup_fixtures import deduplicate
from tests.fixtures.passkey_fixtures import passkey_source

TEXTS = [(f"Text {n} speaks of nothing much.\n\nIt has a second line, which is longer.", f"{n}.py") for n in range(9)]


def draw_documents(count: int, chars: tuple[int, int] = (100, 1600), seed: int = 0) -> list[tuple[str, int, str]]:
    return list(passkeys.draw(TEXTS, count, chars, 4, random.Random(seed)))


def key_of(text: str, prompt_chars: int) -> str:
    return text[prompt_chars:].removeprefix(" ")


def test_a_document_states_its_key_once_and_ends_with_the_answer() -> None:
    documents = draw_documents(400)
    depths = []
    for text, prompt_chars, place in documents:
        key, prompt = key_of(text, prompt_chars), text[:prompt_chars]
        assert key.isdigit() and len(set(key)) == 4
        assert prompt.endswith(passkeys.QUESTION) and prompt.count(passkeys.STATEMENT.format(key)) == 1
        filler = prompt.removesuffix(passkeys.QUESTION).replace(passkeys.STATEMENT.format(key), "")
        assert "pass key" not in filler and len(text) == len(filler) + passkeys.min_characters(4)
        start = int(place.removesuffix(".py"))
        assert filler.startswith(TEXTS[start][0][: len(filler)])  # neighbors in order, from a drawn one on
        depths.append(prompt.index(passkeys.STATEMENT.format(key)) / len(filler))
    lengths = [len(text) for text, _, _ in documents]
    assert min(lengths) >= 100 and max(lengths) <= 1600
    assert statistics.median(lengths) == pytest.approx(400, rel=0.2)  # log-uniform: the geometric mean
    assert statistics.mean(depths) == pytest.approx(0.5, abs=0.06) and min(depths) < 0.05 and max(depths) > 0.95


def test_the_seed_alone_decides() -> None:
    assert draw_documents(20) == draw_documents(20) and draw_documents(20) != draw_documents(20, seed=1)
    assert len(passkeys.STATEMENT.format("1234") + passkeys.QUESTION + " 1234") == passkeys.min_characters(4)
    bare = draw_documents(1, (passkeys.min_characters(4),) * 2)[0][0]
    assert bare.startswith("\nThe pass key is")


def test_a_tenth_of_the_keys_is_never_trained_on() -> None:
    every = {"".join(digits) for digits in itertools.permutations("0123456789", 4)}
    apart = {key for key in every if passkeys.is_for_evaluation(key)}
    assert len(apart) / len(every) == pytest.approx(passkeys.EVALUATION_SHARE, abs=0.02)
    assert not apart & {key_of(text, n) for text, n, _ in draw_documents(2000)}
    rng = random.Random(0)
    assert {passkeys.draw_key(rng, 4, evaluation=True) for _ in range(500)} <= apart


def test_no_filler_is_held_out_elsewhere() -> None:
    """Whatever share up to a tenth a recipe holds out of the docstrings, none of them surrounds a key in training."""
    texts = [(f"Docstring number {n}.", "a.py") for n in range(2000)]
    fillers = {text for text, _ in passkeys.fillers(texts)}
    assert len(fillers) == pytest.approx(1800, abs=60)

    for text, _ in texts:
        if split_of(content_hash(text), passkeys.HELD_OUT_SHARE) == "heldout":
            assert text not in fillers


def test_acquired_from_the_library_and_the_same_twice(run_stage: Any) -> None:
    config = {"source": passkey_source(), "seed": 3}
    first, second = (run_stage(acquire_stage.STAGE, config, {}) for _ in range(2))
    assert first.digest == second.digest
    rows = pq.read_table(first / "documents/part-00000.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f"keys/{n:07d}" for n in range(30)]
    for row in rows:
        assert row["license"] == "PSF-2.0 AND Apache-2.0" and row["origin"].startswith("procedural#")
        assert row["origin"].endswith(".py") and not passkeys.is_for_evaluation(
            key_of(row["text"], row["prompt_chars"])
        )


def test_curation_keeps_documents_that_share_their_filler(tmp_path: Path, run_stage: Any) -> None:
    """As prose, all but a few would be near duplicates of each other; as problems, equal texts alone are removed."""
    rows = []
    for n, (text, prompt_chars, _) in enumerate([*draw_documents(40, (500, 520)), draw_documents(1, (500, 520))[0]]):
        row = {"id": f"keys/{n}", "text": text, "source": "keys", "license": "PSF-2.0", "origin": "procedural"}
        rows.append({**row, "content_hash": content_hash(text), "prompt_chars": prompt_chars})
    write_rows(tmp_path / "keys/documents/part-00000.parquet", DOCUMENTS, rows)
    write_rows(tmp_path / "keys/failed/part-00000.parquet", FAILED, [])
    item = {"id": "sort/0", "task": "sort", "prompt": "sort 52134:", "answer": "12345", "text": "sort 52134"}
    write_rows(tmp_path / "items/items.parquet", ITEMS, [item])
    inputs = {name: write_manifest(tmp_path / name, name) for name in ("keys", "items")}
    rows_by_kind = {}
    for kind in ("problems", "prose"):
        source, settings = {"name": "keys", "kind": kind}, CurationSettings().model_dump()
        filtered = run_stage(filter_stage.STAGE, {"sources": [source], "curation": settings, "seed": 0}, inputs)
        config = {"sources": [{**source, "heldout_fraction": 0.0}], "minhash": settings["minhash"], "alarm_share": 1.0}
        artifact = deduplicate(config, filtered, tmp_path / kind)["dedup"]
        rows_by_kind[kind] = pq.read_table(artifact / "kept/keys/part-00000.parquet").to_pylist()
    assert len(rows_by_kind["problems"]) == 40 and len(rows_by_kind["prose"]) < 20
    assert [row["prompt_chars"] for row in rows_by_kind["problems"]] == [row["prompt_chars"] for row in rows[:40]]


def test_only_the_answer_carries_loss_and_each_digit_is_one_token(trained_tokenizer: Artifact) -> None:
    from stages.data.order.tokenize_stage import Encoder
    from stages.formats.tokenizer import END

    encoder = Encoder(trained_tokenizer / "tokenizer.json")
    tokenizer, end = encoder.tokenizer, encoder.tokenizer.token_to_id(END)
    for text, prompt_chars, _ in draw_documents(20):
        [(array, loss_from)] = encode(encoder.encode, end, [(text, prompt_chars)])
        ids = array.tolist()
        assert tokenizer.decode(ids[loss_from:-1]) == text[prompt_chars:] and ids[-1] == end
        assert len(ids) - loss_from == 4 + 2  # a space, four digits, the end
        assert ids[:-1] == tokenizer.encode(text, add_special_tokens=False).ids  # the cut changes no token


@pytest.fixture(scope="module")
def trained_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tokenizer of the recipe's kind, trained on passkey documents, which tempt it to merge digits."""
    from stages.formats import tokenizer
    from stages.formats.table import KEPT
    from tests.fixtures.run_fixtures import RecordingReport

    folder = tmp_path_factory.mktemp("tokenizer")
    rows = []
    for n, (text, prompt_chars, _) in enumerate(draw_documents(200)):
        row = {"id": f"keys/{n}", "text": text, "source": "keys", "license": "PSF-2.0", "origin": "procedural"}
        rows.append({**row, "content_hash": content_hash(text), "prompt_chars": prompt_chars, "split": "train"})
    write_rows(folder / "in/kept/keys/part-00000.parquet", KEPT, rows)
    inputs = {"dedup": write_manifest(folder / "in", "dedup")}
    (folder / "out").mkdir()
    section = tokenizer.TokenizerSection(vocab_size=320, padded_vocab_size=384, sample_bytes=100_000)
    tokenizer.run(section, inputs, folder, folder / "out", RecordingReport())
    return write_manifest(folder / "out", "tokenizer")


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        ({"min_chars": 30}, ["min_chars = 30", "at least 48"]),
        ({"max_chars": 60}, ["max_chars = 60", "min_chars = 80"]),
        ({"digits": 12}, ["digits", "9"]),
    ],
)
def test_impossible_sizes_are_one_sentence(tmp_path: Path, reader: dict[str, Any], words: list[str]) -> None:
    import yaml

    settings = {"reader": "passkeys", "count": 1, "min_chars": 80, "max_chars": 500, **reader}
    entry = {"name": "keys", "kind": "problems", "license": "Apache-2.0", "license_evidence": "x", "origin": "x"}
    recipe = {"name": "r", "description": "r", "sources": [{**entry, "reader": settings}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "r.yaml")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_whole_files_lose_their_docstrings_and_still_parse(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""Of the module."""\nimport os\n\n\nclass Bare:\n    """All there is."""\n\n\nclass Full:\n'
        '    """Two\n    lines."""\n\n    def one(self): "Ünïcode"; return os\n\n    def two(self):\n        "x"\n'
        '        def inner():\n            """Deep."""\n            return "no docstring"\n        return inner\n'
    )
    (tmp_path / "b.py").write_text("print 'two'\n")
    (tmp_path / "c.py").write_text('"""Nothing else."""\n')
    files = [(name, tmp_path / name) for name in ("a.py", "b.py", "c.py")]
    document, bad = read(files, "file")
    assert isinstance(document, Document) and bad == Unreadable("b.py")
    text = document.text
    assert (document.name, document.location) == ("a.py", "a.py")
    assert text == (
        "import os\n\n\nclass Bare:\n    pass\n\n\nclass Full:\n\n    def one(self): pass; return os\n\n"
        '    def two(self):\n        def inner():\n            return "no docstring"\n        return inner'
    )
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    assert len(nodes) == 6 and not any(ast.get_docstring(node) for node in nodes)


def test_functions_keep_their_key() -> None:
    """`unit` came after recipes had keys."""
    assert identity(StdlibSource(reader="stdlib-source")) == {
        "reader": "stdlib-source", "modules": "all", "limit": None,
    }  # fmt: skip
    assert identity(StdlibSource(reader="stdlib-source", unit="file"))["unit"] == "file"
