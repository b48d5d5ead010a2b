"""Loads a recipe: one YAML file that describes a whole release.

The schema is composed of the config classes of the stages; this file adds only the fields of the release as a whole.
Every error becomes one sentence: the recipe, the field, the problem, the remedy.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.core import extensions
from pipeline.core.bounds import OUT_OF_BOUNDS, LongLine, Range, ReleaseName, Seed, Text, Version
from pipeline.core.errors import RecipeError
from pipeline.core.extensions import Extensions, Installed
from pipeline.core.stage import Config, operational
from pipeline.core.text import escaped, shown, unprintable
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph import registry

# Characters of an error message; some list all known names.
LONGEST_SENTENCE = 1000
Hours = Annotated[float, Range(0, 1e11, "a million GPUs use 1e10 hours in a year", above=True)]


class Budget(Config):
    """Limits on the total use of a release, failed attempts included. Once one is reached, no further job starts."""

    gpu_hours: Hours | None = None
    """hours of allocated GPUs; null: no limit"""
    core_hours: Hours | None = None
    """hours of busy CPU cores; null: no limit"""


class Identity(Config):
    """Name, version and inputs of a release."""

    name: ReleaseName
    """lower-case name; name and version give the name of the release folder"""
    version: Version
    """semantic version of the release"""
    description: Text
    """one or two sentences for the model and dataset cards"""
    seed: Seed
    """seed from which the seeds of all stages are derived, but for those of training if `training_seed` is set"""
    data: LongLine
    """data recipe: the name of a packaged one, or a path relative to this file"""
    extensions: Extensions = operational({})
    """classes of your own by registry and name, in packages beside this file; the digests of those that a stage uses
    are part of its key"""
    budget: Budget | None = operational(None)
    """limits on hours, enforced by `atom submit` and its jobs"""


def schema() -> type[Identity]:
    """Returns the recipe's class: `Identity` and one field per section."""
    recipe_class = registry.definition().RECIPE
    assert issubclass(recipe_class, Identity)
    return recipe_class


LOCK_SUFFIX = ".lock.yaml"
# Of a lock file: a hundred thousand files.
LOCK_BYTES = 2**24


def lock_of(data_path: Path) -> Path:
    """Returns the lock file of a data recipe, `NAME.lock.yaml` beside it, which may be missing."""
    return data_path.with_suffix(LOCK_SUFFIX)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, its data recipe, and the bytes of both files, and of a lock file, as they were read."""

    path: Path
    config: Identity
    data: Config
    # The files by their place in the folder of a run.
    files: dict[str, bytes]
    extensions: Installed

    @property
    def title(self) -> str:
        """The name of the recipe in errors."""
        return _title(self.path)


def find(reference: str, package: str, kind: str, base: Path | None = None) -> Path:
    """Returns a YAML file by its name among the packaged ones, or by its path from `base`.

    Raises RecipeError if there is none, with the existing names.
    """
    files = Path(str(resources.files(package))).glob("*.yaml")
    packaged = {path.stem: path for path in files if not path.name.endswith(LOCK_SUFFIX)}
    if reference in packaged:
        return packaged[reference]
    names = sorted(packaged)
    path, name = (base / reference) if base else Path(reference), escaped(reference, 80)
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise RecipeError(f"{kind} {name} cannot be read ({error.strerror}); name a file that you may read") from None
    except (OSError, ValueError):  # ValueError: a NUL in the name
        # Only the beginning is compared, because a long text would take long.
        close = difflib.get_close_matches(reference[:100], names, 1)
        hint = f"did you mean {close[0]}?" if close else f"packaged ones: {', '.join(names)}"
        raise RecipeError(f"there is no {kind} {name}, neither packaged nor a file; {hint}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise RecipeError(f"{kind} {name} is {what}; name a YAML file")
    if unprintable(path.name):
        raise RecipeError(f"{kind} {name} has a name that cannot be printed, and releases carry it; rename the file")
    return path


@dataclass(frozen=True)
class Mistake:
    """One error of a validation."""

    # The place of the field, as pydantic has it.
    location: tuple[str | int, ...]
    field: str
    # A sentence that begins with the field.
    text: str


def mistakes(error: ValidationError, model: type[BaseModel], raw: Any = None) -> list[Mistake]:
    """Returns every error of a validation. With the raw mapping, the sentences name list items by their names."""
    return [_mistake(row, model, raw) for row in _rows(error)]


def _rows(error: ValidationError) -> list[Any]:
    """Returns the errors of a validation; not that of a list which is short because of the errors of its items."""
    rows = error.errors()
    parents = {row["loc"][:length] for row in rows for length in range(len(row["loc"]))}
    return [row for row in rows if row["type"] != "too_short" or row["loc"] not in parents]


def explain(error: ValidationError, model: type[BaseModel], title: str, raw: Any = None) -> RecipeError:
    """Returns the first error of a validation as one sentence.

    With the raw mapping, the sentence names list items by their names.
    """
    rows = _rows(error)
    suffix = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return RecipeError(f"{title}: {_mistake(rows[0], model, raw).text}{suffix}")


def _mistake(row: Any, model: type[BaseModel], raw: Any) -> Mistake:
    is_section = row["type"] == "value_error"  # of a section, whose last part may be its chosen class
    where = ".".join(_called(row["loc"], raw, is_section))
    field = f"{where} " if where else ""
    if row["type"] == "extra_forbidden":
        fields = _fields_at(model, row["loc"][:-1])
        near = difflib.get_close_matches(str(row["loc"][-1])[:100], fields, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(fields)}" if fields else ""
        text = f"{field}is not a field{hint}"
    elif row["type"] == "missing":
        text = f"{field}is missing"
    elif row["type"] == OUT_OF_BOUNDS:
        text = f"{field}= {shown(row['input'])} {row['msg']}"
    elif row["type"] == "value_error":
        message = str(row["ctx"]["error"])
        about_a_field = re.match(r"[a-z_0-9.]+ = ", message)  # such a sentence continues after the section's name
        text = f"{where}{'.' if about_a_field else ': '}{message}" if where else message
    else:
        text = f"{field}= {shown(row['input'])}: {row['msg'][0].lower()}{row['msg'][1:]}"
    return Mistake(tuple(row["loc"]), where, escaped(text, LONGEST_SENTENCE))


def _called(location: tuple[Any, ...], raw: Any, is_section: bool) -> list[str]:
    """Returns the parts of a location in the words of a recipe's author.

    An item of a list that has a `name` is called by it instead of by its index. The class that a tag chooses is left
    out.
    """
    out = []
    for number, part in enumerate(location):
        if part == "[key]" or (
            isinstance(raw, dict) and part not in raw and (is_section or number < len(location) - 1)
        ):
            continue
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raw = None
        named = isinstance(part, int) and isinstance(raw, dict) and isinstance(raw.get("name"), str)
        out.append(escaped(raw["name"] if named else str(part), 60))
    return out


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Returns the field names of the possible config classes at a location of the schema."""
    classes = [model]
    for part in location:
        fields = [each.model_fields[part] for each in classes if part in each.model_fields]
        if fields:
            classes = [each for info in fields for each in _classes(info.annotation)]
        else:  # an index in a list, or the tag that chooses one of several classes
            classes = [each for each in classes if part in _tags(each)] or classes
    return sorted({name for each in classes for name in each.model_fields})


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Returns the config classes within a type, such as those of `tuple[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [each for part in get_args(annotation) for each in _classes(part)]


def _tags(model: type[BaseModel]) -> set[Any]:
    """Returns the tags that choose a class among others."""
    types = [info.annotation for info in model.model_fields.values()]
    return {word for kind in types if get_origin(kind) is Literal for word in get_args(kind)}


def load(reference: str) -> Recipe:
    """Reads and validates a recipe by its packaged name or its path, with its data recipe.

    Raises RecipeError with one sentence for any error in either.
    """
    path = find(reference, "pipeline.recipes", "recipe")
    title = _title(path)
    content = read_file(path, title)
    raw = parse_yaml(content, title)
    install_extensions(raw, path)
    try:
        config = schema().model_validate(raw)
        # Once all registries are filled, also what nothing in the recipe uses.
        for classes in config.extensions.values():
            for import_path in classes.values():
                extensions.imported(import_path)
    except ValidationError as error:
        raise explain(error, schema(), title, raw) from None
    data_path = find(config.data, "data_recipes", "data recipe", path.parent)
    data_content = read_file(data_path, f"data recipe {escaped(data_path.stem, 80)}")
    data = registry.definition().load_data_recipe(data_content, data_path)
    files = {f"recipes/{path.name}": content, f"data_recipes/{data_path.name}": data_content}
    modules = registry.definition().extension_modules(data, data_path)
    files |= {f"data_recipes/{name}": module for name, module in modules.items()}
    files |= {f"recipes/{name}": module for name, module in extensions.installed().files().items()}
    if (lock := lock_of(data_path)).exists():
        files[f"data_recipes/{lock.name}"] = read_file(lock, f"lock file {escaped(lock.name, 80)}", LOCK_BYTES)
    return Recipe(path, config, data, files, extensions.installed())


def install_extensions(raw: Any, path: Path) -> None:
    """Makes the extensions of a recipe known, before the schema is composed. Raises RecipeError."""
    section = raw.get("extensions", {}) if isinstance(raw, dict) else {}
    try:
        extensions.install(extensions.read(section, path.parent))
    except ValidationError as error:
        raise explain(error, Identity, _title(path), raw) from None


def _title(path: Path) -> str:
    return f"recipe {escaped(path.stem, 80)}"
