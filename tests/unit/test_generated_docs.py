"""docs/cli.md, docs/configuration.md, the tables of failures and of fields, and docs/llms.txt are what commands,
settings, diagnoses, types and pages of today give."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Annotated, Any, Literal, NotRequired

import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from tests.fixtures import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The module that generates the pages."""
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generator: ModuleType) -> dict[str, str]:
    """The pages, generated anew."""
    content: dict[str, str] = generator.pages()
    return content


PAGES = ("cli.md", "configuration.md", "errors.md", "formats.md", "llms.txt")
# Headers of tables on the page of formats that list other things than fields.
LISTS = ("path", "place", "file", "name", "what", "scorer", "gate", "reason")
# Tables of fields that are written by hand: (heading, first header), with the reason.
BY_HAND = {
    (
        "Statement",
        "field",
    ): "in-toto and SLSA define the fields, and the rows tell entries of a list apart by their name",
    ("Run folder", "event"): "a row for each kind of line",
    ("pretrain and midtrain", "line"): "a row for each kind of line, whose fields depend on the model",
    ("filter", "column of `hashes`"): "the number of columns is a setting",
    ("Prediction", "field"): "constants, and the places of three generated tables",
    ("Ladder", "field"): "names of fields follow the law that is fitted",
    ("Mix", "field"): "names of fields are those of sources and domains",
}


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(pages: dict[str, str], name: str) -> None:
    is_current = (DOCS / name).read_text(encoding="utf-8") == pages[name]
    assert is_current, f"docs/{name} is not what docs/generate.py gives today; run it and commit the page"


@pytest.mark.parametrize("name", ["cli.md", "configuration.md"])
def test_headings_are_distinct(pages: dict[str, str], name: str) -> None:
    """A link to a heading that occurs twice leads to the first one only."""
    headings = Counter(re.findall(r"^#+ (.+)$", pages[name], re.MULTILINE))
    assert [heading for heading, count in headings.items() if count > 1] == []


def test_every_command_and_section_has_a_heading(pages: dict[str, str]) -> None:
    assert {"## Check", "### atom plan", "### atom run", "### atom verify"} <= set(pages["cli.md"].splitlines())
    headings = {"## Recipe", "## Data recipe", "## Cluster profile", "### pretrain.batch", "### sources.reader: jsonl"}
    assert headings <= set(pages["configuration.md"].splitlines())


def _tables(page: str) -> list[tuple[str, str]]:
    """Returns (heading, first header) of each table of a page that is not generated."""
    tables, heading, is_generated = [], "", False
    for line, following in pairwise(page.splitlines()):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("<!--"):
            is_generated = line.startswith("<!-- Generated")
        elif line.startswith("|") and re.fullmatch(r"[| -]+", following) and not is_generated:
            tables.append((heading, line.split("|")[1].strip()))
    return tables


def test_tables_of_fields_are_generated_or_have_a_reason() -> None:
    """The code can contradict a table by hand."""
    tables = _tables((DOCS / "formats.md").read_text(encoding="utf-8"))
    of_fields = {table for table in tables if table[1] not in LISTS}
    assert of_fields == set(BY_HAND), "generate a table of fields from its type (see the marks), or state the reason"


def test_a_table_by_hand_is_found() -> None:
    page = (
        "# A\n\n| field | b |\n|---|---|\n\n<!-- Generated -->\n| generated |\n| --- |\n<!-- End -->\n\n| c |\n|---|\n"
    )
    assert _tables(page) == [("A", "field"), ("A", "c")]


class Column(TypedDict):
    id: Annotated[str | None, "string"]
    """the id"""


class Part(TypedDict):
    path: str
    """path"""
    size: NotRequired[int | None]
    """its
    size"""


class Model(BaseModel):
    parts: tuple[Part, ...] | None = None
    """the parts"""
    others: dict[str, Any]
    """the others"""


@dataclass
class Entry:
    """An entry.

    Attributes:
        kind: Its kind.
        figures: SHA-256 of each | by
            name and place.
        model: A model.
        hidden: Not in the file.
    """

    kind: Literal["a", "b"]
    figures: dict[str, dict[str, float]]
    model: Model
    hidden: str = field(default="", repr=False)


class Bare(TypedDict):
    path: str


@pytest.mark.parametrize(
    ("owner", "file", "rows"),
    [
        (Column, "", ["| column | type | meaning |", "| `id` | string, nullable | the id |"]),
        (Part, "x.parquet", ["| column of `x.parquet` | type | meaning |", "| `path` | str | path |"]),
        (
            Part,
            "parts[]",
            ["| field of `parts[]` | type | meaning |", "| `size` | int, nullable, optional | its size |"],
        ),
        (
            Model,
            "",
            ["| `parts` | list of `{path, size?}`, nullable | the parts |", "| `others` | object | the others |"],
        ),
        (Entry, "", ["| `kind` | `a`, `b` | its kind |", "| `model` | object | a model |"]),
        (Entry, "", ["| `figures` | mapping to mapping to float | SHA-256 of each \\| by name and place |"]),
    ],
)
def test_fields_of_a_type(generator: ModuleType, owner: type, file: str, rows: list[str]) -> None:
    (table,) = generator.fields_of(owner, file)

    assert set(rows) <= set(table.splitlines())
    assert "hidden" not in table


def test_a_subclass_has_its_own_fields_before_those_of_its_base(generator: ModuleType) -> None:
    from stages.evaluation.scores import ComparisonScores

    (table,) = generator.fields_of(ComparisonScores, "")

    assert [line.split("`")[1] for line in table.splitlines()[2:5]] == ["model", "before", "win_rate"]


def test_a_field_without_a_meaning_is_refused(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"Bare.path has no text below it"):
        list(generator.fields_of(Bare, ""))
