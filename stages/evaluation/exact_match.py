"""Exact-match accuracy on the recipe's evaluation problems, by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from stages.data.table import ItemRow, String, columns_of
from stages.data.tokenizer import END
from stages.evaluation.bits_per_byte import token_ids


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


def answer_batch(model: Any, tokenizer: Any, batch: Sequence[ItemRow], max_new_tokens: int) -> list[ProblemAnswer]:
    """Greedy answers of one left-padded batch."""
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
    rows: list[ProblemAnswer] = []
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
