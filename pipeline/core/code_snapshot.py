"""A frozen snapshot of the present code: jobs run from a copy named by its digest, so later changes of the checkout do
not affect them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.core import atomic_files, environment, json_files
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store, canonical, sha256_bytes

PACKAGES = ("pipeline", "stages", "release", "data_recipes")
SUFFIXES = frozenset({".py", ".yaml", ".yml", ".jinja", ".css", ".md", ".toml", ".json", ".txt", ".sh", ".typed"})


def roots() -> list[Path]:
    """The distinct folders from which the packages of atom are imported: a checkout, or site-packages."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folders.append(Path(spec.origin).parent.parent)
    return list(dict.fromkeys(folders))


def sources(root: Path, package: str, new: bool = False) -> list[Path]:
    """The files of a package. In a checkout: the files that git tracks and new files that it does not ignore.
    Elsewhere: all but hidden files and byte code."""
    if (root / ".git").exists() and shutil.which("git"):
        kinds = ["--cached", "--others", "--exclude-standard"] if new else ["--cached"]
        command = ["git", "-C", str(root), "ls-files", "-z", *kinds, package]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode == 0:
            return _source_files(root, [root / name for name in process.stdout.decode().split("\0") if name])
    return _source_files(root, list((root / package).rglob("*")))


def _source_files(root: Path, paths: list[Path]) -> list[Path]:
    hidden = [any(p.startswith(".") or p == "__pycache__" for p in path.relative_to(root).parts) for path in paths]
    return sorted(
        p for p, is_hidden in zip(paths, hidden, strict=True) if not is_hidden and p.suffix in SUFFIXES and p.is_file()
    )


def freeze(store: Store, extra_files: Mapping[str, bytes]) -> Path:
    """`$ATOM_HOME/code/<digest>`: the packages of atom, the pins if they are beside them, and `extra_files` under
    as-run/, read-only.

    The same code has the same folder, with the commit of the first checkout that had it. It is complete or absent, also
    after a crash of the machine. Raises Damaged if the folder was changed later.
    """
    files = dict(_snapshot_files(extra_files))
    digest = sha256_bytes(canonical({name: sha256_bytes(data) for name, data in files.items()}))[:16]
    target = store.home / "code" / digest
    if target.is_dir():
        _require_intact(target, files)
        return target
    draft = target.with_name(f".{digest}.{uuid.uuid4().hex}")
    commit, dirty = environment.git_commit(next(iter(roots())))
    stated = json.dumps({"commit": commit, "dirty": dirty}, sort_keys=True).encode()
    for name, data in {**files, environment.COMMIT: stated}.items():
        path = draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
    atomic_files.flush_file_system(draft)  # hundreds of files, one by one, would take seconds
    try:
        os.rename(draft, target)
        atomic_files.flush(target.parent)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(draft)  # another submitter has created the folder
    return target


def _require_intact(folder: Path, files: Mapping[str, bytes]) -> None:
    """Raises Damaged if a file of a snapshot has changed."""
    for name, data in files.items():
        try:
            intact = json_files.read_bytes(folder / name) == data
        except FileNotFoundError:
            intact = False
        if not intact:
            raise Damaged(folder / name, "it is not the code that was frozen", f"move {folder} away, and submit again")


def _snapshot_files(extra_files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for root in roots():
        for package in PACKAGES:
            for path in sources(root, package, new=True) if (root / package).is_dir() else ():
                yield path.relative_to(root).as_posix(), path.read_bytes()
        for path in [root / "pyproject.toml", *sorted(root.glob("constraints*.txt"))]:
            if path.is_file():
                yield path.name, path.read_bytes()
    for name, data in extra_files.items():
        yield f"as-run/{name}", data
