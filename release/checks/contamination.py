"""Whether the items of the evaluation stand in what was trained on."""

from __future__ import annotations

from release.assembly.published_tables import read_json
from release.assembly.score_facts import CONTAMINATION
from release.checks.check import BuildContext
from release.checks.findings import Findings

MIN_RECALL, MIN_PLANTED = 0.9, 4
"""Of items planted into a copy of the corpus, what a detector must find to be believed, and how many there must be."""
MAX_CONTAMINATED = 0.05
"""Share of the items of a split that may stand in what was trained on."""


def contamination_report(build: BuildContext) -> Findings | None:
    """The report of a detector that finds what was planted, and finds few items of the evaluation. None if no model
    converses."""
    if not build.data.chat:
        return None
    path = build.folder / "dataset" / CONTAMINATION
    if not path.exists():
        return Findings(["there is no contamination report; run the stage contamination"])
    report = read_json(path)
    recall, splits = report["detector"]["recall"], {name: dict(counts) for name, counts in report["items"].items()}
    text = f"{recall['found']} of {recall['planted']} planted items found; verdicts {splits}"
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
