"""docs/cli.md, docs/configuration.md, the tables of failures, and docs/llms.txt are what commands, settings, diagnoses
and pages of today give."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter

import pytest

from tests.fixtures import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The pages, generated anew."""
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    content: dict[str, str] = module.pages()
    return content


PAGES = ("cli.md", "configuration.md", "errors.md", "llms.txt")


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
