"""Works are held out as a whole: the readers name them, and the split follows from the name alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from stages.data.acquire.readers.packages import Packages
from stages.data.acquire.readers.python_stdlib import StdlibDocstrings, StdlibSource
from stages.data.acquire.readers.row_files import Jsonl
from stages.data.acquire.readers.web_pages import Warc
from stages.data.curate.settings import work_of
from stages.data.recipe import load

STDLIB = StdlibSource(reader="stdlib-source").work
PACKAGES = Packages(reader="packages", path="x", lock="x", content="code").work
WEB = Warc(reader="warc", path="x").work
DEBIAN, PYPI = "Debian 13 (trixie), main#", "Python Package Index, source distributions#"


@pytest.mark.parametrize(
    ("pattern", "id", "origin", "work"),
    [
        (STDLIB, "code/encodings/cp037.py:Codec.encode", "https://x/Lib/encodings/cp037.py", "encodings"),
        (STDLIB, "docstrings/ast.py:NodeVisitor.visit", "https://x/Lib/ast.py", "ast"),
        (
            PACKAGES,
            "manuals/apache2-doc_2.4.71-1_all.deb/usr/share/doc/apache2/a.html",
            f"{DEBIAN}pool/main/a/apache2/apache2-doc_2.4.71-1_all.deb:usr/share/doc/apache2/a.html",
            "apache2",
        ),
        (
            PACKAGES,
            "programs/linux-source-6.12_6.12.57-1_all.deb/usr/src/x.py",
            f"{DEBIAN}pool/updates/main/l/linux/linux-source-6.12_6.12.57-1_all.deb:usr/src/x.py",
            "linux",
        ),
        (
            PACKAGES,
            "programs/python3-attr_25.3.0-1_all.deb/usr/lib/python3/dist-packages/attr/x.py",
            f"{DEBIAN}pool/main/p/python-attrs/python3-attr_25.3.0-1_all.deb:usr/lib/python3/dist-packages/attr/x.py",
            "attrs",
        ),
        (PACKAGES, "p/attrs-26.1.0.tar.gz/a/x.py", f"{PYPI}packages/9a/8e/82a0/attrs-26.1.0.tar.gz:a/x.py", "attrs"),
        (WEB, "web/crawl.warc.gz:17", "https://docs.example.org:8080/a/b.html", "docs.example.org"),
        (WEB, "web/crawl.warc.gz:17", "no address", None),
    ],
)
def test_a_reader_names_the_work_of_a_document(pattern, id, origin, work):
    assert work_of(re.compile(pattern), id, origin) == work


def test_documents_of_rows_are_works_by_themselves():
    assert Jsonl(reader="jsonl", path="x", text_field="text").work == ""
    assert StdlibDocstrings(reader="stdlib-docstrings").work == STDLIB


def recipe(folder: Path, **settings: str) -> Path:
    lines = [f"{name}: {value}" for name, value in settings.items() if name != "work"]
    source = f"work: '{settings['work']}', " if "work" in settings else ""
    path = folder / "works.yaml"
    path.write_text(
        "name: works\ndescription: x\n" + "\n".join(lines) + "\nsources:\n"
        "  - {name: code, kind: code, license: MIT, license_evidence: x, origin: x, " + source +
        "reader: {reader: stdlib-source}}\n"
    )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({}, ""),
        ({"work": "x(.)"}, ""),
        ({"heldout_by": "work"}, STDLIB),
        ({"heldout_by": "work", "work": "x(.)"}, "x(.)"),
        ({"heldout_by": "work", "work": ""}, ""),
    ],
)
def test_a_recipe_decides_what_is_held_out(tmp_path, settings, pattern):
    loaded = load(recipe(tmp_path, **settings))

    assert loaded.dedup_config()["sources"][0]["work"] == pattern
    assert loaded.works == ({"code": pattern} if pattern else {})


def test_a_work_is_on_one_side_in_all_sources(tmp_path):
    path = recipe(tmp_path, heldout_by="work")
    other = "  - {name: other, heldout_fraction: 0.1, kind: code, license: MIT, license_evidence: x, origin: x, "
    path.write_text(path.read_text() + other + "reader: {reader: stdlib-source}}\n")

    with pytest.raises(RecipeError, match=r"heldout_fraction is 0\.05 and 0\.1 of sources with works"):
        load(path)


@pytest.mark.parametrize(("work", "message"), [("x.", "has no group"), ("x(", "is no regular expression")])
def test_a_pattern_that_names_no_work_is_refused(tmp_path, work, message):
    with pytest.raises(RecipeError, match=message):
        load(recipe(tmp_path, work=work))


def test_evaluation_knows_the_works(tmp_path):
    graph = dag.compose(recipes.load("atom-tiny"), Store(tmp_path))

    config = graph.nodes["evaluate-base"].config

    assert config.works == graph.recipe.data.works and set(config.works) == {"code", "docstrings"}
