"""Baselines score the bytes that a model was scored on, and the overlap finds what training text holds as well."""

from __future__ import annotations

import json
import lzma
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.parts import part_file
from pipeline.core.store import Artifact
from release.checks.scores import score_problems
from stages.confidence import ratio
from stages.evaluation import baselines
from stages.evaluation.baselines import BaselinesConfig
from stages.evaluation.bits_per_byte import DOCUMENT_SCORES
from stages.evaluation.ngram import KneserNey
from stages.formats import table

WORDS = [f"word{n}" for n in range(60)]


class Silent:
    def progress(self, *args: Any, **figures: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def sentence(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def document(source: str, number: int, text: str, split: str, prompt_chars: int = 0) -> dict[str, Any]:
    return {
        "id": f"{source}/{number}",
        "text": text,
        "source": source,
        "license": "CC0-1.0",
        "origin": "test",
        "content_hash": table.content_hash(text),
        "prompt_chars": prompt_chars,
        "split": split,
    }


COPIED = sentence(3)
TRAIN = [document("prose", n, sentence(n), "train") for n in range(20)]
# One held-out document repeats a passage of 100 bytes, and one has a question, é in its last scored character.
HELDOUT = [
    document("prose", 100, "Ω" + COPIED[40:140] + "!" + sentence(100), "heldout"),
    document("prose", 101, "Question? " + sentence(101, 8) + " é " + sentence(102), "heldout", prompt_chars=10),
]


def scores(model: str, sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [
        {
            "source": "prose",
            "id": row["id"],
            "work": row["id"],
            "bytes": size,
            "tokens": size,
            "nll_bits": 2.0 * size + number,
        }
        for number, (row, size) in enumerate(zip(HELDOUT, sizes, strict=True))
    ]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    for part, rows in enumerate((TRAIN[:8], [*HELDOUT, *TRAIN[8:]])):
        table.write_rows(tmp_path / "dedup/kept/prose" / part_file(part), table.KEPT, rows)
    size = sum(len(row["text"].encode()) for row in (*TRAIN, *HELDOUT))
    table.write_json(tmp_path / "dedup/summary.json", {"sources": {"prose": {"bytes_in": size, "removed_bytes": 0}}})
    for model, sizes in (("base", (150, 60)), ("long", (200, 60))):
        table.write_rows(tmp_path / model / "documents.parquet", DOCUMENT_SCORES, scores(model, sizes))
    folders = {"dedup": "dedup", "evaluate-base": "base", "evaluate-long": "long"}
    return {role: Artifact("", "", tmp_path / name, ()) for role, name in folders.items()}


def run(inputs: dict[str, Artifact], tmp_path: Path, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    config = BaselinesConfig(heldout_documents=10, **settings)
    baselines.run(config, inputs, work, out, Silent())
    return json.loads((out / "report.json").read_text()), table.read_table(out / "baselines.parquet").to_pylist()


def test_each_model_is_compared_on_its_own_bytes(inputs, tmp_path):
    report, rows = run(inputs, tmp_path, order=4)

    ngram = KneserNey.fit([row["text"].encode() for row in TRAIN], 4)
    cuts = [(row["id"], row["bytes"]) for row in rows]
    assert cuts == [("prose/100", 150), ("prose/100", 200), ("prose/101", 60)]
    text = HELDOUT[1]["text"].encode()
    assert rows[2]["ngram_bits"] == pytest.approx(ngram.bits(text[10:70], b"Question? "))
    figures = report["models"]["base"]["prose"]
    pairs = [(2.0 * 150 - rows[0]["ngram_bits"], 150), (2.0 * 60 + 1 - rows[2]["ngram_bits"], 60)]
    assert figures["less_ngram"] == pytest.approx(ratio(pairs, works=["a", "b"]))
    assert figures["ngram"]["bytes"] == 210
    assert report["models"]["long"]["prose"]["ngram"]["bytes"] == 260
    assert figures["unigram"]["value"] > figures["ngram"]["value"] > 0


def test_xz_knows_the_training_text(inputs, tmp_path):
    report, _ = run(inputs, tmp_path)

    value = report["models"]["base"]["prose"]["xz"]["value"]
    scored = HELDOUT[0]["text"].encode()[:150] + HELDOUT[1]["text"].encode()[10:70]
    alone = 8 * len(lzma.compress(scored, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]))
    assert 0 < value < alone / 210
    question = [(b"Question? " * 50, b"Question? ")]
    assert baselines.xz_bits([b""], question) < baselines.xz_bits([b""], [(b"", b"Question? ")])
    assert report["training"]["prose"] == {
        "documents": 20,
        "bytes": (size := sum(len(row["text"]) for row in TRAIN)),
        "all_bytes": size,
    }


def test_overlap_is_the_share_of_bytes_in_matches(inputs, tmp_path):
    report, _ = run(inputs, tmp_path)

    # 100 copied bytes begin after Ω, whose two bytes are not in the training text; of the other document nothing is.
    assert report["overlap"]["prose"] == {"value": 100 / 260, "bytes": 260}


def test_tasks_leave_the_same_parts(inputs, tmp_path):
    whole = run(inputs, tmp_path)
    (tmp_path / "work").rename(tmp_path / "first")
    (tmp_path / "work").mkdir()
    config = BaselinesConfig(heldout_documents=10, parts={"prose": 2})

    baselines.run_shard(config, inputs, tmp_path / "work", 1)

    assert run(inputs, tmp_path) == whole


def test_a_large_source_gives_a_sample_by_hash(inputs, tmp_path):
    report, _ = run(inputs, tmp_path, training_bytes=2**12)

    known = report["training"]["prose"]
    share = 2**12 / sum(len(row["text"].encode()) for row in (*TRAIN, *HELDOUT))
    chosen = [row["text"] for row in TRAIN if int(row["content_hash"][16:32], 16) < share * 2**64]
    assert 0 < len(chosen) < len(TRAIN)
    assert (known["documents"], known["bytes"]) == (len(chosen), sum(map(len, chosen)))
    assert known["all_bytes"] == sum(len(row["text"]) for row in TRAIN)


@pytest.mark.parametrize("length", [0, 49, 50, 400])
def test_windows_are_equal_where_their_bytes_are(length):
    text = bytes(random.Random(length).choices(b"ab", k=length)) if length < 400 else b"abcdefg" * 60

    hashes = baselines.window_hashes(text).tolist()

    windows = [text[start : start + 50] for start in range(len(text) - 49)]
    assert len(hashes) == len(windows)
    assert len(set(hashes)) == len(set(windows))
    assert len(set(zip(hashes, windows, strict=True))) == len(set(windows))


def test_the_check_of_scores_computes_the_figures_again(inputs, tmp_path):
    report, rows = run(inputs, tmp_path, order=3)
    evaluation = tmp_path / "dataset/evaluation"
    for model in ("base", "long"):
        shutil.copytree(tmp_path / model, evaluation / model)
    table.write_rows(evaluation / "baselines/baselines.parquet", baselines.BASELINE_SCORES, rows)
    table.write_json(evaluation / "baselines/report.json", report)
    assert score_problems(evaluation) == []

    report["models"]["long"]["prose"]["less_ngram"]["value"] -= 0.1
    table.write_json(evaluation / "baselines/report.json", report)

    assert score_problems(evaluation) == ["evaluation/baselines/report.json is not what its tables give"]
