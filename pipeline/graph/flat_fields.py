"""Nested settings and results as flat fields, for comparisons and for MLflow.

Settings are those of a loaded recipe, or of the files with which a run began. Results are the numbers of the JSON files
of an artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from pipeline.core import json_files
from pipeline.core.errors import RecipeError
from pipeline.core.store import Artifact
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import LOCK_SUFFIX
from pipeline.graph.run import Run


def flat(value: Any, prefix: str = "", is_operational: bool = False) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Yields (dotted field, (plain value, operational)) of every setting.

    An operational setting is in no key: see `pipeline.core.stage.operational`. An item of a list of sections is called
    by its `name`, else by its number.

    Args:
        value: The setting, or a section of settings.
        prefix: A point, and the dotted field of the section.
        is_operational: True if the section is operational, and so is everything in it.
    """
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            extra = info.json_schema_extra
            is_operational_field = isinstance(extra, dict) and extra.get("identity") is False
            yield from flat(getattr(value, name), f"{prefix}.{name}", is_operational or is_operational_field)
    elif isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{prefix}.{name}", is_operational)
    elif _is_list_of_sections(value):
        names = [_name(item) for item in value]
        # Names serve only if every item has one, and no two have the same.
        are_distinct = None not in names and len(set(names)) == len(names)
        for number, item in enumerate(value):
            label = names[number] if are_distinct else number
            yield from flat(item, f"{prefix}.{label}", is_operational)
    else:
        yield prefix.lstrip("."), (to_jsonable_python(value), is_operational)


def _is_list_of_sections(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and any(isinstance(item, (BaseModel, Mapping)) for item in value)


def _name(section: Any) -> str | None:
    name = section.get("name") if isinstance(section, Mapping) else getattr(section, "name", None)
    return name if isinstance(name, str) else None


def settings_of(run: Run) -> dict[str, Any]:
    """Returns the settings in the recipe files with which a run began. Unreadable ones are left out."""
    data = _settings(run, "data_recipes")
    return recipe_settings(run) | {f"data recipe: {field}": value for field, value in data.items()}


def recipe_settings(run: Run) -> dict[str, Any]:
    """Returns the settings of the recipe alone, without those of the data recipe."""
    return _settings(run, "recipes")


def _settings(run: Run, folder: str) -> dict[str, Any]:
    """Returns the settings in the YAML files of a folder of a run, without those of locks."""
    fields: dict[str, Any] = {}
    for path in sorted((run.folder / folder).glob("*.yaml")):
        if path.name.endswith(LOCK_SUFFIX):
            continue
        title = f"{run.id}/{folder}/{path.name}"
        try:
            settings = parse_yaml(read_file(path, title), title)
            fields |= {field: value for field, (value, _) in flat(settings)}
        except RecipeError as error:
            json_files.note(f"{error}; its settings are left out")
    return fields


# The files of an artifact with results of a measurement.
SCORES = ("scores.json", "report.json")
# The field of an estimate beside its standard error and its count. Its number gets the name of the object with them.
ESTIMATE = "value"
_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def scores_of(artifact: Artifact) -> dict[str, float]:
    """Returns the numbers of a measurement, such as `bits_per_byte/code` and `bits_per_byte/code/se`.

    A stage that measures nothing has none. A damaged file is reported and left out.
    """
    numbers: dict[str, float] = {}
    for name in SCORES:
        if any(row.path == name for row in artifact.rows):
            with json_files.reporting("its scores are left out"):
                try:
                    numbers |= dict(_numbers(json_files.read(artifact / name, _ANY)))
                except FileNotFoundError:
                    json_files.note(f"{json_files.printable(artifact / name)} is missing; its scores are left out")
    return numbers


def estimates(numbers: dict[str, float]) -> dict[str, float]:
    """Returns the numbers that have a standard error, an interval or a count beside them."""
    # `a` is an estimate if there is `a/se`.
    names_above = {name.rpartition("/")[0] for name in numbers}
    return {name: value for name, value in numbers.items() if name in names_above}


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in a JSON value, by their names with slashes. Texts, flags, null and lists are left out."""
    if isinstance(value, dict):
        for field, inner in value.items():
            if field == ESTIMATE and name:
                yield from _numbers(inner, name)
            else:
                yield from _numbers(inner, f"{name}/{field}".lstrip("/"))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, float(value)
