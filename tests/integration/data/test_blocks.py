"""Blocks of datatrove: accelerators give what the blocks give, and steps and readers run in their stages."""

from __future__ import annotations

import csv
import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.data.acquire import acquire_stage
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.data.curate import filter_stage
from stages.data.curate.filters.accelerated import ACCELERATORS
from stages.data.curate.filters.base import Removal
from stages.data.curate.filters.block import BlockStep, _stock
from stages.formats.table import part_files
from tests.fixtures.agreement_fixtures import documents
from tests.fixtures.block_fixtures import FINEWEB, PII, QUALITY, REGEX, REPETITION, document
from tests.fixtures.opt_out_fixtures import Text, acquired, no_items

SETTINGS: list[dict[str, Any]] = [
    {"block": QUALITY, "words": "atom"},
    {"block": QUALITY, "words": "atom", "min_doc_words": 0, "min_stop_words": 5, "stop_words": ["the", "a", "in", "of", "is"]},
    {"block": QUALITY, "words": "atom", "min_doc_words": None, "max_doc_words": 300, "max_avg_word_length": 4.5},
    {"block": QUALITY, "words": "atom", "min_doc_words": 0, "min_avg_word_length": 0, "max_symbol_word_ratio": 0.01},
    {"block": QUALITY, "words": "atom", "min_doc_words": 0, "max_symbol_word_ratio": None, "max_non_alpha_words_ratio": 0},
    {"block": QUALITY, "words": "atom", "min_doc_words": 1, "max_bullet_lines_ratio": 0.2, "max_ellipsis_lines_ratio": 0.1},
    {"block": REPETITION, "words": "atom"},
    {"block": REPETITION, "words": "atom", "dup_line_frac": 0, "dup_para_frac": None, "top_n_grams": [[1, 0.1], [7, 0.3]]},
    {"block": REPETITION, "words": "atom", "top_n_grams": [], "dup_n_grams": [[2, 0.05], [5, 0.01], [12, 0.0]]},
    {"block": REPETITION, "words": "atom", "dup_line_frac": 0.05, "dup_line_char_frac": 0.01, "dup_para_char_frac": 0},
    PII,
    {**PII, "remove_emails": False},
    {**PII, "remove_ips": False, "email_replacement": "a@b.cd"},
    {**PII, "only_remove_public_ips": False, "ip_replacement": "10.20.30.40"},
]  # fmt: skip


def test_every_accelerator_is_compared() -> None:
    assert {settings["block"].rpartition(".")[2] for settings in SETTINGS} == set(ACCELERATORS)


@cache
def web_pages() -> list[str]:
    """Pages as extractors leave them: prose with menus, lists, notices, code and addresses between its lines."""
    draw = random.Random(7)
    lines = [line for row in documents()[::30] for line in row["text"].split("\n") if line.strip()]
    boilerplate = [
        "Home", "Home | About | Contact", "Read more...", "Share this on …", "We use cookies. See our privacy policy.",
        "Terms of Use", "Please enable JavaScript to view this page.", "© 2019 Example Inc.", "• An item of a list",
        "- Another item", "# heading #", "var x = {a: 1};", "lorem ipsum dolor sit amet", "Lorem Ipsum", "[edit]",
        "Paris [1] is a city.[citation needed]", "Write to jane.roe+x@mail.example.co.uk or 8.8.4.4 at once!",
        "v1.2.3.4.5 and 300.1.1.1, 10.0.0.1, 192.168.1.20", "", "   ", "\t", "...", "a" * 1200, "1.2.3", "x@y",
    ]  # fmt: skip
    pages = []
    for number in range(400):
        page = draw.choices(lines, k=draw.randint(0, 40)) + draw.choices(boilerplate, k=draw.randint(0, number % 30))
        if number % 3:
            draw.shuffle(page)
        pages.append(draw.choice(["\n", "\n\n", "\r\n", "\u2028"]).join(page * draw.choice([1, 1, 1, 3])))
    return pages


def hostile_texts() -> list[str]:
    alphabets = [
        "\u202e\u2066\u200f ab\n",
        "👩‍👩‍👧‍👦🏳️‍🌈 🎉\n",
        "漢字。かな、カナ！한글 ",
        "ا ل ع ر ب ي ة ؟",
        "a\u0301\u0327 \u00ad\ufeff",
    ]
    draw = random.Random(3)
    drawn = ["".join(draw.choices(alphabet, k=count)) for alphabet in alphabets for count in (1, 30, 700, 5000)]
    return [
        "", " ", "\n", "\n\n\n", "a", "one line", "one line of text that ends with a stop.", "\0", "\0 \0\n" * 200, "\x00a\x1f b" * 80,
        "x" * 300_000, "word " * 60_000, "the be to of and " * 9, "…", "...", "# # # #", "{", "a\n{", "-\n•\n-",
        "\x0b\x1c\u2028a\u0085b " * 30, ". ! ? " * 50, "a@b.cd " * 50, "1.1.1.1 " * 50, "1.1.1.1.1.1.1.1@x.y", "lorem ipsum {\n{",
        "x {\nLorem Ipsum", "one. two.\nthree. four. five. six", "line\n" * 50, "para\n\n" * 50, "\ud7ff\ue000\uffff\U0010ffff " * 20,
        *drawn,
    ]  # fmt: skip


def outcome(function: Any, given: Any) -> tuple[str, str]:
    """The kept text, the reason of a removal, or the exception, which removes the document too."""
    try:
        result = function(given)
    except Exception as error:
        return "raised", type(error).__name__
    return ("removed", result.reason) if isinstance(result, Removal) else ("kept", result)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values()))[27:90])
def test_an_accelerator_gives_what_its_block_gives(settings: dict[str, Any]) -> None:
    step = BlockStep.model_validate(settings)
    block = step._create()
    accelerated, stock = step._accelerated(block), _stock(block)
    assert accelerated is not None
    kinds = set()
    for text in [*(row["text"] for row in documents()), *web_pages(), *hostile_texts()]:
        expected = outcome(stock, document(text))
        assert outcome(accelerated, text) == expected, text[:200]
        kinds.add(expected[0])
    assert {"kept"} < kinds or settings["block"] == PII["block"], "texts of both kinds"


def test_a_removal_by_an_accelerator_states_value_and_threshold() -> None:
    judge = BlockStep.model_validate({"block": QUALITY, "words": "atom"}).function()
    assert judge(document("Too short.")) == Removal("gopher_short_doc", 2, 50)


def rows_of(artifact: Artifact, table: str) -> list[dict[str, Any]]:
    return [row for path in part_files(artifact.path, table) for row in pq.read_table(path).to_pylist()]


def test_what_a_block_removes_has_a_disposition(tmp_path: Path, run_stage: Any) -> None:
    """Of a block as it is: its name and its reason, without a value; edits are counted by its name."""
    texts = ["A note about lorem.", "Write to me@corp-mail.net.", "A note.", "Notes\n" * 30]
    fineweb = {"block": FINEWEB, "words": "atom", "line_punct_thr": 0, "short_line_thr": 1}
    inputs = {
        "notes": acquired(tmp_path, "notes", [dict(zip("abcd", map(Text, texts), strict=True))]),
        "items": no_items(tmp_path),
    }
    source = {"name": "notes", "kind": "prose", "steps": [{"block": REGEX, "regex_exp": "lorem"}, fineweb, PII]}
    config = {"sources": [source], "curation": {"minhash": None, "alarm_share": 1}, "seed": 0}
    artifact = run_stage(filter_stage.STAGE, config, inputs)
    found = [(row["rule"], row["value"], row["threshold"]) for row in rows_of(artifact, "dispositions/notes")]
    kept, rule = (None, None, None), "FineWebQualityFilter/char_dup_ratio"
    assert found == [("RegexFilter", None, None), kept, kept, (rule, None, None)]
    assert artifact.json("edits.json") == {"notes": {"PIIFormatter": 1}}
    assert [row["text"] for row in rows_of(artifact, "kept/notes")] == ["Write to email@example.com.", "A note."]


def test_a_step_that_cannot_run_stops_before_any_document(tmp_path: Path, run_stage: Any) -> None:
    inputs = {name: acquired(tmp_path, name, [{"a": Text("Text.")}]) for name in ("first", "second")}
    steps = {"first": [], "second": [{"block": QUALITY, "min_words": 3}]}
    sources = [{"name": name, "kind": "prose", "steps": each} for name, each in steps.items()]
    config = {"sources": sources, "curation": {}, "seed": 0}
    work = tmp_path / "work"
    with pytest.raises(AtomError, match="has no parameter min_words"):
        run_stage(filter_stage.STAGE, config, {**inputs, "items": no_items(tmp_path)}, work)
    assert list(work.iterdir()) == []


def read(folder: Path, run_stage: Any, **reader: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(documents, failed rows) of a source with a reader of datatrove."""
    source = {
        "name": "notes",
        "kind": "prose",
        "license": "CC-BY-4.0",
        "license_evidence": "LICENSE",
        "origin": "https://example.org",
        "reader": {"path": str(folder), **reader},
    }
    digest = resolve_tree_digest(Source.model_validate(source))
    artifact = run_stage(acquire_stage.STAGE, {"source": {**source, "tree_digest": digest}, "seed": 0}, {})
    return rows_of(artifact, "documents"), rows_of(artifact, "failed")


READERS = "datatrove.pipeline.readers"
ROWS = [
    {"id": "a", "body": "A note.", "license": "MIT", "url": "https://example.org/a"},
    {"id": "b", "body": "", "license": "MIT", "url": "https://example.org/b"},
    {"id": "c", "body": "Another note.", "license": "CC0-1.0", "url": "https://example.org/c"},
]


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "CSVReader":
        with open(folder / "notes.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "JsonlReader":
        lines = [json.dumps(row) for row in ROWS]
        (folder / "notes.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == "ParquetReader":
        pq.write_table(pa.Table.from_pylist(ROWS), folder / "notes.parquet")
    else:
        with pa.OSFile(str(folder / "notes.arrow"), "wb") as sink:
            table = pa.Table.from_pylist(ROWS)
            with pa.ipc.new_file(sink, table.schema) as stream:
                stream.write_table(table)
    return folder


@pytest.mark.parametrize("kind", ["CSVReader", "JsonlReader", "ParquetReader", "IpcReader"])
def test_readers_of_datatrove(kind: str, tmp_path: Path, run_stage: Any) -> None:
    folder = write(tmp_path / "corpus", kind)
    settings = {"block": f"{READERS}.{kind}", "text_key": "body", "license_field": "license", "url_field": "url"}
    documents, failed = read(folder, run_stage, **settings)
    assert [(row["id"], row["text"], row["license"], row["origin"]) for row in documents] == [
        (f"notes/{row['id']}", row["body"], row["license"], row["url"]) for row in ROWS if row["body"]
    ]
    assert [row["reason"] for row in failed] == ["it has no text"], "a row that the reader leaves out is counted"


def test_a_line_that_a_reader_leaves_out_is_counted(tmp_path: Path, run_stage: Any) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_text('{"text": "One."}\n{"text": \n{"text": "Two."}\n')
    (tmp_path / "corpus/LICENSE").write_text("no corpus\n")
    documents, failed = read(tmp_path / "corpus", run_stage, block=f"{READERS}.JsonlReader", pattern="*.jsonl")
    assert [(row["id"], row["text"]) for row in documents] == [("notes/a.jsonl/0", "One."), ("notes/a.jsonl/2", "Two.")]
    assert [row["id"] for row in failed] == ["notes/a.jsonl#1"] and failed[0]["reason"].startswith("Error when reading")


def test_a_file_that_a_reader_cannot_read_is_named(tmp_path: Path, run_stage: Any) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.parquet").write_bytes(b"no parquet")
    with pytest.raises(AtomError, match=r"a\.parquet cannot be read by ParquetReader after document 0: ArrowInvalid"):
        read(tmp_path / "corpus", run_stage, block=f"{READERS}.ParquetReader")
    (tmp_path / "corpus/a.parquet").write_bytes(b'{"text": "One."}\n{"text": "\xff\xff"}\n')
    with pytest.raises(AtomError, match=r"a\.parquet.* may be corrupted"):
        read(tmp_path / "corpus", run_stage, block=f"{READERS}.JsonlReader")
