"""The page of a release: made again with the same bytes, verified, harmless, of bounded size, and shown by a browser."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.core.errors import AtomError
from release.assembly import build_release as builder
from release.checks.formats import formats
from release.facts.published_tables import read_rows
from release.layout import PAGE, SITE
from release.opened_release import Release
from release.untrusted import scan
from release.web_page import page as web_page
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
    web_page.write(Release(built), tmp_path / SITE)
    first = contents(built / SITE)
    assert contents(tmp_path / SITE) == first and first.keys() == {"index.html"}
    verdict = verify(built)
    assert [check.ok for check in verdict.checks if check.name == "page"] == [True], verdict.to_json()
    assert builder.rewrite_page(copy) is False
    (copy / PAGE).write_bytes(first["index.html"].replace(b"prose", b"verse"))
    builder.write_checksums(copy)
    verdict = verify(copy)
    [wrong] = [check for check in verdict.checks if check.ok is False]
    assert (wrong.name, wrong.wrong) == ("page", [f"{PAGE} is not what the release gives"]), verdict.to_json()
    (copy / SITE / "more.md").write_text("more\n")
    builder.write_checksums(copy)
    assert f"{SITE}/more.md is no part of the page" in web_page.problems(Release(copy))
    assert builder.rewrite_page(copy) is True and verify(copy).ok and contents(copy / SITE) == first
    shutil.rmtree(copy / SITE)
    builder.write_checksums(copy)
    assert [c.detail for c in verify(copy).checks if c.ok is False] == [
        f"{SITE}/index.html is missing, and the evidence repository has it"
    ]
    (copy / "model.sig").write_text("{}")
    with pytest.raises(AtomError, match="is signed, and another page would break the signature of its root"):
        builder.rewrite_page(copy)


def test_a_page_is_allowed_in_its_place_only(tmp_path: Path) -> None:
    places = ["site/index.html", "site/other.js", "site/search/a.js", "model/a.js", "dataset/index.html"]
    for path in places:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x\n")
    files = scan(tmp_path, 10).files
    refused = [f"{path} is of a kind that a release does not hold" for path in places[1:]]
    assert sorted(formats(tmp_path, files, True)) == sorted(refused)
    assert len(formats(tmp_path, files, False)) == len(places), "a repository of weights or data has no page"


def test_hostile_documents_do_nothing(hostile: Path, tmp_path: Path) -> None:
    """Neither where the page is made nor where a browser shows it; the release verifies with them."""
    verdict = verify(hostile, deep=True)
    assert verdict.ok, verdict.to_json()
    text = (hostile / PAGE).read_text()
    assert "<script" not in text and 'onerror="' not in text and "\u202e" not in text and "\0" not in text
    assert "&lt;/script&gt;" in text and len(text) < 2_000_000, "a huge line is cut"
    process = browse((hostile / PAGE).as_uri(), tmp_path)
    document = process.stdout
    assert "Content Security Policy" not in process.stderr and "Refused to" not in process.stderr, process.stderr
    assert "Uncaught" not in process.stderr, process.stderr
    title = re.search("<title>(.*)</title>", document, re.DOTALL)
    assert title and title[1].startswith("tiny &lt;/script") and "<script" not in document
    assert document.count("<img") == text.count('<img src="data:image/png;base64,') > 1
    assert 'href="javascript' not in document


def test_every_link_leads_to_a_file(hostile: Path, built: Path) -> None:
    for release in (built, hostile):
        page = (release / PAGE).read_text()
        links = set(re.findall(r'href="\.\./([^"]*)"', page))
        assert len(links) > 20
        assert [link for link in sorted(links) if not (release / unquote(html.unescape(link))).exists()] == []
        assert not re.search(r'(src|href)="(?!\.\./|#|data:image/png;)', page), "nothing is loaded from elsewhere"


def test_a_page_does_not_grow_with_the_documents(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the documents, of which many are removed, change its size by less than a twentieth."""
    few = release_fixtures.corpus()

    def many() -> dict[str, list[dict[str, Any]]]:
        return {
            source: [
                *rows,
                *(
                    {**row, "id": f"{row['id']}/{n}", "text": (text := f"{row['text']} {n}"),
                     "content_hash": release_fixtures.sha(text)}
                    for row in rows[:4]
                    for n in range(300)
                ),
            ]
            for source, rows in few.items()
        }  # fmt: skip

    monkeypatch.setattr(release_fixtures, "corpus", many)
    release = builder.build(release_fixtures.build_input(tmp_path / "run", parts=2), tmp_path / "home")
    documents = sum(len(read_rows(path)) for path in (release / "dataset/dispositions").rglob("*.parquet"))
    assert documents > 100 * sum(map(len, few.values()))
    sizes = [(folder / PAGE).stat().st_size for folder in (built, release)]
    assert abs(sizes[1] - sizes[0]) < sizes[0] / 20, sizes


def test_a_document_shows_what_saw_it(built: Path) -> None:
    """The steps of the shown documents are those of the orders."""
    text = (built / PAGE).read_text()
    section = html.unescape(text[text.index('id="documents"') : text.index('id="curves"')])
    shown = re.findall(r'<pre tabindex="0">(\S+)\n', section)
    assert shown
    for id in shown:
        for order in (built / "dataset/order").iterdir():
            rows = [row for path in order.glob("*.parquet") for row in read_rows(path)]
            steps = {row["step"] for row in rows if row["id"] == id}
            read = re.search(rf"^{re.escape(id)}$(?:\n  .*)*?\n  read in {order.name}, steps ([\d, -]+)", section, re.M)
            assert bool(steps) == bool(read)
            if read:
                spans = [[int(n) for n in span.split("-")] for span in read[1].strip().split(", ")]
                assert steps == {n for span in spans for n in range(span[0], span[-1] + 1)}
