"""Digest of a stage's code: its module and every module of atom that it imports, directly or indirectly.

A registry names modules or their classes (`module:class`) as strings and imports them by name, so a string that is the
full name of a module or of a class counts as an import. Strings of the engine do not count: the engine names the graph,
and the graph names every stage.

The digest is recorded in statements, not in keys: a key identifies the requested work, the code digest identifies the
code that did it. `plan` compares recorded and present digests, so a cache never hides a change of code.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType

from pipeline.core.store import sha256_file

OURS = ("pipeline", "stages", "release")


@cache
def _root(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@cache
def _locate(module: str) -> Path | None:
    """The file of a module of atom, found by path: Python's own lookup would import its parents, and with them
    torch."""
    package, *inner = module.split(".")
    root = _root(package)
    if root is None:
        return None
    path = root.joinpath(*inner)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def _digest(path: Path) -> str:
    return sha256_file(path)


@cache
def _imports(module: str) -> tuple[str, ...]:
    path = _locate(module)
    if path is None:
        return ()
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not module.startswith("pipeline."):
            modules.update([node.value.partition(":")[0]] if "." in node.value else [])
    return tuple(sorted(name for name in modules if name.split(".")[0] in OURS and _locate(name)))


def closure(module: str, chosen: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, str]:
    """{module name: sha256 of its file} for `module` and every module of atom that it imports.

    chosen: by registry, the modules that stand for it.
    """
    pending, digests = [module], {}
    while pending:
        name = pending.pop()
        if name in chosen:
            pending.extend(chosen[name])
            continue
        path = _locate(name)
        if name in digests or path is None:
            continue
        digests[name] = _digest(path)
        pending.extend(_imports(name))
    return dict(sorted(digests.items()))


def code_digests(module: str, chosen: Mapping[str, Sequence[str]] = MappingProxyType({})) -> dict[str, str]:
    """The closure without the engine: code that passes inputs to a stage cannot change its bytes, except for the
    contracts. chosen: as `Stage.code` has it."""
    engine_modules = ("pipeline.core.stage", "pipeline.core.store")
    return {
        name: d
        for name, d in closure(module, chosen).items()
        if name.split(".")[0] != "pipeline" or name in engine_modules
    }
