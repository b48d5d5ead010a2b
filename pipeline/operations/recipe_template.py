"""Writes a recipe of one's own: a packaged one with its comments, under another name, and its JSON Schema.

    python -m pipeline.operations.recipe_template recipe

prints the schema of a recipe, a data_recipe or a cluster_profile, for editors: the fields, types, bounds and
descriptions of the classes that validate these files. Only `atom validate` finds contradictions between fields.
https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from pipeline.core import atomic_files
from pipeline.core.bounds import ReleaseName
from pipeline.core.errors import AtomError
from pipeline.core.text import escaped, shown
from pipeline.graph import recipe, registry
from pipeline.launch.cluster_profile import Profile

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
# The file beside the recipe by which editors complete and check it.
SCHEMA = "atom-recipe.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_id(kind: str) -> str:
    return f"urn:atom-release:schema:{kind}"


def schema_models() -> dict[str, type[BaseModel]]:
    """Returns the class of each kind of file that a user writes."""
    return {"recipe": recipe.schema(), "data_recipe": registry.definition().DATA_RECIPE, "cluster_profile": Profile}


class _Generator(GenerateJsonSchema):
    """Marks operational fields by a name of its own, which other readers of a schema skip."""

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        return {"$schema": DIALECT, **_marked(super().generate(schema, mode))}


def _marked(value: Any) -> Any:
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if not isinstance(value, dict):
        return value
    marks = {"x-operational": True} if value.get("identity") is False else {}
    is_marked = isinstance(value.get("identity"), (bool, str))
    return {name: _marked(item) for name, item in value.items() if not (is_marked and name == "identity")} | marks


def schema_text(kind: str) -> str:
    """Returns the schema of a kind of file, as a file."""
    schema = schema_models()[kind].model_json_schema(schema_generator=_Generator)
    body = {"$schema": DIALECT, "$id": schema_id(kind), **schema, "title": f"atom {kind.replace('_', ' ')}"}
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def write(name: str, source: str, folder: Path, start_from: str | None = None) -> Path:
    """Writes `<folder>/<name>.yaml` from a packaged recipe, and the schema beside it. Returns its path.

    Args:
        name: The name of the release, and of the file.
        source: The name of the packaged recipe.
        folder: The folder for both files.
        start_from: The published model with which it begins, for a packaged recipe with that section.

    Raises:
        AtomError: The name is none of a release or is that of a packaged recipe, no packaged recipe is called `source`,
            the model or a file cannot be read or written, or the recipe exists already.
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
    # The name is the first field of a packaged recipe; the comments before it stay.
    comments, _, fields = _with_start(origin, start_from).partition("\nname: ")
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


def _with_start(origin: Path, model: str | None) -> str:
    """Returns the text of a packaged recipe, which begins with this published model, if it begins with one."""
    text = origin.read_text(encoding="utf-8")
    match = re.search(r"(?<=\n)(start_from:.*\n)( .*\n)+", text)
    if match is None and model is not None:
        raise AtomError(f"{origin.stem} begins with random weights; leave --start-from out, or copy another recipe")
    if match is None:
        return text
    if model is None:
        raise AtomError(f"{origin.stem} begins with a published model; name it: --start-from RELEASE/model")
    fields = registry.definition().start_from(model)
    lines = "".join(f"  {field}: {json.dumps(value)}\n" for field, value in fields.items())
    return f"{text[: match.start()]}{match[1]}{lines}{text[match.end() :]}"


def _write_schema(path: Path) -> None:
    """Writes today's schema, over an earlier one of atom, and over nothing else."""
    is_file = path.is_file() and not path.is_symlink()
    if not os.path.lexists(path) or (is_file and schema_id("recipe").encode() in path.read_bytes()):
        atomic_files.write(path, schema_text("recipe"))


if __name__ == "__main__":
    print(schema_text(sys.argv[1]), end="")
