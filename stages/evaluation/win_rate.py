"""Stage `prefer`: the win rate of a model's answers over those of the model that it was trained from.

    atom run atom-tiny --only prefer-rlvr

Both models answer every held-out request of the test split once, at temperature 1 and with the same seed. A verifier
scores both answers. The higher score wins if that answer does the task of the request. Everything else is a tie, which
counts as half a win.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.bounds import Key
from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs, Report, Stage
from stages.confidence import clustered, wilson
from stages.evaluation import estimates
from stages.evaluation.estimates import Piece, batched_pieces, compute, compute_shard
from stages.evaluation.pass_at_k import JUDGED, Answer, ChatConfig, ChatModel, chat_loader, select_split
from stages.evaluation.scores import ComparisonScores, PairScores, SideScores
from stages.formats.seeds import seed_of
from stages.formats.table import write_json, write_rows
from stages.tasks.eval_set import chat_rows

if TYPE_CHECKING:
    from stages.tasks import Row

VERSION = 4
ITEMS_PER_BATCH = 256
# Pairs that scores.json shows.
EXAMPLES = 8
SIDES = ("model", "before")
SIDE_COLUMNS = {"text": "string", "answer": "string", "finished": "bool", "tokens": "int32", "reward": "double"}
PAIRS = {"id": "string", "question": "string", "seed": "uint64", "verifier": "string", "verifier_version": "string"}
PAIRS |= {f"{side}_{name}": kind for side in SIDES for name, kind in {**SIDE_COLUMNS, "parts": "string"}.items()}


class PreferConfig(ChatConfig):
    """The names of the two models in the recipe."""

    model: Key
    """name of the model"""
    before: Key
    """name of the model that it is compared with"""


def run(config: PreferConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Compares the exports inputs["model"] and inputs["before"] on the requests of inputs["items"].

    Seals `pairs.parquet`, one row for each request, and `scores.json`, which follows from it alone (`summary`). Resumes
    from `work`, which keeps every finished batch.

    Raises:
        AtomError: Fewer than two requests are held out.
    """
    rows = _rows(inputs)
    sides: dict[str, list[Answer]] = {}
    # One side after the other: memory may not hold two models.
    for side in SIDES:
        load = chat_loader(rows, config, inputs, work, report.note, side)
        results = compute(_pieces(rows, config, side), work, load, report, "answers")
        sides[side] = [answer for answers in results for answer in answers]
    pairs = [_pair(row, *answers) for row, *answers in zip(rows, sides["model"], sides["before"], strict=True)]
    write_rows(out / "pairs.parquet", PAIRS, pairs)
    scores: ComparisonScores = {"model": config.model, "before": config.before, **summary(pairs)}
    write_json(out / "scores.json", {**scores, **config.engine.stated()})
    rate = scores["win_rate"]
    report.note(
        f"{config.model} is preferred to {config.before} on {rate['value']:.1%} ± {rate['se']:.1%} of {rate['n']} "
        f"requests; {scores['wins']} wins, {scores['ties']} ties, {scores['losses']} losses"
    )


def run_shard(config: PreferConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Answers the requests of one shard."""
    rows, shards = _rows(inputs), estimates.shards(config.expected, len(SIDES), config.engine)
    for side in SIDES:
        load = chat_loader(rows, config, inputs, work, partial(print, flush=True), side)
        compute_shard(_pieces(rows, config, side), work, load, shard, shards)


def _pair(row: Row, model: Answer, before: Answer) -> dict[str, Any]:
    """Returns a row of pairs.parquet: columns that both answers share, and those of each side."""
    from stages.tasks import question

    # Both answers have the same id, seed and verifier, so those of one side are enough.
    pair = {name: value for name, value in model.items() if name in PAIRS} | {"question": question(row)}
    columns: dict[str, Mapping[str, Any]] = {"model": model, "before": before}
    for side, answer in columns.items():
        pair |= {f"{side}_{name}": answer[name] for name in (*SIDE_COLUMNS, "parts")}
    return pair


def _rows(inputs: Inputs) -> list[dict[str, Any]]:
    rows = [row for row in chat_rows(inputs["items"]) if row["kind"] in JUDGED]
    if not rows:
        raise AtomError("prefer: the items have no request for a courteous note; set evaluation.chat.items.courtesies")
    return select_split(rows, "test")


def _pieces(rows: Sequence[Row], config: PreferConfig, side: str) -> list[Piece[ChatModel]]:
    """Returns batches of requests to one side."""
    # One seed for both sides, so that the comparison has less noise.
    requests = [(row, 0, seed_of(f"prefer/{row['id']}", config.seed)) for row in rows]

    def answer(model: ChatModel, batch: Sequence[tuple[Row, int, int]]) -> list[Answer]:
        return model.answer(batch)

    return batched_pieces(side, requests, ITEMS_PER_BATCH, answer)


def summary(pairs: Sequence[dict[str, Any]]) -> PairScores:
    """Returns `scores.json`, except for the models' names, from the table alone.

    win_rate counts ties as half, with the standard error over requests and Wilson's 95 % interval. An answer whose part
    `task` is not 1 does not win; a verifier without that part decides by the reward alone.
    """
    margins = [_margin(pair) for pair in pairs]
    wins, losses = sum(margin > 0 for margin in margins), sum(margin < 0 for margin in margins)
    rate = clustered([0.5 if margin == 0 else float(margin > 0) for margin in margins])
    ties = len(pairs) - wins - losses
    # Ties count as half a win, as in the rate.
    low, high = wilson(wins + ties / 2, len(pairs))
    # By a hash of the id, so that the examples are neither chosen by anyone nor all of one kind.
    shuffled = sorted(pairs, key=lambda pair: hashlib.sha256(pair["id"].encode()).hexdigest())
    return {
        "win_rate": {**rate, "low": low, "high": high},
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "sides": {side: _summarize_side(pairs, side) for side in SIDES},
        "examples": [
            {"id": pair["id"], "question": pair["question"]}
            | {side: {name: pair[f"{side}_{name}"] for name in ("answer", "finished", "reward")} for side in SIDES}
            for pair in shuffled[:EXAMPLES]
        ],
    }


def _margin(pair: dict[str, Any]) -> float:
    """Returns the difference of rewards, model less before; 0 if the better answer does not fulfill the request."""
    margin = float(pair["model_reward"] - pair["before_reward"])
    better = json.loads(pair["model_parts" if margin > 0 else "before_parts"])
    return margin if better.get("task", 1) == 1 else 0.0


def _summarize_side(pairs: Sequence[dict[str, Any]], side: str) -> SideScores:
    parts = [json.loads(pair[f"{side}_parts"]) for pair in pairs]
    return {
        "parts": {name: clustered([part[name] for part in parts]) for name in sorted(parts[0])},
        "tokens": sum(pair[f"{side}_tokens"] for pair in pairs) / len(pairs),
        "truncated": sum(not pair[f"{side}_finished"] for pair in pairs) / len(pairs),
    }


STAGE = Stage("prefer", VERSION, PreferConfig, run, **estimates.of_engine(len(SIDES)), run_shard=run_shard)
