"""Tokenizer and shards: any text comes back, special tokens stay special, Megatron and transformers read the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, write_manifest
from stages.data import tokenization
from stages.data import tokenizer as training
from stages.data.shards import check_shard
from stages.data.table import KEPT, content_hash, write_rows

SECTION = {"vocab_size": 320, "padded_vocab_size": 384, "sample_bytes": 100_000}
TEXTS = [
    f"The quick brown fox number {i} jumps over the lazy dog, and says: “naïve café {i * i}”.\n\tIt's fine."
    for i in range(60)
]
TRICKY = "A text that names <|endoftext|> and <|im_start|> and <think> without meaning them."


def curated(folder: Path, extra: tuple[str, ...] = ()) -> Artifact:
    rows = []
    for i, text in enumerate([*TEXTS, *extra]):
        split = "heldout" if i % 10 == 9 else "train"
        common = {"source": "prose", "license": "CC0-1.0", "origin": "test", "prompt_chars": 0}
        rows.append({"id": f"prose/{i}", "text": text, "content_hash": content_hash(text), "split": split, **common})
    write_rows(folder / "kept/prose.parquet", KEPT, rows)
    sums = []
    for i in range(40):
        text = f"{100 + i}+{200 + i}={300 + 2 * i}"
        common = {"source": "sums", "license": "CC0-1.0", "origin": "test", "prompt_chars": 8, "split": "train"}
        sums.append({"id": f"sums/{i}", "text": text, "content_hash": content_hash(text), **common})
    write_rows(folder / "kept/sums.parquet", KEPT, sums)
    return write_manifest(folder, "dedup")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fixtures.run_fixtures import RecordingReport

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    inputs = {"dedup": curated(folder / "in")}
    training.run(training.TokenizerSection(**SECTION), inputs, folder, folder / "out", RecordingReport())
    return folder / "out"


@pytest.fixture(scope="module")
def plain(tokenizer_folder: Path) -> Tokenizer:
    return training.load_for_corpus(tokenizer_folder / "tokenizer.json")


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back(plain: Tokenizer, text: str) -> None:
    assert plain.decode(plain.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x01\x1b",
        "\r\n\r\n \t",
        "e\u0301 é",
        "  two  spaces ",
        "👩‍👩‍👧‍👦",
        "\u202eabc",
        "don't 12,345.6",
        TRICKY,
    ],
)
def test_awkward_text_comes_back(plain: Tokenizer, text: str) -> None:
    ids = plain.encode(text, add_special_tokens=False).ids
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert not set(ids) & set(range(6))


def test_special_tokens_are_the_first_and_digits_stand_alone(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in training.SPECIAL_TOKENS] == list(range(6))
    assert tokenizer.encode("<|im_end|>").ids == [3]
    vocabulary = tokenizer.get_vocab()
    assert len(vocabulary) == 320
    assert not [t for t in vocabulary if len(t) > 1 and any(c.isdigit() for c in t)]


def test_transformers_loads_it_in_a_fresh_interpreter(tokenizer_folder: Path) -> None:
    code = """
import json, sys
from transformers import AutoTokenizer
t = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "reasoning_content": "one more", "content": "2"}]
both = t.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
marked = [i for i, m in zip(both["input_ids"], both["assistant_masks"]) if m]
print(json.dumps({
    "eos": t.eos_token, "pad": t.pad_token_id, "bos": t.bos_token, "size": len(t),
    "ids": t("The café 12", add_special_tokens=False)["input_ids"],
    "round": t.decode(t("x  y\\x00 's , .")["input_ids"]),
    "text": t.apply_chat_template(chat, tokenize=False),
    "prompt": t.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True),
    "marked": t.decode(marked), "think": t.convert_tokens_to_ids("<think>")}))
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer_folder)],
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tokenizer_folder.parent)},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(process.stdout.strip().splitlines()[-1])
    assert (report["eos"], report["pad"], report["bos"], report["size"], report["think"]) == (
        "<|endoftext|>",
        0,
        None,
        320,
        4,
    )
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert report["ids"] == tokenizer.encode("The café 12").ids
    assert report["round"] == "x  y\x00 's , ."
    answer = "<think>\none more\n</think>\n\n2<|im_end|>"
    assert report["prompt"] == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert report["text"] == report["prompt"] + answer + "\n"
    assert report["marked"] == answer


def test_training_is_deterministic_and_learns_from_the_training_split_alone(tmp_path: Path, run_stage: Any) -> None:
    first = run_stage(training.STAGE, SECTION, {"dedup": curated(tmp_path / "a")})
    assert run_stage(training.STAGE, SECTION, {"dedup": curated(tmp_path / "b")}).digest == first.digest
    stats = first.json("stats.json")
    assert stats["bytes_per_token"]["prose"]["split"] == "heldout"
    assert stats["sample"]["documents"] == 54 + 40
    sample = list(training.interleave({"a": ["aaaa"] * 3, "b": ["b"] * 5}, 1000))
    assert sample == ["aaaa", "b", "b", "b", "b", "aaaa", "b", "aaaa"]


def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path, run_stage: Any) -> None:
    section = {"vocab_size": 5000, "padded_vocab_size": 5120}
    with pytest.raises(RecipeError, match="yield only"):
        run_stage(training.STAGE, section, {"dedup": curated(tmp_path / "a")})
    with pytest.raises(ValueError, match="below vocab_size"):
        training.TokenizerSection(vocab_size=512, padded_vocab_size=500)


def tokenized(folder: Path, run_stage: Any) -> tuple[Artifact, Artifact]:
    inputs = {"dedup": curated(folder / "curated", extra=(TRICKY,))}
    inputs["tokenizer"] = run_stage(training.STAGE, SECTION, inputs)
    tokens: Artifact = run_stage(tokenization.STAGE, {}, inputs)
    return tokens, inputs["tokenizer"]


def test_megatron_reads_the_shards(tmp_path: Path, run_stage: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens, tokenizer_artifact = tokenized(tmp_path, run_stage)
    tokenizer = Tokenizer.from_file(str(tokenizer_artifact / "tokenizer.json"))
    rows = pq.read_table(tokens / "documents.parquet").to_pylist()
    meta = tokens.json("meta.json")
    assert sorted(p.relative_to(tokens.path).as_posix() for p in tokens.path.rglob("*.bin")) == [
        "heldout/prose.bin",
        "train/prose.bin",
        "train/sums.bin",
    ]
    texts = {f"prose/{i}": t for i, t in enumerate([*TEXTS, TRICKY])}
    for split, source in (("train", "prose"), ("heldout", "prose"), ("train", "sums")):
        mine = [row for row in rows if (row["split"], row["source"]) == (split, source)]
        data = IndexedDataset(str(tokens / f"{split}/{source}"))
        assert len(data) == len(mine) == meta["documents"][split][source] == check_shard(tokens / f"{split}/{source}")
        assert sum(row["tokens"] for row in mine) == meta["tokens"][split][source]
        for row in mine:
            ids = data[row["ordinal"]].tolist()
            assert len(ids) == row["tokens"] and ids[-1] == meta["eod_id"] and meta["eod_id"] not in ids[:-1]
            if source == "prose":
                assert row["loss_from"] == 0
                assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == texts[row["id"]]
            else:
                assert tokenizer.decode(ids[: row["loss_from"]]).endswith("=") and row["loss_from"] == 8


def test_a_broken_shard_is_named(tmp_path: Path, run_stage: Any) -> None:
    tokens, _ = tokenized(tmp_path, run_stage)
    prefix = tokens / "train/sums"
    data, index = (prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx"))
    for suffix, content, words in (
        (".bin", data[:-2], r"sums\.bin has \d+ bytes instead of"),
        (".idx", index[:-8], r"sums\.idx has \d+ bytes where"),
        (".idx", b"nonsense" * 20, r"sums\.idx is not a Megatron index"),
        (".idx", index[:10], r"sums\.idx has only 10 bytes"),
        (".idx", index[:34] + b"\x01" + index[35:], r"sums\.idx does not list"),
    ):
        prefix.with_suffix(suffix).write_bytes(content)
        with pytest.raises(AtomError, match=words):
            check_shard(prefix)
        prefix.with_suffix(".bin").write_bytes(data)
        prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(AtomError, match=r"sums\.bin is missing"):
        check_shard(prefix)
    with pytest.raises(AtomError, match=r"train/sums\.bin is missing"):
        Artifact.open(tokens.path)


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_done_beforehand_are_all_that_the_stage_needs(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    from tests.fixtures.run_fixtures import RecordingReport

    inputs = {"dedup": curated(tmp_path / "in"), "tokenizer": write_manifest(tokenizer_folder, "tokenizer")}
    uncut, cut, work = tmp_path / "whole", tmp_path / "cut", tmp_path / "work"
    for folder in (uncut, cut, work):
        folder.mkdir()
    tokenization.run(tokenization.TokenizeConfig(), inputs, tmp_path / "other", uncut, RecordingReport())
    config = tokenization.TokenizeConfig(shards=shards)
    for shard in range(shards):
        tokenization.run_shard(config, inputs, work, shard)
    assert len(list(work.glob("tokens-*"))) == 2 * shards
    monkeypatch.setattr(tokenization, "encode", None)  # nothing is left to encode
    tokenization.run(config, inputs, work, cut, RecordingReport())
    assert write_manifest(cut, "t").digest == write_manifest(uncut, "t").digest
