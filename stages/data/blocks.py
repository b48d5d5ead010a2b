"""Blocks of datatrove in a data recipe: classes that it names by their import path, with their own parameters.

A data recipe can name the classes of datatrove, and those in the folders that it lists under `extensions`. Nothing is
imported before `create`, so `atom plan` only parses the settings.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Self, Union

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pipeline.core.bounds import LongLine, Settings, Words
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.extensions import add_package, digest_of, imported
from pipeline.core.stage import Config, operational
from pipeline.core.text import escaped

DATATROVE = "datatrove"
# Folders of Python modules, relative to the data recipe. The last part of a path is the name of the package.
Extensions = Annotated[tuple[LongLine, ...], Field(max_length=20)]
Place = Annotated[str, Words(4096, empty=True)]
BlockPath = Annotated[
    str,
    Words(
        300,
        "import path of a class; write such as datatrove.pipeline.filters.RegexFilter",
        r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
    ),
]
# Classes of datatrove that are refused, and what to use instead.
_REFUSED = {
    "SamplerFilter": "draws a random number for each document, so what it keeps depends on the documents before; use "
    "`limit` of the reader",
    "LambdaFilter": "takes a Python function, which a data recipe cannot state; write a filter into a folder of "
    "`extensions`",
    "UnigramLogProbFilter": "downloads a table of words that no digest pins; write a filter of your own",
    "HuggingFaceDatasetReader": "reads what the Hub has at the moment; use reader hub, whose files `atom pin` pins",
}


class Block(Config):
    """Base of a step and of a reader that are a class of datatrove."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    # Parameters of the class that a recipe cannot set, and what to do instead.
    refused: ClassVar[Mapping[str, str]] = {}

    block: BlockPath
    """import path of the class; further settings are its own parameters"""
    parameters: Settings = Field({})
    """parameters of the class, if one of them is called like a setting here"""
    code: LongLine = "auto"
    """expected version of datatrove, and digest of the extension; auto: those that are here"""
    folder: Place = operational("")
    """folder of the data recipe; set when that is read"""
    extension: Place = operational("")
    """folder of the extension that has the class; set when the data recipe is read"""

    @model_validator(mode="before")
    @classmethod
    def _collect_parameters(cls, values: Any) -> Any:
        """Moves the parameters of the class, which are written beside `block`, into the field for them."""
        if not isinstance(values, dict):
            return values
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        parameters = {name: value for name, value in values.items() if name not in cls.model_fields}
        stated = fields.get("parameters", {})
        # Values of a wrong form are left as they are, so that validation names them.
        return {**fields, "parameters": {**stated, **parameters}} if parameters and isinstance(stated, dict) else values

    @property
    def class_name(self) -> str:
        return self.block.rpartition(".")[2]

    def located(self, folder: Path, extensions: Mapping[str, Path]) -> Self:
        """Returns the block with its places on this machine and the version of its code.

        Args:
            folder: The folder of the data recipe.
            extensions: The folder of each package of its `extensions`.

        Raises:
            RecipeError: No extension has the class, or `code` pins another version.
        """
        package = self.block.partition(".")[0]
        if package != DATATROVE and package not in extensions:
            raise RecipeError(
                f"block {self.block} is in no module of datatrove; list the folder {package} under `extensions`"
            )
        places = {"folder": str(folder), "extension": str(extensions.get(package, ""))}
        block = self.model_copy(update=places)
        block._require_code()
        return block.model_copy(update={"code": block._present_code()})

    def portable(self) -> Self:
        """Returns the block without its places on this machine."""
        return self.model_copy(update={"folder": "", "extension": ""})

    def _present_code(self) -> str:
        """Returns the version of the code that is here."""
        digest = [] if not self.extension else [f"{Path(self.extension).name} {digest_of(Path(self.extension))}"]
        return ", ".join([f"datatrove {datatrove_version()}", *digest])

    def _require_code(self) -> None:
        present = self._present_code()
        if self.code not in ("auto", present):
            raise RecipeError(
                f"block {self.block} is pinned to {self.code}, but here is {present}; install that version, or write "
                "code: auto"
            )

    def create(self, bases: Sequence[str], what: str, **given: Any) -> Any:
        """Imports the class and returns an instance with the parameters.

        Args:
            bases: Import paths of classes, one of which it must extend.
            what: Those classes in words, for the error.
            given: Parameters that the recipe does not set.

        Raises:
            RecipeError: There is no such class, it is refused, or its parameters do not fit its signature.
        """
        kind = self.imported(bases, what)
        self.require_parameters(kind, given)
        try:
            return kind(**given, **self.parameters)
        except AtomError:
            raise
        except Exception as error:
            raise RecipeError(f"block {self.block} cannot be created: {in_words(error)}") from None

    def imported(self, bases: Sequence[str], what: str) -> type[Any]:
        """Imports the class, as `create` does."""
        self._require_code()
        module_name, _, name = self.block.rpartition(".")
        package = module_name.partition(".")[0]
        if package != DATATROVE:
            if not self.extension:
                raise RecipeError(f"block {self.block} is in no folder of `extensions`; list the folder {package}")
            add_package(package, Path(self.extension))
        try:
            module = import_module(module_name)
        except Exception as error:
            raise RecipeError(f"block {self.block} cannot be imported: {in_words(error)}") from None
        # A class is refused before anything of it runs.
        kind = getattr(module, name, None)
        if isinstance(kind, type) and is_stock(kind) and name in _REFUSED:
            raise RecipeError(f"block {self.block} {_REFUSED[name]}")
        extended = tuple(map(resolve_name, bases))
        if not isinstance(kind, type) or not issubclass(kind, extended) or inspect.isabstract(kind):
            names = [each for each, value in vars(module).items() if isinstance(value, type)]
            near = difflib.get_close_matches(name, names, 1)
            raise RecipeError(f"block {self.block} is no {what}; {f'did you mean {near[0]}?' if near else 'name one'}")
        return kind

    def require_parameters(self, kind: type[Any], given: Mapping[str, Any]) -> None:
        """Raises RecipeError for parameters that the class does not have, or that it needs and does not get."""
        known = parameters_of(kind)
        # A class that passes unknown parameters on cannot be checked by its signature.
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        for name in self.parameters:
            if name in self.refused:
                raise RecipeError(f"block {self.block}: {name} cannot be set; {self.refused[name]}")
            if name in given or (name not in known and not takes_any):
                near = difflib.get_close_matches(name, known, 1)
                names = ", ".join(each for each in known if each not in self.refused)
                hint = f"did you mean {near[0]}?" if near else f"it has {names or 'none'}"
                raise RecipeError(f"block {self.block} has no parameter {name}; {hint}")
        for name, each in known.items():
            is_needed = each.default is inspect.Parameter.empty and each.kind not in _VARIADIC
            if is_needed and name not in self.parameters and name not in given:
                raise RecipeError(f"block {self.block} needs the parameter {name}; add it")


_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def parameters_of(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class, by name."""
    # Without the first one, which is the instance.
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])


def is_stock(kind: type[Any]) -> bool:
    """Returns True for a class of datatrove itself."""
    return kind.__module__.partition(".")[0] == DATATROVE


def in_words(error: Exception) -> str:
    """Returns an error of another package in one line, without a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    return escaped(f"{type(error).__name__}: {text}" if text else type(error).__name__, 400)


@cache
def datatrove_version() -> str:
    return metadata.version(DATATROVE)


def extension_folders(recipe_folder: Path, extensions: Extensions) -> dict[str, Path]:
    """Returns the folder of each package that a data recipe lists under `extensions`.

    Raises:
        RecipeError: A folder has no Python module, or a name that no package can have.
    """
    folders: dict[str, Path] = {}
    for extension in extensions:
        folder = (recipe_folder / extension).resolve()
        if not folder.name.isidentifier() or folder.name == DATATROVE or folder.name in folders:
            raise RecipeError(
                f"extensions: {escaped(extension, 200)} gives no package a name of its own; name the folder with "
                "letters, digits and '_'"
            )
        digest_of(folder)  # which refuses a folder without modules
        folders[folder.name] = folder
    return folders


def union_of(registry: Mapping[str, str], discriminator: str) -> Any:
    """Returns the union type of the classes of a registry, by the value of the field `discriminator`.

    Settings with a `block` are those of a class of datatrove, and need not state the field.
    """

    def state_datatrove(value: Any) -> Any:
        is_block = isinstance(value, dict) and "block" in value and discriminator not in value
        return {discriminator: "datatrove", **value} if is_block else value

    return Annotated[
        Union[tuple(map(imported, registry.values()))],  # noqa: UP007
        Field(discriminator=discriminator),
        BeforeValidator(state_datatrove),
    ]
