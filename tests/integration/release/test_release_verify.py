"""`verify`: every flipped byte is found and named, on a whole release and on each repository alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from release.audit import verify as audit
from release.audit.verify import kind_of
from release.layout import ALL_SUMS, SUMS
from release.opened_release import Release
from release.repositories import files_below, files_of, repositories
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.release_fixtures import pulled, resum
from tests.fixtures.run_fixtures import SOAK, at_length


def flip(path: Path) -> bytes:
    before = path.read_bytes()
    middle = len(before) // 2
    path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    return before


def test_a_sound_release(built: Path) -> None:
    verdict = verify(built, deep=True)
    assert verdict.ok and verdict.kind == "release", verdict.to_json()
    body = json.loads(json.dumps(verdict.to_json()))
    assert (
        set(body) == {"schema", "subject", "kind", "deep", "ok", "retracted", "digest", "outcome", "checks"}
        and body["schema"] == 1
    )
    assert {c["name"] for c in body["checks"]} >= {
        "statements",
        "dispositions_balance",
        "cards",
        "weights",
        "order",
        "answers",
    }
    verdict.require()


def test_one_flipped_byte_in_every_file(copy: Path) -> None:
    """In one file of twelve here, in every one by `make soak PART=release`."""
    paths = files_below(copy)
    assert len(paths) > 100
    for path in paths[:: 1 if SOAK else 12]:
        before = flip(copy / path)
        verdict = verify(copy)
        assert not verdict.ok, path
        with pytest.raises(CheckFailed):
            verdict.require()
        assert any(path in text for check in verdict.checks for text in check.wrong), path
        (copy / path).write_bytes(before)
    assert verify(copy).ok


def test_one_flipped_byte_in_every_file_of_each_repository_alone(built: Path, tmp_path: Path) -> None:
    """In one file of fifteen here, in every one by `make soak PART=release`."""
    kinds = {}
    for place, folder in pulled(built, tmp_path).items():
        verdict = verify(folder)
        assert verdict.ok, verdict.to_json()
        kinds[place.split("/")[0] + ("/" if "/" in place else "")] = verdict.kind
        for path in files_below(folder)[:: 1 if SOAK else 15]:
            before = flip(folder / path)
            verdict = verify(folder)
            assert any(path in text for check in verdict.checks for text in check.wrong), path
            (folder / path).write_bytes(before)
    assert kinds == {
        "": "evidence", "dataset": "dataset", "checkpoints": "repository", "checkpoints/": "checkpoint",
        "model": "model", "model-base": "model"
    }  # fmt: skip


@at_length("release", 12)
def test_deep_on_each_repository_alone(built: Path, tmp_path: Path) -> None:
    for folder in pulled(built, tmp_path).values():
        verdict = verify(folder, deep=True)
        assert verdict.ok, verdict.to_json()


def test_missing_extra_and_linked_files_are_named(copy: Path) -> None:
    (copy / "model/LICENSE").unlink()
    (copy / "dataset/new.txt").write_text("x")
    (copy / "code/release/assembly/build_release.py").rename(copy / "code/release/moved.py")
    (copy / "code/release/assembly/build_release.py").symlink_to("moved.py")
    problems = [text for check in verify(copy).checks for text in check.wrong]
    assert "model/LICENSE is missing (listed in evidence/SHA256SUMS)" in problems
    assert "dataset/new.txt is not listed in evidence/SHA256SUMS" in problems
    assert any(text.startswith("code/release/assembly/build_release.py is a link") for text in problems)


@pytest.mark.parametrize("part", ["model", "dataset", "checkpoints", "evidence"])
def test_a_missing_part_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    verdict = verify(copy)
    assert not verdict.ok and any(part in text for check in verdict.checks for text in check.wrong)


def test_a_forger_who_writes_new_checksums_is_caught_by_the_ledger(copy: Path) -> None:
    flip(copy / "checkpoints/pretrain-step-2/state.json")
    (copy / "dataset/kept/extra.parquet").write_bytes((copy / "dataset/kept/prose/part-00000.parquet").read_bytes())
    resum(copy)
    problems = [text for check in verify(copy).checks for text in check.wrong]
    assert "checkpoints/pretrain-step-2/state.json is not step-000002/state.json of the artifact pretrain" in problems
    assert "dataset/kept/extra.parquet has no origin" in problems


def test_only_bytes_of_the_named_digest_need_no_second_look(copy: Path) -> None:
    """As after an upload: what was pulled back is compared byte by byte, and its content only if it is another one."""
    digest = audit.verify(copy).digest
    again = audit.verify(copy, checked=digest)
    assert again.ok and again.checks[-1].name == "content" and again.checks[-1].ok is None
    flip(copy / "checkpoints/pretrain-step-2/state.json")
    assert not audit.verify(copy, checked=digest).ok, "the bytes are always checked"
    resum(copy)
    assert not audit.verify(copy, checked=digest).ok, "new checksums are another digest"


def test_a_forged_manifest_is_caught_by_the_statements(copy: Path) -> None:
    path = copy / "evidence/manifests/pretrain.json"
    manifest = json.loads(path.read_text())
    state = copy / "checkpoints/pretrain-step-2/state.json"
    state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
    row = next(r for r in manifest["files"] if r["path"] == "step-000002/state.json")
    row["sha256"] = sha256_file(state)
    release_fixtures.write_json(path, manifest)
    resum(copy)
    assert "manifests" in {c.name for c in verify(copy).checks if c.ok is False}
    from pipeline.core.store import FileRow, digest_of

    manifest["digest"] = digest_of([FileRow(r["path"], r["size"], r["sha256"]) for r in manifest["files"]])
    release_fixtures.write_json(path, manifest)
    resum(copy)
    bad = {c.name: c.detail for c in verify(copy).checks if c.ok is False}
    assert set(bad) == {"origins", "statements", "page"}, "release.json and the page name the digest"


def test_deep_finds_training_on_held_out_text_and_forged_answers(built: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from release.checks.documents import content_hashes
    from release.checks.order import segments

    data = Path(shutil.copytree(built / "dataset", tmp_path / "dataset"))
    path = data / "order/pretrain/part-00000.parquet"
    table = pq.read_table(path)
    assert segments(Release(data, "dataset")).problems == content_hashes(Release(data, "dataset")).problems == []
    pq.write_table(
        table.set_column(table.schema.get_field_index("id"), "id", pa.array(["prose/000"] * len(table))), path
    )
    assert "prose/000, which is no training document" in segments(Release(data, "dataset")).problems[0]
    pq.write_table(
        table.set_column(table.schema.get_field_index("length"), "length", pa.array([9999] * len(table))), path
    )
    assert "reaches beyond the end" in segments(Release(data, "dataset")).problems[0]
    rows = pq.read_table(data / "kept/prose/part-00000.parquet").to_pylist()
    rows[0]["text"] += "!"
    release_fixtures.table(data / "kept/prose/part-00000.parquet", rows)
    assert f"the text of {rows[0]['id']} is not what" in content_hashes(Release(data, "dataset")).problems[0]


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(AtomError, match="there is no folder nowhere/at/all"):
        audit.verify("nowhere/at/all")
    (tmp_path / "f").write_text("x")
    with pytest.raises(AtomError, match="is a file"):
        verify(tmp_path / "f")
    (tmp_path / "code").mkdir()
    (tmp_path / "index.json").write_text('[{"branch": 1}]')
    with pytest.raises(AtomError, match=r"neither a release nor a repository of one: it has no SHA256SUMS; give the"):
        verify(tmp_path)
    (tmp_path / SUMS).write_text("")
    assert kind_of(tmp_path / "code") == "repository" and not verify(tmp_path).ok


def test_a_checksum_file_that_was_deleted_is_missing(built: Path, copy: Path, tmp_path: Path) -> None:
    for place, folder in pulled(built, tmp_path / "alone").items():
        (folder / SUMS).unlink()
        problems = [text for check in verify(folder).checks for text in check.wrong]
        assert f"{SUMS} is missing" in problems, place
    (copy / SUMS).unlink()
    (copy / ALL_SUMS).unlink()
    problems = [text for check in verify(copy).checks for text in check.wrong]
    assert f"{SUMS} is missing" in problems and f"{ALL_SUMS} is missing" in problems


def test_the_tables_of_the_data_set_must_agree_on_every_kept_document(built: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from release.checks.documents import content_hashes

    def damaged(file: str, column: str, where, value: str) -> list[str]:
        path = data / file
        before, rows = path.read_bytes(), pq.read_table(path).to_pylist()
        next(row for row in rows if where(row))[column] = value
        release_fixtures.table(path, rows)
        problems = content_hashes(Release(data, "dataset")).problems
        path.write_bytes(before)
        return problems

    data = Path(shutil.copytree(built / "dataset", tmp_path / "dataset"))
    fates, kept, tokens = (
        f"{table}/prose/part-00000.parquet" for table in ("dispositions", "kept", "tokens/documents")
    )
    one, other = {"id": "prose/001"}, {"id": "prose/003"}
    assert damaged(fates, "kept_hash", lambda row: row["id"] == one["id"], "0" * 64) == [
        f"{fates}: the kept hash of prose/001 is not that of {kept}"
    ]
    assert damaged(fates, "kept_hash", lambda row: row["id"] == other["id"], "0" * 64) == [
        f"{fates}: prose/003 has a kept hash, but is not kept"
    ]
    assert damaged(tokens, "content_hash", lambda row: row["id"] == one["id"], "0" * 64) == [
        f"{tokens}: the content hash of prose/001 is not that of {kept}"
    ]
    assert damaged(tokens, "id", lambda row: row["id"] == one["id"], "prose/003") == [
        f"{tokens}: the content hash of prose/001 is not that of {kept}",
        f"{tokens}: prose/003 is no kept document",
    ]
    assert content_hashes(Release(data, "dataset")).problems == []


@pytest.mark.parametrize("field", ["_type", "predicateType", "buildType"])
def test_a_statement_of_another_kind_is_named(copy: Path, field: str) -> None:
    from pipeline.core.store import canonical, sha256_bytes

    path = sorted((copy / "evidence/statements").glob("*.json"))[0]
    body = json.loads(path.read_text())
    holder = body["predicate"]["buildDefinition"] if field == "buildType" else body
    holder[field] = "https://example.org/other"
    path.unlink()
    data = canonical(body)
    path.with_name(f"{sha256_bytes(data)}.json").write_bytes(data)
    from release.checks.evidence import statements

    problems = statements(Release(copy)).problems
    name = f"evidence/statements/{sha256_bytes(data)}.json"
    assert any(text.startswith(f"{name}: its {field} is https://example.org/other") for text in problems)


def test_deep_without_torch_keeps_what_it_found(copy: Path, monkeypatch) -> None:
    import sys

    rows = json.loads((copy / "evidence/gates.json").read_text())
    rows["counts_balance"]["ok"] = False
    release_fixtures.write_json(copy / "evidence/gates.json", rows)
    resum(copy)
    monkeypatch.setitem(sys.modules, "torch", None)
    verdict = audit.verify(copy, deep=True)
    checks = {check.name: check for check in verdict.checks}
    failed = {name: check.detail for name, check in checks.items() if check.ok is False}
    assert not verdict.ok and failed.keys() == {"gates", "attestations", "page"}, failed
    assert {name for name, check in checks.items() if check.ok is None} == {
        "signatures",
        "runtimes",
        "weights",
        "reload_in_transformers",
    }
    assert (
        checks["weights"].detail
        == "not checked, because it needs torch; run pip install '.[train]' in the checkout or in code/ of a release"
    )
    assert checks["documents"].ok and checks["order"].ok and checks["cards"].ok


def test_links_of_a_client_cache_are_files_and_others_are_not(built: Path, tmp_path: Path) -> None:
    """A snapshot as the Hub client keeps it; test_release_publish.py has a real one."""
    repository = tmp_path / "models--local--tiny"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for path in [*files_of(built, next(p for p in repositories(built) if p.folder == "model")), SUMS]:
        link, blob = snapshot / path, blobs / sha256_file(built / "model" / path)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built / "model" / path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert verify(snapshot).ok, verify(snapshot).to_json()
    link = snapshot / "config.json"
    real = link.resolve()
    for target in (built / "model/config.json", tmp_path / "models--local--other/blobs/x", repository / "refs/x"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.exists() or shutil.copyfile(real, target)
        link.unlink()
        link.symlink_to(target)
        problems = [text for check in verify(snapshot).checks for text in check.wrong]
        expected = ["config.json is a link, not a regular file", "config.json is missing (listed in SHA256SUMS)"]
        assert problems == [*expected, "config.json is missing, and a model repository has it"], target
    link.unlink()
    link.symlink_to(blobs / "gone")
    assert not verify(snapshot).ok
