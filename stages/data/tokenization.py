"""Encode kept documents into Megatron's .bin/.idx shards, one for each split and source, with a table of documents."""

from __future__ import annotations

import os
import shutil
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.core.bounds import MOST_SOURCES, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import once, sha256_file
from stages.data.curation.settings import Shards
from stages.data.table import TOKENIZED, KeptRow, TokenizedRow, read_shard, stream_shards, write_json, write_rows
from stages.data.tokenizer import END, PAD, load_for_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 2
BATCH = 512


class EncodedShard(TypedDict):
    """ids: int32 of all documents of a shard, in Base64; lengths: ids of each document; loss_from: first id of each
    document that carries loss."""

    ids: str
    lengths: list[int]
    loss_from: list[int]


class TokenizeConfig(Config):
    """Tokenizer and documents come as inputs."""

    conversations: tuple[SourceName, ...] = added(
        (), "sources whose documents contain special tokens and end with one", max_length=MOST_SOURCES
    )
    shards: Shards = operational(1, "parts of each source")


def run(config: TokenizeConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal `<split>/<source>.bin` and `.idx`, `documents.parquet` and `meta.json`. Every document ends with
    `<|endoftext|>`, a conversation with its own `<|im_end|>`. A split of a source without documents has no shard.

    inputs["dedup"]: kept documents; inputs["tokenizer"]: tokenizer.json.
    """
    tokenizer, end, files = _load_inputs(inputs)
    vocab_size = tokenizer.get_vocab_size()
    work.mkdir(parents=True, exist_ok=True)
    rows: list[TokenizedRow] = []
    meta: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_id": tokenizer.token_to_id(PAD),
        "eod_id": end,
        "tokenizer": sha256_file(inputs["tokenizer"] / "tokenizer.json"),
        "tokens": {"train": {}, "heldout": {}},
        "documents": {"train": {}, "heldout": {}},
    }
    for n, file in enumerate(files):
        splits = {split: _Shard(vocab_size, split, file.stem, work) for split in ("train", "heldout")}
        for shard, documents in enumerate(stream_shards(file, config.shards)):
            tokens = _unpack_tokens(_cached_tokens(config, tokenizer, end, file, work, shard, documents))
            for document, (ids, loss_from) in zip(documents, tokens, strict=True):
                splits[document["split"]].add(document, ids, loss_from)
        for split, shard_file in splits.items():
            if shard_file.close(out):
                rows.extend(shard_file.rows)
                meta["documents"][split][file.stem] = len(shard_file.rows)
                meta["tokens"][split][file.stem] = sum(row["tokens"] for row in shard_file.rows)
        report.progress(n + 1, len(files), "sources")
    write_rows(out / "documents.parquet", TOKENIZED, rows)
    write_json(out / "meta.json", meta)
    report.note(
        f"{sum(meta['tokens']['train'].values())} training tokens, {sum(meta['tokens']['heldout'].values())} held out"
    )


def _load_inputs(inputs: Inputs) -> tuple[Tokenizer, int, list[Path]]:
    """The tokenizer, its end-of-document id, and the files of kept documents, one for each source."""
    tokenizer = load_for_corpus(inputs["tokenizer"] / "tokenizer.json")
    end = tokenizer.token_to_id(END)
    if end is None:
        raise AtomError(f"{inputs['tokenizer'] / 'tokenizer.json'} has no {END} token; run tokenizer again")
    files = sorted((inputs["dedup"] / "kept").glob("*.parquet"))
    if not files:
        raise AtomError(f"{inputs['dedup'].path} holds no kept documents; run dedup again")
    return tokenizer, end, files


def run_shard(config: TokenizeConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Encodes one shard of every source and caches the tokens in `work`."""
    tokenizer, end, files = _load_inputs(inputs)
    for file in files:
        documents = read_shard(file, shard, config.shards, ["text", "prompt_chars"])
        _cached_tokens(config, tokenizer, end, file, work, shard, documents)


def _cached_tokens(
    config: TokenizeConfig,
    tokenizer: Tokenizer,
    end: int,
    file: Path,
    work: Path,
    shard: int,
    documents: Sequence[KeptRow],
) -> EncodedShard:
    """The tokens of a shard's documents, cached in `work`."""

    def make() -> EncodedShard:
        chat = file.stem in config.conversations
        tokenizer.encode_special_tokens = not chat
        tokens: list[tuple[list[int], int]] = []
        for start in range(0, len(documents), BATCH):
            texts = [(d["text"], d["prompt_chars"]) for d in documents[start : start + BATCH]]
            tokens += encode(tokenizer, None if chat else end, texts)
        ids = array("i", [i for ids, _ in tokens for i in ids])
        lengths, prompts = [len(ids) for ids, _ in tokens], [prompt for _, prompt in tokens]
        return {"ids": b64encode(ids.tobytes()).decode(), "lengths": lengths, "loss_from": prompts}

    encoded: EncodedShard = once(work / f"tokens-{file.stem}-{shard:05d}-of-{config.shards:05d}.json", make)
    return encoded


def _unpack_tokens(tokens: EncodedShard) -> Iterator[tuple[list[int], int]]:
    """(ids, loss_from) of each document of a shard."""
    ids, start = array("i", b64decode(tokens["ids"])).tolist(), 0
    for length, loss_from in zip(tokens["lengths"], tokens["loss_from"], strict=True):
        yield ids[start : start + length], loss_from
        start += length


def encode(tokenizer: Tokenizer, end: int | None, texts: list[tuple[str, int]]) -> Iterator[tuple[list[int], int]]:
    """(ids with the final `end`, number of ids of the part without loss) of each (text, prompt_chars).

    The part without loss is encoded separately, as in a prompt.
    """
    parts = [text[:n] for text, n in texts] + [text[n:] for text, n in texts]
    encoded = [e.ids for e in tokenizer.encode_batch(parts, add_special_tokens=False)]
    for prompt, continuation in zip(encoded[: len(texts)], encoded[len(texts) :], strict=True):
        yield [*prompt, *continuation, *([] if end is None else [end])], len(prompt)


class _Shard:
    """Megatron's shard of a split of a source; `rows` describe its documents."""

    def __init__(self, vocab_size: int, split: str, source: str, work: Path) -> None:
        from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

        # datatrove's files hold two bytes a token up to 65,536 ids; the .idx holds the width: Megatron reads both
        size = 2 if vocab_size <= 65_536 else 4
        self.split, self.source, self.folder = split, source, work / split
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[TokenizedRow] = []
        self._file = MegatronTokenizedFile(str(self.folder), source, token_size=size)

    def add(self, document: KeptRow, ids: list[int], loss_from: int) -> None:
        self._file.write(ids)
        self.rows.append(
            {
                "source": self.source,
                "split": self.split,
                "ordinal": len(self.rows),
                "id": document["id"],
                "content_hash": document["content_hash"],
                "license": document["license"],
                "bytes": len(document["text"].encode()),
                "tokens": len(ids),
                "loss_from": loss_from,
            }
        )

    def close(self, out: Path) -> bool:
        """Moves the finished files to `out`; returns False, without files, if there are no documents."""
        self._file.close()
        if not self.rows:
            return False
        (out / self.split).mkdir(exist_ok=True)
        for suffix in (".bin", ".idx"):
            finished, target = (parent / f"{self.source}{suffix}" for parent in (self.folder, out / self.split))
            try:
                os.replace(finished, target)
            except OSError:  # work and out may be on different file systems
                shutil.move(finished, target)
        return True


def estimate(config: TokenizeConfig) -> Estimate:
    return Estimate(cpu_seconds=10.0, fixed=True)


STAGE = Stage(
    "tokenize", VERSION, TokenizeConfig, run, estimate=estimate, shards=lambda c: c.shards, run_shard=run_shard
)
