"""The files of a release as `atom replay` reads them: each compared with the checksums before it is believed."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from release.checksums import compare, read_sums
from release.layout import ALL_SUMS, SUMS
from release.tree import is_foreign_link
from release.untrusted import printable


class Source:
    """The files of a release, each compared with the checksums before it is believed."""

    def __init__(self, release: Path) -> None:
        if not (release / ALL_SUMS).is_file():
            raise AtomError(f"{release} is no release folder: it has no {ALL_SUMS}; give one that `atom build` made")
        self.folder = release.absolute()
        self.sums = read_sums(release / SUMS, SUMS)
        self.file(ALL_SUMS)
        self.sums |= read_sums(release / ALL_SUMS, ALL_SUMS)

    def file(self, path: str) -> Path:
        """Raises CheckFailed if it is not there as the checksums list it."""
        if path not in self.sums:
            raise CheckFailed(f"{printable(path)} is not in the release, and a replay needs it")
        if is_foreign_link(self.folder, path):
            raise CheckFailed(f"{path} is a link, or lies behind one; a release holds none")
        present = [path] if (self.folder / path).exists() else []
        if problems := compare({path: self.sums[path]}, self.folder, present, SUMS if path == ALL_SUMS else ALL_SUMS):
            raise CheckFailed(printable(problems[0]))
        return self.folder / path

    def json(self, path: str) -> Any:
        return json.loads(self.file(path).read_bytes())

    def digests(self, *places: str) -> dict[str, str]:
        """{path: sha256} of files, and of those in folders."""
        return {path: d for path, d in self.sums.items() for place in places if f"{path}/".startswith(f"{place}/")}

    def listed(self, key: str) -> dict[str, str]:
        """{file: sha256} of an artifact, by its manifest."""
        return {row["path"]: row["sha256"] for row in self.manifests[key][1]["files"]}

    def place(self, key: str, file: str) -> str | None:
        """Where a file of an artifact stands in the release."""
        origin = {"artifact": self.manifests[key][0], "file": file}
        return min((path for path, recorded in self.origins.items() if recorded == origin), default=None)

    def copy(self, key: str, file: str) -> Path:
        """The published copy of a file of an artifact. Raises CheckFailed if there is none, or another one."""
        return self.file(self.place(key, file) or f"{file} of {key}")

    def statement(self, node: str) -> tuple[str, dict[str, Any]]:
        """(key of an artifact, what the ledger says of its making)."""
        manifest = self.json(f"evidence/manifests/{node}.json")
        subject = {"name": manifest["key"], "digest": {"sha256": manifest["digest"]}}
        for body in self.statements:
            if subject in body["subject"]:
                return manifest["key"], body
        raise CheckFailed(f"no statement of the release is about {manifest['key']}, so how it was made is not known")

    @cached_property
    def origins(self) -> dict[str, Any]:
        return dict(self.json("evidence/origins.json"))

    @cached_property
    def manifests(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """{key: (what evidence/ calls the artifact, its manifest)}."""
        by_node = {Path(path).stem: self.json(path) for path in self.digests("evidence/manifests")}
        return {manifest["key"]: (node, manifest) for node, manifest in by_node.items()}

    @cached_property
    def statements(self) -> list[dict[str, Any]]:
        return [self.json(path) for path in self.digests("evidence/statements")]
