"""Stage `evaluate`: bits per byte and accuracy of one exported model, measured with plain transformers.

Two measurements, bitwise reproducible on one thread:

- **bits per byte** of every source on held-out documents (never trained on), which compares models whatever their
  tokenizer: minus log2 p(document) over its bytes, with the standard error of the ratio over documents. What carries
  no loss in training (the question of a problem) is context here too;
- **exact-match accuracy** on the recipe's evaluation problems, by greedy generation, with binomial standard errors.

A recipe with `evaluation.context` has two more, on long texts (stages/evaluation/long_context.py).
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Context, Range, Share, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Renamed, Report, Stage, added
from pipeline.core.store import once
from stages.data.table import write_rows
from stages.evaluation import long_context as context
from stages.evaluation.confidence import binomial, ratio
from stages.evaluation.eval_set import ChatItems, Problems
from stages.evaluation.long_context import ContextSection

if TYPE_CHECKING:
    import torch

VERSION = 3
END = "<|endoftext|>"
ROWS_PER_BATCH = 32


Samples = Annotated[int, Range(1, 4096)]
"""Answers to one problem."""
Documents = Annotated[int, Range(2, 1e6)]


class ChatSection(Config):
    """Evaluation in conversations, and the thresholds of its release gates."""

    items: ChatItems = Field(description="evaluation items")
    max_new_tokens: Context = Field(64, description="maximum number of tokens of an answer")
    num_samples: Annotated[Samples, Renamed("samples")] = Field(
        8, description="answers per problem, for pass@k and maj@k"
    )
    min_gain: Annotated[float, Range(-1, 1)] = Field(
        0.0, description="gain in pass@1 from SFT to RLVR that must be exceeded"
    )
    min_win_rate: Annotated[Share, Renamed("least_win")] = Field(
        0.5, description="value that the lower confidence bound of a win rate must exceed"
    )
    skill_tolerance: Share = Field(0.05, description="maximum loss of pass@1 in phases after RLVR")


class EvaluationSection(Config):
    """Measurements after each phase, and the thresholds of the release gates."""

    problems: Problems = Field(description="number of evaluation problems by task")
    heldout_documents: Documents = Field(60, description="maximum number of held-out documents per source")
    max_new_tokens: Context = Field(64, description="maximum number of tokens generated per problem")
    bits_per_byte_tolerance: Annotated[float, Range(0, 8, "a byte has 8 bits")] = Field(
        0.05, description="maximum increase in bits per byte after mid-training and long-context phases"
    )
    min_accuracy_gain: Annotated[float, Range(-1, 1)] = Field(
        0.0, description="gain in accuracy from mid-training that must be exceeded"
    )
    chat: ChatSection | None = added(None, "evaluation in conversations; null: none")
    context: ContextSection | None = added(None, "evaluation on long texts: passkeys and loss by position; null: none")

    @property
    def chat_items(self) -> dict[str, Any] | None:
        """The part that says what is asked in conversations."""
        return None if self.chat is None else self.chat.items.model_dump()


class EvaluateConfig(Config):
    """The part of the evaluation section that changes the measured numbers."""

    heldout_documents: Documents = Field(description="maximum number of held-out documents per source")
    max_new_tokens: Context = Field(description="maximum number of tokens generated per problem")
    context: ContextSection | None = added(None, "evaluation on long texts; null: none")
    conversations: tuple[SourceName, ...] = added(
        (), "sources whose documents contain special tokens", max_length=MOST_SOURCES
    )


def run(config: EvaluateConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Measures inputs["model"] on the held-out documents of inputs["dedup"] and the problems of inputs["items"].

    Seals `items.parquet` (one row a problem), `documents.parquet` (one row a scored document) and `scores.json`; with
    config.context also `passkey.parquet` and `positions.parquet`.
    Resumes from `work`, which keeps every finished batch.
    Raises AtomError if there is nothing held out or no problem to solve.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = inputs["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")

    documents = heldout_documents(inputs["dedup"] / "kept", config.heldout_documents)
    problems = _read(inputs["items"] / "items.parquet", ["id", "task", "prompt", "answer"])
    if not problems:
        raise AtomError("evaluate: the items artifact holds no problem; give `evaluation.problems` at least one task")
    problems.sort(key=lambda row: (len(row["prompt"]), row["id"]))
    batches = [problems[i : i + ROWS_PER_BATCH] for i in range(0, len(problems), ROWS_PER_BATCH)]
    total, completed = len(documents) + len(problems), 0

    scored: list[dict[str, Any]] = []
    first_token_bits = _first_token_bits(model, tokenizer)
    for source in sorted({row["source"] for row in documents}):
        rows = [row for row in documents if row["source"] == source]
        chat = source in config.conversations
        scored += once(
            work / f"documents-{source}.json", partial(_score_documents, model, tokenizer, first_token_bits, rows, chat)
        )
        completed += len(rows)
        report.progress(completed, total, "documents and problems")

    answered: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        answered += once(
            work / f"items-{number:05d}.json",
            partial(_answer_batch, model, tokenizer, batch, config.max_new_tokens),
        )
        completed += len(batch)
        report.progress(completed, total, "documents and problems")

    answered.sort(key=lambda row: row["id"])
    tables: tuple[list[dict[str, Any]], ...] = (scored, answered)
    if config.context is not None:
        long_documents = [row for row in _read_heldout(inputs["dedup"] / "kept") if not row["prompt_chars"]]
        encode = partial(token_ids, tokenizer)
        tables += context.measure(config.context, model, tokenizer, encode, long_documents, work, report)
        write_rows(out / "passkey.parquet", context.PASSKEY, tables[2])
        write_rows(out / "positions.parquet", context.POSITIONS, tables[3])
    scores = summary(*tables)
    _write_tables(out, scored, answered)
    (out / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for task, row in scores["accuracy"].items():
        report.note(f"{task}: {row['value']:.3f} ± {row['se']:.3f} exact match on {row['n']} problems")
    for source, row in scores["bits_per_byte"].items():
        report.note(f"{source}: {row['value']:.4f} ± {row['se']:.4f} bits per byte on {row['documents']} documents")


def heldout_documents(folder: Path, limit: int) -> list[dict[str, Any]]:
    """Up to `limit` held-out documents of every source, drawn by smallest content hash (a fixed lottery), by id."""
    documents: list[dict[str, Any]] = []
    heldout = _read_heldout(folder)
    for source in sorted({row["source"] for row in heldout}):  # some sources hold nothing out, such as problems
        rows = [row for row in heldout if row["source"] == source]
        if len(rows) < 2:
            raise AtomError(
                f"evaluate: source {source} has {len(rows)} held-out documents, two are needed for an error bar"
            )
        rows = sorted(rows, key=lambda row: (row["content_hash"], row["id"]))[:limit]
        documents += sorted(rows, key=lambda row: row["id"])
    if not documents:
        raise AtomError("evaluate: the curated corpus has no held-out document")
    return documents


def _read_heldout(folder: Path) -> list[dict[str, Any]]:
    """Every held-out document, by source."""
    columns = ["id", "text", "source", "content_hash", "split", "prompt_chars"]
    return [
        row for path in sorted(folder.glob("*.parquet")) for row in _read(path, columns) if row["split"] == "heldout"
    ]


def _first_token_bits(model: Any, tokenizer: Any) -> torch.Tensor:
    """(vocab) bits of every token after a lone end-of-document token: the context of a document's first token."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.convert_tokens_to_ids(END)]])).logits[0, -1]
    return -torch.log_softmax(logits.double(), -1) / math.log(2)


def _score_documents(
    model: Any, tokenizer: Any, first_token_bits: torch.Tensor, rows: list[dict[str, Any]], chat: bool
) -> list[dict[str, Any]]:
    scored = [
        row for row in (_document_bits(model, tokenizer, first_token_bits, row, chat) for row in rows) if row["bytes"]
    ]
    if len(scored) < 2:  # all others are questions as long as the model's context
        raise AtomError(f"evaluate: source {rows[0]['source']} has fewer than two documents to score; hold out more")
    return scored


def _document_bits(
    model: Any, tokenizer: Any, first_token_bits: torch.Tensor, row: dict[str, Any], chat: bool = False
) -> dict[str, Any]:
    """Bits and bytes of one document, cut to the model's context.

    A question, the first `prompt_chars` characters, is context and is not scored, as it carries no loss in training; it
    is tokenized by itself, as there. Documents start a row in training, with no token before them, so a first token
    without a question is scored after a lone end-of-document token and all others in the context that the model was
    trained with: by the chain rule a proper probability of the text, in which every byte is paid for.
    """
    import torch

    prompt = token_ids(tokenizer, row["text"][: row["prompt_chars"]], chat)
    ids = (prompt + token_ids(tokenizer, row["text"][row["prompt_chars"] :], chat))[
        : model.config.max_position_embeddings
    ]
    scored = ids[len(prompt) :]
    bits = float(first_token_bits[ids[0]]) if scored and not prompt else 0.0
    start = max(len(prompt), 1)
    if len(ids) > start:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(tokens).logits[0, start - 1 : -1]
        log_probs = torch.log_softmax(logits.double(), -1).gather(1, tokens[0, start:, None])
        bits -= float(log_probs.sum()) / math.log(2)
    return {
        "source": row["source"],
        "id": row["id"],
        "bytes": token_bytes(tokenizer, scored),
        "tokens": len(scored),
        "nll_bits": bits,
    }


def token_ids(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """The tokens of a document; a special token's name inside the text stays text, as in training, unless it is a
    conversation in the release's template."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not chat
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    return ids


def token_bytes(tokenizer: Any, ids: list[int]) -> int:
    """Bytes that tokens of a byte-level vocabulary stand for: one character of the byte alphabet is one byte.

    A cut in the middle of a multi-byte character is counted exactly, where decoding would put a replacement.
    """
    return sum(len(token) for token in tokenizer.convert_ids_to_tokens(ids))


def _answer_batch(model: Any, tokenizer: Any, batch: list[dict[str, Any]], max_new_tokens: int) -> list[dict[str, Any]]:
    """Greedy outputs of one left-padded batch, each with its score, the scorer and the SHA-256 of its file."""
    import torch
    from transformers import GenerationConfig

    from stages import scorers

    verifier, version = scorers.PROBLEMS
    digest = scorers.digest(verifier, version)
    end, pad = tokenizer.convert_tokens_to_ids(END), tokenizer.pad_token_id
    ids = [token_ids(tokenizer, row["prompt"]) for row in batch]
    width = max(map(len, ids))
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad
    )
    with torch.inference_mode():
        generated = model.generate(tokens, attention_mask=mask, generation_config=greedy)[:, width:]
    rows = []
    for row, token_row in zip(batch, generated.tolist(), strict=True):
        completion = token_row[: token_row.index(end)] if end in token_row else token_row
        output = tokenizer.decode(completion, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        rows.append(
            {
                "id": row["id"],
                "task": row["task"],
                "prompt": row["prompt"],
                "expected": row["answer"],
                "output": output,
                "answer": scorers.answer_of_problem(output),
                "score": scorers.score_problem(row["answer"], output),
                "code_digest": digest,
                "verifier": verifier,
                "verifier_version": version,
            }
        )
    return rows


def summary(
    documents: list[dict[str, Any]],
    items: list[dict[str, Any]],
    keys: list[dict[str, Any]] | None = None,
    positions: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`scores.json` from the tables alone: anyone who has the tables can recompute it.

    bits_per_byte_all pools the scored documents of all sources (strata of a stratified ratio);
    accuracy_all pools all problems.
    """
    by_source = {
        source: ratio([(row["nll_bits"], row["bytes"]) for row in documents if row["source"] == source])
        for source in sorted({row["source"] for row in documents})
    }
    size = sum(row["bytes"] for row in by_source.values())
    pooled = {
        "value": math.fsum(row["nll_bits"] for row in documents) / size,
        "se": math.sqrt(math.fsum((row["se"] * row["bytes"]) ** 2 for row in by_source.values())) / size,
        "documents": len(documents),
        "bytes": size,
    }
    tasks = sorted({row["task"] for row in items})
    by_task = {task: binomial([row["score"] for row in items if row["task"] == task]) for task in tasks}
    return {
        "bits_per_byte": by_source,
        "bits_per_byte_all": pooled,
        "accuracy": by_task,
        "accuracy_all": binomial([row["score"] for row in items]),
        **(context.summary(keys, positions) if keys and positions else {}),
    }


def _read(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    return rows


def _write_tables(out: Path, documents: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, i32, i64, f64 = pa.string(), pa.int32(), pa.int64(), pa.float64()
    columns = {"source": text, "id": text, "bytes": i64, "tokens": i32, "nll_bits": f64}
    pq.write_table(pa.Table.from_pylist(documents, pa.schema(columns)), out / "documents.parquet", compression="zstd")
    columns = {name: text for name in ("id", "task", "prompt", "expected", "output", "answer")}
    columns |= {"score": pa.int8(), "code_digest": text, "verifier": text, "verifier_version": text}
    pq.write_table(pa.Table.from_pylist(items, pa.schema(columns)), out / "items.parquet", compression="zstd")


STAGE = Stage("evaluate", VERSION, EvaluateConfig, run)
