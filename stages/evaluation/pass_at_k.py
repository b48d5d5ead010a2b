"""Stage `solve`: what one exported model answers in conversation, and what more answers to a question are worth.

    atom run atom-tiny --only solve-rlvr

A problem, which has one right answer, is asked once greedily and `samples` times at temperature 1. From the samples
follow, for k = 1, 2, 4, … answers and by what they cost in generated tokens:

- **pass@k**: one of k answers is right;
- **maj@k**: the most frequent of k answers is right. Answers vote by their text without the reasoning; one that did not
  end has no vote, and of equally frequent answers each is as likely.

Both are exact expectations over all subsets of the samples (stages/evaluation/confidence.py). A request for a courteous
note has no one right answer; it is asked once, for its mean reward, and which of two models is preferred is measured by
stage `prefer`. Errors are over items. Seeds follow from item and sample, so all models of a recipe draw with the same
random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pipeline.core.bounds import Context, Range, Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage
from pipeline.core.store import once
from stages.data.seeds import seed_of
from stages.data.table import write_json, write_rows
from stages.evaluation.confidence import clustered, majority_at, pass_at, powers
from stages.evaluation.eval_set import chat_rows

if TYPE_CHECKING:
    from stages.rl.protocols import Row

VERSION = 2
GREEDY = -1
ITEMS_PER_BATCH = 32
JUDGED = ("courtesy",)
"""Kinds of items that have no one right answer."""
ANSWERS = {
    "id": "string",
    "kind": "string",
    "sample": "int32",
    "seed": "uint64",
    "text": "string",
    "answer": "string",
    "finished": "bool",
    "tokens": "int32",
    "reward": "double",
    "parts": "string",
    "verifier": "string",
    "verifier_version": "string",
}
Answer = dict[str, Any]
"""A row of answers.parquet. sample: GREEDY or 0, 1, …; tokens: all that were generated, the stop token too."""


class SolveConfig(Config):
    """Which items are asked, how often, and how long an answer may be."""

    num_samples: Annotated[int, Range(1, 4096)]
    max_new_tokens: Context
    split: Literal["test", "validation"] = "test"
    seed: Seed


def run(config: SolveConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["model"]: an export; inputs["items"]: an artifact with chat.jsonl (items or fresh).

    Seals `answers.parquet`, a row an answer, and `scores.json`, which follows from it alone (`summary`).
    Resumes from `work`, which keeps every finished batch. Raises AtomError if a kind has fewer than two items, and what
    the verifiers raise.
    """
    rows = chosen(chat_rows(inputs["items"]), config.split)
    speaker = Speaker(inputs["model"] / "model", config.max_new_tokens, rows, inputs, report)
    answered: list[Answer] = []
    for start in range(0, len(rows), ITEMS_PER_BATCH):
        batch = rows[start : start + ITEMS_PER_BATCH]
        name = f"answers-{start // ITEMS_PER_BATCH:05d}.json"
        answered += once(work / name, partial(_answers, speaker, batch, config))
        report.progress(start + len(batch), len(rows), "items")
    speaker.close()
    answered.sort(key=lambda row: (row["id"], row["sample"]))
    write_rows(out / "answers.parquet", ANSWERS, answered)
    scores = summary(answered)
    write_json(out / "scores.json", scores)
    for kind, part in scores["problems"].items():
        most = max(part["at"], key=int)
        told = {"greedy": part["greedy"]["accuracy"], **{f"{x}@{most}": part["at"][most][x] for x in ("pass", "maj")}}
        report.note(f"{kind}: " + ", ".join(f"{x} {y['value']:.3f} ± {y['se']:.3f}" for x, y in told.items()))
    for kind, part in scores["judged"].items():
        report.note(f"{kind}: mean reward {part['reward']['value']:.3f} ± {part['reward']['se']:.3f}")


def chosen(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The rows of a split by id. Raises AtomError if there is none, or one kind has a single item."""
    found = sorted((row for row in rows if row["split"] == split), key=lambda row: row["id"])
    kinds = [row["kind"] for row in found]
    single = next((kind for kind in kinds if kinds.count(kind) < 2), None)
    if not found or single:
        what = f"one item of kind {single}, and two are needed for an error bar" if single else "no item"
        raise AtomError(f"the items for conversations have {what} in split {split}; ask for more in evaluation.chat")
    return found


class Speaker:
    """An exported model in conversation, with the verifiers of some rows."""

    def __init__(self, folder: Path, max_new_tokens: int, rows: Sequence[Row], inputs: Inputs, report: Report) -> None:
        import torch

        from stages.rl.rewards.reward_functions import verifiers_of
        from stages.rl.rollout import generation
        from stages.rl.samplers.generate import InProcess

        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        self.chat = generation.Chat(folder)
        self.sampler = InProcess(folder, self.chat.stops, max_new_tokens)
        self.verifiers = generation.Verifiers(verifiers_of(rows, inputs, self.chat, {}), 2, report)

    def ask(self, asked: Sequence[tuple[Row, int, int]], greedy: bool = False) -> list[Answer]:
        """The answers to some (row, sample, seed), scored."""
        from stages.rl.rollout.generation import draw

        drawn = draw(self.sampler, self.chat, [(row, seed) for row, _, seed in asked], greedy)
        responses = [self.chat.response(each) for each in drawn]
        scored = self.verifiers.score([(row, r) for (row, _, _), r in zip(asked, responses, strict=True)])
        return [
            {
                "id": row["id"], "kind": row["kind"], "sample": sample, "seed": seed, "text": response.text,
                "answer": response.answer, "finished": response.finished, "tokens": len(found.ids),
                "reward": parts["reward"], "parts": json.dumps(parts, sort_keys=True), "verifier": row["verifier"],
                "verifier_version": self.verifiers.made[row["verifier"]].version,
            }
            for (row, sample, seed), found, response, parts in zip(asked, drawn, responses, scored, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        self.sampler.close()
        self.verifiers.close()


def _answers(speaker: Speaker, batch: Sequence[Row], config: SolveConfig) -> list[Answer]:
    once_each = [(row, GREEDY, 0) for row in batch if row["kind"] not in JUDGED]
    often = {id(row): 1 if row["kind"] in JUDGED else config.num_samples for row in batch}
    sampled = [(row, n, seed_of(f"solve/{row['id']}/{n}", config.seed)) for row in batch for n in range(often[id(row)])]
    return (speaker.ask(once_each, greedy=True) if once_each else []) + speaker.ask(sampled)


def summary(answered: Sequence[Answer]) -> dict[str, Any]:
    """`scores.json` from the table alone: anyone who has the table can recompute it. Rewards of 1 are right answers."""
    by_kind: dict[str, dict[str, list[Answer]]] = {}
    for row in answered:
        by_kind.setdefault(row["kind"], {}).setdefault(row["id"], []).append(row)
    problems = {kind: items for kind, items in sorted(by_kind.items()) if kind not in JUDGED}
    judged = {kind: items for kind, items in sorted(by_kind.items()) if kind in JUDGED}
    every = {id: rows for items in problems.values() for id, rows in items.items()}
    return {
        "problems": {kind: _problems(items) for kind, items in problems.items()},
        "problems_all": _problems(every) if every else None,
        "judged": {kind: _told(items, "reward") for kind, items in judged.items()},
    }


def _problems(items: Mapping[str, list[Answer]]) -> dict[str, Any]:
    samples = {id: [row for row in rows if row["sample"] != GREEDY] for id, rows in sorted(items.items())}
    greedy = {id: [row for row in rows if row["sample"] == GREEDY] for id, rows in sorted(items.items())}
    told = _told(samples, "accuracy")
    n = min(len(rows) for rows in samples.values())
    at = {
        str(k): {
            "tokens": k * told["tokens"],
            "pass": clustered(
                [pass_at(len(rows), sum(r["reward"] >= 1 for r in rows), k) for rows in samples.values()]
            ),
            "maj": clustered([_majority(rows, k) for rows in samples.values()]),
        }
        for k in powers(n)
    }
    return {"greedy": _told(greedy, "accuracy"), "samples": told, "at": at}


def _majority(rows: Sequence[Answer], k: int) -> float:
    votes = [row["answer"] if row["finished"] else None for row in rows]
    return majority_at(votes, {row["answer"] for row in rows if row["reward"] >= 1}, k)


def _told(items: Mapping[str, list[Answer]], what: str) -> dict[str, Any]:
    """Of some answers: the mean reward under that name, mean generated tokens, and shares of all answers that were cut
    off at max_new_tokens or have a reasoning."""
    rows = [row for own in items.values() for row in own]
    return {
        what: clustered([sum(row["reward"] for row in own) / len(own) for own in items.values()]),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "reasoning": sum("</think>" in row["text"] for row in rows) / len(rows),
    }


STAGE = Stage("solve", VERSION, SolveConfig, run)
