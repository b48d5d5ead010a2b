"""The published files: one closed list of what each kind of repository holds, and where every file comes from.

The list is published_files.yaml, and this module reads it.
`atom build` copies and makes what stands here, and nothing else; `origins.json` states it; and `atom verify` refuses
any other file. A loader takes up files by their names: an adapter, a second chat template, a further shard. So names
that look like one on the list are refused as well.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.core.parts import PART_NAME
from pipeline.core.source_code import PACKAGES, SUFFIXES
from pipeline.core.store import Artifact
from pipeline.core.text import printable
from pipeline.core.yaml_text import read_trusted
from release.layout import (
    ALL_SUMS,
    EXPORTED,
    GATES,
    GATES_STATED,
    MERGE,
    MODEL,
    PUBLIC_KEY,
    RETRACTED,
    SIGNATURE,
    SITE,
    SIZE,
    STUDENT,
    SUMS,
    TRAINING,
    UNMERGED,
    WITHOUT_ORDER,
    folders_of,
    models_of,
    when,
)

DISTRIBUTION, CODE_LICENSE = "atom-release", "Apache-2.0"
"""The name of atom's wheel, and its license."""
CODE_FILES = ("pyproject.toml", "LICENSE")
"""The files that build the code, beside the constraints."""
NAMES = {
    "code": "|".join(map(re.escape, CODE_FILES)),
    "constraints": r"constraints[A-Za-z0-9_.-]*\.txt",
    "encoding": r"[A-Z0-9_]+",
    "extension": r"[A-Za-z_]\w*",
    "key": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?-[0-9a-f]{12}",
    "model": rf"(?:{UNMERGED})?(?:{'|'.join(EXPORTED)})(?:-[0-9]+)?",
    "module": rf"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))})",
    "node": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?",
    "package": "|".join(PACKAGES),
    "part": PART_NAME,
    "phase": rf"(?:{MERGE})?(?:{'|'.join((*TRAINING, SIZE, *STUDENT))})(?:-[0-9]+)?",
    "read": rf"(?:{'|'.join(kind for kind in TRAINING if kind != 'reward')})(?:-[0-9]+)?",
    "recipe": r"[A-Za-z0-9_][\w.-]*\.ya?ml",
    "release": r"[a-z0-9][a-z0-9._-]*",
    "sampled": "|".join(WITHOUT_ORDER),
    "sha256": r"[0-9a-f]{64}",
    "shard": r"[0-9]{5}-of-[0-9]{5}",
    "size": rf"{SIZE}-[0-9]+|{STUDENT[-1]}",
    "source": r"[a-z][a-z0-9_]*",
    "step": r"[0-9]+",
    "table": r"[a-z_]+",
    "variant": r"[a-z0-9_-]+",
}
"""The pattern of each name that may stand in a path between braces."""
EVERYWHERE = (SUMS, SIGNATURE, PUBLIC_KEY, RETRACTED, ".gitattributes")
"""Files that any repository may have: checksums, a signature, a tombstone, and what the Hub adds."""
Receivers = Literal["", "every", "final", "later", "own"]
"""The model repositories that get a copy: all; that of the final model; those of this and the later models, since a
card compares a model with earlier ones and never with later ones; that of this model alone."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a repository, or files that are alike.

    Attributes:
        path: The path from the folder of the repository, with NAMES between braces.
        origin: How `atom build` makes it, as origins.json states it, with details of the build between braces; "" for a
            copy, and for a file that states no origin.
        node: The node of whose artifact it is a copy, with NAMES between braces; "" if it is none.
        source: Its path in that artifact.
        receivers: The model repositories that get the copy.
        needed: True if every repository of the kind has it.
    """

    path: str
    origin: str = ""
    node: str = ""
    source: str = ""
    receivers: Receivers = ""
    needed: bool = False

    def fits(self, path: str) -> bool:
        return fits(self.path, path)


@dataclass(frozen=True)
class FileList:
    """The files of a kind of repository.

    Attributes:
        title: The kind, for sentences.
        files: All of them.
        together: {pattern of a folder: names of the files that it has if it has any}; the first pattern that fits a
            folder counts.
    """

    title: str
    files: tuple[PublishedFile, ...]
    together: Mapping[str, list[str]]

    def holds(self, path: str) -> bool:
        """Returns True if a repository of the kind may have a file of this path."""
        return path in EVERYWHERE or any(file.fits(path) for file in self.files)

    def made(self, path: str) -> PublishedFile | None:
        """Returns the entry of a file that `atom build` makes; None for any other path."""
        return next((file for file in self.files if file.origin and file.fits(path)), None)

    def problems(self, paths: Iterable[str], complete: bool = True) -> Iterator[str]:
        """Yields sentences about files that are not on the list, and about missing ones.

        Args:
            paths: The files of the repository, from its folder.
            complete: Whether the needed files must be there.
        """
        present = set(paths)
        for path in sorted(present):
            if not self.holds(path):
                yield f"{shown(path)} is no file of {self.title}; a release holds what atom writes, and nothing else"
        if not complete:
            return

        for path in self._needed(present):
            if path not in present:
                yield f"{path} is missing, and {self.title} has it"

    def _needed(self, present: set[str]) -> Iterator[str]:
        """Yields the paths that a repository with the files `present` must have."""
        yield from (file.path for file in self.files if file.needed)
        # Most kinds have no such folder, and a release may have very many files.
        if not self.together:
            return
        for folder in sorted({path.rpartition("/")[0] for path in present}):
            names = next((names for pattern, names in self.together.items() if fits(pattern, folder)), [])
            yield from (f"{folder}/{name}" for name in names)


def fits(pattern: str, path: str) -> bool:
    """Returns True if a path fits a pattern: a path with NAMES between braces."""
    return _compiled(pattern).fullmatch(path) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns the regular expression of a path with NAMES between braces, each of which is a group."""
    # Literal texts and names in turn, a literal text first.
    parts = re.split(r"\{(\w+)\}", pattern)
    expression = re.escape(parts[0])
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        expression += f"(?P<{name}>{NAMES[name]})" + re.escape(literal)
    return re.compile(expression, re.ASCII)


def shown(path: str) -> str:
    """Returns a path for a message, with escapes after one that is not ASCII: its letters may look like ASCII ones."""
    if path.isascii():
        return path
    return f"{printable(path)} ({path.encode('unicode_escape').decode()})"


def _flat(paths: list[Any]) -> Iterator[str]:
    """Yields the paths of a list, and of the lists in it."""
    for path in paths:
        if isinstance(path, str):
            yield path
        else:
            yield from _flat(path)


def _files(group: Mapping[str, Any]) -> Iterator[PublishedFile]:
    """Yields the files of a group in the table."""
    node = group.get("node", "")
    for path in _flat(group["paths"]):
        name = path.removeprefix("!")
        source = group.get("source", group.get("from", "") + name) if node else ""
        place, receivers = group.get("at", "") + name, group.get("receivers", "")
        yield PublishedFile(place, group.get("origin", ""), node, source, receivers, needed=path != name)


def _read_lists() -> dict[str, FileList]:
    """Reads published_files.yaml."""
    table = read_trusted(Path(__file__).with_suffix(".yaml"))
    del table["names"]
    return {
        kind: FileList(
            row["title"], tuple(file for group in row["files"] for file in _files(group)), row.get("together", {})
        )
        for kind, row in table.items()
    }


LISTS = _read_lists()
"""{kind of a repository, or form of a variant: its files}"""
VARIANT_NODE = "variant-{variant}"
PLACES = {
    "dataset": "dataset",
    "checkpoints": "repository",
    "checkpoints/{phase}-step-{step}": "checkpoint",
    "model": "model",
    "model-{model}": "model",
    VARIANT_NODE: "variant",
}
"""{folder of a release: the kind of its repository}; the root is that of the evidence."""
PLACED: tuple[tuple[str, FileList], ...] = (
    ("", LISTS["evidence"]),
    ("dataset/", LISTS["dataset"]),
    ("checkpoints/{phase}-step-{step}/", LISTS["checkpoint"]),
    *((f"{VARIANT_NODE}/", LISTS[form]) for form in ("safetensors", "adapter", "gguf")),
    ("{folder}/", LISTS["model"]),
)
"""(prefix of the paths in a release, files) of the repositories that hold copies; `folder` is that of a model."""
ADAPTER = "adapter_model.safetensors"


def list_of(kind: str, paths: Iterable[str]) -> FileList:
    """Returns the list of a repository.

    Args:
        kind: As `checks.listing.kind_of` names it.
        paths: The files of the repository, which show the form of a variant.
    """
    if kind != "variant":
        return LISTS[kind]
    names = set(paths)
    if any(name.endswith(".gguf") for name in names):
        return LISTS["gguf"]
    return LISTS["adapter" if ADAPTER in names else "safetensors"]


def place_of(path: str) -> str:
    """Returns the folder of the repository that a file of a release is in; "" is the root."""
    parts = path.split("/")
    # The innermost folder decides, since a checkpoint lies in the folder of the main branch.
    for depth in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:depth])
        if kind_of_place(folder):
            return folder
    return ""


def kind_of_place(folder: str) -> str:
    """Returns the kind of the repository in a folder of a release; "" for a folder that is no repository of its own."""
    if not folder:
        return "evidence"
    return next((kind for place, kind in PLACES.items() if fits(place, folder)), "")


def made(path: str) -> PublishedFile | None:
    """Returns the entry of a file of a release that `atom build` makes; None for a path of no such file."""
    folder = place_of(path)
    # Without its files, the form of a variant is unknown; `atom build` makes the same files in each.
    return list_of(kind_of_place(folder), ()).made(path.removeprefix(f"{folder}/"))


def origin_of_copy(
    node: str, artifact: Artifact, file: str, target: str, by_reference: Collection[str]
) -> dict[str, str]:
    """Returns the origin of a file of an artifact in its place of the release.

    Args:
        node: The node of the artifact.
        artifact: The artifact.
        file: The path in the artifact.
        target: The path in the release.
        by_reference: Sources whose documents are placed without their texts.
    """
    if any(target.startswith(f"dataset/kept/{name}/") for name in by_reference):
        return {"generated": f"{file} of {artifact.key} without its texts"}
    return {"artifact": node, "file": file}


def placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """Yields (node, file of its artifact, path in the release) for every copy of a file of the release's artifacts."""
    folders = folders_of(models_of(artifacts))
    for node, artifact in sorted(artifacts.items()):
        yield from ((node, *place) for place in placement(node, artifact, folders))


def earlier_placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """Yields (key, file of its artifact, path in the release) of artifacts of earlier runs that training resumed from.

    Their checkpoints stand among the others, and their data by their keys in dataset/earlier/.
    """
    for key, artifact in sorted(artifacts.items()):
        for file, target in placement(key.rsplit("-", 1)[0], artifact):
            if target.startswith("dataset/"):
                yield key, file, f"dataset/earlier/{key}/{file}"
            elif target.startswith("checkpoints/") and "@" in key:
                yield key, file, target


def placement(node: str, artifact: Artifact, folders: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (file of the artifact, path in the release) for every published file of a node.

    Args:
        node: The node.
        artifact: Its artifact.
        folders: {model: its folder} of the release, in the order of training.
    """
    # Few entries are about one node, and a node may have a hundred thousand files.
    entries = [
        (prefix, file, match.groupdict())
        for prefix, file_list in PLACED
        for file in file_list.files
        if file.node and (match := _compiled(file.node).fullmatch(node))
    ]
    for row in artifact.rows:
        # The forms of a variant share files, and each is copied once.
        targets: dict[str, None] = {}
        for prefix, file, node_names in entries:
            if (match := _compiled(file.source).fullmatch(row.path)) is None:
                continue
            names = node_names | match.groupdict()
            if "step" in names:
                # The folder of a checkpoint has zeros before its step, and its branch has none.
                names["step"] = str(int(names["step"]))
            receivers = _receivers(file, names, folders or {}) if file.receivers else ("",)
            for folder in receivers:
                targets[(prefix + file.path).format(**names, folder=folder)] = None
        yield from ((row.path, target) for target in targets)


def _receivers(file: PublishedFile, names: Mapping[str, str], folders: Mapping[str, str]) -> Iterable[str]:
    """Returns the folders of the models that get a copy. `names` are those in the paths of its node and its file."""
    if file.receivers == "own":
        return [folders[names["model"]]] if names["model"] in folders else []
    if file.receivers == "later":
        # A file belongs to a model, or to a phase whose log the model's card reads.
        earliest = names.get("model") or names["read"]
        return [folder for model, folder in folders.items() if when(model) >= when(earliest)]
    if file.receivers == "every":
        return folders.values()
    return [MODEL]


def unexplained(origins: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Lists files of a release without an origin; checksum files, the result of the gates, and the page need none."""
    unlisted = {ALL_SUMS, GATES, GATES_STATED}
    files = []
    for path in paths:
        needs_origin = path not in unlisted and Path(path).name != SUMS and not path.startswith(f"{SITE}/")
        if needs_origin and path not in origins:
            files.append(path)
    return files


def code_license_text(root: Path) -> bytes | None:
    """Returns the license text of atom: that of the folder of its code, else that of the installed wheel."""
    if (root / "LICENSE").is_file():
        return (root / "LICENSE").read_bytes()
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
        if text := distribution.read_text("licenses/LICENSE"):
            return text.encode()
    return None


def license_text(spdx: str, code_license: str, root: Path) -> bytes:
    """Returns the content of LICENSE.

    This is the full text if it is the license of the code and available, else the SPDX id and the address of the text.
    """
    text = code_license_text(root)
    if spdx == code_license and text is not None:
        return text
    address = f"https://spdx.org/licenses/{spdx}.html"
    return f"SPDX-License-Identifier: {spdx}\n\nThe text of this license: {address}\n".encode()
