"""Documents by reference: the tables without texts, and their rebuilding from the pinned files of a Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, write_manifest
from release import references
from release.audit import rebuild
from release.cards import document_tables
from release.checks import documents
from release.checks import withheld as checks
from release.facts.data_facts import DataFacts
from release.opened_release import Release
from release.references import Reference
from stages.data.acquire import acquire_stage
from stages.data.acquire.sources import Source
from stages.data.curate import filter_stage
from stages.formats.table import ITEMS, write_rows, write_table
from tests.fixtures.block_fixtures import EDITED, PII
from tests.fixtures.dedup_fixtures import deduplicate
from tests.fixtures.hub_fixtures import Hub, acquire_config, lines, pin, write_recipe
from tests.fixtures.standard_fixtures import source_facts

NAME = "notes"
CURATION = {"minhash": None}


def text_of(number: int) -> str:
    """Some with an address, which a step replaces; some twice."""
    address = f" Write to someone{number}@corp-mail.net." if number % 3 == 0 else ""
    return f"Note {number - number % 11 if number % 7 == 0 else number} of the harbour.{address}"


FILES = {f"data/{name}.jsonl.gz": lines(*(text_of(40 * n + k) for k in range(40))) for n, name in enumerate("abcd")}


@pytest.fixture
def release(hub: Hub, tmp_path: Path, run_stage: Any) -> Path:
    """What the check and the rebuilding read of a release whose only source is by reference; `full` has the texts."""
    hub.commit(FILES)
    recipe = write_recipe(tmp_path, parts=2)
    pin(recipe)
    config = acquire_config(recipe)
    acquired = run_stage(acquire_stage.STAGE, config.model_dump(), {})
    source = {"name": NAME, "kind": "prose", "parts": 2}
    filtering = {"sources": [{**source, "steps": [PII]}], "curation": CURATION, "seed": 0}
    item = {"id": "add/0", "task": "add", "prompt": "347+586:", "answer": "933", "text": "347+586"}
    write_rows(tmp_path / "items/items.parquet", ITEMS, [item])
    inputs = {NAME: acquired, "items": write_manifest(tmp_path / "items", "items")}
    filtered = run_stage(filter_stage.STAGE, filtering, inputs)
    later = {"minhash": None, "sources": [{**source, "heldout_fraction": 0.1}]}
    dedup = deduplicate(later, filtered, tmp_path / "dedup")["dedup"]
    return publish(tmp_path, acquired, filtered, dedup, config)


def publish(folder: Path, acquired: Artifact, filtered: Artifact, dedup: Artifact, config: Any) -> Path:
    release, data = folder / "release", folder / "release/dataset"
    shutil.copytree(dedup / "kept", folder / "full")
    shutil.copytree(dedup / "dispositions", data / "dispositions")
    for path in sorted((dedup / "kept" / NAME).iterdir()):
        references.write_without_text(path, data / "kept" / NAME / path.name)
    edits = filtered.json("edits.json")[NAME]
    assert list(edits) == [EDITED] and edits[EDITED] > 20
    steps = filter_stage.FilteredSource.model_validate({"name": NAME, "kind": "prose", "steps": [PII]}).steps
    stated = {"sources": {NAME: Reference.of(config.source, config.seed, steps).model_dump(mode="json")}}
    (data / "references.json").write_text(json.dumps(stated))
    (data / "sources").mkdir()
    shutil.copyfile(acquired / "source.json", data / "sources" / f"{NAME}.json")
    (release / "evidence/manifests").mkdir(parents=True)
    (release / "evidence/release.json").write_text('{"format": 1, "card_schema": 1}')
    shutil.copyfile(dedup / "manifest.json", release / "evidence/manifests/dedup.json")
    return release


def test_texts_of_a_model_from_a_source_by_reference_have_a_reason(hub: Hub, release: Path) -> None:
    data = release / "dataset"
    (data / "sources/rewritten.json").write_text(json.dumps({"name": "rewritten", "generated": {"from_source": NAME}}))
    assert checks.by_reference(Release(data, "dataset")).problems == [
        f"references.json does not say why the texts of rewritten are published, which a model wrote from {NAME}"
    ]
    body = json.loads((data / "references.json").read_text())
    (data / "references.json").write_text(json.dumps({**body, "generated": {"rewritten": "its publisher | agreed"}}))
    assert checks.by_reference(Release(data, "dataset")).problems == []
    facts = DataFacts(
        sources={NAME: source_facts()},
        by_reference={NAME: "local/notes"},
        published_reasons=dict(references.published_reasons(data)),
    )
    assert "| rewritten | its publisher \\| agreed |" in document_tables.by_reference(facts)


def kept(folder: Path) -> list[Path]:
    return sorted((folder / NAME).iterdir())


def test_documents_come_back_bit_for_bit(hub: Hub, release: Path, tmp_path: Path) -> None:
    published = kept(release / "dataset/kept")
    assert all(pq.read_table(path)["text"].null_count == pq.read_metadata(path).num_rows for path in published)
    text = (
        "".join(path.read_bytes().decode("latin-1") for path in published)
        + (release / "dataset/references.json").read_text()
    )
    assert "harbour" not in text and str(tmp_path) not in text
    findings = checks.by_reference(Release(release / "dataset", "dataset"))
    assert not findings.problems and "by reference to local/notes@" in findings.skipped[NAME]
    assert not any(
        "has no text" in problem
        for problem in documents.content_hashes(Release(release / "dataset", "dataset")).problems
    )

    shutil.rmtree(tmp_path / "home")  # as on another machine
    target = rebuild.folder_of(release)
    assert target == tmp_path / "release.data"
    result = rebuild.rebuild(release, target, {})
    (row,) = result.sources
    full = kept(tmp_path / "full")
    assert row.equal == row.files == 2 and row.present == 0
    assert [path.read_bytes() for path in kept(target / "kept")] == [path.read_bytes() for path in full]
    rows = [row for path in full for row in pq.read_table(path).to_pylist()]
    assert row.documents == len(rows) > 100 and row.bytes == sum(len(row["text"].encode()) for row in rows)
    assert sum("email@example.com" in row["text"] for row in rows) > 20

    kept(target / "kept")[1].unlink()  # what a killed run had not made
    hub.requests.clear()
    again = rebuild.rebuild(release, target, {})
    assert again.sources[0].present == 1 and again.sources[0].equal == 2
    assert not [name for name in hub.requests if name.startswith("GET") and name.endswith(".gz")], "the files are here"


def test_other_bytes_are_found(hub: Hub, release: Path, tmp_path: Path) -> None:
    target = tmp_path / "rebuilt"
    rebuild.rebuild(release, target, {})
    first = kept(target / "kept")[0]
    table = pq.read_table(first)
    texts = table["text"].to_pylist()
    changed = table.set_column(1, "text", pa.array(["another text", *texts[1:]]))
    write_table(first, changed)
    with pytest.raises(CheckFailed, match="the text of notes/.* is not what its hash says; remove the file"):
        rebuild.rebuild(release, target, {})
    write_table(first, table.slice(1))
    with pytest.raises(CheckFailed, match="is not the table of this release"):
        rebuild.rebuild(release, target, {})
    first.unlink()
    listed = kept(release / "dataset/kept")[0]
    rows = pq.read_table(listed)
    swapped = pa.concat_tables([rows.slice(1, 1), rows.slice(0, 1), rows.slice(2)])
    references_before = listed.read_bytes()
    write_table(listed, swapped)
    with pytest.raises(CheckFailed, match="is not in the files of local/notes@.*, or not in its place"):
        rebuild.rebuild(release, target, {})
    listed.write_bytes(references_before)
    hub.damage("data/a.jsonl.gz", lines("other"))
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(AtomError, match="data/a.jsonl.gz of local/notes"):
        rebuild.rebuild(release, target, {})
    assert not list(target.rglob(".*")), "nothing half-written stays"


def test_what_is_wrong_with_a_release(release: Path, tmp_path: Path) -> None:
    data = release / "dataset"
    body = json.loads((data / "references.json").read_text())
    files = body["sources"][NAME]["files"]
    files["data/a.jsonl.gz"] = "0" * 64
    (data / "references.json").write_text(json.dumps(body))
    assert checks.by_reference(Release(data, "dataset")).problems == [
        f"references.json: the files of {NAME} are not those of sources/{NAME}.json"
    ]
    shutil.copyfile(kept(tmp_path / "full")[0], kept(data / "kept")[0])
    assert any(
        "have a text, though by reference" in text for text in checks.by_reference(Release(data, "dataset")).problems
    )
    (data / "references.json").write_text('{"sources": {}}')
    assert any(
        "have no text, and are not by reference" in text
        for text in checks.by_reference(Release(data, "dataset")).problems
    )
    with pytest.raises(AtomError, match="there is nothing to rebuild"):
        rebuild.rebuild(release, tmp_path / "out", {})


def test_files_that_no_hub_has(tmp_path: Path) -> None:
    """Their folder is given, and has to have the same files; a drawn source has none."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.jsonl").write_text('{"text": "one"}\n')
    settings = {"name": NAME, "kind": "prose", "license": "CC0-1.0", "license_evidence": "x", "origin": "a shelf"}
    source = Source.model_validate({**settings, "reader": {"reader": "jsonl", "path": str(tmp_path / "mine")}})
    reference = Reference.of(source, 0, [])
    assert str(tmp_path) not in reference.model_dump_json()
    with pytest.raises(
        AtomError, match="the files of source notes .a shelf. are not on a Hub; .*--source notes=FOLDER"
    ):
        reference.restored(None, tmp_path)
    assert reference.restored(tmp_path / "mine", tmp_path).files()[0][0] == "a.jsonl"
    drawn = {
        **settings,
        "kind": "problems",
        "reader": {"reader": "problems", "tasks": {"add": 1}, "form": "plain", "count": 3},
    }
    with pytest.raises(AtomError, match="whose documents are drawn and in no file"):
        Reference.of(Source.model_validate(drawn), 0, [])
