"""Checks every scores.json against the tables beside it, the contamination with evaluation items, and the fresh set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.facts.published_tables import read_json
from release.facts.score_facts import (
    CONTAMINATION,
    HARNESS,
    MEMORIZATION,
    chat_tables_of,
    compute_chat_scores,
    compute_harness,
    compute_memorization,
    compute_scores,
)
from release.opened_release import Release

MIN_RECALL, MIN_PLANTED = 0.9, 4
"""The recall on items planted into a copy of the corpus that a valid detector has at least, and the minimum number of
planted items."""
MAX_CONTAMINATED = 0.05
"""The maximum share of the items of a split that may be in the training data."""
META = "dataset/evaluation/fresh/meta.json"


def scores(release: Release) -> Findings:
    """Checks that each scores.json follows from its tables, of every measurement."""
    evaluation = release.dataset / "evaluation"
    return Findings(score_problems(evaluation), compared=any(evaluation.rglob("scores.json")))


def score_problems(evaluation: Path) -> list[str]:
    """The problems with scores. evaluation: the folder of that name in a dataset repository."""
    folders = [path.parent for path in sorted(evaluation.glob("*/scores.json"))]
    problems = [
        f"evaluation/{folder.name}/scores.json is not what its tables give"
        for folder in folders
        if not _equals_measured(folder / "scores.json", compute_scores(folder))
    ]
    for benchmark, models in compute_chat_scores(evaluation).items():
        for table in chat_tables_of(evaluation, benchmark):
            path, measured = table.with_name("scores.json"), models[table.parent.name]
            if not path.exists() or not _equals_measured(path, measured):
                problems.append(f"evaluation/{benchmark}/{table.parent.name}/scores.json is not what its table gives")
    for kind, name, compute in (
        (MEMORIZATION, "documents", compute_memorization), (HARNESS, "items", compute_harness)
    ):  # fmt: skip
        for path in sorted((evaluation / kind).glob(f"*/{name}.parquet")):
            stated = path.with_name("scores.json")
            if not stated.exists() or not _equals_measured(stated, compute(path.parent)):
                problems.append(f"evaluation/{kind}/{path.parent.name}/scores.json is not what its tables give")
    return problems


def _equals_measured(path: Path, measured: Mapping[str, Any]) -> bool:
    """Returns True if a scores.json equals the measured scores."""
    return bool(read_json(path) == json.loads(json.dumps(measured)))


def contamination_report(build: BuildContext) -> Findings | None:
    """Checks that the detector finds the planted items, and finds few items of the evaluation. None without a chat
    model."""
    if not build.release.data.chat:
        return None
    path = build.release.root / "dataset" / CONTAMINATION
    if not path.exists():
        return Findings(["there is no contamination report; run the stage contamination"])
    report = read_json(path)
    recall, splits = report["detector"]["recall"], {name: dict(counts) for name, counts in report["items"].items()}
    verdicts = "; ".join(
        f"{split}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}" for split, counts in splits.items()
    )
    text = f"{recall['found']} of {recall['planted']} planted items found; {verdicts}"
    problems = []
    if recall["planted"] < MIN_PLANTED:
        problems.append(
            "too few items could be planted to know how good the detector is; ask for more items, or cleaner ones"
        )
    elif recall["found"] < MIN_RECALL * recall["planted"]:
        problems.append("the detector misses too much, look at its settings")
    problems += [
        f"the {split} items stand in what was trained on; draw others, or decontaminate the data"
        for split, counts in splits.items()
        if counts["contaminated"] > MAX_CONTAMINATED * sum(counts.values())
    ]
    return Findings([f"{text}; {problem}" for problem in problems], summary=text)


def fresh_set(release: Release) -> Findings:
    """Checks that the fresh set follows from the published weights: it is drawn from their digest, without the removed
    problems."""
    from stages.evaluation import generated_eval
    from stages.formats.table import read_jsonl

    folder = release.root
    if not (folder / META).exists():
        return Findings(["evaluation/fresh/meta.json is missing: no item is known to be newer than the weights"])
    meta = read_json(folder / META)
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
