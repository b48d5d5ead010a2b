"""Stage `evaluate`: bits per byte and accuracy of one exported model, measured with plain transformers or vLLM.

Two measurements, by `evaluation.engine`; in the stage's process they are bitwise reproducible on one thread:

- **bits per byte** of every source on held-out documents (never trained on), with the standard error of the ratio over
  documents (stages/evaluation/bits_per_byte.py);
- **exact-match accuracy** on the recipe's evaluation problems, by greedy generation, with binomial standard errors
  (stages/evaluation/model_evaluation.py).

A recipe with `evaluation.context` has further ones, on long texts (stages/evaluation/long_context.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Context, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage, added, operational
from stages.confidence import Ratio, binomial, ratio
from stages.evaluation import estimates, long_context
from stages.evaluation.bits_per_byte import (
    DOCUMENT_SCORES,
    DocumentScore,
    HeldoutDocument,
    HeldoutLimit,
    heldout_documents,
    heldout_texts,
    score_documents,
    scored_documents,
    token_ids,
)
from stages.evaluation.estimates import Piece, compute, compute_shard
from stages.evaluation.long_context import ContextSection, PasskeyRow, PositionRow
from stages.evaluation.scores import ModelScores
from stages.formats.table import ItemRow, String, arrow_schema, columns_of, read_table, write_rows
from stages.generation.engine import Engine, LanguageModel, engine_field
from stages.generation.samplers import open_model

R = TypeVar("R")

VERSION = 3
ROWS_PER_BATCH = 32
KINDS = ("documents", "items", "passkey", "positions")
"""Of the rows, which are the beginnings of the names of pieces. Each has a table of that name."""
PROBLEM_COLUMNS = ["id", "task", "prompt", "answer"]


class EvaluateConfig(Config):
    """The part of the evaluation section that changes the measured numbers."""

    heldout_documents: HeldoutLimit = Field(description="maximum number of held-out documents per source")
    max_new_tokens: Context = Field(description="maximum number of tokens generated per problem")
    context: ContextSection | None = added(None, "evaluation on long texts; null: none")
    conversations: tuple[SourceName, ...] = added(
        (), "sources whose documents contain special tokens", max_length=MOST_SOURCES
    )
    engine: Engine = engine_field()
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
    scores = measure(config, inputs["model"] / "model", inputs, work, out, report)
    published = {**scores, **config.engine.stated()}
    (out / "scores.json").write_text(json.dumps(published, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for task, row in scores["accuracy"].items():
        report.note(f"{task}: {row['value']:.3f} ± {row['se']:.3f} exact match on {row['n']} problems")
    for source, bits in scores["bits_per_byte"].items():
        report.note(f"{source}: {bits['value']:.4f} ± {bits['se']:.4f} bits per byte on {bits['documents']} documents")


def measure(config: EvaluateConfig, model: Path, inputs: Inputs, work: Path, out: Path, report: Report) -> ModelScores:
    """Writes the tables of the model in a folder, on the documents and problems of the inputs, and returns their
    scores."""
    measured: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    pieces = _pieces(config, model, inputs)
    total, completed = sum(piece.size for piece in pieces), 0
    with ExitStack() as stack:
        values = compute(pieces, work, partial(_load, stack, config, model, work))
        for piece, rows in zip(pieces, values, strict=True):
            measured[piece.name.partition("-")[0]] += rows
            completed += piece.size
            report.progress(completed, total, "documents and problems")
    scored, answered = scored_documents(measured["documents"]), sorted(measured["items"], key=lambda row: row["id"])
    passkeys, positions = measured["passkey"], measured["positions"]
    if config.context is not None:
        long_context.report_passkeys(passkeys, report)
        write_rows(out / "passkey.parquet", long_context.PASSKEY, passkeys)
        write_rows(out / "positions.parquet", long_context.POSITIONS, positions)
    write_tables(out, scored, answered)
    return summary(scored, answered, passkeys, positions)


def run_shard(config: EvaluateConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Measures the documents and problems of one shard."""
    shards = estimates.shards(config.expected, engine=config.engine)
    measure_shard(config, inputs["model"] / "model", inputs, work, shard, shards)


def measure_shard(config: EvaluateConfig, model: Path, inputs: Inputs, work: Path, shard: int, shards: int) -> None:
    """Leaves what one of several tasks measures of the model in a folder in `work`, where `measure` takes it from."""
    with ExitStack() as stack:
        load = partial(_load, stack, config, model, work)
        compute_shard(_pieces(config, model, inputs), work, load, shard, shards)


def _load(stack: ExitStack, config: EvaluateConfig, model: Path, work: Path) -> LanguageModel:
    """The model in a folder, which the stack closes."""
    longest = config.context.longest if config.context else 0
    return stack.enter_context(closing(open_model(config.engine, model, load_tokenizer(model), work, longest)))


def load_tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True, padding_side="left")


def _pieces(config: EvaluateConfig, model: Path, inputs: Inputs) -> list[Piece[LanguageModel]]:
    """The pieces, whose names begin with the table that their rows are for: documents by source, problems by length,
    long texts."""
    tokenizer, kept = load_tokenizer(model), inputs["dedup"] / "kept"
    problems: list[ItemRow] = read_table(inputs["items"] / "items.parquet", PROBLEM_COLUMNS).to_pylist()
    if not problems:
        raise AtomError("evaluate: the items artifact holds no problem; give `evaluation.problems` at least one task")
    problems.sort(key=lambda row: (len(row["prompt"]), row["id"]))

    def score(model: LanguageModel, rows: Sequence[HeldoutDocument]) -> list[DocumentScore]:
        return score_documents(model, tokenizer, rows, config.conversations)

    def answer(model: LanguageModel, batch: Sequence[ItemRow]) -> list[ProblemAnswer]:
        return answer_batch(model, tokenizer, batch, config.max_new_tokens)

    documents = sorted(heldout_documents(kept, config.heldout_documents), key=lambda row: row["source"])
    pieces = [
        Piece(f"documents-{number:05d}", partial(score, rows=rows), len(rows))
        for number, rows in enumerate(_batches(documents))
    ]
    pieces += [
        Piece(f"items-{number:05d}", partial(answer, batch=batch), len(batch))
        for number, batch in enumerate(_batches(problems))
    ]
    if config.context is not None:
        encode, read = partial(token_ids, tokenizer), partial(heldout_texts, kept)
        pieces += long_context.pieces(config.context, tokenizer, encode, read)
    return pieces


def _batches(rows: Sequence[R]) -> list[Sequence[R]]:
    return [rows[start : start + ROWS_PER_BATCH] for start in range(0, len(rows), ROWS_PER_BATCH)]


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


STAGE = Stage(
    "evaluate", VERSION, EvaluateConfig, run,
    **estimates.of_engine(), run_shard=run_shard,
)  # fmt: skip


class ProblemAnswer(TypedDict):
    """The answer to a problem, with its score, the scorer and the SHA-256 of the scorer's file."""

    id: String
    task: String
    prompt: String
    expected: String
    output: String
    answer: String
    score: Annotated[int, "int8"]
    code_digest: String
    verifier: String
    verifier_version: String


PROBLEM_ANSWERS = columns_of(ProblemAnswer)


def answer_batch(
    model: LanguageModel, tokenizer: Any, batch: Sequence[ItemRow], max_new_tokens: int
) -> list[ProblemAnswer]:
    """Greedy answers of one batch."""
    from stages import scorers

    verifier, version = scorers.PROBLEMS
    digest = scorers.digest(verifier, version)
    continuations = model.continue_greedily([token_ids(tokenizer, row["prompt"]) for row in batch], max_new_tokens)
    rows: list[ProblemAnswer] = []
    for row, completion in zip(batch, continuations, strict=True):
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
