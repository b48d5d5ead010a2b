"""Stage `evaluate`: bits per byte and accuracy of one exported model, measured with plain transformers or vLLM.

Two measurements, by `evaluation.engine`; in the stage's process they are bitwise reproducible on one thread:

- **bits per byte** of every source on held-out documents (never trained on), with the standard error of the ratio over
  their works (stages/evaluation/bits_per_byte.py);
- **exact-match accuracy** on the recipe's evaluation problems, by greedy generation, with binomial standard errors.

A recipe with `evaluation.context` has further ones, on long texts (stages/evaluation/long_context.py), and one with
`evaluation.text_items` on items of held-out text (stages/evaluation/text_items.py).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Context, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs, Report, Stage, added
from stages.confidence import Ratio, binomial, ratio, root_of_squares, work_deviations
from stages.data.curate.settings import WorkPattern
from stages.evaluation import estimates, long_context, text_items
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
from stages.evaluation.estimates import EngineConfig, Piece, batched_pieces, compute, compute_shard
from stages.evaluation.long_context import ContextRow, ContextSection, PasskeyRow, PositionRow
from stages.evaluation.scores import ModelScores
from stages.evaluation.text_items import TextAnswer, TextItem
from stages.formats.table import ItemRow, String, columns_of, read_table, write_rows
from stages.generation.engine import LanguageModel
from stages.generation.samplers import open_model

VERSION = 4
# Documents or problems that a model gets at once; a stage resumes after the last finished batch.
ROWS_PER_BATCH = 32
# Kinds of rows: the beginnings of the names of pieces. Each has a table of that name.
KINDS = ("documents", "items", "passkey", "positions", "contexts", "text_items")
# Input with items of held-out text.
TEXT_ITEMS = "text-items"
PROBLEM_COLUMNS = ["id", "task", "prompt", "answer"]


class ProblemAnswer(TypedDict):
    """The answer to a problem."""

    id: String
    """id of the problem"""
    task: String
    """name of the task"""
    prompt: String
    """the prompt"""
    expected: String
    """the correct answer"""
    output: String
    """greedy output, up to the end token"""
    answer: String
    """the answer in the output"""
    score: Annotated[int, "int8"]
    """1 if the answer is correct, otherwise 0"""
    code_digest: String
    """SHA-256 of the scorer's file"""
    verifier: String
    """name of the [scorer](#scorers)"""
    verifier_version: String
    """version of the scorer"""


PROBLEM_ANSWERS = columns_of(ProblemAnswer)


class EvaluateConfig(EngineConfig):
    """The part of the evaluation section that changes the measured numbers."""

    heldout_documents: HeldoutLimit
    """maximum number of held-out documents per source"""
    max_new_tokens: Context
    """maximum number of tokens generated per problem"""
    context: ContextSection | None = added(None)
    """evaluation on long texts; null: none"""
    conversations: tuple[SourceName, ...] = added((), max_length=MOST_SOURCES)
    """sources whose documents contain special tokens"""
    works: Annotated[dict[SourceName, WorkPattern], Field(max_length=MOST_SOURCES)] = added({})
    """by source of which whole works are held out, the pattern in id and origin whose first group names the work"""


def run(config: EvaluateConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Measures inputs["model"] on the held-out documents of inputs["dedup"] and the problems of inputs["items"].

    Seals `items.parquet` (one row a problem), `documents.parquet` (one row a scored document) and `scores.json`; with
    config.context also `passkey.parquet`, `positions.parquet` and, with a short context, `contexts.parquet`; with
    inputs["text-items"] also `text_items.parquet`. Resumes from `work`, which keeps every finished batch.

    Raises:
        AtomError: There is no held-out document or no problem.
    """
    scores = measure(config, inputs["model"] / "model", inputs, work, out, report)
    published = {**scores, **config.engine.stated()}
    # NaN is no JSON; a score that is none must end the stage here.
    (out / "scores.json").write_text(json.dumps(published, indent=1, sort_keys=True, allow_nan=False) + "\n")
    for task, row in scores["accuracy"].items():
        report.note(f"{task}: {row['value']:.3f} ± {row['se']:.3f} exact match on {row['n']} problems")
    for source, bits in scores["bits_per_byte"].items():
        texts = f"{bits['documents']} documents of {bits['works']} works"
        report.note(f"{source}: {bits['value']:.4f} ± {bits['se']:.4f} bits per byte on {texts}")
    for kind, part in scores.get("text_items", {}).items():
        share, baseline = part["accuracy"], part["baseline"]
        report.note(f"{kind}: {share['value']:.3f} right of {share['n']}; n-grams {baseline['value']:.3f}")


def measure(config: EvaluateConfig, model: Path, inputs: Inputs, work: Path, out: Path, report: Report) -> ModelScores:
    """Writes the tables of the model in a folder, on the documents and problems of the inputs, and returns scores."""
    measured: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    pieces = _pieces(config, model, inputs)
    results = compute(pieces, work, partial(_load, config, model, work), report, "documents and problems")
    for piece, rows in zip(pieces, results, strict=True):
        measured[piece.name.partition("-")[0]] += rows

    scored, answered = scored_documents(measured["documents"]), sorted(measured["items"], key=lambda row: row["id"])
    passkeys, positions = measured["passkey"], measured["positions"]
    if config.context is not None:
        long_context.report_passkeys(passkeys, report)
        write_rows(out / "passkey.parquet", long_context.PASSKEY, passkeys)
        write_rows(out / "positions.parquet", long_context.POSITIONS, positions)
        if config.context.short:
            write_rows(out / "contexts.parquet", long_context.CONTEXTS, measured["contexts"])
    of_items = sorted(measured["text_items"], key=lambda row: (row["kind"], row["id"]))
    if TEXT_ITEMS in inputs:
        write_rows(out / "text_items.parquet", text_items.ANSWERS, of_items)
    write_rows(out / "documents.parquet", DOCUMENT_SCORES, scored)
    write_rows(out / "items.parquet", PROBLEM_ANSWERS, answered)
    return summary(scored, answered, passkeys, positions, measured["contexts"], of_items)


def run_shard(config: EvaluateConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Measures the documents and problems of one shard."""
    shards = estimates.shards(config.expected, 1, config.engine)
    measure_shard(config, inputs["model"] / "model", inputs, work, shard, shards)


def measure_shard(config: EvaluateConfig, model: Path, inputs: Inputs, work: Path, shard: int, shards: int) -> None:
    """Leaves what one of several tasks measures of a model in `work`, where `measure` takes it from."""
    compute_shard(_pieces(config, model, inputs), work, partial(_load, config, model, work), shard, shards)


def _load(config: EvaluateConfig, model: Path, work: Path) -> LanguageModel:
    longest = config.context.longest if config.context else 0
    return open_model(config.engine, model, load_tokenizer(model), work, longest)


def load_tokenizer(model: Path) -> Any:
    """Returns the tokenizer of a model, which pads on the left, as generation needs it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, local_files_only=True, padding_side="left")


def _pieces(config: EvaluateConfig, model: Path, inputs: Inputs) -> list[Piece[LanguageModel]]:
    """Returns the pieces: documents by source, problems by length, long texts.

    The name of each begins with the table that its rows are for.
    """
    tokenizer, kept = load_tokenizer(model), inputs["dedup"] / "kept"
    problems: list[ItemRow] = read_table(inputs["items"] / "items.parquet", PROBLEM_COLUMNS).to_pylist()
    if not problems:
        raise AtomError("evaluate: the items artifact holds no problem; give `evaluation.problems` at least one task")
    # Questions of similar length share a batch, so that little of it is padding.
    problems.sort(key=lambda row: (len(row["prompt"]), row["id"]))

    def score(model: LanguageModel, rows: Sequence[HeldoutDocument]) -> list[DocumentScore]:
        return score_documents(model, tokenizer, rows, config.conversations, config.works)

    def answer(model: LanguageModel, batch: Sequence[ItemRow]) -> list[ProblemAnswer]:
        return answer_batch(model, tokenizer, batch, config.max_new_tokens)

    def answer_items(model: LanguageModel, batch: Sequence[TextItem]) -> list[TextAnswer]:
        return text_items.answer_items(model, tokenizer, batch)

    documents = sorted(heldout_documents(kept, config.heldout_documents), key=lambda row: row["source"])
    pieces = batched_pieces("documents", documents, ROWS_PER_BATCH, score)
    pieces += batched_pieces("items", problems, ROWS_PER_BATCH, answer)
    if config.context is not None:
        encode, read = partial(token_ids, tokenizer), partial(heldout_texts, kept)
        pieces += long_context.pieces(config.context, tokenizer, encode, read)
    if TEXT_ITEMS in inputs:
        items = text_items.read_items(inputs[TEXT_ITEMS].path)
        pieces += batched_pieces("text_items", items, ROWS_PER_BATCH, answer_items)
    return pieces


def answer_batch(
    model: LanguageModel, tokenizer: Any, batch: Sequence[ItemRow], max_new_tokens: int
) -> list[ProblemAnswer]:
    """Returns the greedy answers of one batch."""
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


def summary(
    documents: Sequence[DocumentScore],
    items: Sequence[ProblemAnswer],
    passkeys: Sequence[PasskeyRow] = (),
    positions: Sequence[PositionRow] = (),
    contexts: Sequence[ContextRow] = (),
    of_items: Sequence[TextAnswer] = (),
) -> ModelScores:
    """Returns `scores.json` from the tables alone, so that it can be recomputed.

    `bits_per_byte_all` pools the scored documents of all sources, `accuracy_all` all problems.
    """
    by_source, pooled = bits_per_byte(documents)
    tasks = sorted({row["task"] for row in items})
    by_task = {task: binomial([row["score"] for row in items if row["task"] == task]) for task in tasks}
    scores: ModelScores = {
        "bits_per_byte": by_source,
        "bits_per_byte_all": pooled,
        "accuracy": by_task,
        "accuracy_all": binomial([row["score"] for row in items]),
    }
    if passkeys and positions:
        scores = {**scores, **long_context.summary(passkeys, positions, contexts)}
    if of_items:
        scores["text_items"] = text_items.summary(of_items)
    return scores


def bits_per_byte(documents: Sequence[DocumentScore]) -> tuple[dict[str, Ratio], Ratio]:
    """Returns the bits per byte of each source, and of all of them, which are strata of a stratified ratio.

    Standard errors are over works. Those of different sources are independent, but for a work that is in several.
    """
    by_source: dict[str, Ratio] = {}
    deviations: dict[Hashable, list[float]] = defaultdict(list)
    for source in sorted({row["source"] for row in documents}):
        rows = [row for row in documents if row["source"] == source]
        pairs, works = [(row["nll_bits"], row["bytes"]) for row in rows], [row["work"] for row in rows]
        by_source[source] = ratio(pairs, works=works)
        for work, deviation in work_deviations(pairs, works).items():
            deviations[work].append(deviation)
    size = sum(row["bytes"] for row in documents)
    pooled: Ratio = {
        "value": math.fsum(row["nll_bits"] for row in documents) / size,
        "se": root_of_squares(map(math.fsum, deviations.values())) / size,
        "documents": len(documents),
        "bytes": size,
        "works": len(deviations),
    }
    return by_source, pooled


STAGE = Stage("evaluate", VERSION, EvaluateConfig, run, **estimates.of_engine(), run_shard=run_shard)
