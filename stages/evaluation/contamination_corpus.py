"""The training data in the form for contamination search, and the detection rate of items planted in it."""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, seal_part
from pipeline.core.stage import Inputs, Report
from stages.confidence import wilson
from stages.evaluation.generated_eval import prompts, task_roles
from stages.evaluation.scores import Detector
from stages.formats.database import connect
from stages.formats.seeds import seed_of
from stages.formats.table import order_files, part_files, short_hash, sources_of, stream_batches

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ItemRuns

FORMS = ("verbatim", "spacing", "case", "embedded")
Item = tuple[str, str, str]
"""split (test, validation or fresh), kind, text."""


HOSTS = "hosts.json"
RANGES = 256
"""Of hashes that are sorted one after the other."""


class PartFacts(TypedDict):
    """Of a part. read: documents by phase; occurring: candidates whose characters occur; hosts: (draw, id) of the first
    documents of the lottery, whose texts are in `hosts.json`."""

    read: dict[str, int]
    occurring: list[str]
    hosts: list[tuple[str, str]]


class CorpusSearch:
    """The search through the kept documents that the orders read, part by part; `work` keeps each part's result."""

    def __init__(
        self, inputs: Inputs, work: Path, runs: ItemRuns, items: Mapping[str, Item], canaries: int, seed: int
    ) -> None:
        self.inputs, self.work, self.runs, self.canaries, self.seed = inputs, work, runs, canaries, seed
        self.kept = inputs["dedup"] / "kept"
        self.orders = sorted(role for role in inputs if role.startswith("order-"))
        lottery = sorted(items, key=lambda id: _draw_hash("item", id, seed))
        self.candidates = {id: _without_spaces(items[id][2]) for id in lottery[: 3 * canaries] if runs.words[id]}
        index = seal_part(work, "order-hashes", self._write_index).folder
        self.trained = {role.removeprefix("order-"): _load(index / f"{role}.hashes") for role in self.orders}

    def _write_index(self, folder: Path) -> dict[str, Any]:
        """Writes the short hashes of the documents of each order, sorted by one range after the other, of which memory
        holds one."""
        import numpy as np

        bounds = np.arange(1, RANGES, dtype=np.uint64) << np.uint64(64 - RANGES.bit_length() + 1)
        for role in self.orders:
            with ExitStack() as stack, open(folder / f"{role}.hashes", "wb") as sorted_hashes:
                ranges = [stack.enter_context(tempfile.TemporaryFile(dir=self.work)) for _ in range(RANGES)]
                for path in order_files(self.inputs[role].path):
                    ids = (id for batch in stream_batches(path, ["id"]) for id in batch["id"].unique().to_pylist())
                    hashes = np.unique(np.fromiter(map(short_hash, ids), np.uint64))
                    for file, piece in zip(ranges, np.split(hashes, np.searchsorted(hashes, bounds)), strict=True):
                        file.write(piece.tobytes())
                for file in ranges:
                    file.seek(0)
                    sorted_hashes.write(np.unique(np.frombuffer(file.read(), np.uint64)).tobytes())
        return {}

    def seal(self, source: str, number: int) -> Part:
        """The result of a part of the kept documents: its facts, and the runs that occur in `<phase>.npy`."""
        path = part_files(self.kept, source)[number]
        return seal_part(self.work, f"{source}-{number:05d}", partial(self._search_part, path))

    def _search_part(self, path: Path, folder: Path) -> dict[str, Any]:
        import numpy as np

        matched: dict[str, set[int]] = {phase: set() for phase in self.trained}
        read, absent = dict.fromkeys(self.trained, 0), dict(self.candidates)
        hosts: list[tuple[str, str, str]] = []
        for batch in stream_batches(path, ["id", "text"]):
            ids = batch["id"].to_pylist()
            hashes = np.fromiter(map(short_hash, ids), np.uint64, len(ids))
            members = {phase: _members(hashes, trained) for phase, trained in self.trained.items()}
            for n in np.flatnonzero(np.any(list(members.values()), axis=0)).tolist():
                text = batch["text"][n].as_py()
                nodes, squeezed = self.runs.search(text), _without_spaces(text)
                for phase, mask in members.items():
                    if mask[n]:
                        matched[phase] |= nodes
                        read[phase] += 1
                absent = {id: item_text for id, item_text in absent.items() if item_text not in squeezed}
                hosts.append((_draw_hash("host", ids[n], self.seed), ids[n], text))
            hosts = heapq.nsmallest(self.canaries, hosts)
        for phase, nodes in matched.items():
            np.save(folder / f"{phase}.npy", np.array(sorted(nodes), np.uint32))
        (folder / HOSTS).write_text(json.dumps({id: text for _, id, text in hosts}))
        facts: PartFacts = {
            "read": read,
            "occurring": sorted(self.candidates.keys() - absent),
            "hosts": [(draw, id) for draw, id, _ in hosts],
        }
        return dict(facts)

    def missing(self) -> str | None:
        """The first id of the orders that is not among the kept documents; a join that the disk holds."""
        kept = [str(path) for source in sources_of(self.kept) for path in part_files(self.kept, source)]
        orders = [str(path) for role in self.orders for path in order_files(self.inputs[role].path)]
        query = (
            "SELECT min(id) FROM read_parquet($orders, union_by_name = true) "
            "ANTI JOIN (SELECT id FROM read_parquet($kept, union_by_name = true)) USING (id)"
        )
        with connect(self.work) as database:
            row = database.execute(query, {"orders": orders, "kept": kept}).fetchone()
        return row[0] if row else None


class Corpus:
    """The training data. By phase: `matched`, the runs that occur, and `read`, the number of texts."""

    def __init__(self, search: CorpusSearch, items: Mapping[str, Item], sources: Sequence[str], report: Report) -> None:
        """sources: those that are trained on. Raises AtomError if a document of an order is not among the kept ones."""
        import numpy as np

        self.runs, self.items, self.canaries, self.seed = search.runs, items, search.canaries, search.seed
        self.matched: dict[str, set[int]] = {phase: set() for phase in search.trained}
        self.matched |= {role.replace("tasks-", "prompts of "): set() for role in task_roles(search.inputs)}
        self.read = dict.fromkeys(self.matched, 0)
        self.unmatched = dict(search.candidates)
        hosts: list[tuple[str, str, Path]] = []
        parts = [(source, number) for source in sources for number in range(len(part_files(search.kept, source)))]
        for done, (source, number) in enumerate(parts, start=1):
            part = search.seal(source, number)
            for phase, count in part.facts["read"].items():
                self.read[phase] += count
                self.matched[phase].update(np.load(part.folder / f"{phase}.npy").tolist())
            for id in part.facts["occurring"]:
                self.unmatched.pop(id, None)
            part_hosts = ((draw, id, part.folder) for draw, id in part.facts["hosts"])
            hosts = heapq.nsmallest(self.canaries, [*hosts, *part_hosts])
            report.progress(done, len(parts), "parts")
        if any(self.read[phase] < len(trained) for phase, trained in search.trained.items()):
            raise AtomError(
                f"contamination: document {search.missing()} was trained on but is not among the kept ones of "
                f"{search.inputs['dedup'].key}; the artifacts are not of one run, run the recipe again"
            )
        self.hosts = {id: json.loads((folder / HOSTS).read_text())[id] for _, id, folder in hosts}
        for role in task_roles(search.inputs):
            phase = role.replace("tasks-", "prompts of ")
            for text in prompts(search.inputs, role):
                squeezed = _without_spaces(text)
                self.matched[phase] |= self.runs.search(text)
                self.read[phase] += 1
                self.unmatched = {id: item for id, item in self.unmatched.items() if item not in squeezed}

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


def _load(path: Path) -> Any:
    """The sorted hashes of a file, mapped into memory."""
    import numpy as np

    return np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)


def _members(values: Any, sorted_values: Any) -> Any:
    """Whether each value is in the sorted array."""
    import numpy as np

    places = np.searchsorted(sorted_values, values)
    is_member = np.zeros(len(values), bool)
    inside = places < len(sorted_values)
    is_member[inside] = sorted_values[places[inside]] == values[inside]
    return is_member


def _without_spaces(text: str) -> str:
    return "".join(text.lower().split())


def _draw_hash(label: str, id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed_of(f'contamination/{label}', seed)}/{id}".encode()).hexdigest()
