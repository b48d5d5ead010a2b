"""The page of a release: made again with the same bytes, verified, harmless, and found right by a real browser."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.core.errors import AtomError
from release.assembly import build_release as builder
from release.assembly.published_tables import read_rows
from release.checks.formats import formats
from release.layout import SITE
from release.tree import scan
from release.web_page import search_index, site_files
from release.web_page.rewrite import rewrite
from release.web_page.script_parts import PartWriter
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.web_page_fixtures import browse, contents

ATTACK = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
TURNED = "\u202egnirts\u2066 \0end"
HUGE = "x" * 200_000


def corpus() -> dict[str, list[dict[str, Any]]]:
    """The corpus of the small release with hostile documents, origins and ids."""
    documents = CORPUS()
    for number, text in enumerate(
        (f"hostile {ATTACK}", f"hostile {TURNED}", f"hostile {HUGE}", f"hostile <!-- {ATTACK}")
    ):
        row = documents["prose"][1]
        documents["prose"].append(
            {**row, "id": f"prose/{number}{ATTACK}", "text": text, "origin": f"javascript:{ATTACK}",
             "content_hash": release_fixtures.sha(text), "split": "train", "rule": None}
        )  # fmt: skip
    documents["prose"][3]["id"] = f"prose/removed{ATTACK}"
    return documents


CORPUS = release_fixtures.corpus


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setattr(release_fixtures, "corpus", corpus)
    source = release_fixtures.build_input(tmp_path_factory.mktemp("run"), parts=2)
    source.recipe["description"] = f"A test. {ATTACK}"
    source.recipe["release"]["title"] = f"tiny {ATTACK}"
    release = builder.build(source, tmp_path_factory.mktemp("home"))
    patch.undo()
    return release


def test_the_page_is_made_again_with_the_same_bytes_and_verified(built: Path, copy: Path, tmp_path: Path) -> None:
    site_files.write(built, tmp_path / SITE)
    first = contents(built / SITE)
    assert contents(tmp_path / SITE) == first and {"index.html", "search/about.js", "search/terms-0.js"} <= first.keys()
    assert sum(map(len, first.values())) < 2_000_000
    verdict = verify(built, deep=True)
    assert {check.name: check.ok for check in verdict.checks if check.name.startswith("page")} == {
        "page": True, "page_search": True,
    }, verdict.to_json()  # fmt: skip
    assert rewrite(copy) is False
    for path, deep, name in (("index.html", False, "page"), ("search/documents-0.js", True, "page_search")):
        before = (copy / SITE / path).read_bytes()
        (copy / SITE / path).write_bytes(before.replace(b"prose", b"verse"))
        builder.write_checksums(copy)
        verdict = verify(copy, deep=deep)
        assert [c.name for c in verdict.checks if c.ok is False] == [name], verdict.to_json()
        assert [f"{SITE}/{path} is not what the release gives"] == next(
            c for c in verdict.checks if c.name == name
        ).wrong
        (copy / SITE / path).write_bytes(before)
    (copy / SITE / "outputs/more.js").write_text("atomPart('outputs/more', 1);\n")
    builder.write_checksums(copy)
    assert [c.detail for c in verify(copy).checks if c.ok is False] == [
        f"{SITE}/outputs/more.js is no part of the page"
    ]
    assert rewrite(copy) is True and verify(copy).ok and contents(copy / SITE) == first
    shutil.rmtree(copy / SITE)
    builder.write_checksums(copy)
    assert [c.detail for c in verify(copy).checks if c.ok is False] == [
        f"{SITE}/index.html is missing, and the evidence repository has it"
    ]
    (copy / "model.sig").write_text("{}")
    with pytest.raises(AtomError, match="is signed, and another page would break the signature of its root"):
        rewrite(copy)


def test_scripts_are_allowed_in_the_places_of_the_page_only(tmp_path: Path) -> None:
    places = ["site/index.html", "site/search/a.js", "site/other.js", "model/search/a.js", "dataset/index.html"]
    for path in places:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x\n")
    files = scan(tmp_path, 10).files
    refused = [f"{path} is of a kind that a release does not hold" for path in places[2:]]
    assert sorted(formats(tmp_path, files, True)) == sorted(refused)
    assert len(formats(tmp_path, files, False)) == len(places), "a repository of weights or data has no page"


def test_hostile_documents_do_nothing(hostile: Path, tmp_path: Path) -> None:
    """Neither where the page is made nor where a browser shows it; the release verifies with them."""
    verdict = verify(hostile, deep=True)
    assert verdict.ok, verdict.to_json()
    page = (hostile / SITE / "index.html").read_text()
    assert "<script>document" not in page and 'onerror="' not in page and page.count("<script") == 2
    for name, part in contents(hostile / SITE / "search").items():
        assert not set(part) & set(b"<>\0") and part.isascii() and part.count(b"\n") == 1, name
        assert len(part) < 60_000, "a huge line is cut"
    process = browse(f"{(hostile / SITE / 'index.html').as_uri()}#q=hostile", tmp_path)
    document = process.stdout
    assert "Content Security Policy" not in process.stderr and "Refused to" not in process.stderr, process.stderr
    assert "Uncaught" not in process.stderr, process.stderr
    title = re.search("<title>(.*)</title>", document, re.DOTALL)
    assert title and title[1].startswith("tiny &lt;/script") and "<img" not in document
    assert 'data-searched="hostile"' in document and document.count('<li><h4><bdi dir="auto">') == 4
    assert "[U+202E]" in document and "[U+0000]" in document and "\u202e" not in document
    hits = document[document.index('id="hits"') : document.index('id="search-more"')]
    assert "<script" not in hits and 'href="javascript' not in document
    assert "--doc 'prose/1&lt;/script&gt;&lt;script&gt;document.title='\\''hacked'\\''" in hits, "quoted for a shell"


def test_every_link_leads_to_a_file(hostile: Path, built: Path) -> None:
    for release in (built, hostile):
        page = (release / SITE / "index.html").read_text()
        links = set(re.findall(r'href="\.\./([^"]*)"', page))
        assert len(links) > 20
        assert [link for link in sorted(links) if not (release / unquote(html.unescape(link))).exists()] == []
        assert not re.search(r'(src|href)="(?!\.\./|#)', page), "nothing is loaded from elsewhere"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of 1,000 documents of random words, two scripts and some texts by reference."""
    release, draw = tmp_path_factory.mktemp("library"), random.Random(3)
    vocabulary = [*(f"word{n}" for n in range(200)), "Größe", "東京", "constructor", "toString", "x²", "É"]
    weights = [1 / (n + 1) for n in range(len(vocabulary))]
    for source in ("one", "two"):
        for part in range(2):
            kept: list[Any] = []
            for number in range(250):
                text = " ".join(draw.choices(vocabulary, weights, k=draw.randrange(1, 120)))
                text = None if source == "two" and number % 50 == 0 else text
                kept.append(
                    {"id": f"{source}/{part}/{number}", "text": text, "source": source, "license": "CC0-1.0",
                     "origin": "here", "content_hash": release_fixtures.sha(str(text)), "prompt_chars": 0,
                     "split": "heldout" if number % 10 == 0 else "train"}
                )  # fmt: skip
            for folder in ("kept", "dispositions", "tokens/documents"):
                (release / "dataset" / folder / source).mkdir(parents=True, exist_ok=True)
            release_fixtures.table(release / f"dataset/kept/{source}/part-{part:05}.parquet", kept)
            release_fixtures.table(release / f"dataset/dispositions/{source}/part-{part:05}.parquet", [{"id": ""}])
            release_fixtures.table(release / f"dataset/tokens/documents/{source}/part-{part:05}.parquet", [{"id": ""}])
    return release


def documents_of(release: Path) -> list[dict[str, Any]]:
    paths = sorted((release / "dataset/kept").glob("*/*.parquet"))
    return [row for path in paths for row in read_rows(path)]


def brute_force(documents: list[dict[str, Any]], query: str) -> list[list[int]]:
    """[number, score] of the documents with all words of a query, by reading every document."""
    counts = [Counter(search_index.words(search_index.searched_text(row))) for row in documents]
    mean = sum(count.total() for count in counts) / len(counts)
    wanted = sorted(set(search_index.words(query)))
    weight = {word: search_index.weight(sum(word in count for count in counts), len(counts)) for word in wanted}
    hits = [
        [n, sum(weight[word] * search_index.impact(count[word], count.total() / mean) for word in wanted)]
        for n, count in enumerate(counts)
        if wanted and all(word in count for word in wanted)
    ]
    return sorted(hits, key=lambda hit: (-hit[1], hit[0]))


QUERIES = [
    "word0", "word3 WORD7", "word1 word2 word5", "größe", "京", "東京 word0", "constructor", "tostring word1", "x²", "é",
    "two/1/50", "one cc0", "absent", "word0 absent", "!!", "word199 word198", "__proto__", "a" * 50,
]  # fmt: skip


def test_the_search_of_the_page_finds_what_brute_force_finds(built: Path, library: Path, tmp_path: Path) -> None:
    """The page's own script, in a browser, on queries one after the other."""
    shutil.copytree(built / SITE, tmp_path / SITE, ignore=shutil.ignore_patterns("search"))
    search_index.write(library, PartWriter(tmp_path / SITE))
    page = (tmp_path / SITE / "index.html").read_text()
    driver = (
        f"<script>(async () => {{ const all = []; for (const query of {json.dumps(QUERIES)}) all.push(await atomSearch(query));"
        "document.title = JSON.stringify(all); })();</script></body>"
    )
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", driver)
    (tmp_path / SITE / "driver.html").write_text(page)
    document = browse((tmp_path / SITE / "driver.html").as_uri(), tmp_path / "profile").stdout
    title = re.search("<title>(.*)</title>", document)
    assert title is not None
    documents = documents_of(library)
    expected = [brute_force(documents, query) for query in QUERIES]
    assert json.loads(html.unescape(title[1])) == expected
    assert len(expected[0]) > 300 and 0 < len(expected[2]) < 1000 and sum(map(bool, expected)) == 13, expected


def test_a_document_shows_what_saw_it(built: Path) -> None:
    """The steps of every document are those of the orders, by brute force."""
    parts = sorted((built / SITE / "search").glob("documents-*.js"), key=lambda path: int(path.stem.split("-")[1]))
    rows = [row for path in parts for row in json.loads(path.read_text().partition(",")[2].removesuffix(");\n"))]
    about = json.loads((built / SITE / "search/about.js").read_text().partition(",")[2].removesuffix(");\n"))
    steps: dict[tuple[str, str], set[int]] = {}
    for phase in about["phases"]:
        for path in sorted((built / "dataset/order" / phase).glob("*.parquet")):
            for row in read_rows(path):
                steps.setdefault((row["id"], phase), set()).add(row["step"])
    shown = {(row[0], about["phases"][phase]): (count, first) for row in rows for phase, count, first in row[7]}
    assert steps.keys() == shown.keys() and len(shown) == 8
    for key, (count, first) in shown.items():
        assert count == len(steps[key]) and [abs(step) for step in first] == sorted(steps[key])[: len(first)]
    assert not any(row[7] for row in rows if row[4]), "held-out documents were not read"


def test_many_documents_are_a_sample_by_their_hashes(library: Path, tmp_path: Path) -> None:
    search_index.write(library, PartWriter(tmp_path), most=300)
    about = json.loads((tmp_path / "search/about.js").read_text().partition(",")[2].removesuffix(");\n"))
    assert about["of"] == 1000 and 230 < about["documents"] < 370
