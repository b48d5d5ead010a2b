"""The files of a release for `atom replay`: each is compared with the checksums before its use."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.provenance import Statement
from pipeline.core.text import printable
from release import schema
from release.audit import rebuild
from release.facts.published_tables import Manifest
from release.layout import ALL_SUMS, REFERENCES, SUMS
from release.repositories import compare, read_sums
from release.untrusted import is_foreign_link


class Source:
    """A release folder. sums: {path: SHA-256} of every file that the checksum files list."""

    def __init__(self, release: Path) -> None:
        """Opens a release folder and reads its checksum files.

        Raises AtomError if the folder is not a release, and CheckFailed if it cannot be read or its checksum files are
        damaged.
        """
        if not (release / ALL_SUMS).is_file():
            raise AtomError(f"{release} is not a release folder: it has no {ALL_SUMS}; give one that `atom build` made")
        schema.require_readable(release)
        self.folder = release.absolute()
        self.sums = read_sums(release / SUMS, SUMS)
        # The root's checksums cover the list of all files, so it is compared before it is trusted.
        self.file(ALL_SUMS)
        self.sums |= read_sums(release / ALL_SUMS, ALL_SUMS)

    def file(self, path: str) -> Path:
        """Returns a file of the release. Raises CheckFailed if it is missing, a link, or differs from the checksums."""
        if path not in self.sums:
            raise CheckFailed(f"{printable(path)} is not in the release, and a replay needs it")
        if is_foreign_link(self.folder, path):
            raise CheckFailed(f"{path} is a link, or is reached through one; a release has none")
        present = [path] if (self.folder / path).exists() else []
        if problems := compare({path: self.sums[path]}, self.folder, present, SUMS if path == ALL_SUMS else ALL_SUMS):
            raise CheckFailed(printable(problems[0]))
        return self.folder / path

    def json(self, path: str) -> Any:
        """Returns the content of a JSON file. Raises what `file` raises, and ValueError for other text."""
        return json.loads(self.file(path).read_bytes())

    def digests(self, *places: str) -> dict[str, str]:
        """Returns {path: SHA-256} of files, and of those in folders."""
        return {path: d for path, d in self.sums.items() for place in places if f"{path}/".startswith(f"{place}/")}

    def listed(self, key: str) -> dict[str, str]:
        """Returns {file: SHA-256} of an artifact, by its manifest."""
        return self.manifests[key].digests

    def place(self, key: str, file: str) -> str | None:
        """Returns the path in the release of a file of an artifact; None if it is not published."""
        return self._places.get((self.manifests[key].node, file))

    def copy(self, key: str, file: str) -> Path:
        """Returns the published copy of a file of an artifact. Raises CheckFailed if it is missing or altered."""
        return self.file(self.place(key, file) or f"{file} of {key}")

    def kept(self, key: str, file: str) -> Path:
        """Returns a table of kept documents of an artifact of `dedup`.

        If its texts are by reference, it is the table that `atom rebuild-data` wrote. Raises CheckFailed if it is
        missing or altered, and AtomError if it has to be rebuilt first.
        """
        if self.place(key, file) is not None or f"dataset/{REFERENCES}" not in self.sums:
            return self.copy(key, file)
        rebuilt = rebuild.folder_of(self.folder) / file
        if not rebuilt.is_file():
            raise AtomError(
                f"the texts of {file} are by reference; get them by `atom rebuild-data {self.folder}`, then replay"
            )
        return rebuilt

    def tokenizer(self, key: str) -> Path:
        """Returns the published tokenizer.json of an artifact of the tokenizer: each model's repository has a copy.

        Raises CheckFailed if it is missing or altered.
        """
        digest = self.listed(key)["tokenizer.json"]
        copies = (path for path, d in self.sums.items() if d == digest and path.endswith("/tokenizer.json"))
        return self.file(next(copies, f"tokenizer.json of {key}"))

    def statement(self, node: str) -> tuple[str, Statement]:
        """Returns (key, provenance statement) of the artifact of a node.

        Raises CheckFailed if no statement is about it.
        """
        manifest = self._manifest(f"evidence/manifests/{node}.json")
        subject = {"name": manifest.key, "digest": {"sha256": manifest.digest}}
        for body in self.statements:
            if subject in body["subject"]:
                return manifest.key, body
        raise CheckFailed(f"the release has no provenance statement about {manifest.key}")

    def _manifest(self, path: str) -> Manifest:
        return Manifest.parse(Path(path).stem, self.json(path))

    @cached_property
    def origins(self) -> dict[str, Any]:
        """{path: {artifact, file}} of evidence/origins.json."""
        return dict(self.json("evidence/origins.json"))

    @cached_property
    def _places(self) -> dict[tuple[str, str], str]:
        """The first path in the release of each published file, by the node and the file of its artifact."""
        places: dict[tuple[str, str], str] = {}
        for path, origin in sorted(self.origins.items()):
            if set(origin) == {"artifact", "file"}:
                places.setdefault((origin["artifact"], origin["file"]), path)
        return places

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """{key: manifest} of every artifact."""
        return {manifest.key: manifest for manifest in map(self._manifest, self.digests("evidence/manifests"))}

    @cached_property
    def statements(self) -> list[Statement]:
        return [self.json(path) for path in self.digests("evidence/statements")]
