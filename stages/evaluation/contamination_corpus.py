"""The training data in the form for contamination search, and the detection rate of items planted in it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs
from stages.data.seeds import seed_of
from stages.data.table import read_table, stream_rows
from stages.evaluation.confidence import wilson
from stages.evaluation.generated_eval import prompts, task_roles
from stages.evaluation.scores import Detector

if TYPE_CHECKING:
    from stages.data.curation.overlap import ItemRuns

FORMS = ("verbatim", "spacing", "case", "embedded")
Item = tuple[str, str, str]
"""split (test, validation or fresh), kind, text."""


class Corpus:
    """The training data, streamed once. By phase: `matched`, the runs that occur, and `read`, the number of texts."""

    def __init__(self, inputs: Inputs, runs: ItemRuns, items: Mapping[str, Item], canaries: int, seed: int) -> None:
        self.runs, self.items, self.canaries, self.seed = runs, items, canaries, seed
        orders = sorted(role for role in inputs if role.startswith("order-"))
        self.matched: dict[str, set[int]] = {role.removeprefix("order-"): set() for role in orders}
        self.matched |= {role.replace("tasks-", "prompts of "): set() for role in task_roles(inputs)}
        self.read = dict.fromkeys(self.matched, 0)
        phases: dict[str, list[str]] = {}  # of each document
        sources: set[str] = set()
        for role in orders:
            table = read_table(inputs[role] / "order.parquet", ["source", "id"])
            sources |= set(table["source"].unique().to_pylist())
            for id in table["id"].unique().to_pylist():
                phases.setdefault(id, []).append(role.removeprefix("order-"))
        lottery = sorted(items, key=lambda id: _draw_hash("item", id, seed))
        self.unmatched = {id: _without_spaces(items[id][2]) for id in lottery[: 3 * canaries] if runs.words[id]}
        hosts = set(sorted(phases, key=lambda id: _draw_hash("host", id, seed))[:canaries])
        self.hosts: dict[str, str] = {}
        missing = set(phases)
        for source in sorted(sources):
            for row in stream_rows(inputs["dedup"] / "kept" / f"{source}.parquet", ["id", "text"]):
                if row["id"] in phases:
                    missing.discard(row["id"])
                    self._search(row["text"], phases[row["id"]])
                    if row["id"] in hosts:
                        self.hosts[row["id"]] = row["text"]
        if missing:
            raise AtomError(
                f"contamination: document {min(missing)} was trained on but is not among the kept ones of "
                f"{inputs['dedup'].key}; the artifacts are not of one run, run the recipe again"
            )
        for role in task_roles(inputs):
            for text in prompts(inputs, role):
                self._search(text, [role.replace("tasks-", "prompts of ")])

    def _search(self, text: str, phases: Sequence[str]) -> None:
        nodes, squeezed = self.runs.search(text), _without_spaces(text)
        for phase in phases:
            self.matched[phase] |= nodes
            self.read[phase] += 1
        self.unmatched = {id: item_text for id, item_text in self.unmatched.items() if item_text not in squeezed}

    def measure_detector(self, matched: set[int], ngram: int, threshold: float) -> Detector:
        """Recall on planted items by form, and the false-positive rate on items that occur nowhere.

        matched: the runs that occur in the corpus, to which the planted copies are added; ngram: words of an n-gram;
        threshold: the share of an item's n-grams from which it counts as detected. An independent test ensures that an
        item occurs nowhere: no text contains its characters without spaces.
        """
        count = min(self.canaries, len(self.unmatched) // 2, len(self.hosts))
        ids = list(self.unmatched)
        planted, others = ids[:count], ids[count : 2 * count]
        for n, (id, host) in enumerate(zip(planted, sorted(self.hosts), strict=False)):
            text = plant(self.items[id][2], self.hosts[host], FORMS[n % len(FORMS)], _draw_hash("place", id, self.seed))
            matched = matched | self.runs.search(text)
        matched_runs = self.runs.with_prefixes(matched)

        def count_detected(item_ids: Sequence[str]) -> int:
            return sum(self.runs.overlap(id, matched_runs, ngram)[0] >= threshold for id in item_ids)

        by_form = {form: planted[n :: len(FORMS)] for n, form in enumerate(FORMS)}
        low, high = wilson(count_detected(planted), count) if count else (0.0, 1.0)
        return {
            "recall": {"planted": count, "found": count_detected(planted), "low": low, "high": high},
            "recall_by_form": {
                form: {"planted": len(form_ids), "found": count_detected(form_ids)}
                for form, form_ids in by_form.items()
            },
            "false_positives": {"absent": len(others), "found": count_detected(others)},
        }


def plant(item: str, host: str, form: str, seed: str) -> str:
    """A copy of a text with an item in it, at a drawn place between two words."""
    cut = host.find(" ", random.Random(seed).randrange(len(host) + 1))
    head, tail = (host, "") if cut < 0 else (host[:cut], host[cut:])
    forms = {
        "verbatim": f"\n{item}\n",
        "spacing": "\n" + "  ".join(re.findall(r"\w+|[^\w\s]", item)) + "\n",
        "case": f"\n{item.swapcase()}\n",
        "embedded": f" (somebody asked: {item}, and so on) ",
    }
    return head + forms[form] + tail


def _without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def _draw_hash(label: str, id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed_of(f'contamination/{label}', seed)}/{id}".encode()).hexdigest()
