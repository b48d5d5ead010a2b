"""Encodes kept documents into Megatron's .bin/.idx shards, one for each split of a part, and tables of documents.

Texts are encoded by tiktoken, with exactly the ids that the `tokenizers` library gives for the same tokenizer.json.
tiktoken is seven times as fast, but merges any two neighbors whose bytes together are a token, where `tokenizers`
follows the list of merges. Both give the same ids if every token is what its own bytes are encoded to. So this is
checked for each token before the first text, and a tokenizer for which it does not hold, or that is not of the kind
that stages/formats/tokenizer.py trains, stays with `tokenizers`; `tests/integration/data/test_encoder.py` compares
both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.core.bounds import MOST_SOURCES, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.parts import PartCount, link_parts, part_file, seal_part, shards_of
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import sha256_file
from stages.data import estimates
from stages.data.estimates import Size
from stages.data.order.shards import ShardWriter, check_shard
from stages.formats.table import SPLITS, TOKENIZED, part_files, sources_of, stream_batches, table_writer, write_json
from stages.formats.tokenizer import END, PAD, PATTERN, load_for_corpus, untrained

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]
    from tokenizers import Tokenizer


# Characters. tiktoken's regular expressions fail on runs of a million blanks: a text with a block of blanks is left
# to `tokenizers`.
BLOCK = 100_000
VERSION = 3
COLUMNS = ["id", "text", "license", "content_hash", "prompt_chars", "split"]
ROWS = 256  # of text in memory at a time


class Encoder:
    """Encodes texts with the tokenizer at `path`, by tiktoken where `fast` is true.

    If `special_tokens`, the names of special tokens in a text are these tokens, as in conversations; else they are
    ordinary text.
    """

    def __init__(self, path: Path, special_tokens: bool = False) -> None:
        self.tokenizer = load_for_corpus(path)
        self._tiktoken = _tiktoken_encode(self.tokenizer, special_tokens)
        self.tokenizer.encode_special_tokens = not special_tokens

    @property
    def fast(self) -> bool:
        return self._tiktoken is not None

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the ids of each text."""
        encode = self._tiktoken
        if encode is None:
            return self.reference(texts)
        return [self.reference([text])[0] if has_blank_block(text) else encode(text) for text in texts]

    def reference(self, texts: Sequence[str]) -> list[Ids]:
        """Returns the ids of each text by `tokenizers`."""
        import numpy as np

        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def has_blank_block(text: str) -> bool:
    """Returns True if a block of the text is blank. A text without one has no run of 2 * BLOCK blanks."""
    return len(text) > BLOCK and any(text[start : start + BLOCK].isspace() for start in range(0, len(text), BLOCK))


def _tiktoken_encode(tokenizer: Tokenizer, special_tokens: bool) -> Callable[[str], Ids] | None:
    """Returns a function that encodes a text with tiktoken; None if tiktoken cannot represent the tokenizer."""
    import numpy as np
    import tiktoken

    description = json.loads(tokenizer.to_str())
    specials = [token["content"] for token in description["added_tokens"]]
    merged = _merged_tokens(description, specials)
    if merged is None or not _merges_to_itself(tokenizer, merged):
        return None
    byte_of = _bytes_by_character()
    tokens = [*byte_of, *merged]
    # tiktoken's ranks are those of the merges, whatever the ids are
    ranks = {bytes(byte_of[character] for character in token): rank for rank, token in enumerate(tokens)}
    special_ranks = {name: len(tokens) + n for n, name in enumerate(specials)}
    ids = np.array([*map(tokenizer.token_to_id, [*tokens, *specials])], np.int32)
    encoding = tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ranks)
    allowed = frozenset(specials if special_tokens else ())

    def encode(text: str) -> Ids:
        encoded: Ids = ids[encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())]
        return encoded

    return encode


def _merged_tokens(description: dict[str, Any], specials: Sequence[str]) -> list[str] | None:
    """Returns the tokens that the merges make, in the order of the merges; None for a tokenizer of another kind.

    A tokenizer of another kind has other steps or options than an untrained one, tokens that no merge or several merges
    make, merges of tokens that come later, or special tokens that `tokenizers` does not simply look for.
    """
    model, kind = description["model"], json.loads(untrained().to_str())
    steps = ("truncation", "padding", "normalizer", "pre_tokenizer")
    options = [name for name in kind["model"] if name not in ("vocab", "merges")]
    same_kind = all(description[name] == kind[name] for name in steps)
    if not same_kind or any(model.get(name) != kind["model"][name] for name in options):
        return None
    # Options of added tokens that tiktoken does not have.
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    if any(plain.items() - token.items() for token in description["added_tokens"]):
        return None
    ordered = sorted(specials)
    # The libraries may choose differently between special tokens of which one begins with the other.
    if any(later.startswith(earlier) for earlier, later in pairwise(ordered)):
        return None
    merged = [first + second for first, second in model["merges"]]
    tokens = [*_bytes_by_character(), *merged]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or {*tokens, *specials} != {*model["vocab"], *specials} or {*tokens} & {*specials}:
        return None
    parts_come_earlier = all(
        max(ranks.get(first, len(ranks)), ranks.get(second, len(ranks))) < ranks[first + second]
        for first, second in model["merges"]
    )
    return merged if parts_come_earlier else None


def _merges_to_itself(tokenizer: Tokenizer, merged: Sequence[str]) -> bool:
    """Returns True if every token is what the merges make of its bytes."""
    tokenize = tokenizer.model.tokenize
    return all([piece.value for piece in tokenize(token)] == [token] for token in merged)


def _bytes_by_character() -> dict[str, int]:
    """Returns {character that stands for a byte in a byte-level vocabulary: the byte}, as GPT-2 has it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenizeConfig(Config):
    """Tokenizer and documents come as inputs."""

    conversations: tuple[SourceName, ...] = added((), max_length=MOST_SOURCES)
    """sources whose documents contain special tokens and end with one"""
    parts: dict[SourceName, PartCount] = operational({}, max_length=MOST_SOURCES)
    """parts of each source, the tasks of a job array; those of the kept documents"""
    expected: Size | None = operational(None)
    """expected size of all sources; null: unknown"""


class TokensMeta(TypedDict):
    """The content of `meta.json`."""

    vocab_size: int
    """number of ids of the tokenizer"""
    pad_id: int | None
    """id of `<|pad|>`; null if the tokenizer has none"""
    eod_id: int
    """id of `<|endoftext|>`"""
    tokenizer: str
    """SHA-256 of the `tokenizer.json` that encoded"""
    tokens: dict[str, dict[str, int]]
    """number of tokens by split and source"""
    documents: dict[str, dict[str, int]]
    """number of documents by split and source"""


def run(config: TokenizeConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `<split>/<source>/part-*.bin` and `.idx`, `documents/<source>/part-*.parquet` and `meta.json`.

    Every document ends with `<|endoftext|>`, a conversation with its own `<|im_end|>`. A part without documents of
    a split has no shard of it.

    inputs["dedup"]: kept documents, in parts; inputs["tokenizer"]: tokenizer.json. Raises AtomError if an input is
    damaged.
    """
    files, tokenizer = _kept_files(inputs), _tokenizer(inputs)
    totals: dict[str, dict[str, dict[str, int]]]
    totals = {count: {split: {} for split in SPLITS} for count in ("tokens", "documents")}
    places = [(source, part) for source in files for part in range(len(files[source]))]
    parts = []
    for source, part in places:
        sealed = seal_part(work, *_part(config, tokenizer, files[source][part], source, part))
        for count, by_split in sealed.facts.items():
            for split, value in by_split.items():
                totals[count][split][source] = totals[count][split].get(source, 0) + value
        parts.append(sealed)
        report.progress(len(parts), len(places), "parts")
    link_parts(parts, out)
    meta: TokensMeta = {
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad,
        "eod_id": tokenizer.end,
        "tokenizer": tokenizer.sha256,
        "tokens": totals["tokens"],
        "documents": totals["documents"],
    }
    write_json(out / "meta.json", meta)
    report.note(
        f"{sum(meta['tokens']['train'].values())} training tokens, {sum(meta['tokens']['heldout'].values())} held out"
    )


def run_shard(config: TokenizeConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`. Shards count the parts of `config.parts`, source by source."""
    files, tokenizer = _kept_files(inputs), _tokenizer(inputs)
    source, part = [(source, part) for source, count in config.parts.items() for part in range(count)][shard]
    kept = files.get(source, [])
    if len(kept) != config.parts[source]:
        raise AtomError(
            f"{inputs['dedup'].path} holds {len(kept)} parts of {source}, and the recipe has {config.parts[source]}; "
            "run dedup again"
        )
    seal_part(work, *_part(config, tokenizer, kept[part], source, part))


def _kept_files(inputs: Inputs) -> dict[str, list[Path]]:
    """Returns the files of kept documents of each source, by part."""
    kept = inputs["dedup"] / "kept"
    files = {source: part_files(kept, source) for source in sources_of(kept)}
    if not files:
        raise AtomError(f"{inputs['dedup'].path} holds no kept documents; run dedup again")
    return files


def _tokenizer(inputs: Inputs) -> _Tokenizer:
    """Returns the input's tokenizer, loaded once by a process that makes many parts."""
    file = inputs["tokenizer"] / "tokenizer.json"
    return _load_tokenizer(file, sha256_file(file))


class _Tokenizer:
    """The tokenizer, and the encoders that parts need. `end` and `pad` are the ids of these tokens."""

    def __init__(self, file: Path, sha256: str) -> None:
        tokenizer = load_for_corpus(file)
        self.sha256, self.vocab_size = sha256, tokenizer.get_vocab_size()
        end, self.pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
        if end is None:
            raise AtomError(f"{file} has no {END} token; run tokenizer again")
        self.end = end
        # tiktoken keeps the memory of an encoding that is no longer used, 3 MB for 8,192 tokens.
        self.encoder = cache(partial(Encoder, file))


_load_tokenizer = cache(_Tokenizer)


def _part(
    config: TokenizeConfig, tokenizer: _Tokenizer, file: Path, source: str, part: int
) -> tuple[str, Callable[[Path], dict[str, Any]]]:
    """Returns the name of a part and the function that makes it."""

    def make(folder: Path) -> dict[str, Any]:
        chat = source in config.conversations
        encoder = tokenizer.encoder(special_tokens=chat)
        end = None if chat else tokenizer.end
        writers: dict[str, ShardWriter] = {}
        with table_writer(folder / "documents" / source / part_file(part), TOKENIZED) as write:
            for rows in stream_batches(file, COLUMNS, ROWS):
                documents = list(zip(rows["text"].to_pylist(), rows["prompt_chars"].to_pylist(), strict=True))
                encoded = encode(encoder.encode, end, documents)
                ordinals = []
                for split, (ids, _) in zip(rows["split"].to_pylist(), encoded, strict=True):
                    if split not in writers:
                        prefix = folder / split / source / part_file(part, "")
                        writers[split] = ShardWriter(prefix, tokenizer.vocab_size)
                    ordinals.append(len(writers[split].lengths))
                    writers[split].add(ids)
                write(_table(rows, source, part, ordinals, encoded))
        for split, writer in writers.items():
            writer.close()
            # Read back before the part is sealed: Megatron would train on wrong tokens without a word.
            check_shard(folder, f"{split}/{source}/{part_file(part, '')}")
        return {
            "tokens": {split: writer.tokens for split, writer in writers.items()},
            "documents": {split: len(writer.lengths) for split, writer in writers.items()},
        }

    return f"{source}-{part:05d}", make


def encode(
    encode_texts: Callable[[Sequence[str]], list[Ids]], end: int | None, documents: Sequence[tuple[str, int]]
) -> list[tuple[Ids, int]]:
    """Returns (ids with the final `end`, number of ids of the part without loss) of each (text, prompt_chars).

    The part without loss is encoded separately, as in a prompt.
    """
    import numpy as np

    # Merges must not cross the end of a prompt, or the ids of the prompt would depend on the answer.
    prompts = encode_texts([text[:characters] for text, characters in documents])
    continuations = encode_texts([text[characters:] for text, characters in documents])
    tail = np.array([] if end is None else [end], np.int32)
    pairs = zip(prompts, continuations, strict=True)
    return [(np.concatenate((prompt, continuation, tail)), len(prompt)) for prompt, continuation in pairs]


def _table(
    rows: pa.RecordBatch, source: str, part: int, ordinals: Sequence[int], encoded: Sequence[tuple[Ids, int]]
) -> pa.Table:
    """Returns the table of documents for some rows of kept documents."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {name: rows[name] for name in ("split", "id", "content_hash", "license")}
    columns |= {"source": pa.repeat(source, rows.num_rows), "part": pa.repeat(part, rows.num_rows)}
    columns |= {"ordinal": ordinals, "tokens": [len(ids) for ids, _ in encoded]}
    columns |= {"loss_from": [loss_from for _, loss_from in encoded]}
    return pa.table(columns | {"bytes": pc.binary_length(rows["text"].cast(pa.binary()))})


def estimate(config: TokenizeConfig) -> Estimate:
    tables = estimates.published("tokens/documents", config.parts)
    return replace(estimates.estimate("tokenize", config.expected, small=10.0), published=tables)


STAGE = Stage(
    "tokenize",
    VERSION,
    TokenizeConfig,
    run,
    estimate=estimate,
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
