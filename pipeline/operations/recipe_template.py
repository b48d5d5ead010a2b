"""Writes a recipe of one's own: a packaged one with its comments, under another name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.core import atomic_files
from pipeline.core.bounds import ReleaseName
from pipeline.core.errors import AtomError
from pipeline.core.text import escaped, shown
from pipeline.graph import json_schema, recipe

HEAD = """\
# yaml-language-server: $schema={schema}
#
# {name}: a copy of {source} to begin with. `description` and `data` are the first lines to change.
#
#     atom validate {file}         every mistake, with file, line and field
#     atom diff {source} {file}    which stages your changes run again, and what they cost
#     atom plan {file}             stages, keys, memory and costs
#
# docs/configuration.md explains every setting. One that is left out has its default. `data` is the name of a packaged
# data recipe, or the path of one of your own from here.
#
# What {source} says of itself:
#
"""


SCHEMA = f"atom-recipe{json_schema.SUFFIX}"
"""The file beside the recipe by which editors complete and check it."""


def write(name: str, source: str, folder: Path) -> Path:
    """Writes `<folder>/<name>.yaml` from a packaged recipe, and the schema beside it. Returns its path.

    Raises AtomError if the name is none of a release, if no packaged recipe is called `source`, and if the file exists.
    """
    try:
        TypeAdapter(ReleaseName).validate_python(name)
    except ValidationError as error:
        raise AtomError(f"{shown(name)} {error.errors()[0]['msg']}") from None
    origin = recipe.find(source, "pipeline.recipes", "recipe")
    if origin.parent != Path(str(resources.files("pipeline.recipes"))):
        raise AtomError(f"{escaped(source, 80)} is no packaged recipe; copy your own file, and change its name")
    if (origin.parent / f"{name}.yaml").exists():
        raise AtomError(f"{name} is the name of a packaged recipe; choose another name")
    path = folder / f"{name}.yaml"
    comments, _, fields = origin.read_text(encoding="utf-8").partition("\nname: ")
    head = HEAD.format(name=name, source=origin.stem, file=path.name, schema=SCHEMA)
    text = f"{head}{comments}\nname: {name}\n{fields.partition(chr(10))[2]}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
        _write_schema(folder / SCHEMA)
    except FileExistsError:
        raise AtomError(f"{escaped(str(path))} exists, and is not overwritten; choose another name") from None
    except OSError as error:
        raise AtomError(f"{escaped(str(path))} cannot be written ({error.strerror}); go to another folder") from None
    return path


def _write_schema(path: Path) -> None:
    """Writes today's schema, over an earlier one of atom, and over nothing else."""
    is_file = path.is_file() and not path.is_symlink()
    if not os.path.lexists(path) or (is_file and json_schema.schema_id("recipe").encode() in path.read_bytes()):
        atomic_files.write(path, json_schema.text("recipe"))
