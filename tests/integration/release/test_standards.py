"""The bundle of standards of a small release: what verify says of each altered, missing and added document."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from release.audit.verify import CheckResult
from release.cards import croissant
from release.facts.data_facts import read_data_facts
from release.layout import NOTICE, ORIGINS, STANDARDS
from release.repositories import files_of, repositories
from release.schema import read_release
from release.standards import bundle
from stages.rl.rollout import rollouts
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.release_fixtures import pulled, resum


def checks_of(folder: Path) -> dict[str, CheckResult]:
    return {check.name: check for check in verify(folder).checks}


def alter(path: Path) -> None:
    """Changes a document so that it is still one of its kind."""
    text = path.read_text()
    if path.suffix == ".json":
        body = json.loads(text)
        if isinstance(body, list):
            body.append({"name": "left-pad", "version": "1.0", "license": "MIT", "stated": "", "hashes": []})
        elif "specVersion" in body:
            body["metadata"]["component"]["version"] = "0.1.1"
        elif "@graph" in body:
            body["@graph"][1]["name"] = "another"
        elif "sections" in body:
            body["sections"][0]["fields"][0]["answer"] = "another"
        else:
            body["total" if "total" in body else "definition"] = "another"
        release_fixtures.write_json(path, body)
    else:
        path.write_text(f"{text}\n" if path.suffix == ".yml" else text.replace("tiny", "another"))


def test_each_altered_document_is_named(copy: Path) -> None:
    paths = [bundle.RECORDED, *bundle.DOCUMENTS]
    for path in paths:
        alter(copy / path)
    resum(copy)
    checks = checks_of(copy)
    wrong = checks["standards"].wrong
    assert {text.split(" ")[0] for text in wrong} == set(paths), wrong
    assert [name for name, check in checks.items() if check.ok is False] == ["standards", "page"], "the forms are right"


def test_what_breaks_a_standard_or_is_missing_is_named(copy: Path) -> None:
    body = json.loads((copy / bundle.CYCLONEDX).read_text())
    release_fixtures.write_json(copy / bundle.CYCLONEDX, body | {"specVersion": "9"})
    resum(copy)
    (problem,) = checks_of(copy)["standards_valid"].wrong
    assert problem.startswith(f"{bundle.CYCLONEDX}: specVersion: ")
    (copy / bundle.OSAID).unlink()
    origins = json.loads((copy / ORIGINS).read_text())
    del origins[bundle.OSAID]
    release_fixtures.write_json(copy / ORIGINS, origins)
    resum(copy)
    assert checks_of(copy)["file_list"].wrong == [f"{bundle.OSAID} is missing, and the evidence repository has it"]


def test_the_evidence_alone_is_valid_by_the_standards(built: Path, tmp_path: Path) -> None:
    folder = pulled(built, tmp_path)[""]
    checks = checks_of(folder)
    assert checks["standards_valid"].ok is True and "standards" not in checks
    place = next(place for place in repositories(built) if not place.folder)
    assert {path for path in files_of(built, place) if path.startswith(STANDARDS)} >= {bundle.SPDX, bundle.CITATION}


def test_the_documents_say_what_the_release_is(built: Path) -> None:
    bom = json.loads((built / bundle.CYCLONEDX).read_text())
    (weights,) = bom["metadata"]["component"]["components"]
    sums = dict(line.split("  ")[::-1] for line in (built / "model/SHA256SUMS").read_text().splitlines())
    assert weights["hashes"] == [{"alg": "SHA-256", "content": sums["model.safetensors"]}]
    sources = {part["name"]: part for part in bom["components"] if part["type"] == "data"}
    assert sources["prose"]["licenses"] == [{"expression": "PSF-2.0"}]
    cited = yaml.safe_load((built / bundle.CITATION).read_text())
    assert (cited["license"], cited["type"]) == ("Apache-2.0", "software")
    assert cited["authors"] == [{"name": "the maker of local/tiny, who states no name"}]
    notice = (built / "dataset" / NOTICE).read_text()
    assert "prose\n  licenses: PSF-2.0\n  origin: https://example.org/prose" in notice and "sums" not in notice
    assert not (built / "dataset" / bundle.PYTHON_LICENSE).exists(), "no source is Python's own library"


def test_every_table_is_described_and_loads(built: Path) -> None:
    description = json.loads((built / "dataset" / croissant.NAME).read_text())
    patterns = [row.get("includes") or row["contentUrl"] for row in description["distribution"]]
    described = {path for pattern in patterns for path in (built / "dataset").glob(pattern)}
    assert described == {*(built / "dataset").rglob("*.parquet")} and "order/pretrain/part-*.parquet" in patterns


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_table_too_large_for_memory_is_not_loaded(built: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(croissant, "LOADED", limit)
    names = croissant._large(built / "dataset" / croissant.NAME)
    records = {row["@id"] for row in json.loads((built / "dataset" / croissant.NAME).read_text())["recordSet"]}
    assert names == (records if limit == 0 else set())


def test_rollouts_of_every_kind_are_described_and_load(copy: Path) -> None:
    """Policies of the tokens and turns are structures, which are no fields."""
    rows = [{
        "step": 1, "wave": 0, "group": 2, "sample": 3, "task": "add/1", "kind": "add", "level": 0, "policy": "ab",
        "seed": 2**64 - 1, "prompt_ids": [1, 2], "ids": [3], "logprobs": [-0.5], "text": 'a "b"\n', "finished": True,
        "reward": 1.0, "parts": "{}", "verifier": "problems", "verifier_version": "1", "dropped": "",
        "issued": 0, "versions": [{"version": None, "policy": "ab", "tokens": 1}],
        "turns": [{"sampled": 1, "calls": [], "appended": 0}],
    }]  # fmt: skip
    path = copy / "dataset/rl/rlvr/rollouts.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, rollouts.schema(asynchronous=True, tools=True)), path)
    dataset = copy / "dataset"
    description = croissant.describe_dataset(read_release(copy), dataset, read_data_facts(dataset))
    (dataset / croissant.NAME).write_text(json.dumps(description))
    (records,) = (row for row in description["recordSet"] if row["@id"] == "rl-rlvr-rollouts")
    assert records["description"] == "Columns that are no field: versions, turns."
    assert {field["name"] for field in records["field"] if field.get("isArray")} == {"prompt_ids", "ids", "logprobs"}
    assert croissant.problems(dataset / croissant.NAME) == []
