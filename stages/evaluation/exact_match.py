"""Exact-match accuracy on the recipe's evaluation problems, by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from stages.evaluation.bits_per_byte import token_ids
from stages.formats.table import ItemRow, String, columns_of
from stages.generation.engine import LanguageModel


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
