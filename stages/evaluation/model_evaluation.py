"""Stage `evaluate`: bits per byte and accuracy of one exported model, measured with plain transformers.

Two measurements, bitwise reproducible on one thread:

- **bits per byte** of every source on held-out documents (never trained on), with the standard error of the ratio over
  documents (stages/evaluation/bits_per_byte.py);
- **exact-match accuracy** on the recipe's evaluation problems, by greedy generation, with binomial standard errors
  (stages/evaluation/exact_match.py).

A recipe with `evaluation.context` has two more, on long texts (stages/evaluation/long_context.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Context, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage, added, operational
from pipeline.core.store import once
from stages.data.table import ItemRow, arrow_schema, read_table, write_rows
from stages.evaluation import estimates, long_context
from stages.evaluation.bits_per_byte import (
    DOCUMENT_SCORES,
    DocumentScore,
    HeldoutLimit,
    first_token_bits_of,
    score_documents,
    token_ids,
)
from stages.evaluation.confidence import binomial, ratio
from stages.evaluation.exact_match import PROBLEM_ANSWERS, ProblemAnswer, answer_batch
from stages.evaluation.heldout import heldout_documents, heldout_texts
from stages.evaluation.long_context import ContextSection, PasskeyRow, PositionRow
from stages.evaluation.scores import ModelScores, Ratio

VERSION = 3
ROWS_PER_BATCH = 32
PROBLEM_COLUMNS = ["id", "task", "prompt", "answer"]


class EvaluateConfig(Config):
    """The part of the evaluation section that changes the measured numbers."""

    heldout_documents: HeldoutLimit = Field(description="maximum number of held-out documents per source")
    max_new_tokens: Context = Field(description="maximum number of tokens generated per problem")
    context: ContextSection | None = added(None, "evaluation on long texts; null: none")
    conversations: tuple[SourceName, ...] = added(
        (), "sources whose documents contain special tokens", max_length=MOST_SOURCES
    )
    expected: estimates.Expected | None = operational(
        None, "the model and tokens, for `atom plan` alone; null: unknown"
    )


def run(config: EvaluateConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Measures inputs["model"] on the held-out documents of inputs["dedup"] and the problems of inputs["items"].

    Seals `items.parquet` (one row a problem), `documents.parquet` (one row a scored document) and `scores.json`; with
    config.context also `passkey.parquet` and `positions.parquet`.
    Resumes from `work`, which keeps every finished batch.
    Raises AtomError if there is no held-out document or no problem.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    folder = inputs["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")

    documents = heldout_documents(inputs["dedup"] / "kept", config.heldout_documents)
    problems: list[ItemRow] = read_table(inputs["items"] / "items.parquet", PROBLEM_COLUMNS).to_pylist()
    if not problems:
        raise AtomError("evaluate: the items artifact holds no problem; give `evaluation.problems` at least one task")
    problems.sort(key=lambda row: (len(row["prompt"]), row["id"]))
    batches = [problems[i : i + ROWS_PER_BATCH] for i in range(0, len(problems), ROWS_PER_BATCH)]
    total, completed = len(documents) + len(problems), 0

    scored: list[DocumentScore] = []
    first_token_bits = first_token_bits_of(model, tokenizer)
    for source in sorted({row["source"] for row in documents}):
        rows = [row for row in documents if row["source"] == source]
        chat = source in config.conversations
        scored += once(
            work / f"documents-{source}.json", partial(score_documents, model, tokenizer, first_token_bits, rows, chat)
        )
        completed += len(rows)
        report.progress(completed, total, "documents and problems")

    answered: list[ProblemAnswer] = []
    for number, batch in enumerate(batches):
        answered += once(
            work / f"items-{number:05d}.json",
            partial(answer_batch, model, tokenizer, batch, config.max_new_tokens),
        )
        completed += len(batch)
        report.progress(completed, total, "documents and problems")

    answered.sort(key=lambda row: row["id"])
    passkeys: list[PasskeyRow] = []
    positions: list[PositionRow] = []
    if config.context is not None:
        texts = heldout_texts(inputs["dedup"] / "kept")
        encode = partial(token_ids, tokenizer)
        passkeys, positions = long_context.measure(config.context, model, tokenizer, encode, texts, work, report)
        write_rows(out / "passkey.parquet", long_context.PASSKEY, passkeys)
        write_rows(out / "positions.parquet", long_context.POSITIONS, positions)
    scores = summary(scored, answered, passkeys, positions)
    write_tables(out, scored, answered)
    (out / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for task, row in scores["accuracy"].items():
        report.note(f"{task}: {row['value']:.3f} ± {row['se']:.3f} exact match on {row['n']} problems")
    for source, bits in scores["bits_per_byte"].items():
        report.note(f"{source}: {bits['value']:.4f} ± {bits['se']:.4f} bits per byte on {bits['documents']} documents")


def summary(
    documents: Sequence[DocumentScore],
    items: Sequence[ProblemAnswer],
    passkeys: Sequence[PasskeyRow] = (),
    positions: Sequence[PositionRow] = (),
) -> ModelScores:
    """`scores.json` from the tables alone, so that it can be recomputed.

    bits_per_byte_all pools the scored documents of all sources (strata of a stratified ratio);
    accuracy_all pools all problems.
    """
    by_source = {
        source: ratio([(row["nll_bits"], row["bytes"]) for row in documents if row["source"] == source])
        for source in sorted({row["source"] for row in documents})
    }
    size = sum(row["bytes"] for row in by_source.values())
    pooled: Ratio = {
        "value": math.fsum(row["nll_bits"] for row in documents) / size,
        "se": math.sqrt(math.fsum((row["se"] * row["bytes"]) ** 2 for row in by_source.values())) / size,
        "documents": len(documents),
        "bytes": size,
    }
    tasks = sorted({row["task"] for row in items})
    by_task = {task: binomial([row["score"] for row in items if row["task"] == task]) for task in tasks}
    scores: ModelScores = {
        "bits_per_byte": by_source,
        "bits_per_byte_all": pooled,
        "accuracy": by_task,
        "accuracy_all": binomial([row["score"] for row in items]),
    }
    if passkeys and positions:
        long = long_context.summary(passkeys, positions)
        scores["passkey"], scores["passkey_by_depth"] = long["passkey"], long["passkey_by_depth"]
        scores["loss_by_position"] = long["loss_by_position"]
    return scores


def write_tables(out: Path, documents: Sequence[DocumentScore], items: Sequence[ProblemAnswer]) -> None:
    """Writes `documents.parquet` and `items.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents_schema, items_schema = arrow_schema(DOCUMENT_SCORES), arrow_schema(PROBLEM_ANSWERS)
    pq.write_table(pa.Table.from_pylist(documents, documents_schema), out / "documents.parquet", compression="zstd")
    pq.write_table(pa.Table.from_pylist(items, items_schema), out / "items.parquet", compression="zstd")


STAGE = Stage("evaluate", VERSION, EvaluateConfig, run, estimate=lambda config: estimates.estimate(config.expected))
