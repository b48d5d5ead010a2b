"""Tokenizer and shards: any text comes back, special tokens stay special, Megatron and transformers read the files."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.parts import part_file
from pipeline.core.store import Artifact, write_manifest
from stages.data.order import tokenize_stage
from stages.data.order.shards import ShardWriter, check_shard, check_sizes
from stages.data.order.tokenize_stage import Encoder
from stages.formats import text_sample
from stages.formats import tokenizer as training
from stages.formats.table import KEPT, content_hash, write_rows

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
    write_rows(folder / "kept/prose/part-00000.parquet", KEPT, rows)
    sums = []
    for i in range(40):
        text = f"{100 + i}+{200 + i}={300 + 2 * i}"
        common = {"source": "sums", "license": "CC0-1.0", "origin": "test", "prompt_chars": 8, "split": "train"}
        sums.append({"id": f"sums/{i}", "text": text, "content_hash": content_hash(text), **common})
    write_rows(folder / "kept/sums/part-00000.parquet", KEPT, sums)
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
training = open(sys.argv[1] + "/training_chat_template.jinja").read()
both = t.apply_chat_template(chat, chat_template=training, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
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


def test_the_sample_has_equal_bytes_of_each_source() -> None:
    lengths = {"a": [4] * 3, "b": [1] * 5}
    assert text_sample.interleave(lengths, 1000) == {"a": 3, "b": 5}
    assert text_sample.interleave(lengths, 7) == {"a": 1, "b": 3}
    assert text_sample.interleave(lengths, 9) == {"a": 2, "b": 4}
    assert text_sample.interleave({"a": [4] * 3, "b": []}, 5) == {"a": 2, "b": 0}


def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path, run_stage: Any) -> None:
    section = {"vocab_size": 5000, "padded_vocab_size": 5120}
    with pytest.raises(RecipeError, match="yield only"):
        run_stage(training.STAGE, section, {"dedup": curated(tmp_path / "a")})
    with pytest.raises(ValueError, match="below vocab_size"):
        training.TokenizerSection(vocab_size=512, padded_vocab_size=500)


def tokenized(folder: Path, run_stage: Any) -> tuple[Artifact, Artifact]:
    inputs = {"dedup": curated(folder / "curated", extra=(TRICKY,))}
    inputs["tokenizer"] = run_stage(training.STAGE, SECTION, inputs)
    tokens: Artifact = run_stage(tokenize_stage.STAGE, {}, inputs)
    return tokens, inputs["tokenizer"]


def test_megatron_reads_the_shards(tmp_path: Path, run_stage: Any) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens, tokenizer_artifact = tokenized(tmp_path, run_stage)
    tokenizer = Tokenizer.from_file(str(tokenizer_artifact / "tokenizer.json"))
    rows = [row for path in sorted(tokens.path.glob("documents/*/*")) for row in pq.read_table(path).to_pylist()]
    meta = tokens.json("meta.json")
    assert sorted(p.relative_to(tokens.path).as_posix() for p in tokens.path.rglob("*.bin")) == [
        "heldout/prose/part-00000.bin",
        "train/prose/part-00000.bin",
        "train/sums/part-00000.bin",
    ]
    texts = {f"prose/{i}": t for i, t in enumerate([*TEXTS, TRICKY])}
    for split, source in (("train", "prose"), ("heldout", "prose"), ("train", "sums")):
        mine = [row for row in rows if (row["split"], row["source"]) == (split, source)]
        name = f"{split}/{source}/part-00000"
        data = IndexedDataset(str(tokens / name))
        assert len(data) == len(mine) == meta["documents"][split][source] == check_shard(tokens.path, name)
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
    name = "train/sums/part-00000"
    prefix = tokens / name
    data, index = (prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx"))
    sequences = check_shard(tokens.path, name)
    pointers = 34 + 4 * sequences
    for suffix, content, words, at_a_glance in (
        (".bin", data[:-2], r"00000\.bin has \d+ bytes instead of", True),
        (".idx", index[:-8], r"00000\.idx has \d+ bytes where", True),
        (".idx", b"nonsense" * 20, r"00000\.idx is not a Megatron index", True),
        (".idx", index[:10], r"00000\.idx has only 10 bytes", True),
        (".idx", index[:-8] + bytes(8), r"00000\.idx does not end its last document", True),
        (".idx", index[:34] + b"\x01" + index[35:], r"00000\.idx does not list", False),
        (".idx", index[:pointers] + b"\x02" + index[pointers + 1 :], r"00000\.idx does not list", False),
    ):
        prefix.with_suffix(suffix).write_bytes(content)
        with pytest.raises(AtomError, match=f"sums/part-{words}.*; remove {tokens.path} and run again"):
            check_shard(tokens.path, name)
        if at_a_glance:
            with pytest.raises(AtomError, match=words):
                check_sizes(tokens.path, name)
        else:
            assert check_sizes(tokens.path, name) == sequences
        prefix.with_suffix(".bin").write_bytes(data)
        prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").unlink()
    with pytest.raises(AtomError, match=r"sums/part-00000\.bin is missing"):
        check_sizes(tokens.path, name)
    with pytest.raises(AtomError, match=r"train/sums/part-00000\.bin is missing"):
        Artifact.open(tokens.path)


@pytest.mark.parametrize("documents, entries", [(0, 1 << 18), (7, 3), (9, 3), (50, 1 << 18)])
@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_the_shard_has_the_bytes_of_datatrove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, entries: int, vocab_size: int
) -> None:
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    monkeypatch.setattr("stages.data.order.shards._ENTRIES", entries)
    writer = ShardWriter(tmp_path / "ours/shard", vocab_size)
    theirs = MegatronTokenizedFile(str(tmp_path), "shard", token_size=2 if vocab_size == 65_536 else 4)
    rng = np.random.default_rng(0)
    for _ in range(documents):
        ids = rng.integers(0, vocab_size, rng.integers(1, 9)).astype(np.int32)
        writer.add(ids)
        theirs.write(ids.tolist())
    writer.close()
    theirs.close()
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours/shard{suffix}").read_bytes() == (tmp_path / f"shard{suffix}").read_bytes()
    assert check_shard(tmp_path / "ours", "shard") == check_sizes(tmp_path / "ours", "shard") == documents


PARTS = {"prose": 3, "sums": 2}


def in_parts(folder: Path) -> Artifact:
    """The documents of `curated` in parts, one of them without documents and one without held-out documents."""
    curated(folder / "whole")
    for source, bounds in (("prose", [0, 9, 9, 60]), ("sums", [0, 13, 40])):
        rows = pq.read_table(folder / f"whole/kept/{source}/part-00000.parquet").to_pylist()
        for part, (start, stop) in enumerate(pairwise(bounds)):
            write_rows(folder / "parts/kept" / source / part_file(part), KEPT, rows[start:stop])
    return write_manifest(folder / "parts", "dedup")


def tokenize(inputs: dict[str, Artifact], work: Path, out: Path, **config: Any) -> Artifact:
    from tests.fixtures.run_fixtures import RecordingReport

    out.mkdir()
    tokenize_stage.run(tokenize_stage.TokenizeConfig(**config), inputs, work, out, RecordingReport())
    return write_manifest(out, "tokenize")


@pytest.fixture
def part_inputs(tokenizer_folder: Path, tmp_path: Path) -> dict[str, Artifact]:
    return {"dedup": in_parts(tmp_path / "in"), "tokenizer": write_manifest(tokenizer_folder, "tokenizer")}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_order_of_the_parts_gives_the_same_bytes(
    part_inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    whole = tokenize(part_inputs, tmp_path / "other", tmp_path / "whole")
    config = tokenize_stage.TokenizeConfig(parts=PARTS)
    assert tokenize_stage.STAGE.shards(config) == 5
    for shard in random.Random(seed).sample(range(5), 5):
        tokenize_stage.run_shard(config, part_inputs, tmp_path / "work", shard)
    monkeypatch.setattr(tokenize_stage, "encode", None)  # nothing is left to encode
    assert tokenize(part_inputs, tmp_path / "work", tmp_path / "out", parts=PARTS).digest == whole.digest
    files = {path.relative_to(whole.path).as_posix() for path in whole.path.rglob("*") if path.is_file()}
    assert files == {
        "manifest.json", "meta.json",
        *(f"documents/{source}/part-0000{part}.parquet" for source, parts in PARTS.items() for part in range(parts)),
        *(f"train/{name}.{suffix}" for suffix in ("bin", "idx") for name in
          ("prose/part-00000", "prose/part-00002", "sums/part-00000", "sums/part-00001")),
        *(f"heldout/prose/part-00002.{suffix}" for suffix in ("bin", "idx")),
    }  # fmt: skip
    assert pq.read_metadata(whole / "documents/prose/part-00001.parquet").num_rows == 0


def test_parts_hold_what_one_part_holds(part_inputs: dict[str, Artifact], tmp_path: Path) -> None:
    whole_inputs = {**part_inputs, "dedup": curated(tmp_path / "one")}
    parts = tokenize(part_inputs, tmp_path / "a", tmp_path / "parts")
    whole = tokenize(whole_inputs, tmp_path / "b", tmp_path / "whole")
    assert parts.json("meta.json") == whole.json("meta.json")
    for source, count in PARTS.items():
        tables = [pq.read_table(parts / f"documents/{source}" / part_file(part)).to_pylist() for part in range(count)]
        assert [row["part"] for rows in tables for row in rows] == [n for n, rows in enumerate(tables) for _ in rows]
        for rows in tables:
            for split in ("train", "heldout"):
                ordinals = [row["ordinal"] for row in rows if row["split"] == split]
                assert ordinals == list(range(len(ordinals)))
        rows = [{**row, "part": 0, "ordinal": 0} for table in tables for row in table]
        expected = pq.read_table(whole / f"documents/{source}/part-00000.parquet").to_pylist()
        assert rows == [{**row, "ordinal": 0} for row in expected]
        for split in ("train", "heldout"):
            data = b"".join(path.read_bytes() for path in sorted(parts.path.glob(f"{split}/{source}/*.bin")))
            one = whole / f"{split}/{source}/part-00000.bin"
            assert data == (one.read_bytes() if one.exists() else b"")


def test_one_encoding_serves_all_parts_of_a_process(
    part_inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize_stage._load_tokenizer.cache_clear()
    encodings: list[Encoder] = []

    def load(file: Path, special_tokens: bool = False) -> Encoder:
        encodings.append(Encoder(file, special_tokens))
        return encodings[-1]

    monkeypatch.setattr(tokenize_stage, "Encoder", load)
    for shard in range(5):
        tokenize_stage.run_shard(tokenize_stage.TokenizeConfig(parts=PARTS), part_inputs, tmp_path / "work", shard)
    assert len(encodings) == 1  # tiktoken keeps the memory of each


@pytest.mark.parametrize("damage", ["killed", "cut"])
def test_a_killed_or_damaged_part_is_made_again(
    part_inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expected = tokenize(part_inputs, tmp_path / "other", tmp_path / "whole")
    work, config = tmp_path / "work", tokenize_stage.TokenizeConfig(parts=PARTS)
    if damage == "killed":
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "close", lambda self: os._exit(9))
            if (pid := os.fork()) == 0:
                tokenize_stage.run_shard(config, part_inputs, work, 2)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert [path.name.split(".")[1] for path in work.iterdir()] == ["prose-00002"]
    else:
        tokenize_stage.run_shard(config, part_inputs, work, 2)
        file = work / "prose-00002/train/prose/part-00002.bin"
        file.write_bytes(file.read_bytes()[:-2])
    assert tokenize(part_inputs, work, tmp_path / "out").digest == expected.digest


def test_a_part_that_the_disk_spoils_is_not_sealed(
    part_inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = ShardWriter.close

    def spoil(writer: ShardWriter) -> None:
        close(writer)
        index = writer.prefix.with_suffix(".idx")
        index.write_bytes(index.read_bytes()[:34] + b"\x01" + index.read_bytes()[35:])

    monkeypatch.setattr(ShardWriter, "close", spoil)
    with pytest.raises(AtomError, match=r"part-00000\.idx does not list its sequences one behind the other"):
        tokenize_stage.run_shard(tokenize_stage.TokenizeConfig(parts=PARTS), part_inputs, tmp_path / "work", 0)
    assert not (tmp_path / "work/prose-00000").exists()


def test_other_parts_than_the_recipe_has_are_refused(part_inputs: dict[str, Artifact], tmp_path: Path) -> None:
    config = tokenize_stage.TokenizeConfig(parts={"prose": 4})
    with pytest.raises(AtomError, match="holds 3 parts of prose, and the recipe has 4; run dedup again"):
        tokenize_stage.run_shard(config, part_inputs, tmp_path / "work", 3)


def test_the_tokenizer_is_the_same_for_any_parts(part_inputs: dict[str, Artifact], tmp_path: Path) -> None:
    from tests.fixtures.run_fixtures import RecordingReport

    out = tmp_path / "tokenizer"
    out.mkdir()
    training.run(training.TokenizerSection(**SECTION), part_inputs, tmp_path, out, RecordingReport())
    assert write_manifest(out, "tokenizer").digest == part_inputs["tokenizer"].digest


def test_a_large_source_is_sampled_from_some_of_its_files(tmp_path: Path) -> None:
    kept = in_parts(tmp_path) / "kept"

    def files(**section: Any) -> dict[str, list[str]]:
        chosen = text_sample.choose_files(kept, **{"leave_out": (), "size": 100_000, **section})
        return {name: [path.stem for path in paths] for name, paths in chosen.items()}

    assert {name: len(paths) for name, paths in files().items()} == PARTS
    assert {name: len(paths) for name, paths in files(size=1).items()} == {"prose": 1, "sums": 1}
    assert list(files(leave_out=["prose"])) == ["sums"]


class PublishedTokens:
    """What a replay reads of a release: the plan of a phase on some token shards."""

    def __init__(self, inputs: dict[str, Artifact], tokens: Artifact) -> None:
        keys = {"dedup": "dedup-1", "tokenizer": "tokenizer-1", "tokens": "tokenize-1"}
        artifacts = {"dedup-1": inputs["dedup"], "tokenizer-1": inputs["tokenizer"], "tokenize-1": tokens}
        self.files = {key: {row.path: (artifact / row.path, row.sha256) for row in artifact.rows}
                      for key, artifact in artifacts.items()}  # fmt: skip
        self.manifests = {"tokenize-1": SimpleNamespace(node="tokenize")}
        self.source, self.materials = self, keys
        self.mix = {"prose": 0.5, "sums": 0.5}

    def statement(self, node: str) -> tuple[str, Any]:
        return "tokenize-1", {}

    def listed(self, key: str) -> dict[str, str]:
        return {path: digest for path, (_, digest) in self.files[key].items()}

    def copy(self, key: str, file: str) -> Path:
        return self.files[key][file][0]

    kept = copy

    def tokenizer(self, key: str) -> Path:
        return self.files[key]["tokenizer.json"][0]


@pytest.mark.parametrize("layout", ["parts", "one part"])
def test_a_replay_makes_the_shards_again(
    part_inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    from pipeline.core import provenance
    from release.audit.replay import retraining

    monkeypatch.setattr(provenance, "material_keys", lambda body: {"dedup": "dedup-1", "tokenizer": "tokenizer-1"})
    monkeypatch.setattr(provenance, "parameters_of", lambda body: {"config": {}})
    inputs = part_inputs if layout == "parts" else {**part_inputs, "dedup": curated(tmp_path / "one")}
    tokens = tokenize(inputs, tmp_path / "work", tmp_path / "tokens")
    plan: Any = PublishedTokens(inputs, tokens)
    replayed = retraining.tokenize(plan, tmp_path / "replay")
    assert replayed.rows == tokens.rows
    plan.files["tokenize-1"] = {
        path: (file, "0" * 64 if path.endswith(".idx") and "train/sums" in path else digest)
        for path, (file, digest) in plan.files["tokenize-1"].items()
    }
    with pytest.raises(CheckFailed, match=r"train/sums/part-00000.idx differs .* shards differ"):
        retraining.tokenize(plan, tmp_path / "altered")
    plan.files["dedup-1"] = {"kept/prose/../../x.parquet": (tmp_path, "")}
    with pytest.raises(CheckFailed, match="the manifest of dedup-1 lists no kept documents of prose"):
        retraining.tokenize(plan, tmp_path / "none")


@pytest.mark.parametrize("documents, size", [(5, 0), (1, 700), (1, 10**9), (100, 0)])
@pytest.mark.parametrize("pending", [0, 1_000_000])
def test_a_sample_has_the_least_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: int, size: int, pending: int
) -> None:
    monkeypatch.setattr(text_sample, "PENDING", pending)
    monkeypatch.setattr(text_sample, "ROWS", 4)
    kept = in_parts(tmp_path) / "kept/prose"
    files = sorted(kept.iterdir())
    rows = [row for path in files for row in pq.read_table(path).to_pylist() if row["split"] == "train"]
    rows.sort(key=lambda row: row["content_hash"])
    sample = text_sample.Sample.draw(files, "train", documents, size)
    lengths = [len(row["text"].encode()) for row in rows]
    least = next((n for n in range(len(rows)) if sum(lengths[:n]) >= size), len(rows))
    count = min(max(least, documents), len(rows))
    assert count <= len(sample.lengths) <= count + 1 and sample.lengths.tolist() == lengths[: len(sample.lengths)]
    texts = [text for batch in sample.texts(count) for text in batch]
    assert sorted(texts) == sorted(row["text"] for row in rows[:count])
