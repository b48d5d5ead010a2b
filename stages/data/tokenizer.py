"""Train a byte-level BPE tokenizer that transformers, vLLM and llama.cpp load unchanged.

The pre-tokenizer is Qwen2's pattern (llama.cpp: `pre=qwen2`), which splits digits singly. There is no normalizer, so
that decode(encode(x)) == x for any text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added
from stages.data.table import read_table, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1

PAD, END, TURN_START, TURN_END, THINK_START, THINK_END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML. The generation block marks the assistant's tokens, so that fine-tuning can put loss on them alone.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['reasoning_content'] -%}
{{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


Vocabulary = Annotated[int, Range(len(SPECIAL_TOKENS) + 256, 2**20, "Llama 3: 128256, Gemma 3: 262144, XLM-V: 1e6")]
"""Number of tokens; the minimum is all bytes and the special tokens."""
SampleBytes = Annotated[int, Range(1, 1e12, "the sample lies in memory")]


class TokenizerSection(Config):
    """The byte-level BPE tokenizer of a release, and the size of the embedding, which is the same for every layout."""

    vocab_size: Vocabulary = Field(description="tokens of the vocabulary, special tokens included")
    padded_vocab_size: Vocabulary = Field(
        description="rows of the embedding matrix: at least vocab_size, and a multiple of tp"
    )
    sample_bytes: SampleBytes = Field(
        4_000_000, description="maximum bytes of training text from which the tokenizer is trained"
    )
    leave_out: tuple[SourceName, ...] = added(
        (), "sources excluded from its training; conversations are always excluded", max_length=MOST_SOURCES
    )

    @model_validator(mode="after")
    def _check_vocab_sizes(self) -> TokenizerSection:
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}; raise it"
            )
        return self


def run(config: TokenizerSection, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Train on a sample of the training split and seal tokenizer files and `stats.json` (bytes per token by source).

    inputs["dedup"]: kept documents. Raises RecipeError if the corpus cannot yield vocab_size tokens.
    """
    from tokenizers import Tokenizer, models, trainers

    files = sorted((inputs["dedup"] / "kept").glob("*.parquet"))
    files = [file for file in files if file.stem not in config.leave_out]
    texts = {file.stem: _texts(file) for file in files}
    sample = list(interleave({name: by_split["train"] for name, by_split in texts.items()}, config.sample_bytes))
    tokenizer = Tokenizer(models.BPE())
    _set_byte_level(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        available = sum(len(t.encode()) for t in sample)
        raise RecipeError(
            f"tokenizer.vocab_size = {config.vocab_size}, but {available} bytes of training text yield only {size} "
            f"tokens; lower it, or give more text or sample_bytes"
        )
    save(tokenizer, out)
    ratios = bytes_per_token(load_for_corpus(out / "tokenizer.json"), texts)
    stats = {
        "vocab_size": size,
        "padded_vocab_size": config.padded_vocab_size,
        "sample": {"documents": len(sample), "bytes": sum(len(t.encode()) for t in sample)},
        "bytes_per_token": ratios,
    }
    write_json(out / "stats.json", stats)
    for name, part in ratios.items():
        report.note(f"{name}: {part['value']:.2f} bytes a token ({part['split']})")


def interleave(texts: dict[str, list[str]], limit: int) -> Iterator[str]:
    """Texts of all sources in equal bytes, until a source is exhausted, up to `limit` bytes in total."""
    iterators = {name: iter(source_texts) for name, source_texts in sorted(texts.items())}
    bytes_taken = dict.fromkeys(iterators, 0)
    while iterators and sum(bytes_taken.values()) < limit:
        name = min(iterators, key=lambda n: (bytes_taken[n], n))
        text = next(iterators[name], None)
        if text is None:
            del iterators[name]
        else:
            bytes_taken[name] += len(text.encode())
            yield text


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files for `AutoTokenizer.from_pretrained(folder)`; the exporter adds model_max_length."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": END,
            "pad_token": PAD,
            "extra_special_tokens": [TURN_START, TURN_END, THINK_START, THINK_END],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def load_for_corpus(path: Path) -> Tokenizer:
    """The tokenizer that encodes documents: special tokens occurring in a text are ordinary bytes to it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, texts: dict[str, dict[str, list[str]]]) -> dict[str, Any]:
    """Bytes per token by source, on its held-out documents if it has any, else on at most 2000 training documents."""
    stats = {}
    for name, by_split in sorted(texts.items()):
        split = "heldout" if by_split["heldout"] else "train"
        sample = by_split[split][:2000]
        tokens = sum(len(e.ids) for e in tokenizer.encode_batch(sample, add_special_tokens=False))
        total = sum(len(t.encode()) for t in sample)
        if tokens:
            stats[name] = {"value": round(total / tokens, 6), "split": split, "documents": len(sample), "bytes": total}
    return stats


def _set_byte_level(tokenizer: Tokenizer) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _texts(file: Path) -> dict[str, list[str]]:
    table = read_table(file, ["text", "split", "content_hash"])
    rows = sorted(table.to_pylist(), key=lambda row: row["content_hash"])  # an order that mixes the parts of a source
    return {split: [row["text"] for row in rows if row["split"] == split] for split in ("train", "heldout")}


def estimate(config: TokenizerSection) -> Estimate:
    return Estimate(cpu_seconds=5 + config.sample_bytes / 1.5e6)


STAGE = Stage("tokenizer", VERSION, TokenizerSection, run, estimate=estimate)
