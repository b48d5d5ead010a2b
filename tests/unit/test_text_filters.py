"""Filters of scans, of personal numbers and of repeated lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from release.references import Reference
from stages.data.acquire.sources import Source
from stages.data.curate.filters.base import Removal
from stages.data.curate.filters.own import RepeatedLines
from stages.data.curate.filters.personal import PersonalNumbers
from stages.data.curate.filters.scan import Scan
from stages.formats.table import DOCUMENTS, content_hash, write_rows
from tests.fixtures.block_fixtures import apply

PROSE = (
    "When the first boats came home the harbor was quiet, and the people on the quay talked about the weather and the "
    "price of fish."
)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Call (212) 736-5000 or +44 20 7946 0958.", "Call 555-0100 or 555-0100."),
        ("Pay to DE89 3704 0044 0532 0130 00 today.", "Pay to 0000-0000 today."),
        ("Card 4111 1111 1111 1111 or 378282246310005.", "Card 0000-0000 or 0000-0000."),
        ("Number 536-90-4399, please.", "Number 0000-0000, please."),
    ],
)
def test_personal_numbers_are_replaced(text: str, expected: str) -> None:
    assert apply(PersonalNumbers(step="personal_numbers").function(), text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Opened on 2024-01-15 10:20:33, ISBN 978-3-16-148410-0, doi 10.1000/182, pages 1234-1250.",
        "The largest integer is 2147483647, and 3.14159265358979 is a ratio.",
        "Card 4111 1111 1111 1112 fails its check digit, as does DE88 3704 0044 0532 0130 00.",
        "No number 000-12-3456 was ever issued.",
        "short 1234",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert apply(PersonalNumbers(step="personal_numbers").function(), text) == text


def test_phone_numbers_are_those_of_the_region() -> None:
    german = PersonalNumbers(step="personal_numbers", region="DE", phone_replacement="TEL").function()
    assert apply(german, "Tel. 030 901820, Berlin") == "Tel. TEL, Berlin"


def test_divided_words_are_joined_if_the_result_is_a_word() -> None:
    scan = Scan(step="scan").function()
    divided = PROSE.replace("weather", "wea-\n  ther").replace("price of fish", "well-\nknown fish")
    assert apply(scan, divided) == PROSE.replace("weather", "weather\n").replace("price of fish", "well-\nknown fish")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "few_letters"),
        ("12.5 | 13.9 | 14.2 | total 99.1 | " * 20, "few_letters"),
        ("t h e q u i c k b r o w n f o x " * 5, "single_letters"),
        (PROSE.replace("e", "c").replace("a", "u").replace("t", "l"), "unknown_words"),
    ],
)
def test_badly_recognized_text_is_removed_with_its_value(text: str, reason: str) -> None:
    removal = apply(Scan(step="scan").function(), text)
    assert isinstance(removal, Removal) and removal.reason == reason
    assert removal.value is not None and removal.threshold is not None


def write_part(folder: Path, texts: list[str]) -> Path:
    rows = [
        {
            "id": f"web/{number}",
            "text": text,
            "source": "web",
            "license": "CC0-1.0",
            "origin": "test",
            "content_hash": content_hash(text),
            "prompt_chars": 0,
        }
        for number, text in enumerate(texts)
    ]
    write_rows(folder / "part-00000.parquet", DOCUMENTS, rows)
    return folder / "part-00000.parquet"


def test_lines_of_many_documents_are_taken_out(tmp_path: Path) -> None:
    menu, note = "Home | About us | All products", "We use cookies on this page."
    # A line that one document repeats is in one document.
    own = "This long line is repeated in one document."
    texts = [f"{menu}\nPage {number}.\n\n {note.upper()} \nok" for number in range(4)] + [f"{own}\n" * 9]
    step = RepeatedLines(step="repeated_lines", max_documents=3).prepared({}, write_part(tmp_path, texts))
    apply_step = step.function()
    assert apply(apply_step, texts[0]) == "Page 0.\n\nok", "short lines stay, however often they occur"
    assert apply(apply_step, texts[4]) == texts[4]
    removal = apply(apply_step, f"{menu}\n{note}")
    assert isinstance(removal, Removal) and removal.reason == "only_repeated_lines"
    kept = RepeatedLines(step="repeated_lines", max_documents=4).prepared({}, tmp_path / "part-00000.parquet")
    assert apply(kept.function(), texts[0]) == texts[0]


def test_paragraphs_are_counted_as_a_whole(tmp_path: Path) -> None:
    notice = "All rights\nare reserved here."
    texts = [f"{notice}\n\nPage {number} has a text of its own." for number in range(3)]
    step = RepeatedLines(step="repeated_lines", unit="paragraph", max_documents=2)
    apply_step = step.prepared({}, write_part(tmp_path, texts)).function()
    assert apply(apply_step, texts[1]) == "Page 1 has a text of its own."
    assert apply(apply_step, notice.replace("\n", " ")) == notice.replace("\n", " ")


def test_texts_that_depend_on_others_are_not_published_by_reference(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "A note."}\n')
    settings = {"name": "notes", "kind": "prose", "license": "MIT", "license_evidence": "test", "origin": "test"}
    source = Source.model_validate({**settings, "reader": {"reader": "jsonl", "path": str(tmp_path)}})
    with pytest.raises(AtomError, match="release.by_reference names notes, whose texts depend on the documents beside"):
        Reference.of(source, 0, [RepeatedLines(step="repeated_lines")])
    assert Reference.of(source, 0, [Scan(step="scan")]).steps == (Scan(step="scan"),)
