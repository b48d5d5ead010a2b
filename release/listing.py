"""What lies in a folder that is to be verified, and what it is, before any of it is hashed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pipeline.errors import CheckFailed
from release import confine, untrusted
from release.confine import Budget
from release.layout import ALL_SUMS, MODEL, ORIGINS, PARTS, SUMS, SUMS_BYTES, read_sums
from release.tree import NAMED, SPARSE_BYTES, Tree, is_sparse
from release.verdict import Check, Wrong, answer

SMALL_JSON = 4 << 20
"""What is read of a file to see what a folder is."""
BRANCHES = 10_000
"""Folders of checkpoints at most."""
HOLES = 4
"""How often the bytes of files of holes may be those that are on the disk."""
SECONDS, MEMORY = 3.0, 128 << 20
"""For reading the sizes that manifests name."""
SIGNS = (
    "evidence", "code/as-run", "dispositions.parquet", "parity.json", "checkpoints/index.json",
    *(f"{part}/{SUMS}" for part in PARTS),
)  # fmt: skip


def kind_of(folder: Path) -> str:
    """What a folder is, by the files that only it has. Parts of a release beside each other are a release, even if its
    evidence is gone: no repository holds a folder of such a name."""
    if parts_of(folder):
        return "release"
    marks = {
        "dispositions.parquet": "dataset",
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
    """What lies in a folder that only a release has beside its root: models, dataset, checkpoints."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False) or e.is_symlink())
    return [name for name in names if name in PARTS or name.startswith(f"{MODEL}-")]


def shows_release(folder: Path) -> bool:
    """Whether a folder is, or once was, of a release: then a missing checksum file is a finding, not a wrong name."""
    if os.path.lexists(folder / SUMS) or any(os.path.lexists(folder / mark) for mark in SIGNS):
        return True
    if any(os.path.lexists(folder / part / mark) for part in parts_of(folder) for mark in (SUMS, "config.json")):
        return True
    if os.path.lexists(folder / "state.json") and any(folder.glob("*.safetensors")):
        return True
    try:
        rows = untrusted.read_json(folder / "index.json", SMALL_JSON, follow=True)
    except CheckFailed:
        return False
    return isinstance(rows, list) and any(isinstance(row, dict) and {"branch", "state"} <= row.keys() for row in rows)


def count_lines(folder: Path) -> int:
    """How many files the checksum files can name, by their sizes alone."""
    sizes = [os.lstat(folder / name).st_size for name in (SUMS, ALL_SUMS) if os.path.lexists(folder / name)]
    return sum(min(size, SUMS_BYTES) // 67 for size in sizes)


def listed_files(folder: Path) -> set[str]:
    """Every file that a checksum file names, by its path in the folder."""
    bases = ["", *(f"{part}/" for part in parts_of(folder))]
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        with os.scandir(checkpoints) as entries:
            bases += sorted(f"checkpoints/{entry.name}/" for entry in entries if entry.is_dir(follow_symlinks=False))
    paths: set[str] = set()
    for name, base in [(ALL_SUMS, ""), *((f"{base}{SUMS}", base) for base in bases)]:
        try:
            paths |= {base + path for path in read_sums(folder / name, name)}
        except CheckFailed:
            continue  # which its own check says
    return paths


def check(folder: Path, kind: str, tree: Tree) -> Check:
    """All that lies there may be read, and tells of itself how large it is."""
    wrong = tree.refused[:NAMED]
    if tree.overflow:
        return answer("files", [tree.refused[-1]])
    wrong += missing_parts(folder, kind)
    try:
        sizes, _ = confine.run(lambda: _sizes(folder, tree), Budget(MEMORY, SECONDS))
    except CheckFailed:
        sizes = {}  # the manifests have a check of their own
    holes = {path for path, status in tree.files.items() if is_sparse(status)}
    # file systems that compress keep no zeros, and the moments of an optimizer begin as such
    if sum(tree.files[path].st_size for path in holes) > HOLES * sum(s.st_blocks * 512 for s in tree.files.values()):
        for path in sorted(holes):
            status = tree.files.pop(path)
            wrong.append(f"{path} is a file of holes: of its {status.st_size} bytes next to none are on the disk")
    for path in sorted(tree.files.keys() & sizes.keys()):
        if (size := tree.files[path].st_size) > sizes[
            path
        ] + SPARSE_BYTES:  # a smaller one is hashed, and judged by that
            tree.files.pop(path)
            wrong.append(f"{path} has {size} bytes, and its manifest says {sizes[path]}")
    return answer("files", wrong, f"{len(tree.files)} regular files")


def missing_parts(folder: Path, kind: str) -> Wrong:
    """What makes a folder what it is, and is not there."""
    if kind == "repository" and not (folder / "index.json").is_file():
        return [
            "nothing here tells what it is: no release, model, dataset, checkpoint or evidence is without its files"
        ]
    if kind != "release":
        return []
    places = {name: folder / name for name in (*PARTS, "evidence", "code")}
    wrong = [f"{name} is missing" for name, place in places.items() if place.is_symlink() or not place.is_dir()]
    if (folder / "checkpoints").is_dir() and len(os.listdir(folder / "checkpoints")) > BRANCHES:
        wrong.append(f"checkpoints holds more than {BRANCHES} branches")
    return wrong


def _sizes(folder: Path, tree: Tree) -> dict[str, int]:
    """{path: bytes} of the files that are copies from artifacts, by the manifests of those, as far as they can be read:
    a file of another size is not worth hashing."""
    sizes: dict[str, int] = {}
    try:
        rows: dict[tuple[str, str], Any] = {}
        for path in tree.files:
            if path.startswith("evidence/manifests/") and path.endswith(".json"):
                body = untrusted.read_json(folder / path, follow=True)
                rows |= {(Path(path).stem, row["path"]): row["size"] for row in body["files"]}
        for path, origin in untrusted.read_json(folder / ORIGINS, follow=True).items():
            if (size := rows.get((origin.get("artifact"), origin.get("file")))) is not None and type(size) is int:
                sizes[path] = size
    except (CheckFailed, KeyError, TypeError, AttributeError):
        return {}
    return sizes
