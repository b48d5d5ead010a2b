"""Stage `pass-rates`: the pass rate of each task of a phase under the policy that the phase starts from.

    atom run RECIPE --only pass-rates-rlvr

The exported model answers each task `num_samples` times at temperature 1, with the limit of the phase, and the rate is
the mean reward. The phase leaves out the tasks that are solved always or never (stages/rl/rollout/pass_rates.py).
Seeds follow from task and sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Key, Settings
from pipeline.core.stage import Inputs, Report, Stage, operational
from stages.evaluation import estimates
from stages.evaluation.estimates import Piece, batched_pieces, compute, compute_shard
from stages.evaluation.pass_at_k import ANSWERS, ITEMS_PER_BATCH, Answer, ChatConfig, ChatModel, NumSamples
from stages.formats.seeds import seed_of
from stages.formats.table import write_json, write_rows
from stages.rl.rollout import tasks
from stages.rl.rollout.pass_rates import PASS_RATES
from stages.tasks import Row

VERSION = 1


class PassRatesConfig(ChatConfig):
    """The number of answers to each task."""

    num_samples: NumSamples
    """answers to each task"""
    verifiers: Annotated[dict[Key, Settings], Field(max_length=100)] = operational({})
    """settings of verifiers by name, such as the URL of a server"""


def run(config: PassRatesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Answers the tasks of inputs["tasks"] with the export inputs["model"].

    Seals `answers.parquet`, one row for each answer, and `pass_rates.json`, which follows from it. Resumes from `work`,
    which keeps every finished batch.
    """
    rows = tasks.read(inputs["tasks"])
    results = compute(_pieces(rows, config), work, _loader(rows, config, inputs, work, report.note), report, "tasks")
    answers: list[Answer] = [answer for batch in results for answer in batch]
    write_rows(out / "answers.parquet", ANSWERS, answers)
    rates = pass_rates(answers)
    write_json(out / PASS_RATES, rates)
    unsolved, solved = (sum(rate == end for rate in rates.values()) for end in (0, 1))
    report.note(
        f"of {len(rates)} tasks, {unsolved} are never solved and {solved} always, in {config.num_samples} answers"
    )


def pass_rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the mean reward of each task, by id, with rewards held between 0 and 1."""
    rewards: dict[str, list[float]] = {}
    for answer in answers:
        rewards.setdefault(answer["id"], []).append(min(max(answer["reward"], 0.0), 1.0))
    return {id: fmean(values) for id, values in sorted(rewards.items())}


def run_shard(config: PassRatesConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Answers the tasks of one shard."""
    rows = tasks.read(inputs["tasks"])
    load = _loader(rows, config, inputs, work, partial(print, flush=True))
    compute_shard(_pieces(rows, config), work, load, shard, estimates.shards(config.expected, 1, config.engine))


def _loader(rows: Sequence[Row], config: PassRatesConfig, inputs: Inputs, work: Path, note: Any) -> Any:
    return lambda: ChatModel(inputs["model"] / "model", rows, config, inputs, work, note, config.verifiers)


def _pieces(rows: Sequence[Row], config: PassRatesConfig) -> list[Piece[ChatModel]]:
    def answer(chat_model: ChatModel, batch: Sequence[Row]) -> list[Answer]:
        return chat_model.answer(
            [
                (row, n, seed_of(f"pass-rates/{row['id']}/{n}", config.seed))
                for row in batch
                for n in range(config.num_samples)
            ]
        )

    return batched_pieces("answers", rows, ITEMS_PER_BATCH, answer)


STAGE = Stage("pass-rates", VERSION, PassRatesConfig, run, **estimates.of_engine(), run_shard=run_shard)
