"""The documents of standards: valid by each standard's own tool, whatever the names, and right in what they compute."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import CheckFailed
from release.checks.check import Absent
from release.checks.evidence import valid_standards
from release.facts.data_facts import OrderFacts, OrderPart, SourceInOrder
from release.layout import MODEL
from release.opened_release import Release
from release.schema import PublishedLicenses
from release.standards import bundle, eu_summary, frameworks, standard_facts, validation
from release.standards.eu_summary import INTERACTIONS
from stages.formats.table import DISPOSITIONS, DOCUMENTS, KEPT, write_rows
from stages.recipe import Maker
from tests.fixtures.standard_fixtures import make_facts, manifest_of, source_facts, variant_facts, write_documents

CARBON = {"grams_per_kwh": 475, "source": "a report", "overhead": 1.2}
HOSTILE = [
    'a "quoted" \'name\'', "line\nbreak\r\ttab", "<script>alert(1)</script> | *bold* `code` [a](b)", "Ü ñ 漢字 😀",
    "\u202eright to left\u202c", "nul\x00bell\x07", "surrogate \ud800", "a: b # {c} - !!python/object", "%2F/../..", " ",
    "http://[::1 #a#b%",
]  # fmt: skip
"""Texts that end a string, a line, a cell or a scalar of the formats."""


def field(body: Any, label: str) -> Any:
    return next(f for section in body["sections"] for f in section["fields"] if f["label"] == label)


def test_each_document_is_valid(tmp_path: Path) -> None:
    maker = {"carbon": CARBON, "provider": "Example", "market_date": "2026-08-02", "code_of_practice": False}
    texts = write_documents(make_facts(tmp_path, {"web": source_facts()}, maker))
    assert validation.problems(tmp_path) == []
    assert yaml.safe_load(texts[bundle.CITATION])["date-released"] == "2026-08-02"
    assert "- **Name of the provider**: Example *(maker)*" in texts["evidence/standards/eu_summary.md"]
    assert "web\n  licenses: CC-BY-4.0" in texts["dataset/NOTICE"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_valid(tmp_path: Path, text: str) -> None:
    rows = {text: source_facts(licenses=[text, "MIT"], origin=text, license_evidence=text, removed={text: 2})}
    rows["web"] = source_facts(licenses=["MIT OR Apache-2.0", "CC-BY-4.0"])
    names = {"title": text, "description": text, "contact": text, "namespace": text}
    facts = make_facts(tmp_path, rows, {"carbon": CARBON}, release=names, methods=[text], declared={})
    object.__setattr__(facts, "packages", [standard_facts.Package(text, text, text, text, []), *facts.packages])
    texts = write_documents(facts)
    assert validation.problems(tmp_path) == []
    bom = json.loads(texts[bundle.CYCLONEDX])
    assert [part["name"] for part in bom["components"]][:3] == [text, "web", text]
    assert bom["components"][1]["licenses"] == [{"expression": "(MIT OR Apache-2.0) AND CC-BY-4.0"}]
    assert yaml.safe_load(texts[bundle.MOF])["release"]["producer"] == text
    for path in ("evidence/standards/eu_summary.md", "dataset/NOTICE"):
        assert texts[path].isascii() or all(c.isprintable() or c == "\n" for c in texts[path]), path
    assert "<script>" not in texts["evidence/standards/eu_summary.md"].replace("\\<", "")
    heads = [line for line in texts["evidence/standards/eu_summary.md"].splitlines() if line.startswith("#")]
    assert len(heads) == 1 + len(validation.SECTIONS), "no name begins a line"


BREAKS = {
    bundle.CYCLONEDX: ('"specVersion": "1.7"', '"specVersion": "1.7", "extra": 1'),
    bundle.SPDX: ('"ai_autonomyType": "noAssertion"', '"ai_autonomyType": "maybe"'),
    bundle.MOF: ("name: Datasets", "name: Data"),
    bundle.CITATION: ("cff-version: 1.2.0", "cff-version: 1.2.0\nhome: x"),
    bundle.EU_SUMMARY: ('"answer": "Text"', '"answer": ""'),
}


@pytest.mark.parametrize("path", BREAKS)
def test_what_a_standard_does_not_allow_is_named(tmp_path: Path, path: str) -> None:
    texts = write_documents(make_facts(tmp_path, {"web": source_facts()}))
    old, new = BREAKS[path]
    assert old in texts[path]
    (tmp_path / path).write_text(texts[path].replace(old, new))
    problems = validation.problems(tmp_path)
    assert problems and all(text.startswith(f"{path}: ") and "\n" not in text for text in problems)
    for damage in (b"a: [", b"\xff", b"[" * 1000, b""):
        (tmp_path / path).write_bytes(damage)
        assert validation.errors(tmp_path, path), damage[:4]
    (tmp_path / path).unlink()
    assert validation.errors(tmp_path, path)


def test_the_bills_have_the_model_that_it_began_with_and_its_variants(tmp_path: Path) -> None:
    files = {"model.safetensors": "cd" * 32, "config.json": "ef" * 32}
    base = {"repo": "local/base", "license": "MIT", "digest": f"sha256:{'0' * 64}", "files": files}
    facts = make_facts(tmp_path, {"web": source_facts()})
    facts = replace(
        facts,
        models={MODEL: replace(facts.models[MODEL], base=base)},
        manifests={**facts.manifests, "variant-gguf-q8_0": manifest_of("model/model-Q8_0.gguf", "12" * 32)},
        variants={"-gguf-q8_0": variant_facts("gguf-q8_0")},
    )
    texts = write_documents(facts)
    assert validation.problems(tmp_path) == []
    bom = json.loads(texts[bundle.CYCLONEDX])
    (ancestor,) = bom["metadata"]["component"]["pedigree"]["ancestors"]
    assert (ancestor["name"], ancestor["version"]) == ("local/base", base["digest"])
    assert [file["hashes"][0]["content"] for file in ancestor["components"]] == ["cd" * 32]
    variant = bom["components"][0]
    assert variant["bom-ref"] == "model:variant-gguf-q8_0" and variant["name"] == "tiny-gguf-q8_0"
    assert variant["pedigree"]["ancestors"][0]["externalReferences"][0]["url"].endswith("/local/tiny")
    assert variant["components"][0]["hashes"][0]["content"] == "12" * 32
    assert {"ref": "model:variant-gguf-q8_0", "dependsOn": [f"model:{MODEL}"]} in bom["dependencies"]
    graph = json.loads(texts[bundle.SPDX])["@graph"]
    names = {row["spdxId"]: row["name"] for row in graph if "name" in row}
    related = {
        (names[row["from"]], row["relationshipType"], names[row["to"][0]])
        for row in graph
        if row.get("relationshipType") in ("ancestorOf", "descendantOf", "hasVariant")
    }
    assert related == {
        ("local/base", "ancestorOf", "tiny"),
        ("tiny", "hasVariant", "tiny-gguf-q8_0"),
        ("tiny-gguf-q8_0", "descendantOf", "tiny"),
    }


def test_references_of_spdx_resolve(tmp_path: Path) -> None:
    texts = write_documents(make_facts(tmp_path, {"web": source_facts()}))
    graph = json.loads(texts[bundle.SPDX])
    graph["@graph"] = [row for row in graph["@graph"] if row["type"] != "dataset_DatasetPackage"]
    assert any("refers to" in text for text in validation.spdx(json.dumps(graph).encode()))
    graph["@graph"] = [{**row, "spdxId": "https://x#1"} if "spdxId" in row else row for row in graph["@graph"]]
    assert list(validation.spdx(json.dumps(graph).encode()))


def test_without_the_tools_it_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(make_facts(tmp_path, {"web": source_facts()}))
    monkeypatch.setitem(sys.modules, "cyclonedx.schema", None)
    with pytest.raises(Absent, match=r"it needs cyclonedx\.schema; run pip install '\.\[report\]'"):
        valid_standards(Release(tmp_path))


def test_a_model_was_trained_on_what_its_phases_read(tmp_path: Path) -> None:
    facts = make_facts(tmp_path, {"web": source_facts(), "unread": source_facts()})
    facts.data.order["rlvr"] = OrderFacts(9, [OrderPart(1, 9, {"web": SourceInOrder(1, 1, 1)})])
    texts = write_documents(facts)
    card = json.loads(texts[bundle.CYCLONEDX])["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"ref": "source:web"}]
    elements = json.loads(texts[bundle.SPDX])["@graph"]
    (relation,) = (row for row in elements if row.get("relationshipType") == "trainedOn")
    names = {row["spdxId"]: row.get("name") for row in elements if "spdxId" in row}
    assert [names[target] for target in relation["to"]] == ["web"]
    assert validation.problems(tmp_path) == []


def test_energy_and_carbon_follow_from_the_stated_factors(tmp_path: Path) -> None:
    rows = {"web": source_facts()}
    energy = json.loads(write_documents(make_facts(tmp_path, rows, {"carbon": CARBON}))[bundle.ENERGY])
    assert energy["total"]["energy_kwh"] == pytest.approx(3.0)
    assert energy["total"]["co2_kg"] == pytest.approx(3.0 * 1.2 * 0.475)
    assert energy["factors"]["carbon"]["source"] == "a report" and energy["methods"] == ["estimate: x"]
    without = json.loads(write_documents(make_facts(tmp_path, rows))[bundle.ENERGY])
    assert without["total"]["co2_kg"] is None and without["factors"] == {"carbon": None, "stated_by": None}


def write_pages(folder: Path, pages: list[tuple[str, str]]) -> None:
    """The tables of two parts of kept pages (address, text), with another text, and a removed page in each."""
    for part, of_part in enumerate((pages[::2], pages[1::2])):
        ids = [f"web/{part}-{n}" for n in range(len(of_part))]
        kept = [
            dict.fromkeys(KEPT, "") | {"id": id, "source": "web", "origin": url, "prompt_chars": 0, "text": "not read"}
            for id, (url, _) in zip(ids, of_part, strict=True)
        ]
        write_rows(folder / f"dataset/kept/web/part-{part:05d}.parquet", KEPT, kept)
        fates = [
            dict.fromkeys(DISPOSITIONS)
            | {"id": id, "source": "web", "license": "", "content_hash": "", "bytes": size, "disposition": fate}
            for id, size, fate in [
                (f"web/{part}-spam", 10**6, "removed"),
                *((id, len(text), "kept") for id, (_, text) in zip(ids, of_part, strict=True)),
            ]
        ]
        write_rows(folder / f"dataset/dispositions/web/part-{part:05d}.parquet", DISPOSITIONS, fates)


def test_categories_of_the_eu_summary(tmp_path: Path) -> None:
    rows = {name: source_facts() for name in ("hub", "sums", "mine", "web", "written")}
    rows["mine"].origin, rows["written"].generated = "a disk", {"generator": "local/tiny 0.1.0"}
    readers = {"hub": "hub", "sums": "problems", "mine": "jsonl", "web": "warc", "written": "generated"}
    crawler = {"name": "bot", "purpose": "text", "behavior": "robots.txt is obeyed", "period": "2025-01 to 2025-03"}
    pages = [
        ("https://a.org/1", "long " * 50),
        ("https://a.org/2", "x"),
        *((f"https://b{n}.org/", "short") for n in range(9)),
    ]
    write_pages(tmp_path, pages)
    facts = make_facts(
        tmp_path, rows, {"sources": {"web": "crawled", "mine": "licensed"}, "crawler": crawler},
        declared={name: {"reader": reader} for name, reader in readers.items()},
    )  # fmt: skip
    body = eu_summary.summary(facts)
    sections = {section["number"]: section["fields"] for section in body["sections"]}

    def listed(number: str) -> list[str]:
        return [row["source"] for f in sections[number] if f["label"] == "Sources" for row in f["answer"]]

    assert {n: listed(n) for n in ("2.1", "2.2.1", "2.3", "2.5", "2.6")} == {
        "2.1": ["hub"], "2.2.1": ["mine"], "2.3": ["web"], "2.5": ["written"], "2.6": ["sums"],
    }  # fmt: skip
    assert sections["2.2.2"][0]["answer"].startswith("No") and field(body, "Crawler")["basis"] == "maker"
    assert field(body, "The tenth of the domains with the most text")["answer"] == [{"domain": "a.org", "bytes": 251}]
    assert field(body, "Published models that wrote the data")["answer"] == ["local/tiny 0.1.0"]
    (itself,) = field(body, "Other models that wrote the data, those of the provider among them")["answer"]
    assert "in rlvr" in itself and field(body, "The content and the online sources in words")["basis"] == "not stated"
    assert field(body, "Interactions of users with the model") == {
        "label": "Interactions of users with the model", "answer": "No", "basis": "computed",
    }  # fmt: skip
    stated = {"sources": {"web": "user"}, "user_interactions": ["services"]}
    users = eu_summary.summary(make_facts(tmp_path, {"web": source_facts()}, stated))
    answers = [(field(users, label)["answer"], field(users, label)["basis"]) for label in INTERACTIONS.values()]
    assert answers == [("No", "maker"), ("Yes", "maker")]
    assert field(body, "Name of the provider") == {
        "label": "Name of the provider", "answer": "not stated", "basis": "not stated",
    }  # fmt: skip
    assert field(body, "Models that it depends on")["answer"].startswith("None")
    facts.models[MODEL].base = {"repo": "local/tiny", "license": "MIT", "digest": "sha256:ab"}
    assert "local/tiny, digest sha256:ab" in field(eu_summary.summary(facts), "Models that it depends on")["answer"]


def test_more_domains_than_memory_holds_are_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eu_summary, "MOST_DOMAINS", 1)
    write_pages(tmp_path, [(f"https://b{n}.org", "x") for n in range(3)])
    facts = make_facts(tmp_path, {"web": source_facts()}, {"sources": {"web": "crawled"}})
    label = "The tenth of the domains with the most text"
    assert "there are more than 1 domains" in field(eu_summary.summary(facts), label)["answer"]
    monkeypatch.undo()
    write_rows(tmp_path / "dataset/kept/web/part-00001.parquet", KEPT, [])
    with pytest.raises(CheckFailed, match="kept/web/part-00001.parquet has other documents than its dispositions keep"):
        eu_summary.summary(make_facts(tmp_path, {"web": source_facts()}, {"sources": {"web": "crawled"}}))
    facts.data.by_reference["web"] = "owner/pages@1234"
    assert "the texts of web are by reference" in field(eu_summary.summary(facts), label)["answer"]


def test_the_class_of_the_framework_is_reached_step_by_step(tmp_path: Path) -> None:
    def reached(**maker: str) -> str:
        return str(frameworks.framework(make_facts(tmp_path, {"web": source_facts()}, maker))["class"])

    def touch(*paths: str) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("x")

    report = {"technical_report": "https://example.org/report"}
    assert reached(**report) == "none"
    touch("code/stages/models/x", "model/model.safetensors", "model/README.md", "dataset/README.md")
    touch("dataset/evaluation/mid/scores.json")
    assert reached() == "none" and reached(**report).startswith("Class III")
    touch(
        "code/stages/train/x",
        "code/stages/generation/x",
        "code/stages/evaluation/x",
        "dataset/evaluation/items.parquet",
    )
    assert reached(**report).startswith("Class II:")
    touch("code/stages/data/x", "checkpoints/a/model.safetensors", "dataset/kept/web/part-00000.parquet")
    paper = {**report, "research_paper": "https://example.org/paper"}
    assert reached(**report).startswith("Class II:") and reached(**paper).startswith("Class I:")
    closed = {"license": PublishedLicenses("Apache-2.0", "CC-BY-4.0", "LicenseRef-mine")}
    body = frameworks.framework(make_facts(tmp_path, {"web": source_facts()}, paper, release=closed))
    assert body["class"] == "none" and "LicenseRef-mine" in str(body["missing"])


def test_the_definition_is_met_requirement_by_requirement(tmp_path: Path) -> None:
    rows = {"web": source_facts(licenses=["LicenseRef-unknown-web"], origin="")}
    unmet = [item for item in frameworks.checklist(make_facts(tmp_path, rows))["requirements"] if not item["met"]]
    reasons = " ".join(item["reason"] for item in unmet)
    assert "no origin or evidence of web" in reasons and "not known: LicenseRef-unknown-web" in reasons
    assert "the texts of 0 of 10 kept documents" in reasons


def test_texts_by_reference_are_not_called_published(tmp_path: Path) -> None:
    rows = [
        {"id": f"web/{n}", "text": "", "source": "web", "license": "MIT", "origin": "", "content_hash": "", "prompt_chars": 0}
        for n in range(10)
    ]  # fmt: skip
    write_rows(tmp_path / "dataset/kept/web/part-00000.parquet", DOCUMENTS, rows)
    facts = make_facts(tmp_path, {"web": source_facts()})
    facts.data.by_reference["web"] = "owner/pages@1234"
    item = next(item for item in frameworks.checklist(facts)["requirements"] if item["evidence"] == "dataset/kept")
    assert item["met"] and item["reason"] == (
        "the texts of 0 of 10 kept documents are in the release; `atom rebuild-data` gets the other 10 from "
        "owner/pages@1234"
    )
    assert "Datasets: the texts of web are by reference" in str(frameworks.framework(facts)["missing"])
    assert '"dataset_datasetAvailability": "scrapingScript"' in write_documents(facts)[bundle.SPDX]
    assert validation.problems(tmp_path) == []


def test_the_license_of_python_stays_with_its_texts(tmp_path: Path) -> None:
    rows = {"code": source_facts(licenses=["PSF-2.0"]), "free": source_facts(licenses=["CC0-1.0"])}
    facts = make_facts(tmp_path, rows, declared={"code": {"reader": "stdlib-source"}})
    assert "https://docs.python.org/3/license.html" in bundle.notice(facts) and "free" not in bundle.notice(facts)
    (tmp_path / "dataset" / bundle.PYTHON_LICENSE).parent.mkdir(parents=True)
    (tmp_path / "dataset" / bundle.PYTHON_LICENSE).write_bytes(b"PSF LICENSE AGREEMENT")
    (tmp_path / "dataset/notices/code").mkdir(parents=True)
    text = bundle.notice(facts)
    assert f"copyright: {bundle.PYTHON_LICENSE}" in text and "packages: notices/code" in text
    text = bundle.notice(make_facts(tmp_path, {"free": rows["free"]}))
    assert text.endswith("or to keep notices:\n\nnone\n")


def test_packages_have_licenses_and_hashes(tmp_path: Path) -> None:
    version = metadata.version("safetensors")
    (tmp_path / "requirements").mkdir()
    lock = (
        f"# head\nsafetensors=={version} \\\n    --hash=sha256:{'c' * 64}\nother==1 \\\n    --hash=sha256:{'d' * 64}\n"
    )
    (tmp_path / "requirements/x.lock").write_text(lock)
    known, older, unknown = standard_facts.describe_packages(
        [("safetensors", version), ("safetensors", "0.0.1"), ("no-such-package", "1")], tmp_path
    )
    assert known["hashes"] == ["c" * 64] and (known["license"] or known["stated"])
    assert older == {"name": "safetensors", "version": "0.0.1", "license": None, "stated": "", "hashes": []}
    assert unknown["license"] is None


@pytest.mark.parametrize(
    ("section", "words"),
    [({"market_date": "2026-13-01"}, "no date of the calendar"), ({"carbon": {"grams_per_kwh": -1, "source": "x"}}, "greater than or equal to 0")],
    ids=str,
)  # fmt: skip
def test_statements_of_the_maker_are_bounded(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Maker.model_validate(section)
