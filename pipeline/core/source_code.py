"""The code of a stage: digests of the modules that it imports, and snapshots from which jobs run.

The digest of a stage's code has its module and every module of atom that it imports, directly or indirectly. A registry
names modules or their classes (`module:class`) as strings and imports them by name, so a string that is the
full name of a module or of a class counts as an import. Strings of the engine do not count: the engine names the graph,
and the graph names every stage.

The digest is recorded in statements, not in keys: a key identifies the requested work, the code digest identifies the
code that did it. `plan` compares recorded and present digests, so a cache never hides a change of code.

Jobs run from a frozen snapshot, a copy named by its digest, so later changes of the checkout do not affect them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from types import MappingProxyType

from pipeline.core import atomic_files, environment, json_files
from pipeline.core.json_files import Damaged
from pipeline.core.store import Store, canonical, sha256_bytes, sha256_file

# The packages whose modules are code of a stage.
OURS = ("pipeline", "stages", "release")
# The packages of a snapshot, and the endings of their files.
PACKAGES = (*OURS, "data_recipes")
# The endings of templates and tables that belong to a module.
TEXTS = frozenset({".yaml", ".jinja", ".txt"})
SUFFIXES = frozenset({".py", ".yaml", ".yml", ".jinja", ".css", ".md", ".toml", ".json", ".txt", ".sh", ".typed"})


@cache
def _root(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def _locate(module: str) -> Path | None:
    """Returns the file of a module of atom; None for another name."""
    # Found by path: Python's own lookup would import its parents, and with them torch.
    package, *inner = module.split(".")
    root = _root(package)
    if root is None:
        return None
    path = root.joinpath(*inner)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _digest(path: Path) -> str:
    return sha256_file(path)


@dataclass(frozen=True)
class _Named:
    """The files that the code of a module names.

    Attributes:
        modules: Modules of atom that it imports, or whose full name is a string in it.
        texts: Templates and tables beside it: what they say is code too.
    """

    modules: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()


@cache
def _named(module: str) -> _Named:
    path = _locate(module)
    if path is None:
        return _Named()
    modules: set[str] = set()
    strings: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and "." in node.value:
                strings.add(node.value)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module)
            # An imported name may itself be a module.
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    if not module.startswith("pipeline."):
        modules.update(text.partition(":")[0] for text in strings)
    names = (text for text in strings if PurePath(text).suffix in TEXTS and "/" not in text)
    return _Named(
        tuple(sorted(name for name in modules if name.split(".")[0] in OURS and _locate(name))),
        tuple(sorted(file for name in names if (file := path.with_name(name)).is_file())),
    )


def closure(module: str, chosen: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, str]:
    """Returns {module name: sha256 of its file} for `module` and every module of atom that it imports.

    Templates and tables beside these modules are among them, by their paths.

    Args:
        module: Full name of the first module.
        chosen: The modules that stand for a registry, by its name.
    """
    pending, digests = [module], {}
    while pending:
        name = pending.pop()
        # A registry names every module of its kind, so only the chosen ones count.
        if name in chosen:
            pending.extend(chosen[name])
            continue
        path = _locate(name)
        if name in digests or path is None:
            continue
        digests[name] = _digest(path)
        package = "/".join(name.split(".")[:-1] if path.name != "__init__.py" else name.split("."))
        named = _named(name)
        digests.update({f"{package}/{file.name}": _digest(file) for file in named.texts})
        pending.extend(named.modules)
    return dict(sorted(digests.items()))


def code_digests(module: str, chosen: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, str]:
    """Returns the digests of the code that can change the bytes of a stage: its closure without the engine.

    Args:
        module: The module of the stage.
        chosen: The result of `Stage.code`.
    """
    # Code that passes inputs to a stage cannot change its bytes, except for the contracts.
    contracts = ("pipeline.core.stage", "pipeline.core.store")
    digests = closure(module, chosen)
    return {
        name: d for name, d in digests.items() if not name.startswith(("pipeline.", "pipeline/")) or name in contracts
    }


def roots() -> list[Path]:
    """Returns the distinct folders from which the packages of atom are imported: a checkout, or site-packages."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folders.append(Path(spec.origin).parent.parent)
    return list(dict.fromkeys(folders))


def sources(root: Path, package: str, new: bool = False) -> list[Path]:
    """Returns the files of a package, sorted.

    In a checkout: the files that git tracks. Elsewhere: all but hidden files and byte code.

    Args:
        root: The folder that has the package.
        package: Name of the package.
        new: Include new files that git does not ignore.
    """
    if (root / ".git").exists() and shutil.which("git"):
        kinds = ["--cached", "--others", "--exclude-standard"] if new else ["--cached"]
        command = ["git", "-C", str(root), "ls-files", "-z", *kinds, package]
        process = subprocess.run(command, capture_output=True, check=False)
        if process.returncode == 0:
            return _source_files(root, [root / name for name in process.stdout.decode().split("\0") if name])
    return _source_files(root, list((root / package).rglob("*")))


def _source_files(root: Path, paths: list[Path]) -> list[Path]:
    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)

    return sorted(path for path in paths if path.suffix in SUFFIXES and not is_hidden(path) and path.is_file())


def freeze(store: Store, extra_files: Mapping[str, bytes]) -> Path:
    """Writes a read-only snapshot of atom's code to `$ATOM_HOME/code/<digest>`, and returns that folder.

    It has the packages of atom, the pins if they are beside them, and `extra_files` under as-run/. The same code has
    the same folder, with the commit of the first checkout that had it. The folder is complete or absent, also after a
    crash of the machine. Raises Damaged if the folder was changed later.
    """
    files = dict(_snapshot_files(extra_files))
    digest = sha256_bytes(canonical({name: sha256_bytes(data) for name, data in files.items()}))[:16]
    target = store.home / "code" / digest
    if target.is_dir():
        _require_intact(target, files)
        return target
    draft = target.with_name(f".{digest}.{uuid.uuid4().hex}")
    commit, dirty = environment.git_commit(next(iter(roots())))
    commit_file = json.dumps({"commit": commit, "dirty": dirty}, sort_keys=True).encode()
    for name, data in {**files, environment.COMMIT: commit_file}.items():
        path = draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o444)
    os.sync()  # hundreds of files, one by one, would take seconds
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
