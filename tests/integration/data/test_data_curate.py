"""Curation: planted faults are found by the right rule, every document has one disposition, counts balance."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError
from pipeline.core.parts import part_file, part_slice
from pipeline.core.store import Artifact, write_manifest
from stages.data.acquire import acquire_stage
from stages.data.curate import dedup_stage, duplicates_stage, filter_stage, representatives_stage
from stages.data.curate.decontamination import ContaminationIndex
from stages.data.curate.filters.block import BlockStep
from stages.data.curate.settings import CurationSettings
from stages.data.recipe import load
from stages.formats import table as data_table
from stages.formats.table import DOCUMENTS, FAILED, ITEMS, content_hash, part_files, sources_of, write_rows
from stages.tasks import benchmarks, eval_set
from tests.fixtures.block_fixtures import EDITED, FINEWEB, PII, QUALITY, REPETITION
from tests.fixtures.dedup_fixtures import deduplicate
from tests.fixtures.run_fixtures import RecordingReport, at_length

PROSE_STEPS = [
    {"block": QUALITY, "words": "atom", "min_doc_words": 10, "min_stop_words": 0, "max_non_alpha_words_ratio": 0.6},
    {"step": "language", "language_threshold": 0.25},  # as in data_recipes/tiny.yaml
    {"block": REPETITION, "words": "atom", "top_n_grams": []},
    {"step": "top_n_grams"},
    {"block": FINEWEB, "words": "atom", "line_punct_thr": 0.1},
    PII,
]
STOCK = ("RegexFilter", "FineWebQualityFilter/")
"""Rules of blocks that run as they are, and so state no value."""
CODE_STEPS = [{"step": "python_syntax"}, {"step": "code_shape"}]

LONG = (
    "The harbour was quiet when the first boats came home, and the people on the quay talked about the weather, the "
    "price of fish and the new road that would soon reach the village from the north. Nobody believed that it would be "
    "finished."
)
GOOD = (
    "A reader takes the file apart line by line and gives back the words that it has found, together with their places."
)
ITEM_TEXT = "A farmer has seventeen sheep and all but nine of them run away, how many sheep does the farmer have left?"

PROSE = {
    "good": GOOD,
    "good2": "When the parser meets a line that it cannot read, it raises an error that names the file and the line.",
    "copy": GOOD,
    "long": LONG,
    "near": LONG.replace("finished", "completed"),
    "short": "Too short.",
    "french": "Le lecteur ouvre le fichier ligne par ligne et rend les mots qu'il a trouvés avec leur place.",
    "repeated": "the same words again and again, " * 12,
    "mail": "Please write to Jane Roe at jane.roe@corp-mail.net or ask the host at 8.8.4.4 for the list of names.",
    "mail2": "Please write to Jane Roe at someone.else@corp-mail.net or ask the host at 9.9.9.9 for the list of names.",
    "leak": f"This riddle is known to the whole village. {ITEM_TEXT.upper()} Nine, said the child to the farmer.",
    "sum": "In the book of examples there is the sum 347 + 586, and the answer to it is written on the last page.",
}
CODE = {
    "good": "def area(width, height):\n    size = width * height\n    return size\n",
    "broken": "def area(width, height:\n    size = width * height\n    return size\n",
    "blob": "table = [\n" + "    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,\n" * 8 + "]\n",
    "tiny": "def one():\n    return 1\n",
    "leak": "def check():\n    # the teacher's example\n    total = 347+586\n    return total\n",
}
SUMS = {"1": "347+586=933", "2": "111+222=333", "3": "111+222=333", "4": "sort 53142=12345", "5": "1347+586=1933"}


def acquired(folder: Path, name: str, texts: dict[str, str], license: str = "CC0-1.0", parts: int = 1) -> Artifact:
    rows = [
        {
            "id": f"{name}/{key}",
            "text": text,
            "source": name,
            "license": license,
            "origin": "test",
            "content_hash": content_hash(text),
            "prompt_chars": 0,
        }
        for key, text in texts.items()
    ]
    for part in range(parts):
        rows_of_part = rows[part_slice(len(rows), part, parts)]
        write_rows(folder / name / "documents" / part_file(part), DOCUMENTS, rows_of_part)
        write_rows(folder / name / "failed" / part_file(part), FAILED, [])
    return write_manifest(folder / name, f"acquire-{name}")


def evaluation_items(folder: Path) -> Artifact:
    rows = [
        {"id": "add/00000", "task": "add", "prompt": "347+586:", "answer": "933", "text": "347+586"},
        {"id": "riddle/00000", "task": "riddle", "prompt": ITEM_TEXT, "answer": "9", "text": ITEM_TEXT},
    ]
    write_rows(folder / "items" / "items.parquet", ITEMS, rows)
    return write_manifest(folder / "items", "items")


def config(heldout: float = 0.0, parts: int = 1) -> dict[str, Any]:
    return {
        "sources": [
            {"name": "prose", "kind": "prose", "heldout_fraction": heldout, "steps": PROSE_STEPS, "parts": parts},
            {"name": "code", "kind": "code", "heldout_fraction": heldout, "steps": CODE_STEPS},
            {"name": "sums", "kind": "problems", "heldout_fraction": 0.0, "steps": []},
        ],
        "curation": {},
        "seed": 0,
    }


def inputs_of(folder: Path, parts: int = 1) -> dict[str, Artifact]:
    return {
        "prose": acquired(folder, "prose", PROSE, parts=parts),
        "code": acquired(folder, "code", CODE),
        "sums": acquired(folder, "sums", SUMS),
        "items": evaluation_items(folder),
    }


def split_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config of filter, and that of both stages of deduplication."""
    steps = [{k: v for k, v in source.items() if k != "heldout_fraction"} for source in config["sources"]]
    splits = [{k: v for k, v in source.items() if k != "steps"} for source in config["sources"]]
    curation = CurationSettings.model_validate(config["curation"]).model_dump()
    return {**config, "sources": steps}, {"sources": splits, "minhash": curation["minhash"]}


def curated(run_stage: Any, config: dict[str, Any], inputs: dict[str, Artifact]) -> Artifact:
    """The stages of curation, one after the other."""
    first, later = split_config(config)
    filtered = run_stage(filter_stage.STAGE, first, inputs)
    return deduplicate(later, filtered, filtered.path.parent / f"{filtered.key}-deduplicated")["dedup"]


@pytest.fixture
def planted(tmp_path: Path, run_stage: Any) -> Artifact:
    return curated(run_stage, config(), inputs_of(tmp_path))


def dispositions(artifact: Artifact) -> dict[str, dict[str, Any]]:
    tables = [table(artifact, f"dispositions/{name}") for name in sources_of(artifact / "dispositions")]
    return {row["id"]: row for rows in tables for row in rows}


def table(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return [row for path in part_files(artifact.path, name) for row in pq.read_table(path).to_pylist()]


def test_planted_faults_fall_to_the_right_rules(planted: Artifact) -> None:
    rows = dispositions(planted)
    rules = {key: row["rule"] for key, row in rows.items()}
    assert rules["prose/short"] == "GopherQualityFilter/gopher_short_doc"
    assert rules["prose/french"] == "language/score"
    assert rules["prose/repeated"].startswith("GopherRepetitionFilter/")
    assert rules["code/broken"] == "python_syntax/does_not_parse"
    assert rules["code/blob"] == "code_shape/many_digits"
    assert rules["code/tiny"] == "code_shape/too_few_lines"
    assert {key for key, rule in rules.items() if rule is None} == {
        "prose/good", "prose/good2", "prose/long", "prose/mail", "code/good", "sums/2", "sums/4", "sums/5",
    }  # fmt: skip


def test_duplicates_name_the_document_that_stays(planted: Artifact) -> None:
    rows = dispositions(planted)
    assert (rows["prose/copy"]["rule"], rows["prose/copy"]["duplicate_of"]) == ("exact_duplicate", "prose/good")
    assert (rows["sums/3"]["rule"], rows["sums/3"]["duplicate_of"]) == ("exact_duplicate", "sums/2")
    near = rows["prose/near"]
    assert (near["rule"], near["duplicate_of"]) == ("near_duplicate", "prose/long")
    assert near["threshold"] < near["value"] < 1
    # two letters that differ in an address only are the same document once the addresses are gone
    assert (rows["prose/mail2"]["rule"], rows["prose/mail2"]["duplicate_of"]) == ("exact_duplicate", "prose/mail")


def test_contamination_is_found_in_prose_code_and_problems(planted: Artifact) -> None:
    rows = dispositions(planted)
    matches = {key: row["match"] for key, row in rows.items() if row["rule"] == "decontamination"}
    assert matches == {
        "prose/leak": "riddle/00000",
        "prose/sum": "add/00000",
        "code/leak": "add/00000",
        "sums/1": "add/00000",
    }
    assert rows["prose/leak"]["value"] == 13 and rows["sums/1"]["value"] == 3
    published = b"".join(path.read_bytes() for path in planted.path.rglob("*.json"))
    assert b"riddle" not in published
    kept_rows = table(planted, "kept/prose")
    assert not any("sheep" in row["text"].lower() for row in kept_rows)


def test_personal_data_is_replaced_and_counted(planted: Artifact) -> None:
    kept_rows = {row["id"]: row for row in table(planted, "kept/prose")}
    text = kept_rows["prose/mail"]["text"]
    assert "jane.roe" not in text and "8.8.4.4" not in text
    assert "email@example.com" in text and "192.0.2.1" in text
    row = dispositions(planted)["prose/mail"]
    assert row["content_hash"] == content_hash(PROSE["mail"]) != row["kept_hash"] == content_hash(text)
    assert row["kept_hash"] == kept_rows["prose/mail"]["content_hash"]
    assert planted.json("summary.json")["sources"]["prose"]["edited"] == {EDITED: 2}


def test_values_lie_on_the_removing_side_and_counts_balance(planted: Artifact) -> None:
    rows = dispositions(planted)
    assert set(rows) == {f"{s}/{k}" for s, t in (("prose", PROSE), ("code", CODE), ("sums", SUMS)) for k in t}
    for row in rows.values():
        assert (row["disposition"] == "kept") == (row["rule"] is None) == (row["split"] is not None)
        has_value = row["value"] is not None and row["threshold"] is not None
        assert has_value == (row["disposition"] == "removed" and not row["rule"].startswith(STOCK))
    summary = planted.json("summary.json")
    for part in [*summary["sources"].values(), summary["total"]]:
        assert part["documents_in"] == sum(part["kept"].values()) + sum(part["removed"].values())
    written = {name: len(table(planted, f"kept/{name}")) for name in ("prose", "code", "sums")}
    assert written == dict(Counter(row["source"] for row in rows.values() if row["disposition"] == "kept"))


def test_a_document_without_license_is_refused(tmp_path: Path, run_stage: Any) -> None:
    inputs = inputs_of(tmp_path)
    inputs["sums"] = acquired(tmp_path / "again", "sums", SUMS, license="")
    with pytest.raises(AtomError, match="sums/1 has no license"):
        curated(run_stage, config(), inputs)


def test_hashes_are_those_of_the_texts_that_pass(tmp_path: Path, run_stage: Any) -> None:
    """128 bits of each text's SHA-256 in the order of the kept rows, and bands for sources with MinHash alone."""
    artifact = run_stage(filter_stage.STAGE, split_config(config())[0], inputs_of(tmp_path))
    for name in ("prose", "code", "sums"):
        kept, hashes = table(artifact, f"kept/{name}"), table(artifact, f"hashes/{name}")
        assert len(kept) == len(hashes) > 0
        for row, values in zip(kept, hashes, strict=True):
            digest = hashlib.sha256(row["text"].encode()).digest()
            assert [values["hash_high"], values["hash_low"]] == [
                int.from_bytes(digest[start : start + 8], "big") for start in (0, 8)
            ]
            bands = [value for column, value in values.items() if column.startswith("band_")]
            assert len(bands) == (0 if name == "sums" else 14) and None not in bands
    rows = table(artifact, "dispositions/prose")
    kept_hashes = {row["content_hash"] for row in table(artifact, "kept/prose")}
    assert [row["id"] for row in rows] == [f"prose/{key}" for key in PROSE]
    assert {row["kept_hash"] for row in rows if row["disposition"] == "kept"} == kept_hashes
    assert {row["split"] for row in rows} == {None}, "deduplication decides on it"
    assert {row["rule"] for row in rows}.isdisjoint({"exact_duplicate", "near_duplicate"})


def test_languages_of_the_documents_that_pass_are_recorded(tmp_path: Path, run_stage: Any) -> None:
    texts = {"english": GOOD, "french": PROSE["french"], "short": PROSE["short"]}
    steps: dict[str, list[dict[str, Any]]] = {
        "measured": [{"step": "language", "language_threshold": 0.1}],
        "plain": [],
    }
    inputs = {name: acquired(tmp_path, name, texts) for name in steps}
    sources = [{"name": name, "kind": "prose", "steps": each} for name, each in steps.items()]
    settings = {"sources": sources, "curation": {"minhash": None, "decontamination": {}}, "seed": 0}
    artifact = run_stage(filter_stage.STAGE, settings, {**inputs, "items": evaluation_items(tmp_path)})
    assert sources_of(artifact / "measures") == ["measured"], "no step of plain measures"
    rows = pq.read_table(artifact / "measures/measured/part-00000.parquet").to_pylist()
    kept = pq.read_table(artifact / "kept/measured/part-00000.parquet")["id"].to_pylist()
    assert [row["id"] for row in rows] == kept, "one row for each document that passes, in their order"
    assert {row["language"] for row in rows} == {"en"} and all(row["language_score"] > 0.1 for row in rows)


def test_a_short_text_has_no_bands(tmp_path: Path, run_stage: Any) -> None:
    sources = [{"name": "prose", "kind": "prose", "steps": []}]
    inputs = {"prose": acquired(tmp_path, "prose", {"a": "four words are short", "b": LONG})}
    inputs["items"] = evaluation_items(tmp_path)
    artifact = run_stage(filter_stage.STAGE, {"sources": sources, "curation": {}, "seed": 0}, inputs)
    short, long = table(artifact, "hashes/prose")
    assert {short[f"band_{n:02d}"] for n in range(14)} == {None} and None not in long.values()


class Poison(Exception):
    """Raised by a step on one document."""


def poisoned(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    function = BlockStep.function

    def poison(self: BlockStep) -> Any:
        step = function(self)

        def apply(document: Any) -> Any:
            if self.name == EDITED and word in document.text:
                raise Poison("this text cannot be handled")
            return step(document)

        return apply

    monkeypatch.setattr(BlockStep, "function", poison)


def test_a_document_on_which_a_step_raises_is_removed_alone(
    tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, "harbour")
    out, report = tmp_path / "out", RecordingReport()
    filter_stage.run(
        filter_stage.FilterConfig.model_validate(split_config(config())[0]), inputs_of(tmp_path), tmp_path, out, report
    )
    rows = {row["id"]: row for row in pq.read_table(out / "dispositions/prose/part-00000.parquet").to_pylist()}
    for key in PROSE:
        assert (rows[f"prose/{key}"]["rule"] == "failed/parse") == (key in ("long", "near"))
    assert (rows["prose/long"]["disposition"], rows["prose/long"]["value"]) == ("removed", 0.0)
    assert (
        "prose: failed in its steps, and removed: documents prose/long (Poison: this text cannot be handled), "
        "prose/near (Poison: this text cannot be handled)" in report.notes
    )


def test_a_step_that_often_raises_stops_the_stage(
    tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, "reader")
    sources = [{"name": "prose", "kind": "prose", "steps": [PII]}]
    inputs = {"prose": acquired(tmp_path, "prose", {str(n): f"{GOOD} {n}" for n in range(11)})}
    inputs["items"] = evaluation_items(tmp_path)
    sentence = r"source prose: 11 of 11 documents fail in its steps; check the steps; the first is prose/0 \(Poison"
    with pytest.raises(AtomError, match=sentence):
        run_stage(filter_stage.STAGE, {"sources": sources, "curation": {}, "seed": 0}, inputs)


def test_a_document_that_could_not_be_read_is_removed(tmp_path: Path, run_stage: Any) -> None:
    inputs = inputs_of(tmp_path)
    failed = [{"id": "sums/x.jsonl:7", "source": "sums", "license": "CC0-1.0", "reason": "not a JSON object"}]
    write_rows(tmp_path / "sums/failed/part-00000.parquet", FAILED, failed)
    inputs["sums"] = write_manifest(tmp_path / "sums", "acquire-sums")
    planted = curated(run_stage, config(), inputs)
    row = dispositions(planted)["sums/x.jsonl:7"]
    assert (row["disposition"], row["rule"], row["bytes"]) == ("removed", "failed/parse", 0)
    assert row["content_hash"] == content_hash("")
    counts = planted.json("summary.json")["sources"]["sums"]
    assert counts["documents_in"] == len(SUMS) + 1 and counts["removed"]["failed/parse"] == 1


def test_a_source_that_its_filters_empty_is_reported(tmp_path: Path) -> None:
    """The other sources go on; a corpus without any document stops."""
    texts = {"a": "Too short.", "b": "Short too."}
    inputs = {"prose": acquired(tmp_path, "prose", texts), "sums": acquired(tmp_path, "sums", SUMS)}
    inputs["items"] = evaluation_items(tmp_path)
    sources = [{"name": "prose", "kind": "prose", "steps": PROSE_STEPS}]
    both = [*sources, {"name": "sums", "kind": "problems", "steps": []}]
    report = RecordingReport()
    settings = filter_stage.FilterConfig.model_validate({"sources": both, "curation": {}, "seed": 0})
    filter_stage.run(settings, inputs, tmp_path / "work", tmp_path / "out", report)
    assert any("curation removed all documents of prose" in note for note in report.notes), report.notes
    settings = filter_stage.FilterConfig.model_validate({"sources": sources, "curation": {}, "seed": 0})
    with pytest.raises(AtomError, match="removed every document of every source"):
        filter_stage.run(settings, inputs, tmp_path / "work2", tmp_path / "out2", report)


def test_a_step_that_returns_no_text_is_refused(
    tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockStep, "function", lambda self: lambda document: None)
    sentence = "step GopherQualityFilter returned None for document prose/good; a filter returns the text"
    with pytest.raises(AtomError, match=sentence):
        curated(run_stage, config(), inputs_of(tmp_path))


def test_heldout_split_follows_the_text_alone(tmp_path: Path, run_stage: Any) -> None:
    texts = {
        str(i): f"def function_{i}(value):\n    result = value + {i}\n    return result_{i * 7}\n" for i in range(300)
    }
    setup = config(heldout=0.2)
    setup["sources"] = [setup["sources"][1]]
    setup["curation"] = {"minhash": None}
    inputs = {"code": acquired(tmp_path, "code", texts), "items": evaluation_items(tmp_path)}
    rows = table(curated(run_stage, setup, inputs), "kept/code")
    heldout = {row["content_hash"] for row in rows if row["split"] == "heldout"}
    assert 30 < len(heldout) < 90
    inputs["code"] = acquired(tmp_path / "fewer", "code", dict(list(texts.items())[::-2]))
    fewer = table(curated(run_stage, setup, inputs), "kept/code")
    assert all((row["split"] == "heldout") == (row["content_hash"] in heldout) for row in fewer)


def test_contamination_index() -> None:
    index = ContaminationIndex([("short", "2+2"), ("long", " ".join(f"w{i}" for i in range(20)))], 13)
    assert index.find("so 2 + 2 is four") == ("short", 3)
    assert index.find("12+2") is None and index.find("2, 2") is None
    assert index.find("x " + ", ".join(f"W{i}" for i in range(4, 17))) == ("long", 13)
    assert index.find(" ".join(f"w{i}" for i in range(4, 16))) is None


@at_length("data-plane", 40)
def test_curation_resumes_and_does_not_depend_on_hash_randomization(tmp_path: Path, run_stage: Any) -> None:
    """The same digests in fresh interpreters with other hash seeds, and when the second part of the work is left."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from tests.fixtures.run_fixtures import RecordingReport; from stages.data.curate import filter_stage\n"
        "from tests.fixtures.dedup_fixtures import deduplicate\n"
        "from pipeline.core.store import Artifact, write_manifest\n"
        "base, work, out = map(Path, sys.argv[1:4]); out.mkdir()\n"
        "inputs = {n: Artifact.open(base / n) for n in ('prose', 'code', 'sums', 'items')}\n"
        "first, then = json.loads(sys.argv[4])\n"
        "config = filter_stage.FilterConfig.model_validate(first)\n"
        "filter_stage.run(config, inputs, work / 'filter', out, RecordingReport())\n"
        "filtered = write_manifest(out, 'x')\n"
        "print(*(artifact.digest for artifact in deduplicate(then, filtered, work).values()))"
    )
    inputs_of(tmp_path, parts=3)
    digests = set()
    for seed, work in (("1", "w1"), ("2", "w2"), ("3", "w2")):
        folders = [tmp_path, tmp_path / work, tmp_path / f"out{seed}"]
        arguments = [*map(str, folders), json.dumps(split_config(config(0.1, parts=3)))]
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={"PYTHONHASHSEED": seed, "PATH": "", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(process.stdout.strip().splitlines()[-1])
        (tmp_path / work / "filter/prose-00001/kept/prose/part-00001.parquet").unlink()
        shutil.rmtree(tmp_path / work / "out")
    assert len(digests) == 1


def test_the_smoke_recipe_runs_every_step_and_values_are_consistent(run_stage: Any) -> None:
    recipe = load("smoke").resolved()
    inputs = {s.name: run_stage(acquire_stage.STAGE, recipe.acquire_config(s.name, 0), {}) for s in recipe.sources}
    inputs["items"] = run_stage(eval_set.STAGE, {"problems": {"add": 20, "sort": 200}, "seed": 0}, {})
    filtered = run_stage(filter_stage.STAGE, recipe.filter_config(0), inputs)
    given = {"filter": filtered}
    given["duplicates"] = run_stage(duplicates_stage.STAGE, recipe.duplicates_config(), given)
    given["representatives"] = run_stage(representatives_stage.STAGE, recipe.representatives_config(), given)
    artifact = run_stage(dedup_stage.STAGE, recipe.dedup_config(), given)
    rows = dispositions(artifact)
    read = [table(a, name) for n, a in inputs.items() if n != "items" for name in ("documents", "failed")]
    assert len(rows) == sum(map(len, read))
    removed = [row for row in rows.values() if row["disposition"] == "removed"]
    removed = [row for row in removed if "duplicate" not in row["rule"] and row["rule"] != "decontamination"]
    lower_is_bad = ("short_doc", "below", "too_few", "few_letters", "parse", "score", "stop_words", "punct")
    for row in removed:
        if row["value"] is None:
            assert row["threshold"] is None and row["rule"].startswith(STOCK), row
        elif not row["rule"].startswith("license/"):  # which remove before any step looks
            low = any(part in row["rule"] for part in lower_is_bad)
            assert row["value"] < row["threshold"] if low else row["value"] > row["threshold"], row
    for row in rows.values():
        hops = 0
        while row["duplicate_of"]:
            row, hops = rows[row["duplicate_of"]], hops + 1
        assert hops <= 2 and (hops == 0 or row["disposition"] == "kept")


def test_a_text_of_two_kinds_of_source_is_still_found_nearly_twice(tmp_path: Path, run_stage: Any) -> None:
    """The first source is searched for near duplicates, a later one that holds the same text is not."""
    long = " ".join(f"{chr(97 + n % 26)}{chr(97 + n // 26)}x" for n in range(200))  # numbers would all be alike
    inputs = {
        "prose": acquired(tmp_path, "prose", {"first": long, "near": long + " more"}),
        "sums": acquired(tmp_path, "sums", {"copy": long}),
        "items": evaluation_items(tmp_path),
    }
    sources = [{"name": "prose", "kind": "prose", "heldout_fraction": 0.0, "steps": []}]
    sources += [{"name": "sums", "kind": "problems", "heldout_fraction": 0.0, "steps": []}]
    rows = dispositions(curated(run_stage, {"sources": sources, "curation": {}, "seed": 0}, inputs))
    rules = {key: row["rule"] for key, row in rows.items()}
    assert rules["sums/copy"] == "exact_duplicate"
    assert sorted(str(rules[f"prose/{name}"]) for name in ("first", "near")) == ["None", "near_duplicate"]


@pytest.mark.parametrize("parts", [1, 5])
def test_parts_done_beforehand_are_all_that_filter_needs(
    tmp_path: Path, run_stage: Any, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """In any order; a part with no document that passes is a part too."""
    inputs = inputs_of(tmp_path, parts)
    settings = split_config(config(parts=parts))[0]
    expected = run_stage(filter_stage.STAGE, settings, inputs)
    whole = run_stage(filter_stage.STAGE, split_config(config())[0], inputs_of(tmp_path / "whole"))
    work, model = tmp_path / "work", filter_stage.FilterConfig.model_validate(settings)
    assert filter_stage.STAGE.shards(model) == (7 if parts == 5 else 1), (
        "sources of one part each are one piece of work"
    )
    for number in reversed(range(len(model.parts()))):
        filter_stage.run_shard(model, inputs, work, number)
    monkeypatch.setattr(filter_stage, "SourceFilter", None)  # nothing is left to do
    assert run_stage(filter_stage.STAGE, settings, inputs, work).digest == expected.digest
    for name in ("kept/prose", "hashes/prose", "dispositions/prose"):
        assert table(expected, name) == table(whole, name)


def test_a_near_duplicate_may_be_the_only_one_removed_of_its_source(tmp_path: Path, run_stage: Any) -> None:
    inputs = {
        "prose": acquired(tmp_path, "prose", {"long": LONG}),
        "code": acquired(tmp_path, "code", {"near": LONG.replace("finished", "completed")}),
        "items": evaluation_items(tmp_path),
    }
    sources = [{"name": name, "kind": name, "heldout_fraction": 0.0, "steps": []} for name in ("prose", "code")]
    rows = dispositions(curated(run_stage, {"sources": sources, "curation": {}, "seed": 0}, inputs))
    assert sorted(str(row["rule"]) for row in rows.values()) == ["None", "near_duplicate"]


def test_documents_with_items_of_task_sets_are_removed(tmp_path: Path, run_stage: Any) -> None:
    item = {"id": "own/words/000000", "set": "own", "task": "words", "number": 0, "text": GOOD}
    (tmp_path / "benchmarks").mkdir()
    write_rows(tmp_path / "benchmarks/items.parquet", benchmarks.ITEMS, [item])
    inputs = {
        "prose": acquired(tmp_path, "prose", {"good": GOOD, "long": LONG}),
        "items": evaluation_items(tmp_path),
        "benchmarks": write_manifest(tmp_path / "benchmarks", "benchmarks"),
    }
    sources = [{"name": "prose", "kind": "prose", "heldout_fraction": 0.0, "steps": []}]
    artifact = curated(run_stage, {"sources": sources, "curation": {}, "seed": 0}, inputs)
    rows = {id: (row["rule"], row["match"]) for id, row in dispositions(artifact).items()}
    assert rows == {"prose/good": ("decontamination", "own/words/000000"), "prose/long": (None, None)}


def test_no_source_is_searched_for_near_duplicates(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"sums": acquired(tmp_path, "sums", SUMS), "items": evaluation_items(tmp_path)}
    sources = [{"name": "sums", "kind": "problems", "heldout_fraction": 0.0, "steps": []}]
    artifact = curated(run_stage, {"sources": sources, "curation": {}, "seed": 0}, inputs)
    assert {row["rule"] for row in dispositions(artifact).values()} == {None, "decontamination", "exact_duplicate"}


def test_rows_are_read_from_the_row_groups_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_table, "ROWS_PER_GROUP", 4)
    path = tmp_path / "rows.parquet"
    data_table.write_rows(path, {"id": "string"}, [{"id": str(n)} for n in range(11)])
    for numbers in ([], [0], [3, 4], [2, 9, 10], list(range(11))):
        assert [row["id"] for row in data_table.rows_at(path, numbers, ["id"])] == list(map(str, numbers))


def test_a_row_group_ends_before_its_texts_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_table, "GROUP_BYTES", 10)
    path = tmp_path / "rows.parquet"
    data_table.write_rows(path, {"text": "string"}, [{"text": "abcd"}] * 7)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 3, 1]
    assert [batch.num_rows for batch in data_table.stream_batches(path, ["text"])] == [3, 3, 1]
