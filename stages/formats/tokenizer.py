"""Stage `tokenizer`: trains a byte-level BPE tokenizer that transformers, vLLM and llama.cpp load unchanged.

The pre-tokenizer is Qwen2's pattern (llama.cpp: `pre=qwen2`), which splits digits singly. There is no normalizer, so
that decode(encode(x)) == x for any text.

The chat template is ChatML, in two texts that render the same. The inference template has no `generation` blocks, which
several runtimes refuse. The training template has them around the assistant's tokens, so that training libraries put
loss on these alone; this project renders its own examples with it. What they render:

- `content` as a text, as a list of texts and parts of type `text`, or null. Parts are lines, as llama.cpp has it. Other
  parts raise an error.
- `tools` in the system turn, after the text of a first system message, and `tool_calls` in the form of Hermes and Qwen.
  Arguments are an object, or its JSON, which is kept as it is. A result is a turn of the role `tool`.
- Reasoning from `reasoning_content`, `reasoning`, or a think block in the content: only after the last message of the
  user. Earlier reasoning is dropped from the history.
- `enable_thinking=false` begins the answer with an empty think block.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import model_validator

from pipeline.core.bounds import MOST_SOURCES, Range, SourceName
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added
from pipeline.core.yaml_text import read_trusted
from stages.formats.table import write_json
from stages.formats.text_sample import Sample, choose_files, interleave

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.trainers import BpeTrainer


VERSION = 3

# Their order gives their ids in a trained tokenizer, from 0 on.
PAD, END, TURN_START, TURN_END, THINK_START, THINK_END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
# Tokens at which generation ends.
STOPS = (END, TURN_END)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Number of tokens; the minimum is all bytes and the special tokens.
Vocabulary = Annotated[int, Range(len(SPECIAL_TOKENS) + 256, 2**20, "Llama 3: 128256, Gemma 3: 262144, XLM-V: 1e6")]
SampleBytes = Annotated[int, Range(1, 1e12, "the distinct words of the sample lie in memory")]
# Loaders read the first template by its name. The second one is given to training libraries by its path.
INFERENCE_FILE, TRAINING_FILE = "chat_template.jinja", "training_chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", CONFIG_FILE, INFERENCE_FILE, TRAINING_FILE)
REPORTED = 2_000  # documents of each source on which the bytes per token are measured


class TokenizerSection(Config):
    """The byte-level BPE tokenizer of a release, and the size of the embedding, which is the same for every layout."""

    vocab_size: Vocabulary
    """tokens of the vocabulary, special tokens included"""
    padded_vocab_size: Vocabulary
    """rows of the embedding matrix: at least vocab_size, and a multiple of tp"""
    sample_bytes: SampleBytes = 4_000_000
    """maximum bytes of training text from which the tokenizer is trained"""
    leave_out: tuple[SourceName, ...] = added((), max_length=MOST_SOURCES)
    """sources excluded from its training; conversations are always excluded"""

    @model_validator(mode="after")
    def _check_vocab_sizes(self) -> TokenizerSection:
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}; raise it"
            )
        return self


def run(config: TokenizerSection, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains on a sample of the training split and seals tokenizer files and `stats.json` (bytes per token by source).

    `inputs["dedup"]` holds the kept documents. If there is `inputs["import"]`, a published model, its tokenizer is
    taken over instead. Of a large source only some parts are read, and the texts are streamed.

    Raises:
        RecipeError: The corpus cannot yield vocab_size tokens, or the published tokenizer has another number.
    """
    files = choose_files(inputs["dedup"] / "kept", config.leave_out, config.sample_bytes)
    train: dict[str, Sample] = {}
    if "import" in inputs:
        taken = {"documents": 0, "bytes": 0}
        for path in sorted(inputs["import"].path.iterdir()):
            if path.is_file() and path.name in TOKENIZER_FILES:
                shutil.copyfile(path, out / path.name)
    else:
        train = {name: Sample.draw(paths, "train", REPORTED, config.sample_bytes) for name, paths in files.items()}
        taken = _train(config, train, out)
    tokenizer = load_for_corpus(out / "tokenizer.json")
    if (size := tokenizer.get_vocab_size()) != config.vocab_size:
        raise RecipeError(
            f"tokenizer.vocab_size = {config.vocab_size}, but the imported tokenizer has {size}; write it"
        )
    samples = {}
    for name, paths in files.items():
        # Measured on held-out documents, as the tokenizer was fitted to the others; a source without any on those.
        heldout = Sample.draw(paths, "heldout", REPORTED)
        samples[name] = heldout if len(heldout.lengths) else train.get(name) or Sample.draw(paths, "train", REPORTED)
    ratios = bytes_per_token(tokenizer, samples)
    stats = {"vocab_size": size, "padded_vocab_size": config.padded_vocab_size, "bytes_per_token": ratios}
    write_json(out / "stats.json", {**stats, "sample": taken})
    if "import" in inputs:
        report.note(f"took over the tokenizer of {inputs['import'].json('base.json')['repo']}")
    else:
        for name, part in ratios.items():
            report.note(f"{name}: {part['value']:.2f} bytes a token ({part['split']})")


def _train(config: TokenizerSection, train: Mapping[str, Sample], out: Path) -> dict[str, int]:
    """Trains a tokenizer and saves it. Returns the number of documents that it read, and their bytes.

    Raises RecipeError if they do not have vocab_size tokens.
    """
    # Equal bytes of every source, so that a large one does not decide all merges.
    counts = interleave({name: sample.lengths for name, sample in train.items()}, config.sample_bytes)
    sample_bytes = sum(int(train[name].lengths[:count].sum()) for name, count in counts.items())
    tokenizer = untrained()
    # the tokenizer depends on the texts, not on their order
    texts = (text for name, count in counts.items() for batch in train[name].texts(count) for text in batch)
    tokenizer.train_from_iterator(texts, bpe_trainer(config.vocab_size))
    # A small corpus has too few different pairs; the embedding would have rows without a token.
    if (size := tokenizer.get_vocab_size()) < config.vocab_size:
        raise RecipeError(
            f"tokenizer.vocab_size = {config.vocab_size}, but {sample_bytes} bytes of training text yield only {size} "
            f"tokens; lower it, or give more text or sample_bytes"
        )
    save(tokenizer, out)
    return {"documents": sum(counts.values()), "bytes": sample_bytes}


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files for `AutoTokenizer.from_pretrained(folder)`; the exporter adds `model_max_length`.

    The markers of reasoning are not special, so that they survive decoding. transformers 4 refuses
    `extra_special_tokens` as a list, and 5 reads `additional_special_tokens` as well.
    """
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        # Decoding with skip_special_tokens must keep the markers of reasoning.
        token["special"] = token["content"] not in (THINK_START, THINK_END)
    _from_description(content).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / INFERENCE_FILE).write_text(inference_template(), "utf-8")
    (folder / TRAINING_FILE).write_text(training_template(), "utf-8")
    write_json(folder / CONFIG_FILE, tokenizer_config())


@cache
def training_template() -> str:
    return Path(__file__).with_name(TRAINING_FILE).read_text("utf-8")


def inference_template() -> str:
    """Returns the training template without the lines of its `generation` blocks."""
    lines = training_template().splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() not in ("{%- generation -%}", "{%- endgeneration -%}"))


def response_template() -> Any:
    """Returns the parts of an answer that parsers of runtimes read."""
    return read_trusted(Path(__file__).with_name("response_template.yaml"))


def tokenizer_config() -> dict[str, Any]:
    """Returns the content of tokenizer_config.json, without the length of a model's context."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "response_template": response_template(),
        "split_special_tokens": False,
    }


def load_for_corpus(path: Path) -> Tokenizer:
    """Returns the tokenizer that encodes documents.

    Names of special tokens that occur in a text are ordinary bytes to it.
    """
    return for_corpus(json.loads(path.read_text("utf-8")))


def for_corpus(content: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer of `load_for_corpus` from the content of its tokenizer.json.

    `tokenizers` looks for added tokens that are not special in every text, so all are special here.
    """
    added_tokens = [token | {"special": True} for token in content["added_tokens"]]
    tokenizer = _from_description({**content, "added_tokens": added_tokens})
    tokenizer.encode_special_tokens = True
    return tokenizer


def without_special(tokenizer: Any) -> Any:
    """Returns a tokenizer of transformers that reads names of special tokens in a text as text, as in training.

    It is changed in place: for each text, transformers sets anew whether the backend looks for them.
    """
    tokenizer._tokenizer = for_corpus(json.loads(tokenizer.backend_tokenizer.to_str()))
    tokenizer.split_special_tokens = True
    return tokenizer


def _from_description(content: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Returns the bytes per token by source, on at most REPORTED documents of each sample."""
    stats = {}
    for name, sample in sorted(samples.items()):
        documents = min(REPORTED, len(sample.lengths))
        tokens = sum(
            len(encoding.ids)
            for batch in sample.texts(documents)
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        )
        total = int(sample.lengths[:documents].sum())
        if tokens:
            stats[name] = {
                "value": round(total / tokens, 6),
                "split": sample.split,
                "documents": documents,
                "bytes": total,
            }
    return stats


def untrained() -> Tokenizer:
    """Returns a byte-level BPE tokenizer with the pre-tokenizer of this project, without tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    # The pattern above splits; ByteLevel only maps bytes to characters.
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bpe_trainer(vocab_size: int) -> BpeTrainer:
    """Returns a trainer whose tokenizers have all bytes and the special tokens."""
    from tokenizers import pre_tokenizers, trainers

    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # All bytes are tokens, also those that the sample lacks, so that any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def estimate(config: TokenizerSection) -> Estimate:
    return Estimate(
        cpu_seconds=5 + config.sample_bytes / 1.5e6,
        memory_bytes=int(300e6 + 241 * config.sample_bytes**0.75),  # distinct words, on 10 to 300 MB (docs/lab-log.md)
        disk_bytes=100 * config.vocab_size,
    )


STAGE = Stage("tokenizer", VERSION, TokenizerSection, run, estimate=estimate)
