"""Checks the measurements of a release.

These are every scores.json against the tables beside it, every answer against its score, the contamination with
evaluation items, and the fresh set.

The scorers of stages/scorers are frozen files, so an old answer is scored as before. Other scorers need a sandbox,
other packages, a model or a server: they are not run, and the number of their answers is reported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release.checks.check import BuildContext, Findings
from release.facts.published_tables import read_json, stream_rows
from release.facts.score_facts import (
    BASELINES,
    CHANGES,
    CONTAMINATION,
    HARNESS,
    TEXT_ITEMS,
    chat_tables_of,
    compute_baselines,
    compute_changes,
    compute_chat_scores,
    compute_harness,
    compute_scores,
)
from release.opened_release import Release
from stages import scorers
from stages.evaluation.text_items import COMPLETION, is_right
from stages.formats.table import read_jsonl

MAX_CONTAMINATED = 0.05
"""The maximum share of the items of a split that may be in the training data."""
META = "dataset/evaluation/fresh/meta.json"


def scores(release: Release) -> Findings:
    """Checks that each scores.json follows from its tables, of every measurement."""
    evaluation = release.dataset / "evaluation"
    return Findings(score_problems(evaluation), compared=any(evaluation.rglob("scores.json")))


def score_problems(evaluation: Path) -> list[str]:
    """Returns the problems with scores. `evaluation` is the folder of that name in a dataset repository."""
    folders = [path.parent for path in sorted(evaluation.glob("*/scores.json"))]
    problems = [
        f"evaluation/{folder.name}/scores.json is not what its tables give"
        for folder in folders
        if not _equals_measured(folder / "scores.json", compute_scores(folder))
    ]
    problems += _text_item_problems(evaluation)
    if (baselines := evaluation.parent / BASELINES).exists():
        stated = read_json(baselines)["models"]
        if stated != json.loads(json.dumps(compute_baselines(evaluation))):
            problems.append(f"{BASELINES} is not what its tables give")
    for benchmark, models in compute_chat_scores(evaluation).items():
        for table in chat_tables_of(evaluation, benchmark):
            path, measured = table.with_name("scores.json"), models[table.parent.name]
            if not path.exists() or not _equals_measured(path, measured):
                problems.append(f"evaluation/{benchmark}/{table.parent.name}/scores.json is not what its table gives")
    for path in sorted((evaluation / HARNESS).glob("*/items.parquet")):
        stated = path.with_name("scores.json")
        if not stated.exists() or not _equals_measured(stated, compute_harness(path.parent)):
            problems.append(f"evaluation/{HARNESS}/{path.parent.name}/scores.json is not what its tables give")
    changes = evaluation / HARNESS / CHANGES
    if changes.exists() and not _equals_measured(changes, compute_changes(changes.parent)):
        problems.append(f"evaluation/{HARNESS}/{CHANGES} is not what the tables of the models give")
    return problems


def _text_item_problems(evaluation: Path) -> Iterator[str]:
    """Yields the tables of models whose rows are not judged by the items.

    The items of a document that was taken back are no longer there.
    """
    path = evaluation / TEXT_ITEMS / "questions.parquet"
    items = {(row["id"], row["kind"]): row for row in stream_rows(path)} if path.exists() else {}
    for table in sorted(evaluation.glob(f"*/{TEXT_ITEMS}.parquet")):
        for row in stream_rows(table):
            if (item := items.get((row["id"], row["kind"]))) is None:
                continue
            # Whether a line parses depends on the version of Python, so that is not judged again.
            score = row["score"] if row["kind"] == COMPLETION else is_right(item, row["output"])
            if (row["baseline"], row["score"]) != (item["baseline"], score):
                yield f"evaluation/{table.parent.name}/{table.name}: {row['id']} of {row['kind']} was judged otherwise"


def _equals_measured(path: Path, measured: Mapping[str, Any]) -> bool:
    """Returns True if a scores.json equals the measured scores."""
    # By way of JSON, which turns tuples into lists, and keys into texts.
    return bool(read_json(path) == json.loads(json.dumps(measured)))


def contamination_report(build: BuildContext) -> Findings | None:
    """Checks that few items of the evaluation are in the training data.

    None without a chat model.
    """
    if not build.release.data.chat:
        return None
    path = build.release.root / "dataset" / CONTAMINATION
    if not path.exists():
        return Findings(["there is no contamination report; run the stage contamination"])
    report = read_json(path)
    splits = {name: dict(counts) for name, counts in report["items"].items()}
    text = "; ".join(
        f"{split}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}" for split, counts in splits.items()
    )
    problems = [
        f"the {split} items stand in what was trained on; draw others, or decontaminate the data"
        for split, counts in splits.items()
        if counts["contaminated"] > MAX_CONTAMINATED * sum(counts.values())
    ]
    return Findings([f"{text}; {problem}" for problem in problems], summary=text)


def fresh_set(release: Release) -> Findings:
    """Checks that the fresh set follows from the published weights.

    It is drawn from their digest, without the removed problems.
    """
    from stages.evaluation import generated_eval
    from stages.formats.table import read_jsonl

    folder = release.root
    if not (folder / META).exists():
        return Findings(["evaluation/fresh/meta.json is missing: no item is known to be newer than the weights"])
    meta = read_json(folder / META)
    # A data repository alone has no weights to compare with.
    if (folder / "model").is_dir() and (digest := generated_eval.digest_of(folder / "model")) != meta["digest"]:
        text = f"evaluation/fresh/meta.json was drawn from the weights {meta['digest']}, and these are {digest}"
        return Findings([text])
    removed_ids = {row["id"] for row in meta["removed"]}
    expected = [row for row in generated_eval.draw(meta["digest"], meta["problems"]) if row["id"] not in removed_ids]
    drawn = read_jsonl((folder / META).with_name("chat.jsonl")) == json.loads(json.dumps(expected))
    problems = [] if drawn else ["evaluation/fresh/chat.jsonl is not what the digest of the weights gives"]
    return Findings(problems, summary=f"{meta['kept']} items drawn from the digest of the weights")


def fresh_set_of_conversations(build: BuildContext) -> Findings | None:
    """Checks that a release with chat models has a fresh set."""
    if not build.release.data.chat:
        return None
    missing = not (build.release.root / META).parent.is_dir()
    text = "evaluation/fresh is missing: no item is known to be newer than the weights"
    return Findings([text] if missing else [])


Row = dict[str, Any]
Scorer = tuple[str, str]
SIDES = ("model", "before")


@dataclass(frozen=True)
class Scored:
    """An answer with its score.

    Attributes:
        location: The table and the row, for sentences.
        task: The row of the task.
        text: The whole output.
        answer: The published answer; None if the table has no such column.
        finished: Whether the output ended by itself.
        reward: The published score.
        parts: The published parts of it.
    """

    location: str
    task: Row
    text: str
    answer: str | None
    finished: bool
    reward: float
    parts: Row


@dataclass
class Tally:
    """The number of answers that were scored again, and of those that could not be.

    Attributes:
        rescored: By scorer.
        skipped: By scorer.
        reasons: {scorer: why its answers were skipped}
    """

    rescored: Counter[Scorer] = field(default_factory=Counter)
    skipped: Counter[Scorer] = field(default_factory=Counter)
    reasons: dict[Scorer, str] = field(default_factory=dict)

    def skip(self, scorer: Scorer, reason: str, count: int = 1) -> None:
        self.skipped[scorer] += count
        self.reasons.setdefault(scorer, reason)

    def findings(self, problems: list[str]) -> Findings:
        skipped = {
            " ".join(scorer): f"scored by {' '.join(scorer)}: {count:,} answers; {self.reasons[scorer]}"
            for scorer, count in self.skipped.items()
        }
        rescored = ", ".join(f"{count:,} by {' '.join(scorer)}" for scorer, count in sorted(self.rescored.items()))
        if not rescored:
            return Findings(problems, skipped, "no answer could be scored again", compared=False)
        return Findings(problems, skipped, f"scored again: {rescored}")


def rescored_answers(release: Release) -> Findings:
    """Checks that every score equals the result of the scorer that is stated beside it."""
    dataset, tally = release.dataset, Tally()
    problems = _rescore_problems(dataset, tally)
    for table in _conversations(dataset):
        by_scorer: dict[Scorer, list[Scored]] = {}
        for scorer, answer in table:
            by_scorer.setdefault(scorer, []).append(answer)
        for scorer, scored in sorted(by_scorer.items()):
            problems += _rescore_answers(scorer, scored, tally)
    return tally.findings(problems)


def _rescore_problems(dataset: Path, tally: Tally) -> list[str]:
    """Scores again the outputs of base models on the evaluation problems."""
    problems = []
    expected = {row["id"]: row["answer"] for row in stream_rows(dataset / "evaluation/items.parquet", ["id", "answer"])}
    for path in (
        scores.with_name("items.parquet") for scores in sorted((dataset / "evaluation").glob("*/scores.json"))
    ):
        name = path.relative_to(dataset).as_posix()
        for row in stream_rows(path):
            if expected.get(row["id"]) != row["expected"]:
                problems.append(f"{name}: {row['id']} was judged by another answer than the problem's")
            scorer = _scorer_of(row)
            if scorer != scorers.PROBLEMS:
                tally.skip(scorer, _skip_reason(scorer))
            else:
                tally.rescored[scorer] += 1
                if scorers.score_problem(row["expected"], row["output"]) != row["score"]:
                    problems.append(f"{name}: the score of {row['id']} is not what its output earns")
    return problems


def _conversations(dataset: Path) -> Iterator[Iterator[tuple[Scorer, Scored]]]:
    """Yields every answer of a chat model with its scorer, by table, including those sampled for training."""
    items = _tasks(dataset / "evaluation/chat.jsonl")
    for benchmark, tasks in (("test", items), ("fresh", _tasks(dataset / "evaluation/fresh/chat.jsonl"))):
        for path in chat_tables_of(dataset / "evaluation", benchmark):
            yield _answers(dataset, path, tasks)
    for path in chat_tables_of(dataset / "evaluation", "preferences"):
        yield _pairs(dataset, path, items)
    for path in sorted((dataset / "rl").glob("*/rollouts.parquet")):
        yield _rollouts(dataset, path, _tasks(path.with_name("tasks.jsonl")))


def _answers(dataset: Path, path: Path, tasks: dict[str, Row]) -> Iterator[tuple[Scorer, Scored]]:
    name = path.relative_to(dataset).as_posix()
    for row in stream_rows(path):
        yield _scorer_of(row), _scored_answer(f"{name}: {row['id']}/{row['sample']}", tasks, row["id"], row)


def _pairs(dataset: Path, path: Path, tasks: dict[str, Row]) -> Iterator[tuple[Scorer, Scored]]:
    name = path.relative_to(dataset).as_posix()
    for row in stream_rows(path):
        for side in SIDES:
            answer = {column: row[f"{side}_{column}"] for column in ("text", "answer", "finished", "reward", "parts")}
            yield _scorer_of(row), _scored_answer(f"{name}: {row['id']} of {side}", tasks, row["id"], answer)


def _rollouts(dataset: Path, path: Path, tasks: dict[str, Row]) -> Iterator[tuple[Scorer, Scored]]:
    name, place_columns = path.relative_to(dataset).as_posix(), ("step", "wave", "group", "sample")
    columns = [*place_columns, "task", "text", "finished", "reward", "parts", "verifier", "verifier_version"]
    for row in stream_rows(path, columns):
        location = "/".join(str(row[column]) for column in place_columns)
        yield _scorer_of(row), _scored_answer(f"{name}: {row['task']} at {location}", tasks, row["task"], row)


def _tasks(path: Path) -> dict[str, Row]:
    return {row["id"]: row for row in read_jsonl(path)} if path.exists() else {}


def _scorer_of(row: Row) -> Scorer:
    return str(row["verifier"]), str(row["verifier_version"])


def _scored_answer(location: str, tasks: dict[str, Row], task: str, row: Row) -> Scored:
    parts, task_row = json.loads(row["parts"]), tasks.get(task, {})
    return Scored(location, task_row, row["text"], row.get("answer"), row["finished"], row["reward"], parts)


def _rescore_answers(scorer: Scorer, scored: Sequence[Scored], tally: Tally) -> list[str]:
    """Returns the problems of answers of one scorer; counts the answers in the tally."""
    if scorer not in scorers.SCORERS:
        tally.skip(scorer, _skip_reason(scorer), len(scored))
        return []
    tally.rescored[scorer] += len(scored)
    return [text for scored_answer in scored for text in _rescore_answer(scorer, scored_answer)]


def _rescore_answer(scorer: Scorer, scored_answer: Scored) -> Iterator[str]:
    answer = scorers.answer_of(scored_answer.text)
    if scored_answer.answer is not None and scored_answer.answer != answer:
        yield f"{scored_answer.location}: its answer is not the one that its text holds"
    try:
        rescored = scorers.SCORERS[scorer](scored_answer.task, answer, scored_answer.finished)
    except (KeyError, ValueError) as error:
        yield f"{scored_answer.location}: its task cannot be scored by {' '.join(scorer)}: {error}"
    else:
        if scored_answer.reward != rescored["reward"] or scored_answer.parts != rescored:
            yield f"{scored_answer.location}: its reward is not what its answer earns"


def _skip_reason(scorer: Scorer) -> str:
    name = scorer[0]
    if name == "reward-model":
        return "a trained model, which is published as a checkpoint and is not loaded to verify"
    versions = sorted(version for scorer_name, version in (*scorers.SCORERS, scorers.PROBLEMS) if scorer_name == name)
    if versions:
        return f"this atom holds {name} {', '.join(versions)}"
    return "it needs a sandbox, other packages or a server, and verification runs none"
