"""Receipts of opt-outs, one file for each request: what was removed, and what the documents had reached before.

A receipt is a tombstone: it holds the hash of the request's reference, and no text, address or name. With the earlier
release it names the data, steps, checkpoints and models of that release that the documents are in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.store import sha256_file
from release.facts.document_facts import OptOut, removed_documents
from release.facts.published_tables import read_json, stream_rows
from release.layout import ALL_SUMS, OPT_OUTS, folders_of
from release.schema import ReleaseInfo
from release.tracing.answers import Document
from release.tracing.documents import find_documents
from release.tracing.release_data import ReleaseData
from release.tracing.report import ranges
from stages.data.curate.deny_list import OPT_OUT_RULE, DenyList

SCHEMA = 1
MOST_LISTED, MOST_TRACED = 1_000, 10_000
"""The maximum number of documents of a request that a receipt lists, and that are traced in the earlier release."""
TRACED_TOGETHER = 1_000


def write_receipts(
    dataset: Path,
    release: ReleaseInfo,
    opt_outs: Sequence[OptOut],
    earlier: Path | None,
    deny_list: DenyList | None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (request, receipt) of each request of a dataset folder.

    `earlier` is the folder of an earlier release, which is searched for the documents of the deny-list. Raises
    AtomError if it is no release.
    """
    documents: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in removed_documents(dataset) if opt_outs else ():
        requests = row.pop("requests")
        for request in requests:
            # A request for a whole site may name millions of documents.
            if len(documents[request]) < MOST_TRACED:
                documents[request].append({key: value for key, value in row.items() if key != "rule"})
    reach: dict[str, dict[str, Any]] = {}
    if earlier is not None and deny_list is not None:
        reach = EarlierRelease(earlier).reach(deny_list, documents, progress)
    for opt_out in opt_outs:
        yield (
            opt_out.request,
            {
                "schema": SCHEMA,
                "request": opt_out.request,
                "date": opt_out.date,
                "release": {"name": release.name, "version": release.version},
                "deny_list": read_json(dataset / OPT_OUTS)["deny_list"],
                "entries": opt_out.entries,
                "rule": OPT_OUT_RULE,
                "removed": dict(sorted(opt_out.removed.items())),
                "documents": documents[opt_out.request][:MOST_LISTED],
                "earlier": reach.get(opt_out.request),
            },
        )


@dataclass
class Reach:
    """The documents of a request in an earlier release.

    Attributes:
        documents: The number of all.
        kinds: {document: how it was found} of at most MOST_TRACED.
    """

    documents: int = 0
    kinds: dict[str, str] = field(default_factory=dict)

    def add(self, id: str, kind: str) -> None:
        if id not in self.kinds:
            self.documents += 1
            if len(self.kinds) < MOST_TRACED:
                self.kinds[id] = kind


class EarlierRelease:
    """A release that was built before, in which denied documents are looked up."""

    def __init__(self, folder: Path) -> None:
        """Raises AtomError if the folder is no whole release."""
        if not (folder / ALL_SUMS).is_file():
            raise AtomError(f"{folder} is no release folder; --previous takes one that `atom build` made")
        self.folder, self.data = folder, ReleaseData.locate(folder)
        self.info, places = self.data.opened.info, self.data.opened.repositories
        self.names = {place.folder: place.id(self.info.namespace, self.info.name) for place in places}
        self.model_folders = folders_of(self.data.models())

    def reach(
        self, deny_list: DenyList, removed: Mapping[str, list[dict[str, Any]]], progress: Callable[[str], None]
    ) -> dict[str, dict[str, Any]]:
        """Returns {request: its documents here, and what they had reached}, for all requests of the deny-list.

        `removed` has, by request, the documents that the later release removed. Copies, near duplicates and rewrites
        are found by their ids and hashes, since a deny-list names only the documents themselves.
        """
        progress(f"looking for denied documents in {self.folder.name}")
        reaches = self._find(deny_list, removed)
        about = {
            "release": {"name": self.info.name, "version": self.info.version},
            "checksums": f"sha256:{sha256_file(self.folder / ALL_SUMS)}",
        }
        return {row["request"]: about | self._trace(reaches[row["request"]]) for row in deny_list.requests()}

    def _find(self, deny_list: DenyList, removed: Mapping[str, list[dict[str, Any]]]) -> dict[str, Reach]:
        reach: dict[str, Reach] = defaultdict(Reach)
        # Copies and rewrites have other ids or hashes than the deny-list names; the later release found them.
        later: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for request, rows in removed.items():
            for row in rows:
                for name in (row["id"], row["content_hash"]):
                    later[name].append((request, row["found"]))
        for row in stream_rows(self.data.dispositions(), ["id", "content_hash", "kept_hash"]):
            hashes = [row["content_hash"], row["kept_hash"] or ""]
            if denial := deny_list.find(row["id"], "", hashes):
                for request in denial.requests:
                    reach[request].add(row["id"], denial.kind)
            for name in (row["id"], *hashes) if later else ():
                for request, kind in later.get(name, ()):
                    reach[request].add(row["id"], kind)
        for row in stream_rows(self.data.kept(), ["id", "origin"]):
            if denial := deny_list.find("", row["origin"], ()):
                for request in denial.requests:
                    reach[request].add(row["id"], denial.kind)
        return reach

    def _trace(self, reach: Reach) -> dict[str, Any]:
        documents: list[Document] = []
        ids = sorted(reach.kinds)
        # Each call reads the tables once for all its documents.
        for start in range(0, len(ids), TRACED_TOGETHER):
            documents += find_documents(self.data, ids[start : start + TRACED_TOGETHER]).values()
        listed = documents[:MOST_LISTED]
        return {
            "documents": reach.documents,
            "traced": len(documents),
            **self._places(documents),
            "reached": [{"id": each.id, "found": reach.kinds[each.id], **self._places([each])} for each in listed],
            "unknown": sorted({sentence for each in documents for sentence in each.unknown}),
        }

    def _places(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Returns the places of documents: data, steps, tasks, checkpoints and models, by the names of repositories."""
        splits = {(fate.source, fate.split) for each in documents for fate in each.fates if fate.kept}
        steps: dict[str, set[int]] = defaultdict(set)
        for use in (use for each in documents for use in each.uses):
            steps[use.phase].add(use.step)
        tasks = {task.phase: task for each in documents for task in each.asked}
        checkpoints = {name for each in documents for name in each.checkpoints or ()}
        models = [name for name in self.data.models() if any(name in each.models for each in documents)]
        return {
            "datasets": [
                {"repository": self.names["dataset"], "source": source, "split": split}
                for source, split in sorted(splits, key=str)
            ],
            "steps": {phase: ranges(sorted(numbers)) for phase, numbers in steps.items()},
            "tasks": sorted(tasks),
            "checkpoints": [f"{self.names['checkpoints']}@{name}" for name in sorted(checkpoints)],
            "models": [self.names[self.model_folders[name]] for name in models if name in self.model_folders],
        }


def receipt_path(request: str) -> str:
    """Returns the path of the receipt of a request in a release."""
    return f"evidence/opt_out/{request}.json"


def receipts_below(release: Path) -> Iterable[Path]:
    return sorted((release / "evidence/opt_out").glob("*.json"))
