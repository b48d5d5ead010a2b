"""Writes a recipe of one's own: a packaged one with its comments, under another name."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.core.bounds import ReleaseName
from pipeline.core.errors import AtomError
from pipeline.core.text import escaped, shown
from pipeline.graph import recipe, registry

HEAD = """\
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


def write(name: str, source: str, folder: Path, start_from: str | None = None) -> Path:
    """Writes `<folder>/<name>.yaml` from a packaged recipe. Returns its path.

    Args:
        name: The name of the release, and of the file.
        source: The name of the packaged recipe.
        folder: The folder for the file.
        start_from: The published model with which it begins, for a packaged recipe with that section.

    Raises:
        AtomError: The name is none of a release or is that of a packaged recipe, no packaged recipe is called `source`,
            the model cannot be read, or the recipe cannot be written or exists already.
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
    head = HEAD.format(name=name, source=origin.stem, file=path.name)
    text = f"{head}{comments}\nname: {name}\n{fields.partition(chr(10))[2]}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
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
