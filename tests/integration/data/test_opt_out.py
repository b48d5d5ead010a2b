"""Opt-out: a request reaches the document, its copies, near duplicates and stated rewrites, held out or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact
from stages.data.acquire import acquire_stage
from stages.data.curate import duplicate_groups, duplicates_stage, filter_stage
from stages.data.recipe import load
from stages.formats.table import part_files, sources_of
from tests.fixtures.block_fixtures import PII
from tests.fixtures.dedup_fixtures import deduplicate
from tests.fixtures.opt_out_fixtures import (
    Text,
    acquired,
    chain,
    hashed,
    near,
    new_text,
    no_items,
    write_deny_list,
)

ONE, TWO, THREE, FOUR = (new_text() for _ in range(4))
LETTER = f"{new_text(30)} write to jane@corp-mail.net"
NEAR, NEAR_NEAR = chain(ONE)
REWRITE, REWRITTEN_AGAIN = new_text(), new_text()
PAGE, SITE = "https://www.one.example/a%20page/?q=1", "https://blog.two.example/post"
SOURCES: dict[str, list[dict[str, Text]]] = {
    "web": [
        {"one": Text(ONE), "other": Text(new_text()), "page": Text(TWO, PAGE)},
        {"copy": Text(ONE), "near": Text(NEAR), "near near": Text(NEAR_NEAR), "site": Text(THREE, SITE)},
    ],
    "letters": [{"letter": Text(LETTER), "hash": Text(FOUR), "alone": Text(new_text())}],
    "books": [
        {
            "copy": Text(ONE), "edited copy": Text(LETTER), "near page": Text(near(TWO)), "copy of near": Text(NEAR),
            "copy of rewrite": Text(REWRITE), "near again": Text(near(REWRITTEN_AGAIN)), "alone": Text(new_text()),
        }
    ],
    "sums": [{"copy": Text(ONE), "copy of near": Text(NEAR), "alone": Text("1+1=2")}],
    "made": [
        {
            "rewrite": Text(REWRITE, parents=("web/site",)), "again": Text(REWRITTEN_AGAIN, parents=("made/rewrite",)),
            "of a copy": Text(new_text(), parents=("web/alone", "web/copy")),
            "of a page": Text(new_text(), parents=("http://one.example/a page?q=1",)),
            "of another": Text(new_text(), parents=("web/other",)),
        }
    ],
}  # fmt: skip
KINDS = {"sums": "problems"}
ENTRIES = (
    {"request": "r-id", "id": "web/one"},
    {"request": "r-letter", "id": "letters/letter"},
    {"request": "r-url", "url": "http://one.example/a page?q=1#top"},
    {"request": "r-host", "host": "two.example"},
    {"request": "r-hash", "content_hash": "placeholder"},
    {"request": "r-failed", "id": "web/unreadable"},
    {"request": "r-none", "host": "nowhere.example"},
)
EXPECTED = {
    "web/one": ("id", "r-id", None),
    "web/page": ("url", "r-url", None),
    "web/site": ("host", "r-host", None),
    "letters/letter": ("id", "r-letter", None),
    "letters/hash": ("content_hash", "r-hash", None),
    "web/unreadable": ("id", "r-failed", None),
    "web/copy": ("copy", "r-id", "web/one"),
    "books/copy": ("copy", "r-id", "web/one"),
    "sums/copy": ("copy", "r-id", "web/one"),  # of a kind without a search for near duplicates
    "books/edited copy": ("copy", "r-letter", "letters/letter"),  # its source replaces the address
    "web/near": ("near_duplicate", "r-id", "web/one"),
    "books/copy of near": ("near_duplicate", "r-id", "web/one"),
    "sums/copy of near": ("near_duplicate", "r-id", "web/one"),
    "books/near page": ("near_duplicate", "r-url", "web/page"),
    "made/rewrite": ("derived", "r-host", "web/site"),
    "made/again": ("derived", "r-host", "made/rewrite"),
    "made/of a copy": ("derived", "r-id", "web/copy"),
    "made/of a page": ("derived", "r-url", None),
    "books/copy of rewrite": ("copy", "r-host", "made/rewrite"),
    "books/near again": ("near_duplicate", "r-host", "made/again"),
}


def configs(path: Path | None, digest: str | None, heldout: float = 0.5) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of filter and of dedup."""
    names = [(name, KINDS.get(name, "prose"), len(parts)) for name, parts in SOURCES.items()]
    curation = {"deny_list": path and str(path), "deny_list_sha256": digest}
    steps = {"books": [PII]}
    sources = [{"name": n, "kind": kind, "parts": parts, "steps": steps.get(n, [])} for n, kind, parts in names]
    splits = [{"name": n, "kind": kind, "parts": parts, "heldout_fraction": heldout} for n, kind, parts in names]
    return {"sources": sources, "curation": curation, "seed": 0}, {"sources": splits, "minhash": {}}


def curated(tmp_path: Path, run_stage: Any, *entries: dict[str, str]) -> tuple[Artifact, Artifact]:
    """The artifacts of filter and of dedup."""
    inputs = {
        name: acquired(tmp_path / "acquired", name, parts, ["unreadable"] if name == "web" else [])
        for name, parts in SOURCES.items()
    }
    inputs["items"] = no_items(tmp_path)
    path = tmp_path / "deny.jsonl"
    digest = write_deny_list(path, *entries) if entries else None
    first, second = configs(path if entries else None, digest)
    filtered = run_stage(filter_stage.STAGE, first, inputs)
    return filtered, deduplicate(second, filtered, tmp_path / "stages")["dedup"]


def entries_of(artifact_rows: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """ENTRIES with the hash of a document as its disposition states it."""
    digest = artifact_rows["letters/hash"]["kept_hash"]
    return [{**entry, **({"content_hash": digest} if "content_hash" in entry else {})} for entry in ENTRIES]


def dispositions(artifact: Artifact) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows_of(artifact, "dispositions")}


def rows_of(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    files = [path for name in sources_of(artifact / table) for path in part_files(artifact.path, f"{table}/{name}")]
    return [row for path in files for row in pq.ParquetFile(path).read().to_pylist()]


def test_a_request_reaches_copies_near_duplicates_and_rewrites(
    tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "before").mkdir()
    before = dispositions(curated(tmp_path / "before", run_stage)[1])
    assert {row["split"] for row in before.values()} == {"train", "heldout", None}
    assert before["web/one"]["split"] == "heldout", "so that the request reaches a held-out document"
    entries = entries_of(before)
    filtered, artifact = curated(tmp_path, run_stage, *entries)
    rows = dispositions(artifact)
    opted_out = {id: row for id, row in rows.items() if row["rule"] == "opt_out"}
    matches = {id: (*row["match"].split(" "), row["duplicate_of"]) for id, row in opted_out.items()}
    assert matches == {id: (kind, hashed(request), of) for id, (kind, request, of) in EXPECTED.items()}
    assert all(row["disposition"] == "removed" and row["kept_hash"] is None for row in opted_out.values())
    kept = {row["id"] for row in rows_of(artifact, "kept")}
    assert kept == rows.keys() - opted_out.keys(), "nothing else goes: not what is near a near duplicate only"
    assert {"web/near near", "made/of another"} <= kept
    assert artifact.json("summary.json")["total"]["removed"] == {"opt_out": len(EXPECTED)}
    requests = {row["request"]: row for row in filtered.json("opt_out.json")["requests"]}
    assert requests[hashed("r-none")] == {
        "request": hashed("r-none"), "date": "2026-11-03", "entries": {"host": 1}
    }  # fmt: skip
    assert len(requests) == len(ENTRIES)

    denied_texts = [ONE, TWO, THREE, FOUR, LETTER, REWRITE]
    for path in filtered.path.rglob("denied/**/*.parquet"):
        assert not any(text.encode() in path.read_bytes() for text in denied_texts), "hashes, and no text"

    monkeypatch.setattr(duplicates_stage, "PARTS_PER_RANGE", 2)  # three ranges of each hash
    monkeypatch.setattr(duplicate_groups, "BATCH", 2)
    again = deduplicate(configs(None, None)[1], filtered, tmp_path / "again")["dedup"]
    assert again.digest == artifact.digest


def test_without_a_deny_list_the_artifacts_have_the_files_of_before(tmp_path: Path, run_stage: Any) -> None:
    filtered, _ = curated(tmp_path, run_stage)
    assert {row.path.split("/")[0] for row in filtered.rows} == {"kept", "hashes", "dispositions", "edits.json"}


def test_several_requests_for_one_document_are_all_named(tmp_path: Path, run_stage: Any) -> None:
    entries = ({"request": "b", "id": "web/page"}, {"request": "a", "url": PAGE}, {"request": "c", "id": "web/near"})
    rows = dispositions(curated(tmp_path, run_stage, *entries, {"request": "d", "id": "web/one"})[1])
    both = " ".join(sorted([hashed("a"), hashed("b")]))
    assert rows["web/page"]["match"] == f"id {both}"
    assert (rows["books/near page"]["match"], rows["books/near page"]["value"]) == (f"near_duplicate {both}", 14.0)
    assert rows["books/copy"]["match"] == f"copy {hashed('d')}"
    assert rows["books/copy of near"]["match"] == f"copy {hashed('c')}"


def test_a_changed_deny_list_is_noticed(tmp_path: Path, run_stage: Any) -> None:
    path = tmp_path / "deny.jsonl"
    digest = write_deny_list(path, {"request": "a", "id": "web/one"})
    write_deny_list(path, {"request": "a", "id": "web/two"})
    inputs = {name: acquired(tmp_path, name, parts) for name, parts in SOURCES.items()} | {"items": no_items(tmp_path)}
    with pytest.raises(RecipeError, match="changed after the run was planned"):
        run_stage(filter_stage.STAGE, configs(path, digest)[0], inputs)
    with pytest.raises(AtomError, match="has no digest"):
        run_stage(filter_stage.STAGE, configs(path, None)[0], inputs)


RECIPE = """
name: corpus
description: notes
sources:
  - name: notes
    kind: prose
    license: CC0-1.0
    license_evidence: here
    origin: here
    reader: {reader: jsonl, path: notes.jsonl, derived_from_field: made_from}
curation: {deny_list: deny.jsonl}
"""


def test_the_recipe_names_the_deny_list_and_its_digest_is_in_the_key(tmp_path: Path, run_stage: Any) -> None:
    (tmp_path / "corpus.yaml").write_text(RECIPE)
    lines = ['{"text": "a", "made_from": null}', '{"text": "b", "made_from": ["x/1", "x/2"]}', '{"text": "c"}']
    (tmp_path / "notes.jsonl").write_text("\n".join(lines * 6) + "\n")
    recipe = load(tmp_path / "corpus.yaml")
    with pytest.raises(RecipeError, match="cannot be read .*; check curation.deny_list"):
        recipe.resolved()
    _, messages = recipe.present()
    assert messages == (
        f"no deny-list at {tmp_path}/deny.jsonl; put it there before running; keys below are provisional",
    )
    digest = write_deny_list(tmp_path / "deny.jsonl", {"request": "a", "id": "notes/1"})
    curation = recipe.resolved().filter_config(0)["curation"]
    assert (curation["deny_list"], curation["deny_list_sha256"]) == (str(tmp_path / "deny.jsonl"), digest)
    assert recipe.present()[0].curation.deny_list_sha256 == digest
    config = filter_stage.FilterConfig.model_validate(recipe.resolved().filter_config(0))
    assert '"deny_list_sha256"' in key_of(config) and '"deny_list"' not in key_of(config)
    pinned = recipe.model_copy(
        update={"curation": recipe.curation.model_copy(update={"deny_list_sha256": "sha256:" + "0" * 64})}
    )
    with pytest.raises(RecipeError, match="is pinned to sha256:0000"):
        pinned.resolved()

    artifact = run_stage(acquire_stage.STAGE, recipe.resolved().acquire_config("notes", 0), {})
    parents = pq.read_table(artifact / "derived/part-00000.parquet").to_pylist()
    assert parents[:2] == [{"id": "notes/notes.jsonl:2", "parent": f"x/{n}"} for n in (1, 2)] and len(parents) == 12
    failed = pq.read_table(artifact / "failed/part-00000.parquet").to_pylist()
    assert len(failed) == 6 and "does not name what it was made from" in failed[0]["reason"]


def key_of(config: filter_stage.FilterConfig) -> str:
    import json

    from pipeline.core.stage import identity

    return json.dumps(identity(config))


def test_a_request_for_most_of_a_source_stops_the_run_unless_acknowledged(tmp_path: Path, run_stage: Any) -> None:
    pages = {f"page {n}": Text(new_text(10), f"https://{'two' if n else 'three'}.example/{n}") for n in range(20)}
    inputs = {"web": acquired(tmp_path, "web", [pages]), "items": no_items(tmp_path)}
    digest = write_deny_list(tmp_path / "deny.jsonl", {"request": "a", "host": "two.example"})
    curation = {"deny_list": str(tmp_path / "deny.jsonl"), "deny_list_sha256": digest}
    config = {"sources": [{"name": "web", "kind": "prose"}], "curation": curation, "seed": 0}
    with pytest.raises(AtomError, match="source web: opt_out removes 19 of 20 documents, a larger share than 0.5"):
        run_stage(filter_stage.STAGE, config, inputs)
    config["sources"] = [{"name": "web", "kind": "prose", "acknowledged_removals": {"opt_out": 0.95}}]
    assert len(rows_of(run_stage(filter_stage.STAGE, config, inputs), "kept")) == 1
