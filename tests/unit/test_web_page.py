"""The parts of the page of a release: scripts, tables, charts, words and postings."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import escape

from release.cards import tables
from release.web_page import charts, curves, lineage, markdown_html, page, search_index
from release.web_page.script_parts import PartWriter, embedded, is_part
from release.web_page.spill import Spill

HOSTILE = "</script><script>document.title = 'x'</script><!--<img src=x onerror=y> \u2028\u202e\0\ud800 & 'q' \"w\""


def test_nothing_in_embedded_json_is_markup(tmp_path: Path) -> None:
    text = embedded({"key </script>": [HOSTILE, float("nan"), 1.5, None]})
    assert text.isascii() and not set(text) & set("<>&\n\u2028")
    assert json.loads(text) == {"key </script>": [HOSTILE, None, 1.5, None]}
    PartWriter(tmp_path).write("search/terms-0", {"constructor": HOSTILE})
    part = (tmp_path / "search/terms-0.js").read_text()
    assert part.startswith('atomPart("search/terms-0",{') and part.endswith("});\n") and part.count("\n") == 1


def test_tables_lists_and_links_escape_everything() -> None:
    rows = ["| measure | base |", "|---|---|", "| <b>x</b> \\| y | 1.5 |", ""]
    lines = [*rows, "- **bold** <i>", "- two", "text & more"]
    html = markdown_html.blocks(lines, {"base": "dataset/a b#c.json"})
    assert "<b>x</b>" not in html and "&lt;b&gt;x&lt;/b&gt; | y" in html and '<td class="number">1.5</td>' in html
    assert '<a class="file" href="../dataset/a%20b%23c.json" data-path="dataset/a b#c.json">base</a>' in html
    assert "<ul><li><b>bold</b> &lt;i&gt;</li><li>two</li></ul><p>text &amp; more</p>" in html
    two = markdown_html.blocks(
        tables.table(["measure", *(f"model {'w' * 30} {n}" for n in range(5))], [["x", *"12345"]])
    )
    assert two.count("<table>") > 1 and "---" not in two, "a wide table of a card is several"
    link = markdown_html.file_link("javascript:alert(1)//\"'>")
    assert 'href="../javascript%3Aalert' in link and "\"'>" not in link, (
        "every link begins in the folder of the release"
    )


def test_charts_are_well_formed_and_say_their_ends() -> None:
    points = [(float(n), n * 0.5, n * 0.5 - 1, n * 0.5 + 1) for n in range(50)]
    drawing = charts.chart("<loss>", [charts.Series("a & b", points), charts.Series("none", [])], "step", "nats")
    figure = ElementTree.fromstring(drawing)
    label = figure.find("svg").get("aria-label")  # type: ignore[union-attr]
    assert label == "<loss> by step: a & b from 0 at 0 to 24.5 at 49"
    assert len(figure.findall(".//polyline")) == 1 and len(figure.findall(".//polygon")) == 1
    assert charts.chart("empty", [charts.Series("none", [])], "step") == ""
    one = charts.chart("one", [charts.Series("one", [(3.0, 2.0, 2.0, 2.0)])], "step")
    assert len(ElementTree.fromstring(one).findall(".//circle")) == 1
    many = charts.chart("many", [charts.Series(str(n), points) for n in range(20)], "step", "", True)
    assert "and 4 others" in many and many.count("<polyline") == 16
    assert charts.ticks(0, 1, 4) == [0, 0.5, 1] and charts.ticks(2, 2, 4) == [2]
    assert [charts.short(x) for x in (0, 1234, 20_000, 1.5e6, 3e9, 3e-5, -0.25)] == [
        "0", "1234", "20k", "1.5M", "3B", "3e-05", "-0.25",
    ]  # fmt: skip


def test_a_curve_has_the_same_size_for_any_length() -> None:
    short, long = curves.Curve(), curves.Curve()
    for step in range(1, 101):
        short.add(step, float(step))
    for step in range(1, 100_001):
        long.add(step, float(step % 7))
    long.add(5, float("nan"))
    assert len(short.points()) == 100 and short.points()[0] == (1, 1, 1, 1)
    assert curves.BUCKETS / 2 <= len(long.points()) <= curves.BUCKETS
    assert all(low == 0 and high == 6 and low < mean < high for _, mean, low, high in long.points())


def test_words_of_any_script() -> None:
    assert search_index.words("The CPU's cache_line: Größe 東京 x²!") == [
        "the", "cpu", "s", "cache", "line", "größe", "東", "京", "x²",
    ]  # fmt: skip
    assert search_index.words("a" * 100) == ["a" * 40]


@pytest.mark.parametrize("limit", [1, 1000, 1 << 30])
def test_a_spill_gives_back_what_it_got(tmp_path: Path, limit: int) -> None:
    spill, expected, draw = Spill(tmp_path, limit), {n: b"" for n in range(5)}, random.Random(1)
    for _ in range(500):
        number, data = draw.randrange(5), bytes([draw.randrange(256)] * draw.randrange(9))
        spill.add(number, data)
        expected[number] += data
    assert {n: spill.take(n) for n in range(5)} == expected
    assert spill.take(0) == b"" and not list(tmp_path.iterdir()) and spill.size == 0


def test_postings_are_exact(tmp_path: Path) -> None:
    postings = search_index.Postings(1, Spill(tmp_path))
    draw = random.Random(2)
    documents = [[f"w{draw.randrange(30)}" for _ in range(draw.randrange(1, 60))] for _ in range(400)]
    for number, document in enumerate(documents):
        postings.add(number, document)
    part = postings.part(0)
    mean = sum(map(len, documents)) / len(documents)
    assert list(part) == sorted({word for document in documents for word in document})
    for word, (weight, text) in part.items():
        holders = [n for n, document in enumerate(documents) if word in document]
        assert weight == search_index.weight(len(holders), 400)
        numbers, value, shift, number = [], 0, 0, 0
        for sign in text:
            digit = search_index.DIGITS.index(sign)
            value |= (digit & 31) << shift
            shift += 5
            if digit < 32:
                number += value >> 4
                numbers.append((number, value & 15))
                value = shift = 0
        impacts = [search_index.impact(documents[n].count(word), len(documents[n]) / mean) for n in holders]
        assert numbers == list(zip(holders, impacts, strict=True))


def test_the_script_and_the_style_are_inlined_as_they_are() -> None:
    folder = Path(search_index.__file__).parent
    script, style = ((folder / name).read_text() for name in ("page.js", "page.css"))
    assert "</script" not in script and "<!--" not in script and "</style" not in style
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "style="):
        assert forbidden not in script, forbidden
    assert not re.search(r"https?://(?!huggingface\.co/)", script + style)


def products(sources: int, checkpoints: int) -> dict[str, lineage.Product]:
    """A graph of sources, each acquired and filtered, one phase, and its checkpoints."""
    rows = {}
    for n in range(sources):
        rows[f"acquire-{n}"] = lineage.Product(f"acquire-{n}", "k", "d", "acquire")
        rows[f"filter-{n}"] = lineage.Product(f"filter-{n}", "k", "d", "filter", inputs={"source": f"acquire-{n}"})
    inputs = {f"filtered-{n}": f"filter-{n}" for n in range(sources)}
    rows["pretrain"] = lineage.Product("pretrain", "k", "d", "pretrain", inputs=inputs)
    for n in range(checkpoints):
        rows[f"pretrain@{n}"] = lineage.Product(f"pretrain@{n}", "k", "d", "pretrain", checkpoint=True)
    return rows


def test_the_graph_folds_artifacts_of_one_stage(tmp_path: Path) -> None:
    few, many = lineage.drawing(products(3, 5)), lineage.drawing(products(500, 5_000))
    assert few.count('class="box"') == 7 and few.count('class="edge"') == 6
    assert many.count('class="box"') == 3 and many.count('class="edge"') == 2 and len(many) < 3_000
    assert "500 × acquire" in many and "500 × filter" in many
    ElementTree.fromstring(many)
    parts = PartWriter(tmp_path)
    lineage.write_products(products(500, 3), parts)
    assert parts.names == [lineage.PRODUCTS]
    part = json.loads((tmp_path / f"{lineage.PRODUCTS}.js").read_text().partition(",")[2].removesuffix(");\n"))
    assert len(part["products"]) == 1004
    assert {name: len(nodes) for name, nodes in part["groups"].items()} == {
        "acquire: 500 in column 1": 500, "filter: 500 in column 2": 500,
    }  # fmt: skip


def test_the_points_of_an_axis_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "training.jsonl"
    lines = [{"step": n, "tokens": 10 * n, "heldout_loss": 9 - n / 1000, "generated": n, "validation": {"add": n / 5000}}
             for n in range(1, 5001)]  # fmt: skip
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    phase = curves.read_curves(log)
    for points in (phase.heldout, phase.validation["add"]):
        assert curves.BUCKETS <= len(points) <= 2 * curves.BUCKETS
        assert points == sorted(points) or points == sorted(points, key=lambda point: point[0])
    assert phase.heldout[-1] == (50_000, 4.0) and phase.validation["add"][-1] == (5000, 1.0)


def test_bars_are_well_formed_and_say_their_shares() -> None:
    figure = ElementTree.fromstring(charts.bars("<tokens>", {"a & b": 3_000_000, "c": 1_000_000}, "tokens"))
    assert len(figure.findall(".//rect")) == 2 and "75.0%" in "".join(figure.itertext())
    assert figure.find("svg").get("aria-label") == "<tokens>: a & b 3M; c 1M"  # type: ignore[union-attr]
    assert charts.bars("none", {}, "tokens") == ""


@pytest.mark.parametrize(
    "text",
    [
        'atomPart("search/about",{"a":1});alert(1);\n', 'atomPart("search/about",alert(1));\n', "alert(1);\n",
        'atomPart("search/other",1);\n', 'atomPart("search/about",1);\n\n', 'atomPart("search/about","\u2028");\n',
        'atomPart("search/about","</script>");\n', 'atomPart("search/about",1)\n;\n', "",
    ],
)  # fmt: skip
def test_a_part_is_one_call_with_json(text: str) -> None:
    assert is_part(b'atomPart("search/about",{"a":1});\n', "search/about")
    assert not is_part(text.encode(), "search/about")


def test_a_page_has_its_own_script_and_no_other() -> None:
    script, style = page.sources()
    template = (page.FOLDER / page.TEMPLATE).read_text("utf-8")
    head = template.partition("{{ policy }}")[0] + str(escape(page.policy(script, style))) + '">'
    body = (
        f'<style>{style}</style><p></p><script type="application/json" id="data">[]</script><script>{script}</script>'
    )
    assert page.has_own_script(head + body)
    for before, after in (
        ("<p></p>", "<p></p><script src='search/x.js'></script>"), ("<p></p>", "<SCRIPT>alert(1)</SCRIPT>"),
        ("<p></p>", '<meta http-equiv="refresh" content="0; url=https://evil.example">'), (script, f"{script};alert(1)"),
        ("script-src", "script-src 'unsafe-inline'"), ("<head>", "<head><base href='x'>"), (style, "p {}"),
    ):  # fmt: skip
        text = (head + body).replace(before, after, 1)
        assert text != head + body and not page.has_own_script(text), after
