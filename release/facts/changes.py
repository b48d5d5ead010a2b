"""`evidence/changes.json`: what changed since an earlier version of a release, which `atom build --previous` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from release import schema
from release.facts.model_facts import ModelFacts, read_model_facts
from release.facts.published_tables import read_json
from release.layout import MODEL, RECIPE, RELEASE
from stages.confidence import Figure

FILE = "evidence/changes.json"
FIGURES = {"bits_per_byte_all": "bits per byte of held-out text", "accuracy_all": "right, in plain text"}


@dataclass(frozen=True)
class Changes:
    """version: the earlier one. settings: of the recipe, each with its value before and after, None for none. figures:
    of the final model by title, before and after."""

    version: str
    settings: list[tuple[str, Any, Any]]
    figures: dict[str, tuple[Figure, Figure]]


def compare(previous: Path, recipe: Mapping[str, Any], model: ModelFacts) -> dict[str, Any]:
    """Returns the content of FILE.

    Args:
        previous: The folder of the earlier release.
        recipe: The recipe of the later one.
        model: The final model of the later one.

    Raises:
        AtomError: The folder is no release.
        CheckFailed: A file of it is damaged.
    """
    if not ((previous / RELEASE).is_file() and (previous / RECIPE).is_file()):
        raise AtomError(f"{previous} is no release folder; --previous takes one that `atom build` made")
    before, after = dict(_leaves(read_json(previous / RECIPE))), dict(_leaves(recipe))
    names = [*before, *(name for name in after if name not in before)]
    old, new = read_model_facts(previous / MODEL).own_scores(), model.own_scores()
    return {
        "version": schema.read_release(previous).version,
        "settings": [
            [name, before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)
        ],
        "figures": {title: [old[name], new[name]] for name, title in FIGURES.items()},  # type: ignore[literal-required]
    }


def read_changes(release: Path) -> Changes | None:
    """The changes that a release states; None if it states none."""
    if not (release / FILE).exists():
        return None
    body = read_json(release / FILE)
    settings = [(str(name), before, after) for name, before, after in body["settings"]]
    figures = {str(title): (before, after) for title, (before, after) in body["figures"].items()}
    return Changes(str(body["version"]), settings, figures)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of every setting; a list is one value, unless it is of sections."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            label = inner.get("name", number) if isinstance(inner, Mapping) else number
            yield from _leaves(inner, f"{name}.{label}")
    else:
        yield name, value
