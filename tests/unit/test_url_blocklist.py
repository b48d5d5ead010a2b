"""The URL blocklist: what an entry blocks, lines that are no entries, its place among the rules, and its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, sha256_bytes
from stages.data.curate import filter_stage, url_blocklist
from stages.data.curate.url_blocklist import URL_BLOCKLIST, UrlBlocklist
from stages.data.recipe import load
from stages.formats.table import part_files, stream_parts
from tests.fixtures.opt_out_fixtures import Text, acquired, no_items, write_deny_list


def list_of(*lines: str) -> UrlBlocklist:
    return UrlBlocklist((f"line {number}", line.encode()) for number, line in enumerate(lines, 1))


@pytest.mark.parametrize(
    ("entry", "origin", "match"),
    [
        ("example.org", "https://example.org", "example.org"),
        ("example.org", "HTTP://example.org/", None),  # no URL that the deny-list knows either
        ("www.Example.ORG.", "http://a.b.EXAMPLE.org:8080/x?y=1#z", "example.org"),
        ("example.org  # adult", "https://example.org/x", "example.org"),
        ("blog.example.org", "https://example.org/x", None),
        ("ample.org", "https://example.org/x", None),
        ("bücher.example", "https://xn--bcher-kva.example/a", "xn--bcher-kva.example"),
        ("127.0.0.1", "http://127.0.0.1/a", "127.0.0.1"),
        ("0.0.1", "http://127.0.0.1/a", None),
        ("example.org", "a file of example.org", None),
        ("example.org", "https://[bad", None),
        ("https://example.org/wiki/User:", "http://www.example.org/wiki/User:Ann", "example.org/wiki/User:"),
        ("example.org/wiki/User:", "https://de.example.org/wiki/User:Ann", None),
        ("example.org/forum/", "https://example.org/forum/?page=2", "example.org/forum/"),
        ("example.org/forum/", "https://example.org/forum-rules", None),
        ("example.org/forum", "https://example.org/forum-rules", "example.org/forum"),
        ("example.org/a%20b", "https://example.org/a b/c", "example.org/a%20b"),
        ("example.org/?id=1", "https://example.org?id=17", "example.org/?id=1"),
        ("https://example.org", "https://example.org?x", "example.org/"),
        ("https://example.org/", "https://sub.example.org/", None),
        ("https://example.org/", "https://example.organic/", None),
    ],
)
def test_an_entry_blocks_a_host_or_the_beginning_of_an_address(entry: str, origin: str, match: str | None) -> None:
    assert list_of("# a comment", "other.example", entry, "  ").find(origin) == match


def test_of_several_entries_the_broadest_is_the_match() -> None:
    entries = list_of("example.org/a/b", "example.org/a")
    assert entries.find("https://example.org/a/b/c") == "example.org/a"
    assert list_of("example.org/a", "example.org").find("https://example.org/a") == "example.org"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"0.0.0.0 example.org", "0.0.0.0 example.org has a space"),
        (b"*.example.org", "is no host, such as example.org"),
        (b"||example.org^", "is no host"),
        (b"example.org:80", "is no host"),
        (b"ftp://example.org/a", "does not start with http:// or https://"),
        (b"/wiki", "is no URL with a host"),
        (b"https://jane:pass@a.example/", "holds a user name"),
        (b"a.example/x#y", "has a fragment; leave it out"),
        (b"b\xfccher.example", "is not UTF-8"),
        (b"a.example/" + b"x" * 30_000, "at most 20000"),
        (b"\x1b[31m", "is no host"),
    ],
)
def test_another_line_is_one_sentence_with_its_number(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "blocklist.txt"
    path.write_bytes(b"# hosts of b\xfccher\n\na.example\r\n" + line + b"\n")
    with pytest.raises(RecipeError) as error:
        URL_BLOCKLIST.digest_of(path)
    message = str(error.value)
    assert message.startswith(f"URL blocklist {path}, line 4: ") and problem in message and message.isprintable()


def test_a_list_of_too_many_entries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_blocklist, "MOST_ENTRIES", 1)
    with pytest.raises(RecipeError, match="line 3: more than 1 entries; name hosts"):
        list_of("a.example", "# b.example", "b.example")


PAGES = {
    "host": Text("one text", "https://a.blocked.example/1"),
    "page": Text("another text", "https://open.example/spam/1"),
    "denied": Text("a third text", "https://blocked.example/2"),
    "open": Text("a fourth text", "https://open.example/1"),
    "file": Text("a fifth text", "blocked.example/1.txt"),
}
LIST = b"# known answers\nblocked.example\nopen.example/spam\n"


def config_of(**curation: Any) -> dict[str, Any]:
    sources = [{"name": "web", "kind": "prose", "license_allow": ["MIT"]}, {"name": "notes", "kind": "prose"}]
    return {"sources": sources, "curation": {"minhash": None, **curation}, "seed": 0}


def rules_of(artifact: Artifact) -> dict[str, tuple[str | None, str | None]]:
    columns = ["id", "rule", "match"]
    rows = stream_parts(part_files(artifact.path, "dispositions/web"), columns)
    return {row["id"].removeprefix("web/"): (row["rule"], row["match"]) for row in rows}


def test_blocked_documents_have_a_rule_of_their_own_before_licenses_and_after_requests(
    tmp_path: Path, run_stage: Any
) -> None:
    (tmp_path / "blocklist.txt").write_bytes(LIST)
    digest = f"sha256:{sha256_bytes(LIST)}"
    blocklist = {"url_blocklist": str(tmp_path / "blocklist.txt"), "url_blocklist_sha256": digest}
    denied = write_deny_list(tmp_path / "deny.jsonl", {"request": "a", "id": "web/denied"})
    deny_list = {"deny_list": str(tmp_path / "deny.jsonl"), "deny_list_sha256": denied}
    notes = acquired(tmp_path, "notes", [{"note": Text("a note")}])
    inputs = {"web": acquired(tmp_path, "web", [PAGES]), "notes": notes, "items": no_items(tmp_path)}
    config = config_of(**blocklist, **deny_list)
    artifact = run_stage(filter_stage.STAGE, config, inputs)
    rules = rules_of(artifact)
    assert rules.pop("denied")[0] == "opt_out"
    assert rules == {
        "host": ("url_blocklist", "blocked.example"),
        "page": ("url_blocklist", "open.example/spam"),
        "open": ("license/not-allowed", None),
        "file": ("license/not-allowed", None),
    }
    (tmp_path / "kept").mkdir()
    many = {f"{n}": Text(f"text {n}", f"https://{'blocked' if n else 'open'}.example/{n}") for n in range(20)}
    inputs["web"] = acquired(tmp_path / "kept", "web", [many])
    with pytest.raises(
        AtomError, match="source web: url_blocklist removes 19 of 20 documents, a larger share than 0.5"
    ):
        run_stage(filter_stage.STAGE, config_of(**blocklist), inputs)
    (tmp_path / "blocklist.txt").write_bytes(LIST + b"c.example\n")
    with pytest.raises(RecipeError, match="URL blocklist .* changed after the run was planned"):
        run_stage(filter_stage.STAGE, config, inputs)


RECIPE = {
    "name": "corpus", "description": "notes", "curation": {"url_blocklist": "lists/blocklist.txt"},
    "sources": [
        {
            "name": "notes", "kind": "prose", "license": "CC0-1.0", "license_evidence": "here", "origin": "here",
            "reader": {"reader": "jsonl", "path": "notes.jsonl"},
        }
    ],
}  # fmt: skip


def test_the_digest_of_the_list_is_in_the_key_and_its_path_is_not(tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n')
    recipe = load(tmp_path / "corpus.yaml")
    path = tmp_path / "lists/blocklist.txt"
    with pytest.raises(RecipeError, match="URL blocklist .* cannot be read .*; check curation.url_blocklist"):
        recipe.resolved()
    assert recipe.present()[1] == (
        f"no URL blocklist at {path}; put it there before running; keys below are provisional",
    )
    path.parent.mkdir()
    path.write_bytes(LIST)
    config = filter_stage.FilterConfig.model_validate(recipe.resolved().filter_config(0))
    assert config.curation.url_blocklist == str(path)
    assert identity(config)["curation"]["url_blocklist_sha256"] == f"sha256:{sha256_bytes(LIST)}"
    assert "url_blocklist" not in identity(config)["curation"]
    assert recipe.present()[0].curation == recipe.resolved().curation
    pin = {"url_blocklist_sha256": "sha256:" + "0" * 64}
    pinned = recipe.model_copy(update={"curation": recipe.curation.model_copy(update=pin)})
    with pytest.raises(RecipeError, match="curation.url_blocklist_sha256 is pinned to sha256:0000"):
        pinned.resolved()
    path.write_bytes(LIST + b"no host\n")
    with pytest.raises(RecipeError, match="line 4: no host has a space"):
        recipe.present()
    (tmp_path / "corpus.yaml").write_text(yaml.safe_dump({**RECIPE, "curation": {}}))
    without = filter_stage.FilterConfig.model_validate(load(tmp_path / "corpus.yaml").resolved().filter_config(0))
    assert not any("blocklist" in name for name in identity(without)["curation"]), "keys without a list stay"
