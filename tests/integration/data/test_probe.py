"""`atom pin` reads a sample of each source by ranges, runs its reader and its steps on it, and says what is wrong."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from starlette.responses import JSONResponse, Response

from pipeline.core.errors import AtomError
from pipeline.core.store import Store, sha256_file, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.graph.supply import SourceSupply
from pipeline.hub import client
from release.commands import pinning as command
from release.web_page import page
from stages.data import pinning, probing
from stages.data.acquire import acquire_stage, hub_files, hub_samples
from stages.data.acquire.source_probe import Probe
from stages.data.curate import filter_stage
from stages.data.recipe import load
from stages.data.supply import SupplySection, supplies
from stages.formats import tokenizer
from stages.formats.table import ITEMS, write_rows
from tests.fixtures.hub_fixtures import Hub
from tests.fixtures.package_fixtures import lock_folder, sdist_of

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "small", "boats", "sail")
LICENSES = ("CC0-1.0", "MIT", "As is")
TOKEN = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


def text(seed: int, words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + f" {seed}."


def gz(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


def parquet(rows: list[dict[str, Any]], group: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group, compression="none")
    return buffer.getvalue()


def pages(seed: int, count: int = 60, license: Any = None) -> list[dict[str, Any]]:
    """Rows of one file; every third has a license that no map knows."""
    return [
        {"text": text(1000 * seed + n), "meta": {"license": LICENSES[n % 3] if license is None else license}, "n": n}
        for n in range(count)
    ]


def source(name: str, **reader: Any) -> dict[str, Any]:
    settings = {"reader": "hub", "repo": f"local/{name}", "pattern": "*.gz", "format": "jsonl", **reader}
    return {
        "name": name, "kind": "prose", "license": "LicenseRef-by-document", "license_evidence": "the card",
        "origin": "here", "reader": settings,
    }  # fmt: skip


def recipe(folder: Path, *sources: dict[str, Any]) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "description": "test", "sources": list(sources)}))
    return path


def probed(path: Path) -> tuple[dict[str, Probe], str]:
    """The probes of the lock file after `pin`, and the sentence that it ended with."""
    failure = ""
    try:
        list(pinning.pin(path))
    except AtomError as error:
        assert error.exit_code == 2
        failure = str(error)
    locked = hub_files.read(recipes.lock_of(path))
    return {name: entry.probe for name, entry in locked.items() if entry.probe}, failure


def test_figures_of_a_sample_are_those_of_the_source(hub: Hub, tmp_path: Path) -> None:
    """Of a source that is read as a whole they are exact; of a larger one the truth is in the interval; a later plan has
    the sizes, until the settings change."""
    rows = [row for n in range(3) for row in pages(n)]
    rows[1]["text"] += f" {TOKEN}"
    rows[3]["text"] = rows[0]["text"]
    rows[60]["n"] = ["a", 1]
    hub.add("local/web", {f"{n}.json.gz": gz(rows[60 * n : 60 * n + 60]) for n in range(3)})
    books = [{"text": text(n, 400), "license": "MIT", "other": "x" * 5000} for n in range(3000)]
    hub.add("local/books", {"a.parquet": parquet(books[:2000], 50), "b.parquet": parquet(books[2000:], 50)})
    web = source("web", license_field="meta.license") | {"license_allow": ["CC0-1.0"], "heldout_fraction": 0.5}
    web["acknowledged_removals"] = {"license": 0.7}
    stored = source("books", pattern="*.parquet", format="parquet", license_field="license")
    path = recipe(tmp_path, web, stored)

    probes, failure = probed(path)

    assert failure == ""
    probe = probes["web"]
    assert (probe.sampled, probe.pieces, probe.sampled_documents, probe.documents) == ("heads", 3, 180, 180)
    assert {rule: row.documents for rule, row in probe.removed.items()} == {
        "license/unmapped": 60, "license/not-allowed": 60, "exact_duplicate": 1,
    }  # fmt: skip
    kept = sum(len(row["text"].encode()) for n, row in enumerate(rows) if n % 3 == 0 and n != 3)
    assert (probe.kept_low, probe.kept_bytes, probe.kept_high) == (kept, kept, kept)
    assert {(row.string, row.license, round(row.share, 3)) for row in probe.licenses} == {
        ("CC0-1.0", "CC0-1.0", 0.333), ("MIT", "MIT", 0.333), ("As is", "", 0.333),
    }  # fmt: skip
    assert probe.languages == {"en": 1.0}
    assert probe.fields == {"text": "str", "meta": "object of license", "n": "int|list"}

    large, true_bytes = probes["books"], sum(len(row["text"].encode()) for row in books)
    assert (large.sampled, large.pieces) == ("row groups", 10) and large.sampled_documents < 1000
    assert large.kept_low is not None and large.kept_high is not None
    assert large.kept_low <= true_bytes <= large.kept_high < 1.1 * true_bytes
    assert large.documents == pytest.approx(3000, rel=0.05)
    # The column that no setting names is most of the files, and is not requested.
    assert hub.sent["a.parquet"] + hub.sent["b.parquet"] < 5_000_000 < 3000 * 5000
    assert large.fields["other"] == "string"

    # What filter would stop at, `pin` says, without another sample.
    hub.sent.clear()
    _, failure = probed(recipe(tmp_path, web | {"acknowledged_removals": {"license": 0.6}}))
    assert failure.startswith("source web: license removes 120 of 180 documents, a larger share than 0.6")
    assert not [name for name in hub.sent if name.endswith(".gz")]
    probed(path := recipe(tmp_path, web, stored))

    loaded = {each.name: each for each in load(path).resolved().sources}
    assert loaded["web"].expected is not None and loaded["web"].expected.documents == 180
    for change in ({"license_allow": ["MIT"]}, {"bytes_per_token": 3.0}, {"steps": [{"step": "language"}]}):
        changed = load(recipe(tmp_path, web | change, stored)).resolved().sources[0]
        assert changed.expected is None, change
    assert load(recipe(tmp_path, web | {"heldout_fraction": 0.1}, stored)).sources[0].probe == probe


@pytest.mark.parametrize(("suffix", "head"), [("", 2**16), (".gz", 2**16), (".zst", 2**18)])
def test_the_beginning_of_a_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, head: int
) -> None:
    """Of a larger file only its beginning is requested, and the rest is estimated from it; its last line may lack an end.
    Zstandard's blocks are large, so that more of them are read here."""
    monkeypatch.setattr(hub_samples, "HEAD_BYTES", head)
    monkeypatch.setattr(hub_samples, "PIECE_BYTES", 2**14)
    rows: list[dict[str, Any]] = [{"text": text(n, 30), "meta": {"license": "MIT"}} for n in range(12_000)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    compressed = {"": lines, ".gz": gzip.compress(lines, mtime=0), ".zst": pa.compress(lines, "zstd", asbytes=True)}
    short = b'{"text": "one"}\n{"text": "two"}'
    hub.add("local/web", {f"a.jsonl{suffix}": compressed[suffix]})
    hub.add("local/short", {"b.jsonl": short})

    probes, failure = probed(recipe(tmp_path, source("web", pattern="*.jsonl*"), source("short", pattern="*.jsonl")))

    probe, total = probes["web"], sum(len(row["text"].encode()) for row in rows)
    assert failure == "" and probes["short"].documents == probes["short"].kept_documents == 2
    assert hub.sent[f"a.jsonl{suffix}"] == head < len(compressed[suffix])
    assert 50 < probe.sampled_documents < 150 and (probe.kept_low, probe.kept_high) == (None, None)
    assert probe.documents == pytest.approx(12_000, rel=0.1) and probe.kept_bytes == pytest.approx(total, rel=0.1)


def local(name: str, **reader: Any) -> dict[str, Any]:
    return source(name) | {"reader": {"path": name, **reader}}


def packages(name: str, folder: Path) -> dict[str, Any]:
    return local(name, reader="packages", path=str(folder), lock=str(lock_folder(folder)), content="documentation")


def test_sources_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read and curated as by a run; a folder that is missing has a sentence; what is drawn has no files."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    for name in ("lines", "tables", "sdists", "more", "empty", "cut", "unreadable"):
        (tmp_path / name).mkdir()
    rows = [*pages(0), {**pages(0)[0], "n": -1}, {**pages(1)[0], "text": f"A key: {TOKEN}"}]
    for n, part in enumerate((rows[:40], rows[40:])):
        (tmp_path / f"lines/{n}.jsonl.gz").write_bytes(gz(part))
    (tmp_path / "tables/a.parquet").write_bytes(parquet(pages(2), 20))
    sdist = {"PKG-INFO": "License-Expression: MIT\n\n"} | {f"doc/{n}.txt": text(n) for n in range(20)}
    (tmp_path / "sdists/a-1.tar.gz").write_bytes(sdist_of("a-1", sdist))
    (tmp_path / "sdists/b-1.tar.gz").write_bytes(sdist_of("b-1", {"PKG-INFO": "License: Mine\n\n", "doc/a.md": "# A"}))
    (tmp_path / "more/c-1.tar.gz").write_bytes(sdist_of("c-1", sdist))
    absent = packages("absent", tmp_path / "more")
    (tmp_path / "more/c-1.tar.gz").unlink()
    (tmp_path / "empty/a.jsonl").write_text("")
    (tmp_path / "unreadable/a.jsonl").symlink_to("/proc/self/mem")
    (tmp_path / "cut/d-1.tar.gz").write_bytes(sdist_of("d-1", sdist))
    drawn = {"reader": "problems", "tasks": {"add": 1.0}, "form": "plain", "count": 9}
    path = recipe(
        tmp_path,
        local("lines", reader="jsonl", license_field="meta.license") | {"heldout_fraction": 0.5},
        local("tables", reader="parquet", license_field="meta.license"),
        packages("sdists", tmp_path / "sdists"),
        absent,
        local("empty", reader="jsonl"),
        packages("cut", tmp_path / "cut"),
        local("unreadable", reader="jsonl"),
        source("drawn") | {"kind": "problems", "license": "MIT", "reader": drawn},
    )
    (tmp_path / "cut/d-1.tar.gz").write_bytes(b"another file")

    with pytest.raises(AtomError) as caught:
        list(pinning.pin(path))
    lock = recipes.lock_of(path)
    entries = hub_files.read_local(lock)
    probes = {name: entry.probe for name, entry in entries.items() if entry.probe}

    assert str(caught.value).startswith(f"source absent: no package c-1.tar.gz at {tmp_path}/more; ")
    assert "fetch them by `python -m stages.data.acquire.packages.fetch locked LOCK FOLDER`" in str(caught.value)
    assert str(caught.value).endswith("; …; 3 of 7 sources are in order") and caught.value.exit_code == 2
    assert str(tmp_path) not in lock.read_text() and not hub_files.read(lock)
    assert probes["empty"].problem == "source empty: its sample has no document; check its reader"
    assert probes["cut"].problem == "source cut: …/d-1.tar.gz is not the file that …/cut.lock.yaml pins; fetch it again"
    lines = probes["lines"]
    assert (lines.sampled, lines.pieces, lines.documents, lines.secrets, lines.duplicates) == ("heads", 2, 62, 1, 1)
    assert {rule: row.documents for rule, row in lines.removed.items()} == {
        "license/unmapped": 20, "secrets/github_token": 1, "exact_duplicate": 1,
    }  # fmt: skip
    kept = sum(len(row["text"].encode()) for n, row in enumerate(pages(0)) if n % 3 < 2)
    assert (lines.kept_low, lines.kept_bytes, lines.kept_high) == (kept, kept, kept)
    assert lines.fields == {"text": "str", "meta": "object of license", "n": "int"} and lines.languages["en"] > 0.99
    assert probes["tables"].documents == 60 and probes["tables"].fields["text"] == "string"
    sdists = probes["sdists"]
    assert (sdists.sampled, sdists.pieces, sdists.documents, sdists.kept_documents) == ("files", 2, 21, 20)
    assert {row.license: row.share for row in sdists.licenses} == {"MIT": 0.952381, "": 0.047619}
    assert sdists.removed["license/unmapped"].documents == 1

    before = lock.read_bytes()
    with pytest.raises(AtomError):
        list(pinning.pin(path))
    assert lock.read_bytes() == before
    asked = {"pretrain": {"lines": 10.0, "sdists": 10.0, "drawn": 10.0}}
    supply = {row.source: row for row in supplies(SupplySection(), load(path), asked)}
    assert [supply[name].basis for name in asked["pretrain"]] == ["probed", "probed", "computed"]
    assert supply["lines"].tokens == lines.kept_tokens / 2 and not supply["lines"].lacks_probe
    report = tmp_path / "report.html"
    with pytest.raises(AtomError):
        command.pin(str(path), report=report, no_sample=True, as_json=True)
    assert "<td>files here</td>" in report.read_text()

    # With other files, the probe is not that of the source.
    (tmp_path / "lines/1.jsonl.gz").write_bytes(gz(pages(3)))
    assert load(path).sources[0].probe is None and load(path).sources[1].probe == probes["tables"]
    with pytest.raises(AtomError):
        list(pinning.pin(path))
    assert (again := load(path).sources[0].probe) and again.documents == 100
    pinned = local("lines", reader="jsonl") | {"tree_digest": entries["lines"].tree_digest}
    with pytest.raises(AtomError, match="source lines: tree_digest is pinned to sha256:.* but the 2 files here give "):
        list(pinning.pin(recipe(tmp_path, pinned)))


@pytest.mark.parametrize(("name", "most"), [("sdists", 2**14), ("web", 2**16)])
def test_a_part_of_large_files_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """Of packages, a random share of the members is read; of WARC files the first pages, and the rest by their size."""
    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probing, "PIECE_TEXT", most)
    folder = tmp_path / name
    folder.mkdir()
    for part in range(3):
        texts = [text(1000 * part + n, 400) for n in range(150)]
        if name == "sdists":
            files = {f"doc/{n}.txt": each for n, each in enumerate(texts)}
            content = sdist_of(f"a-{part}", {"PKG-INFO": "License-Expression: MIT\n\n", **files})
            (folder / f"a-{part}.tar.gz").write_bytes(content)
        else:
            (folder / f"{part}.warc").write_bytes(b"".join(map(page_record, texts)))
    described = packages(name, folder) if name == "sdists" else local(name, reader="warc")

    list(pinning.pin(path := recipe(tmp_path, described)))

    probe = hub_files.read_local(recipes.lock_of(path))[name].probe
    assert probe is not None and (probe.pieces, probe.problem) == (3, "")
    assert 60 < probe.sampled_documents < 300 and probe.documents == pytest.approx(450, rel=0.2)
    assert probe.kept_low is not None and probe.kept_high is not None
    assert probe.kept_low < probe.kept_bytes < probe.kept_high


def page_record(body: str) -> bytes:
    """A page of a WARC file."""
    html = f"<html><body><article><p>{body}</p></article></body></html>".encode()
    content = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html
    header = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://a.example/{len(html)}\r\n"
    header += f"Content-Type: application/http\r\nContent-Length: {len(content)}\r\n\r\n"
    return header.encode() + content + b"\r\n\r\n"


def test_a_second_pin_requests_no_sample_again(hub: Hub, tmp_path: Path) -> None:
    hub.add("local/web", {f"{n}.json.gz": gz(pages(n)) for n in range(2)})
    hub.add("local/copy", {"x.json.gz": gz(pages(0)[:9])})
    path = recipe(tmp_path, source("web", license_field="meta.license"), source("copy", license_field="meta.license"))
    first, _ = probed(path)
    before = recipes.lock_of(path).read_bytes()
    hub.sent.clear()

    again, _ = probed(path)

    assert again == first and recipes.lock_of(path).read_bytes() == before
    assert not [name for name in hub.sent if name.endswith(".gz")]
    assert first["copy"].shared == {"web": 6} and not first["web"].shared
    # Without a sample, the probe of unchanged files stays.
    list(pinning.pin(path, sample=False))
    assert recipes.lock_of(path).read_bytes() == before


def test_a_damaged_lock_file_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    """It has the commits and the probes of all sources, which nothing can tell once it is written over."""
    hub.add("local/web", {"a.json.gz": gz(pages(0))})
    path = recipe(tmp_path, source("web", license_field="meta.license"))
    probed(path)
    lock = recipes.lock_of(path)
    for content in (lock.read_bytes()[:-200], lock.read_bytes().replace(b'"pieces": 1', b'"pieces": "many"'), b""):
        lock.write_bytes(content)
        with pytest.raises(AtomError, match=r"^lock file mine.lock.yaml: .*; restore it, or remove it") as caught:
            command.pin(str(path))
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
        assert lock.read_bytes() == content


def test_alarms_are_those_of_the_present_settings(hub: Hub, tmp_path: Path) -> None:
    """The lock file has the shares that rules remove, so a setting that changes needs no other sample."""
    hub.add("local/web", {"a.json.gz": gz(pages(0))})
    web = source("web", license_field="meta.license")

    def pinned(share: float, **changes: Any) -> tuple[str, SourceSupply]:
        path = recipe(tmp_path, web | changes)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"curation": {"alarm_share": share}}))
        _, failure = probed(path)
        (row,) = supplies(SupplySection(), load(path), {"pretrain": {"web": 10.0}})
        assert row.basis == "probed"
        return failure, row

    failure, row = pinned(0.5)
    assert failure == "" and not row.lacks_probe and "problem" not in row.where
    hub.sent.clear()
    failure, row = pinned(0.3)
    alarm = "source web: license removes 20 of 60 documents, a larger share than 0.3"
    assert failure.startswith(alarm) and row.lacks_probe and f"with a problem: {alarm}" in row.where
    report = tmp_path / "report.html"
    with pytest.raises(AtomError, match=alarm):
        command.pin(str(tmp_path / "mine.yaml"), report=report)
    assert report.read_text().count(alarm) == 2, "above all sources, and at this one"
    failure, row = pinned(0.3, acknowledged_removals={"license": 0.4})
    assert failure == "" and not row.lacks_probe
    assert not [name for name in hub.sent if name.endswith(".gz")]


def test_tokens_are_counted_by_the_tokenizer_of_the_recipe(hub: Hub, tmp_path: Path) -> None:
    hub.add("local/web", {"a.json.gz": gz(pages(0, license="MIT"))})
    path = recipe(tmp_path, source("web", license_field="meta.license"))
    first = probed(path)[0]["web"]
    assert (first.tokens_by, first.bytes_per_token, first.kept_tokens) == (
        "bytes_per_token", 4.0, round(first.kept_bytes / 4),
    )  # fmt: skip
    assert '"tokens_by": "bytes_per_token"' in recipes.lock_of(path).read_text()
    trained = tokenizer.untrained()
    trained.train_from_iterator([text(n) for n in range(50)], tokenizer.bpe_trainer(300))
    tokenizer.save(trained, tmp_path)
    file = tmp_path / "tokenizer.json"

    list(pinning.pin(path, tokenizer=file))
    probe = hub_files.read(recipes.lock_of(path))["web"].probe

    assert probe is not None and probe.tokens_by == f"tokenizer sha256:{sha256_file(file)}"
    encodings = [trained.encode(row["text"], add_special_tokens=False) for row in pages(0)]
    assert probe.kept_tokens == sum(len(encoding.ids) for encoding in encodings) > 1.2 * first.kept_tokens
    assert probe.bytes_per_token == pytest.approx(probe.kept_bytes / probe.kept_tokens, abs=1e-6)
    (row,) = supplies(SupplySection(), load(path), {"pretrain": {"web": 10.0}})
    assert row.tokens == pytest.approx(0.95 * probe.kept_tokens), "a twentieth is held out"
    # It is counted once, and what was counted stays where no tokenizer is.
    before = recipes.lock_of(path).read_bytes()
    hub.sent.clear()
    list(pinning.pin(path, tokenizer=file))
    list(pinning.pin(path))
    assert recipes.lock_of(path).read_bytes() == before and not [name for name in hub.sent if name.endswith(".gz")]


def test_the_tokenizer_of_a_recipe_is_there_once_it_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_HOME", str(tmp_path))
    store = Store(tmp_path)
    assert pinning.tokenizer_of("atom-smoke", store) is None and pinning.tokenizer_of("smoke", store) is None
    key = dag.compose(recipes.load("atom-smoke"), store).nodes["tokenizer"].key
    (store.artifacts / key).mkdir(parents=True)
    (store.artifacts / key / "tokenizer.json").write_text("{}")
    write_manifest(store.artifacts / key, key)
    assert pinning.tokenizer_of("atom-smoke", store) == store.artifacts / key / "tokenizer.json"
    assert pinning.tokenizer_of("smoke", store) is None


def test_a_secret_is_counted_and_is_not_trained_on(hub: Hub, tmp_path: Path, run_stage: Any) -> None:
    rows, key = pages(0, license="MIT"), "AKIA" + "Q3EXK7ZL" + "T5MNWB2V"
    rows[4]["text"] += f" {TOKEN}"
    rows[9]["text"] += f" aws_access_key_id = {key}"
    hub.add("local/web", {"a.json.gz": gz(rows)})
    path = recipe(tmp_path, source("web", license_field="meta.license"))

    probes, failure = probed(path)

    probe, rules = probes["web"], {"secrets/github_token": 1, "secrets/aws_access_key": 1}
    assert failure == "" and probe.secrets == 2 and probe.kept_documents == 58
    assert {rule: row.documents for rule, row in probe.removed.items()} == rules
    lock = recipes.lock_of(path).read_text()
    assert TOKEN not in lock and key not in lock

    data = load(path).resolved()
    write_rows(tmp_path / "items/items.parquet", ITEMS, [])
    inputs = {"items": write_manifest(tmp_path / "items", "items")}
    inputs["web"] = run_stage(acquire_stage.STAGE, data.acquire_config("web", 0), {})
    filtered = run_stage(filter_stage.STAGE, data.filter_config(0), inputs)
    tables = {file: pq.read_table(file).to_pylist() for file in filtered.path.rglob("*.parquet")}
    assert Counter(row["rule"] for table in tables.values() for row in table if row.get("rule")) == rules
    assert sum(len(table) for file, table in tables.items() if "kept" in file.parts) == 58
    assert not any(secret in str(tables) for secret in (TOKEN, key))


def test_one_source_that_fails_leaves_the_others(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Vanished, gated, not what its name says, and without the column: each has a sentence, and what was learnt stays."""
    hub.add("local/web", {"a.json.gz": gz(pages(0))})
    hub.add("local/hostile", {"a.json.gz": b"<html>not found</html>" * 1000, "b.json.gz": gz(pages(1))})
    hub.add("local/columns", {"a.parquet": parquet(pages(0), 20)})
    hub.add("local/gated", {"a.json.gz": gz(pages(2))})
    path = recipe(
        tmp_path,
        source("web", license_field="meta.license"),
        source("vanished"),
        source("gated"),
        source("hostile", license_field="meta.license"),
        source("columns", pattern="*.parquet", format="parquet", license_field="terms"),
    )
    gated = JSONResponse({"error": "Access to this dataset is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
    hub.behavior = lambda scope: gated if "local/gated" in scope["path"] else None

    probes, failure = probed(path)

    assert "source vanished: local/vanished@main: http" in failure and "has no such repository" in failure
    assert "source gated" in failure and "private or gated" in failure
    assert failure.endswith("; 1 of 5 sources are in order")
    assert not probes["web"].problem and probes["web"].sampled_documents == 60
    # One of two files is good; of the other recipe's column, the fields are known.
    assert probes["hostile"].sampled_documents == 60
    assert "a.json.gz of local/hostile@" in probes["hostile"].problem
    assert "not compressed as its name says" in probes["hostile"].problem
    assert "has no column 'terms' (columns: text, meta, n)" in probes["columns"].problem
    assert list(probes["columns"].fields) == ["meta", "n", "text"]

    report = tmp_path / "report.html"
    with pytest.raises(AtomError) as caught:
        command.pin(str(path), report=report, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert str(caught.value) == printed["failure"] == failure
    assert [row["name"] for row in printed["sources"]] == ["columns", "hostile", "web"]

    html = report.read_text()
    assert page.runs_nothing(html) and "http-equiv" in html and html.count("<img") == 1
    assert "<td>As is</td><td>removed: 0.3333</td>" in html and "has no such repository" in html


def test_licenses_that_are_missing_or_change_between_files(hub: Hub, tmp_path: Path) -> None:
    turned = [{"\u202e" * 300: 1, "\ud800": "\0"} | row | {"meta": {"license": "\u202e" * 300}} for row in pages(3)]
    hub.add("local/none", {"a.json.gz": gz(pages(0))})
    hub.add("local/turned", {"a.json.gz": gz(turned)})
    hub.add("local/mixed", {"a.json.gz": gz(pages(0)), "b.json.gz": gz(pages(1, license="Terms of Use"))})
    path = recipe(tmp_path, source("none", license_field="terms"), source("mixed", license_field="meta.license"))

    probes, failure = probed(path)
    odd, said = probed(recipe(tmp_path, source("turned", license_field="meta.license")))

    assert odd["turned"].licenses[0].string == ("\\u202e" * 200)[:199] + "…" and said.isprintable()
    assert "source none: no sampled row states a license in terms (fields: " in failure
    assert "license removes" not in failure, "it is the reason why a rule removes all"
    assert probes["none"].removed["license/unmapped"].documents == 60 and probes["none"].kept_tokens == 0
    assert "source mixed: no license string of b.json.gz is known, such as 'Terms of Use'" in failure
    assert "those of other files are" in failure and probes["mixed"].kept_tokens > 0


def test_rows_of_a_hundred_megabytes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller limits: rows that are longer than a piece may be."""
    monkeypatch.setattr(hub_samples, "MOST_BYTES", 2**17)
    monkeypatch.setattr(hub_samples, "HEAD_BYTES", 2**15)
    long = [{"text": random.Random(n).randbytes(2**18).hex()} for n in range(3)]
    hub.add("local/lines", {"a.json.gz": gz(long)})
    hub.add("local/groups", {"a.parquet": parquet(long, 1)})
    path = recipe(tmp_path, source("lines"), source("groups", pattern="*.parquet", format="parquet"))

    probes, failure = probed(path)

    assert "a.json.gz of local/lines@" in failure and "its first line is longer than" in failure
    assert "its rows have 1 MB each, too much for a sample; leave the file out by reader.pattern, or state" in failure
    assert {name: probe.sampled_documents for name, probe in probes.items()} == {"lines": 0, "groups": 0}


def test_a_probe_that_the_network_cuts(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before stays, and the next one completes it."""
    monkeypatch.setattr(client, "_pause", lambda error, attempt: None)
    hub.add("local/web", {f"{n}.json.gz": gz(pages(n)) for n in range(4)})
    path = recipe(tmp_path, source("web", license_field="meta.license"))
    served: list[str] = []

    def cut(scope: Any) -> Any:
        if scope["path"].endswith(".gz"):
            served.append(scope["path"])
        return Response(status_code=502) if len(served) > 2 else None

    hub.behavior = cut
    probes, failure = probed(path)
    assert "answers 502" in failure
    # One that is cut even earlier takes nothing away.
    served.append("and another")
    assert probed(path)[0]["web"].pieces == 2
    assert (probes["web"].pieces, probes["web"].sampled_documents) == (2, 120)
    assert probes["web"].kept_low is not None and probes["web"].kept_low < probes["web"].kept_bytes

    hub.behavior = lambda scope: None
    hub.sent.clear()
    probes, failure = probed(path)
    assert (failure, probes["web"].pieces, probes["web"].kept_low) == ("", 4, probes["web"].kept_bytes)

    # A server that ignores ranges sends the whole file.
    hub.add("local/whole", {"a.json.gz": gz(pages(7))})
    hub.behavior = lambda scope: Response(b"x" * 99) if scope["path"].endswith("a.json.gz") else None
    _, failure = probed(recipe(tmp_path, source("whole")))
    assert "a whole file in place of a range of its bytes" in failure
