"""The parts of the page of a release: tables, links, samples, and the absence of scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.text import short
from release.hub.publish import hub_address
from release.web_page import markdown_html, page, samples
from tests.fixtures import release_fixtures


def test_tables_lists_and_links_escape_everything() -> None:
    rows = ["| measure | base |", "|---|---|", "| <b>x</b> \\| y | 1.5 |", ""]
    lines = [*rows, "- **bold** <i>", "- two", "text & more"]
    html = markdown_html.blocks(lines, {"base": "dataset/a b#c.json"})
    assert "<b>x</b>" not in html and "&lt;b&gt;x&lt;/b&gt; | y" in html and '<td class="number">1.5</td>' in html
    assert '<a class="file" href="../dataset/a%20b%23c.json">base</a>' in html
    assert "<ul><li><b>bold</b> &lt;i&gt;</li><li>two</li></ul><p>text &amp; more</p>" in html
    link = markdown_html.file_link("javascript:alert(1)//\"'>")
    assert 'href="../javascript%3Aalert' in link and "\"'>" not in link, (
        "every link begins in the folder of the release"
    )


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0, 1234, 20_000, 1.5e6, 3e9, 3e-5, -0.25, 1e21)] == [
        "0", "1234", "20k", "1.5M", "3B", "3e-05", "-0.25", "1e21",
    ]  # fmt: skip


def test_the_style_is_included_as_it_is() -> None:
    style = (page.FOLDER / "page.css").read_text()
    assert "</style" not in style and "url(" not in style and "@import" not in style


def test_a_sample_of_answers_is_bounded_and_has_all_models(tmp_path: Path) -> None:
    evaluation = tmp_path / "dataset/evaluation"
    for model in ("base", "sft"):
        (evaluation / model).mkdir(parents=True)
        rows = [
            {"id": f"{n}", "task": "add", "prompt": "1+1=", "expected": "2", "output": "x" * 9, "score": float(n % 2)}
            for n in range(500 if model == "sft" else 400)
        ]
        release_fixtures.table(evaluation / model / "items.parquet", rows)
    [sample] = samples.read_samples(tmp_path)
    assert sample.total == 500 and len(sample.shown) == samples.ITEMS
    assert sample.files == [f"dataset/evaluation/{model}/items.parquet" for model in ("base", "sft")]
    for item in sample.shown:
        answers = item.answers
        assert list(answers) == ["base", "sft"] and (answers["base"] is None) == (int(item.id) >= 400)
        assert answers["sft"] is not None and answers["sft"].verdict == ("right" if int(item.id) % 2 else "wrong")


def test_a_page_begins_with_its_policy_and_has_no_script() -> None:
    head = (page.FOLDER / page.TEMPLATE).read_text("utf-8").partition("<title>")[0]
    assert "default-src 'none'" in head and "script-src" not in head and "{{" not in head
    text = f"{head}<title>x</title></head><body><p>an &lt;script&gt; and http-equiv in a text</p></body>"
    assert page.runs_nothing(text)
    for before, after in (
        ("<p>", "<script src='x.js'></script><p>"), ("<p>", "<SCRIPT>alert(1)</SCRIPT>"),
        ("<p>", '<meta http-equiv="refresh" content="0; url=https://evil.example">'),
        ("default-src 'none'", "default-src *"), ("<head>", "<head><base href='x'>"),
    ):  # fmt: skip
        changed = text.replace(before, after, 1)
        assert changed != text and not page.runs_nothing(changed), after


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("dataset/summary.json", "datasets/local/tiny-data/blob/v0.1.0/summary.json"),
        ("dataset/kept", "datasets/local/tiny-data/tree/v0.1.0/kept"),
        ("dataset/NOTICE", "datasets/local/tiny-data/blob/v0.1.0/NOTICE"),
        ("model/", "local/tiny/tree/v0.1.0/"),
        ("model-base/config.json", "local/tiny-base/blob/v0.1.0/config.json"),
        ("checkpoints/sft-step-3/", "local/tiny-checkpoints/tree/sft-step-3/"),
        ("checkpoints/index.json", "local/tiny-checkpoints/blob/v0.1.0/index.json"),
        ("variant-gguf/a%20b.gguf", "local/tiny-gguf/blob/v0.1.0/a%20b.gguf"),
        ("evidence/gates.json", "datasets/local/tiny-evidence/blob/v0.1.0/evidence/gates.json"),
    ],
)
def test_links_of_the_space_lead_to_the_tag_on_the_hub(path: str, address: str) -> None:
    class Info:
        repository, tag = "local/tiny", "v0.1.0"

    assert hub_address(Info, path) == f"https://huggingface.co/{address}"  # type: ignore[arg-type]
