"""Stage `solve`: pass@k of one exported model in conversation.

    atom run atom-tiny --only solve-rlvr

The model answers each problem once greedily and `num_samples` times at temperature 1. pass@k is the chance that one of
k answers is correct, for k = 1, 2, 4, …, with the cost of k answers in generated tokens: an exact expectation over all
subsets of the samples (stages/confidence.py). Some problems may get further samples, for a larger k.

A request for a courteous note has no single correct answer: the model answers it once, and its mean reward is reported.
Stage `prefer` measures which of two models is preferred. Standard errors are over items. Seeds follow from item and
sample, so all models of a recipe draw with the same random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pipeline.core.bounds import Context, Range, Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Inputs, Report, Stage, added
from stages.confidence import clustered, pass_at, powers_of_two
from stages.evaluation import estimates
from stages.evaluation.estimates import EngineConfig, Piece, batched_pieces, compute, compute_shard
from stages.evaluation.scores import AnswerScores, AnswerStatistics, ProblemScores, SeveralAnswers
from stages.formats.seeds import seed_of
from stages.formats.table import Double, Int32, String, columns_of, write_json, write_rows
from stages.generation.samplers import open_sampler
from stages.tasks.eval_set import chat_rows

if TYPE_CHECKING:
    from stages.tasks import Row

VERSION = 3
# Number of the greedy answer among the samples.
GREEDY = -1
# Items that are answered together; a stage resumes after the last finished batch.
ITEMS_PER_BATCH = 32
# Kinds of items without a single right answer.
JUDGED = ("courtesy",)


class Answer(TypedDict):
    """A row of answers.parquet."""

    id: String
    """id of the item"""
    kind: String
    """kind of the item"""
    sample: Int32
    """-1 for the greedy answer"""
    seed: Annotated[int, "uint64"]
    """0 for the greedy answer"""
    text: String
    """special tokens in words, without the stop token"""
    answer: String
    """the text after the reasoning"""
    finished: Annotated[bool, "bool"]
    """whether the answer ended by itself"""
    tokens: Int32
    """all generated tokens"""
    reward: Double
    """reward by the verifier"""
    parts: String
    """parts of the reward, as JSON"""
    verifier: String
    """the scorer"""
    verifier_version: String
    """version of the scorer"""


ANSWERS = columns_of(Answer)

# Answers to one problem.
NumSamples = Annotated[int, Range(1, 4096)]


class FurtherSamples(Config):
    """Further answers to some problems, for pass@k with a large k."""

    items: Annotated[int, Range(2, 1e6)]
    """problems of each kind, the first ones by id; fewer than there are of any kind"""
    num_samples: NumSamples
    """answers to each of them"""


class ChatConfig(EngineConfig):
    """Settings of the stages in which a model answers in conversation."""

    max_new_tokens: Context
    """maximum number of tokens of an answer"""
    seed: Seed
    """seed of the recipe"""


class SolveConfig(ChatConfig):
    """The items, and the number of answers to each."""

    num_samples: NumSamples
    """answers per item"""
    split: Literal["test", "validation"] = "test"
    """split of the items"""
    pass_at_k: FurtherSamples | None = added(None)
    """further answers to some problems; null: none"""


def run(config: SolveConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Answers the items of an artifact with chat.jsonl, inputs["items"], with the export inputs["model"].

    Seals `answers.parquet`, one row for each answer, and `scores.json`, which follows from it alone (`summary`).
    Resumes from `work`, which keeps every finished batch.

    Raises:
        AtomError: A kind has fewer than two items; and the errors of the verifiers.
    """
    rows = _rows(config, inputs)
    results = compute(_pieces(rows, config), work, chat_loader(rows, config, inputs, work, report.note), report)
    answered: list[Answer] = [answer for answers in results for answer in answers]
    # In a batch all greedy answers come first; the table has the answers item by item.
    answered.sort(key=lambda row: (row["id"], row["sample"]))
    write_rows(out / "answers.parquet", ANSWERS, answered)
    scores = summary(answered)
    write_json(out / "scores.json", {**scores, **config.engine.stated()})

    for kind, part in scores["problems"].items():
        largest_k = max(part["at"], key=int)
        headline = {"greedy": part["greedy"]["accuracy"], f"pass@{largest_k}": part["at"][largest_k]["pass"]}
        report.note(f"{kind}: " + ", ".join(f"{x} {y['value']:.3f} ± {y['se']:.3f}" for x, y in headline.items()))
    for kind, judged in scores["judged"].items():
        report.note(f"{kind}: mean reward {judged['reward']['value']:.3f} ± {judged['reward']['se']:.3f}")


def run_shard(config: SolveConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Answers the items of one shard."""
    rows = _rows(config, inputs)
    load = chat_loader(rows, config, inputs, work, partial(print, flush=True))
    compute_shard(_pieces(rows, config), work, load, shard, estimates.shards(config.expected, 1, config.engine))


def _rows(config: SolveConfig, inputs: Inputs) -> list[dict[str, Any]]:
    return select_split(chat_rows(inputs["items"]), config.split)


def chat_loader(
    rows: Sequence[Row],
    config: ChatConfig,
    inputs: Inputs,
    work: Path,
    note: Callable[[str], object],
    role: str = "model",
) -> Callable[[], ChatModel]:
    """Returns the function that opens the export inputs[role]; see `ChatModel`."""
    return lambda: ChatModel(inputs[role] / "model", rows, config, inputs, work, note)


def _pieces(rows: Sequence[Row], config: SolveConfig) -> list[Piece[ChatModel]]:
    # A judged request is answered once: it has no right answer that a vote of several could find.
    counts = {row["id"]: 1 if row["kind"] in JUDGED else config.num_samples for row in rows}
    if more := config.pass_at_k:
        for kind in {row["kind"] for row in rows} - set(JUDGED):
            of_kind = [row["id"] for row in rows if row["kind"] == kind]
            counts |= dict.fromkeys(of_kind[: more.items], more.num_samples)

    def answer(chat_model: ChatModel, batch: Sequence[Row]) -> list[Answer]:
        """Returns the greedy answers to the problems of a batch, then the samples to all of its items."""
        problems = [row for row in batch if row["kind"] not in JUDGED]
        # A greedy answer draws nothing, so its seed is 0.
        answers = chat_model.answer([(row, GREEDY, 0) for row in problems], greedy=True) if problems else []
        samples = [
            (row, n, seed_of(f"solve/{row['id']}/{n}", config.seed)) for row in batch for n in range(counts[row["id"]])
        ]
        return answers + chat_model.answer(samples)

    return batched_pieces("answers", rows, ITEMS_PER_BATCH, answer)


def select_split(rows: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Returns the rows of a split, sorted by id.

    Raises:
        AtomError: There is none, or a kind has a single item.
    """
    selected = sorted((row for row in rows if row["split"] == split), key=lambda row: row["id"])
    kinds = [row["kind"] for row in selected]
    single = next((kind for kind in kinds if kinds.count(kind) < 2), None)
    if not selected or single:
        problem = f"one item of kind {single}, and two are needed for an error bar" if single else "no item"
        raise AtomError(f"the items for conversations have {problem} in split {split}; ask for more in evaluation.chat")
    return selected


class ChatModel:
    """The exported model in a folder with its chat template, and the verifiers of its items."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Row],
        config: ChatConfig,
        inputs: Inputs,
        work: Path,
        note: Callable[[str], object],
        verifier_settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Opens the model.

        Args:
            folder: Folder of the model.
            rows: All items, whose verifiers are made.
            config: Settings of the stage.
            inputs: Artifacts of the stage.
            work: Work folder, for the log of a server.
            note: Prints a line to the log.
            verifier_settings: Settings of verifiers by name; None: none.
        """
        import torch

        from stages.rl.protocols import make_verifiers
        from stages.rl.rollout import generation

        # One thread and deterministic kernels, so that the answers repeat bit for bit.
        torch.set_num_threads(1)
        torch.set_deterministic_debug_mode("error")
        self.chat = generation.Chat(folder)
        self.sampler = open_sampler(config.engine, folder, self.chat.stops, config.max_new_tokens, work)
        self.verifiers = generation.Verifiers(make_verifiers(rows, inputs, self.chat, verifier_settings or {}), note)

    def answer(self, requests: Sequence[tuple[Row, int, int]], greedy: bool = False) -> list[Answer]:
        """Returns the scored answers to requests, each (row, sample, seed)."""
        from stages.rl.rollout.generation import draw

        completions = draw(self.sampler, self.chat, [(row, seed) for row, _, seed in requests], greedy)
        responses = [self.chat.response(completion) for completion in completions]
        scored = self.verifiers.score([(row, r) for (row, _, _), r in zip(requests, responses, strict=True)])
        answers: list[Answer] = []
        for (row, sample, seed), completion, response, parts in zip(
            requests, completions, responses, scored, strict=True
        ):
            answers.append(
                {
                    "id": row["id"],
                    "kind": row["kind"],
                    "sample": sample,
                    "seed": seed,
                    "text": response.text,
                    "answer": response.answer,
                    "finished": response.finished,
                    "tokens": len(completion.ids),
                    "reward": parts["reward"],
                    "parts": json.dumps(parts, sort_keys=True),
                    "verifier": row["verifier"],
                    "verifier_version": self.verifiers.by_name[row["verifier"]].version,
                }
            )
        return answers

    def close(self) -> None:
        self.sampler.close()
        self.verifiers.close()


def summary(answered: Sequence[Answer]) -> AnswerScores:
    """Returns `scores.json` from the table alone, so that it can be recomputed. A reward of 1 is a correct answer."""
    by_kind: dict[str, dict[str, list[Answer]]] = {}
    for row in answered:
        by_kind.setdefault(row["kind"], {}).setdefault(row["id"], []).append(row)
    problems = {kind: items for kind, items in sorted(by_kind.items()) if kind not in JUDGED}
    reward_scored = {kind: items for kind, items in sorted(by_kind.items()) if kind in JUDGED}
    all_items = {id: rows for items in problems.values() for id, rows in items.items()}
    return {
        "problems": {kind: _summarize_problems(items) for kind, items in problems.items()},
        "problems_all": _summarize_problems(all_items) if all_items else None,
        "judged": {kind: _answer_statistics(items, "reward") for kind, items in reward_scored.items()},
    }


def _summarize_problems(items: Mapping[str, list[Answer]]) -> ProblemScores:
    samples = {id: [row for row in rows if row["sample"] != GREEDY] for id, rows in sorted(items.items())}
    greedy = {id: [row for row in rows if row["sample"] == GREEDY] for id, rows in sorted(items.items())}
    # As many samples of every problem, so that every k is measured on all problems, and problems weigh the same.
    fewest, most = (limit(len(rows) for rows in samples.values()) for limit in (min, max))
    of_all = {id: rows[:fewest] for id, rows in samples.items()}
    scores: ProblemScores = {
        "greedy": _answer_statistics(greedy, "accuracy"),
        "samples": _answer_statistics(of_all, "accuracy"),
        "at": _several_answers(of_all, fewest),
    }
    if most > fewest:
        scores["at_subset"] = _several_answers({id: rows for id, rows in samples.items() if len(rows) == most}, most)
    return scores


def _several_answers(samples: Mapping[str, list[Answer]], largest_k: int) -> dict[str, SeveralAnswers]:
    """Returns pass@k and its cost, by k."""
    tokens = _answer_statistics(samples, "accuracy")["tokens"]
    correct = {id: sum(row["reward"] >= 1 for row in rows) for id, rows in samples.items()}
    at: dict[str, SeveralAnswers] = {}
    for k in powers_of_two(largest_k):
        estimates = [pass_at(len(rows), correct[id], k) for id, rows in samples.items()]
        at[str(k)] = {"tokens": k * tokens, "pass": clustered(estimates)}
    return at


def _answer_statistics(items: Mapping[str, list[Answer]], name: Literal["accuracy", "reward"]) -> AnswerStatistics:
    """Returns statistics of answers by item.

    They are the mean reward under `name`, mean generated tokens, and the shares of answers that are truncated at
    max_new_tokens or have a reasoning.
    """
    rows = [row for answers in items.values() for row in answers]
    statistics: AnswerStatistics = {
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "reasoning": sum("</think>" in row["text"] for row in rows) / len(rows),
    }
    statistics[name] = clustered([sum(row["reward"] for row in answers) / len(answers) for answers in items.values()])
    return statistics


STAGE = Stage("solve", VERSION, SolveConfig, run, **estimates.of_engine(), run_shard=run_shard)
