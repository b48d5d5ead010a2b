"""Loads a recipe: one YAML file that tells a whole release, top to bottom.

The schema is composed of the config classes that the stages own; this file adds only what is about the release as a
whole. Every mistake becomes one sentence: which recipe, which field, what is wrong, what to do.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from pipeline import registry
from pipeline.errors import RecipeError
from pipeline.stage import Config, operational


class Budget(Config):
    """What a release may use in all, failed attempts included; nothing further is begun beyond it."""

    gpu_hours: float | None = Field(None, gt=0)
    core_hours: float | None = Field(None, gt=0)


class Identity(Config):
    """What names a release."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9._-]*$", description="lower-case name; with the version it names the folder"
    )
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$", description="semantic version of the release")
    description: str = Field(description="one or two sentences for the cards")
    seed: int = Field(ge=0, description="every seed of every stage derives from this one")
    data: str = Field(description="a data recipe: the name of a packaged one, or a path relative to this file")
    budget: Budget | None = operational(None, "hours that may be used; `atom submit` and its jobs keep to it")


@cache
def schema() -> type[Config]:
    """The recipe's class: `Identity` and one field per registered section."""
    sections: dict[str, Any] = {name: (_optional(name), registry.OPTIONAL.get(name, ...)) for name in registry.SECTIONS}
    return create_model("Recipe", __base__=Identity, **sections)


def _optional(name: str) -> Any:
    """The type of a section: one that may be absent may be null."""
    section = registry.section(name)
    return section | None if registry.OPTIONAL.get(name, ...) is None else section


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, its data recipe, and the bytes of both files as they were read."""

    path: Path
    config: Any
    data: Any
    files: dict[str, bytes]

    @property
    def title(self) -> str:
        """How errors name it."""
        return f"recipe {self.path.stem}"


class _UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(data: bytes, title: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError naming the line if it is not YAML, or not a mapping."""
    try:
        found = yaml.load(data, _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError(f"{title}: line {line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{title}: is not valid YAML: {error}".replace("\n", " ")) from None
    if not isinstance(found, dict):
        raise RecipeError(f"{title}: must be a mapping of sections, see the packaged recipes for examples")
    return found


def find(reference: str, package: str, kind: str, base: Path | None = None) -> Path:
    """A packaged YAML by name, or a file by path. Raises RecipeError listing what there is."""
    packaged = Path(str(resources.files(package)))
    names = sorted(p.stem for p in packaged.glob("*.yaml"))
    if reference in names:
        return packaged / f"{reference}.yaml"
    path = (base / reference) if base else Path(reference)
    if path.is_file():
        return path
    close = difflib.get_close_matches(reference, names, 1)
    hint = f"did you mean {close[0]}?" if close else f"packaged ones: {', '.join(names)}"
    raise RecipeError(f"there is no {kind} {reference}, neither packaged nor a file; {hint}")


def explain(error: ValidationError, model: type[BaseModel], title: str, raw: Any = None) -> RecipeError:
    """The first mistake of a validation as one sentence. With the raw mapping, list items are called by their names."""
    mistakes = error.errors()
    first = mistakes[0]
    where = ".".join(_called(first["loc"], raw))
    field = f"{where} " if where else ""
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}" if known else ""
        text = f"{field}is not a field{hint}"
    elif first["type"] == "missing":
        text = f"{field}is missing"
    elif first["type"] == "value_error":
        said = str(first["ctx"]["error"])
        about_a_field = re.match(r"[a-z_0-9.]+ = ", said)  # such a sentence goes on from the section's name
        text = f"{where}{'.' if about_a_field else ': '}{said}" if where else said
    else:
        text = f"{field}= {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return RecipeError(f"{title}: {text}{more}")


def _called(location: tuple[Any, ...], raw: Any) -> list[str]:
    """The parts of a location; an item of a list is called by its `name`, if it has one, instead of its place."""
    out = []
    for part in location:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raw = None
        named = isinstance(part, int) and isinstance(raw, dict) and isinstance(raw.get("name"), str)
        out.append(raw["name"] if named else str(part))
    return out


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """The field names of the class that stands at a location of the schema."""
    for part in location:
        info = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        candidates = [info.annotation, *getattr(info.annotation, "__args__", ())] if info else []
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def load(reference: str) -> Recipe:
    """Reads and validates a recipe by its packaged name or its path, with its data recipe.

    Raises RecipeError with one sentence for any mistake in either.
    """
    path = find(reference, "pipeline.recipes", "recipe")
    title = f"recipe {path.stem}"
    raw = path.read_bytes()
    try:
        config = schema().model_validate(parse_yaml(raw, title))
    except ValidationError as error:
        raise explain(error, schema(), title) from None
    identity: Any = config
    data_path = find(identity.data, "data_recipes", "data recipe", path.parent)
    data = registry.data().load(str(data_path))
    files = {f"recipes/{path.name}": raw, f"data_recipes/{data_path.name}": data_path.read_bytes()}
    return Recipe(path, config, data, files)
