"""Lists the files of a folder and identifies its kind, before any hashing."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from pipeline.core.errors import CheckFailed
from release import untrusted
from release.checks.verdict import CheckResult, Problems, answer
from release.layout import ALL_SUMS, LOSS, MODEL, PARTS, RETRACTED, SUMS, VARIANT
from release.published_files import kind_of_place, list_of, shown
from release.repositories import (
    MOST_ENTRIES,
    SUMS_BYTES,
    SUMS_LINES,
    Repository,
    files_within,
    published,
    read_sums,
    repositories,
)
from release.untrusted import SPARSE_BYTES, Tree, is_foreign_link, is_sparse, real_bytes

SMALL_JSON = 4 << 20
"""The maximum size of a file that is read to identify a folder."""
BRANCHES, MODELS = 10_000, 100
"""The maximum number of folders of checkpoints and of models."""
HOLES = 4
"""The maximum ratio of the size of sparse files to their bytes on the disk."""
SIGNS = (
    "evidence",
    "code/as-run",
    "dispositions",
    "parity.json",
    LOSS,
    "checkpoints/index.json",
    *(f"{part}/{SUMS}" for part in PARTS),
)


def kind_of(folder: Path) -> str:
    """Returns the kind of a folder, by the files that only that kind has.

    Parts of a release beside each other are a release, even without its evidence: no repository has a folder of
    such a name.
    """
    # A release that lost its evidence is still a release, and not a repository that lacks its files.
    if parts_of(folder):
        return "release"
    # The order matters: the repository of a variant may also have a config.json.
    marks = {
        "dispositions": "dataset",
        LOSS: "variant",
        "config.json": "model",
        "state.json": "checkpoint",
        "index.json": "repository",  # the main branch of checkpoints
    }
    if kind := next((kind for mark, kind in marks.items() if os.path.lexists(folder / mark)), None):
        return kind
    if any(os.path.lexists(folder / name) for name in ("evidence", "code")):
        return "evidence"
    return "repository"


def parts_of(folder: Path) -> list[str]:
    """Returns the parts in a folder that only a release has beside its root: models, variants, dataset, checkpoints."""
    with os.scandir(folder) as entries:
        first_entries = islice(entries, MOST_ENTRIES)  # `scan` reports the overflow
        names = sorted(e.name for e in first_entries if e.is_dir(follow_symlinks=False) or e.is_symlink())
    return [name for name in names if name in PARTS or name.startswith((f"{MODEL}-", f"{VARIANT}-"))]


def looks_like_release(folder: Path) -> bool:
    """Returns True if a folder is, or was, part of a release.

    In such a folder a missing checksum file is a finding. In any other, the caller has given a wrong name.
    """
    if os.path.lexists(folder / SUMS) or any(os.path.lexists(folder / marker) for marker in SIGNS):
        return True
    if any(os.path.lexists(folder / part / marker) for part in parts_of(folder) for marker in (SUMS, "config.json")):
        return True
    if os.path.lexists(folder / "state.json") and any(folder.glob("*.safetensors")):
        return True
    try:
        rows = untrusted.read_json(folder / "index.json", SMALL_JSON, follow=True)
    except CheckFailed:
        return False
    return isinstance(rows, list) and any(isinstance(row, dict) and {"branch", "state"} <= row.keys() for row in rows)


class Checksums:
    """The checksum files of a folder, each read once, within limits on their total.

    Attributes:
        rows: {name: {path: SHA-256}} of the readable ones.
        problems: {name: a sentence} of the others.
        overflow: A sentence, if there are more than any release has.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: dict[str, dict[str, str]] = {}
        self.problems: dict[str, str] = {}
        self.overflow = ""
        size = lines = 0
        for name in _sums_files(folder):
            file_size = _size(folder, name)
            size += file_size if file_size <= SUMS_BYTES else 0  # a larger one is not read
            if size <= SUMS_BYTES:
                try:
                    self.rows[name] = read_sums(folder / name, name)
                except CheckFailed as error:
                    self.problems[name] = str(error)
            lines += len(self.rows.get(name, ()))
            # Stop at once: the limit is on all checksum files together, and a branch may hold thousands of them.
            if size > SUMS_BYTES or lines > SUMS_LINES:
                limits = f"{SUMS_BYTES >> 20} MB and {SUMS_LINES} lines"
                self.overflow = (
                    f"the checksum files up to {name} have more than {limits}, which is the most that is read"
                )
                return

    def read(self, name: str) -> dict[str, str]:
        """Returns {path: sha256} of one of them. Raises CheckFailed if it is missing or damaged."""
        if name not in self.rows:
            raise CheckFailed(self.problems.get(name, f"{name} is missing"))
        return self.rows[name]

    def listed(self) -> set[str]:
        """Returns every file that a checksum file names, by its path in the folder."""
        bases = {name: "" if name == ALL_SUMS else name.removesuffix(SUMS) for name in self.rows}
        return {bases[name] + path for name, rows in self.rows.items() for path in rows}


def _sums_files(folder: Path) -> list[str]:
    """Returns the names of the checksum files in a folder, those of its root first."""
    bases = ["", *(f"{part}/" for part in parts_of(folder))]
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        with os.scandir(checkpoints) as entries:
            branches = (entry.name for entry in islice(entries, MOST_ENTRIES) if entry.is_dir(follow_symlinks=False))
            bases += [f"checkpoints/{name}/" for name in sorted(branches)]
    names = [SUMS, ALL_SUMS, *(f"{base}{SUMS}" for base in bases[1:])]
    return [name for name in names if os.path.lexists(folder / name) and not is_foreign_link(folder, name)]


def _size(folder: Path, name: str) -> int:
    try:
        return os.stat(folder / name).st_size
    except OSError:
        return 0  # reading it reports the problem


class Contents:
    """The listing of a folder, made once, for the checks of bytes and signatures.

    Attributes:
        folder: The folder.
        kind: Its kind.
        sums: Its checksum files.
        tree: Its files.
        missing: Required parts that it lacks.
        places: Its repositories, if it is a complete release.
        models: The folders of models and variants among them.
        paths: Its files, sorted.
    """

    def __init__(self, folder: Path, kind: str, sums: Checksums, tree: Tree) -> None:
        self.folder, self.kind, self.sums, self.tree = folder, kind, sums, tree
        self.missing = missing_parts(folder, kind)
        is_complete_release = kind == "release" and not self.missing
        self.places = repositories(folder) if is_complete_release else [Repository("", "", "")]
        self.models = [
            repository.folder for repository in self.places if repository.folder.split("-")[0] in (MODEL, VARIANT)
        ]
        self.paths = sorted(tree.files)

    def present(self) -> list[str]:
        """Returns the files that the checksum file of the whole covers, and itself."""
        return published(self.paths, self.places)

    def present_in(self, repository: Repository) -> list[str]:
        """Returns the files of one repository, relative to its folder, without its checksum file."""
        if self.kind != "release":
            return [path for path in self.present() if path != SUMS]
        return files_within(self.paths, repository, self.models)


def check_files(contents: Contents) -> CheckResult:
    """Checks that every file may be read and has a plausible size."""
    tree = contents.tree
    problems = list(tree.refused)
    if tree.others:
        problems.append(f"and {tree.others} others that may not be read")
    if tree.overflow:
        return answer("files", problems)
    problems += contents.missing
    # A file of holes costs its maker nothing, and whoever hashes it hours.
    holes = {path for path, status in tree.files.items() if is_sparse(status)}
    # compressing file systems store no zeros, and the moments of an optimizer start as zeros
    allowed_bytes = SPARSE_BYTES + HOLES * real_bytes(tree.files.values())
    if sum(tree.files[path].st_size for path in holes) > allowed_bytes:
        for path in sorted(holes):
            status = tree.files.pop(path)
            problems.append(f"{path} is a file of holes: of its {status.st_size} bytes next to none are on the disk")
    # Files that were taken out above are neither hashed nor read by later checks.
    contents.paths = sorted(tree.files)
    return answer("files", problems, f"{len(tree.files)} regular files")


def check_names(contents: Contents) -> CheckResult:
    """Checks that a folder has the files of its kind: none that is not on the list, and none missing."""
    name, folder = "file_list", contents.folder
    if contents.kind == "release" and contents.missing:
        return CheckResult(name, None, "not checked, because parts of the release are missing")
    complete = not (folder / RETRACTED).exists()
    problems: Problems = []
    for place in contents.places:
        kind = contents.kind if contents.kind != "release" else kind_of_place(place.folder)
        if not kind:
            problems.append(f"{shown(place.folder)} is no folder of a release")
            continue
        paths = contents.present_in(place)
        prefix = f"{place.folder}/".lstrip("/")
        problems += [prefix + text for text in list_of(kind, paths).problems(paths, complete)]
    detail = problems[0] if problems else "every file is one that atom writes"
    return CheckResult(name, not problems, detail, problems)


def missing_parts(folder: Path, kind: str) -> Problems:
    """Returns the parts that a folder of this kind requires and that are missing or exist too often."""
    if kind == "repository" and not any((folder / name).is_file() for name in ("index.json", RETRACTED)):
        return [
            "nothing here tells what it is: no release, model, dataset, checkpoint or evidence is without its files"
        ]
    if kind != "release":
        return []
    # A link to a folder is none of these: it could lead to files that no checksum covers.
    folders = {name: folder / name for name in (*PARTS, "evidence", "code")}
    problems = [f"{name} is missing" for name, part in folders.items() if part.is_symlink() or not part.is_dir()]
    if sum(name.split("-")[0] in (MODEL, VARIANT) for name in parts_of(folder)) > MODELS:
        problems.append(f"there are more than {MODELS} folders of models and variants")
    if not problems and len(os.listdir(folder / "checkpoints")) > BRANCHES:
        problems.append(f"checkpoints holds more than {BRANCHES} branches")
    return problems
