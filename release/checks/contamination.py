"""Checks the contamination of the training data with items of the evaluation."""

from __future__ import annotations

from release.assembly.published_tables import read_json
from release.assembly.score_facts import CONTAMINATION
from release.checks.check import BuildContext
from release.checks.findings import Findings

MIN_RECALL, MIN_PLANTED = 0.9, 4
"""The recall on items planted into a copy of the corpus that a valid detector has at least, and the minimum number of
planted items."""
MAX_CONTAMINATED = 0.05
"""The maximum share of the items of a split that may be in the training data."""


def contamination_report(build: BuildContext) -> Findings | None:
    """Checks that the detector finds the planted items, and finds few items of the evaluation. None without a chat
    model."""
    if not build.data.chat:
        return None
    path = build.folder / "dataset" / CONTAMINATION
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
