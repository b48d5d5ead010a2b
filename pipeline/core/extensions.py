"""Extensions: classes of a user's own that a recipe names as it names those of this project.

    extensions:
      verifiers: {rhyme: my_rewards.poems.Rhyme}

Here `my_rewards` is a folder of Python modules beside the recipe. Each registry adds the names that the section has for
it, and each stage whose settings use such a name has the digest of the folder in its key.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from pipeline.core.bounds import Key, Words
from pipeline.core.errors import RecipeError
from pipeline.core.store import canonical, sha256_bytes, sha256_file
from pipeline.core.text import escaped

RegistryName = Literal[
    "readers",
    "filters",
    "verifiers",
    "task_sources",
    "tools",
    "samplers",
    "algorithms",
    "optimizers",
    "architectures",
]
ClassPath = Annotated[
    str,
    Words(
        300,
        "import path of a class; write such as my_rewards.poems.Rhyme",
        r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
    ),
]
# {registry: {name: class}}.
Extensions = Annotated[dict[RegistryName, Annotated[dict[Key, ClassPath], Field(max_length=100)]], Field(max_length=9)]


class _Recipe(BaseModel):
    """The part of a recipe that is read before its schema is composed."""

    extensions: Extensions = Field({})


@dataclass(frozen=True)
class Installed:
    """The extensions of the recipe that this process works on.

    Attributes:
        folder: Folder of the recipe, in which the packages are.
        names: {registry: {name: class}}.
        digests: Digest of the modules of each package.
    """

    folder: str = ""
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Returns the modules of the packages, by their paths in the folder of the recipe."""
        folder = Path(self.folder)
        paths = [path for package in self.digests for path in modules_in(folder / package)]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def used_by(self, settings: Any) -> dict[str, list[str]]:
        """Returns the class of each name that settings use, with the digest of its package."""
        texts = _texts(settings)
        used = {name: path for names in self.names.values() for name, path in names.items() if name in texts}
        return {name: [path, self.digests[path.partition(".")[0]]] for name, path in sorted(used.items())}


# Those of this process, and the names that registries have got. A registry is filled when its module is imported.
_installed = Installed()
_filled: dict[str, Mapping[str, str]] = {}


def read(section: Any, folder: Path) -> Installed:
    """Reads the section `extensions` of a recipe in a folder.

    Raises:
        ValidationError: The section has another form.
        RecipeError: A package is missing, or has the name of another one.
    """
    stated = _Recipe.model_validate({"extensions": section}).extensions
    names: dict[str, dict[str, str]] = {str(name): classes for name, classes in stated.items()}
    packages = sorted({path.partition(".")[0] for classes in names.values() for path in classes.values()})
    return Installed(str(folder.resolve()), names, {package: digest_of(folder / package) for package in packages})


def install(extensions: Installed) -> None:
    """Makes the classes of extensions known to the registries of this process.

    Raises:
        RecipeError: The code has changed since the extensions were read, another package has the name of one, or this
            process has filled its registries for another recipe.
    """
    global _installed
    if extensions == _installed:
        return
    for package, digest in extensions.digests.items():
        folder = Path(extensions.folder) / package
        if digest_of(folder) != digest:
            raise RecipeError(f"extensions: {folder} has changed since this run began; run the recipe again")
        add_package(package, folder)
    for registry, names in extensions.names.items():
        if registry in _filled and not names.items() <= _filled[registry].items():
            raise RecipeError(
                f"extensions.{registry} differs from that of another recipe that this command has read; give the "
                "recipes to two commands"
            )
    _installed = extensions


def installed() -> Installed:
    """Returns the extensions of this process."""
    return _installed


def extend(name: RegistryName, registry: dict[str, Any], load: bool = False) -> None:
    """Adds the installed extensions to a registry, when its module is imported.

    Args:
        name: Name of the registry in the section `extensions`.
        registry: The registry, with the names of this project.
        load: True if it holds the classes themselves; otherwise it holds their import paths.

    Raises:
        RecipeError: An extension has a name of this project, or cannot be imported.
    """
    _filled[name] = _installed.names.get(name, {})
    for entry, path in _filled[name].items():
        if entry in registry:
            raise RecipeError(f"extensions.{name}.{entry} is a name of this project; choose another one")
        registry[entry] = imported(path) if load else path


def imported(path: str) -> Any:
    """Returns what a registry names by its import path. Raises RecipeError if an extension does not have it."""
    try:
        return resolve_name(path)
    except Exception as error:
        if path.partition(".")[0] not in _installed.digests:
            raise
        reason = escaped(f"{type(error).__name__}: {error}", 400)
        raise RecipeError(f"extensions: {path} cannot be imported ({reason}); correct the path or the module") from None


def modules_in(folder: Path) -> list[Path]:
    """Returns the Python modules in a folder."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def digest_of(folder: Path) -> str:
    """Returns the digest of the Python modules in a folder. Raises RecipeError if there is none."""
    modules = modules_in(folder)
    if not modules:
        raise RecipeError(f"extensions: there is no Python module in {folder}; correct the path")
    digests = [[path.relative_to(folder).as_posix(), sha256_file(path)] for path in modules]
    return f"sha256:{sha256_bytes(canonical(digests))}"


def add_package(name: str, folder: Path) -> None:
    """Makes the modules in a folder importable as those of a package.

    Raises:
        RecipeError: Another package has this name.
    """
    folder = folder.resolve()
    if name in sys.modules:
        places = list(getattr(sys.modules[name], "__path__", []))
    elif spec := importlib.util.find_spec(name):
        # In a process that was started beside the folder, Python finds the folder itself.
        places = list(spec.submodule_search_locations or [])
    else:
        places = [str(folder)]
    if [Path(place).resolve() for place in places] != [folder]:
        raise RecipeError(
            f"extensions: another package is called {name} as well; give the folder {folder} a name of its own"
        )
    if name in sys.modules:
        return

    # The folder becomes a package without being put on sys.path, where its modules could hide others.
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def _texts(value: Any) -> set[str]:
    """Returns all texts in settings, at any depth."""
    if isinstance(value, str):
        return {value}
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return {text for part in parts for text in _texts(part)}
