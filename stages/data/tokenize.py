"""Encode kept documents into Megatron's .bin/.idx shards, one a split and source, and say what stands where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import AtomError
from pipeline.stage import Config, Estimate, Inputs, Report, Stage, added
from pipeline.store import sha256_file
from stages.data.table import TOKENIZED, read_table, write_json, write_rows
from stages.data.tokenizer import END, PAD, load_for_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 2
BATCH = 512


class TokenizeConfig(Config):
    """Tokenizer and documents come as inputs."""

    conversations: tuple[str, ...] = added((), "sources in which special tokens are tokens, and end every document")


def run(config: TokenizeConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seal `<split>/<source>.bin` and `.idx`, `documents.parquet` and `meta.json`. Every document ends with
    `<|endoftext|>`, a conversation with its own `<|im_end|>`. A split of a source without documents has no shard.

    inputs["curate"]: kept documents; inputs["tokenizer"]: tokenizer.json.
    """
    tokenizer = load_for_corpus(inputs["tokenizer"] / "tokenizer.json")
    vocab_size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    if end is None:
        raise AtomError(f"{inputs['tokenizer'] / 'tokenizer.json'} has no {END} token; run tokenizer again")
    files = sorted((inputs["curate"] / "kept").glob("*.parquet"))
    if not files:
        raise AtomError(f"{inputs['curate'].path} holds no kept documents; run curate again")
    rows: list[dict[str, Any]] = []
    meta: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_id": tokenizer.token_to_id(PAD),
        "eod_id": end,
        "tokenizer": sha256_file(inputs["tokenizer"] / "tokenizer.json"),
        "tokens": {"train": {}, "heldout": {}},
        "documents": {"train": {}, "heldout": {}},
    }
    for n, file in enumerate(files):
        documents, chat = read_table(file).to_pylist(), file.stem in config.conversations
        tokenizer.encode_special_tokens = not chat
        for split in ("train", "heldout"):
            mine = [d for d in documents if d["split"] == split]
            if not mine:
                continue
            written = list(_shard(tokenizer, None if chat else end, mine, split, file.stem, work, out))
            rows.extend(written)
            meta["documents"][split][file.stem] = len(written)
            meta["tokens"][split][file.stem] = sum(row["tokens"] for row in written)
        report.progress(n + 1, len(files), "sources")
    write_rows(out / "documents.parquet", TOKENIZED, rows)
    write_json(out / "meta.json", meta)
    report.note(
        f"{sum(meta['tokens']['train'].values())} training tokens, {sum(meta['tokens']['heldout'].values())} held out"
    )


def encode(tokenizer: Tokenizer, end: int | None, texts: list[tuple[str, int]]) -> Iterator[tuple[list[int], int]]:
    """(ids with the final `end`, number of ids of the part without loss) of each (text, prompt_chars).

    The part without loss is encoded by itself, as it will be when a model is prompted with it.
    """
    parts = [text[:n] for text, n in texts] + [text[n:] for text, n in texts]
    encoded = [e.ids for e in tokenizer.encode_batch(parts, add_special_tokens=False)]
    for prompt, rest in zip(encoded[: len(texts)], encoded[len(texts) :], strict=True):
        yield [*prompt, *rest, *([] if end is None else [end])], len(prompt)


def _shard(
    tokenizer: Tokenizer,
    end: int | None,
    documents: list[dict[str, Any]],
    split: str,
    source: str,
    work: Path,
    out: Path,
) -> Iterator[dict[str, Any]]:
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    # datatrove's files hold two bytes a token up to 65,536 ids; the width stands in the .idx, so Megatron reads both
    size = 2 if tokenizer.get_vocab_size() <= 65_536 else 4
    folder = work / split
    folder.mkdir(parents=True, exist_ok=True)
    shard = MegatronTokenizedFile(str(folder), source, token_size=size)
    ordinal = 0
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        encoded = encode(tokenizer, end, [(d["text"], d["prompt_chars"]) for d in batch])
        for document, (ids, loss_from) in zip(batch, encoded, strict=True):
            shard.write(ids)
            yield {
                "source": source,
                "split": split,
                "ordinal": ordinal,
                "id": document["id"],
                "content_hash": document["content_hash"],
                "license": document["license"],
                "bytes": len(document["text"].encode()),
                "tokens": len(ids),
                "loss_from": loss_from,
            }
            ordinal += 1
    shard.close()
    (out / split).mkdir(exist_ok=True)
    for suffix in (".bin", ".idx"):
        target = out / split / f"{source}{suffix}"
        try:
            os.replace(folder / f"{source}{suffix}", target)
        except OSError:  # work and out may lie on different file systems
            shutil.move(folder / f"{source}{suffix}", target)


def estimate(config: TokenizeConfig) -> Estimate:
    return Estimate(cpu_seconds=10.0)


STAGE = Stage("tokenize", VERSION, TokenizeConfig, run, estimate=estimate)
