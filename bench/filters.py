"""Speed of datatrove's blocks in a data recipe, as they are and by their accelerators: CPU seconds a MB.

    .venv/bin/python bench/filters.py            # about five minutes
    .venv/bin/python bench/filters.py --spacy    # with a column for the words of spaCy, some minutes more
    .venv/bin/python bench/filters.py --steps    # every step of the packaged data recipes instead
    .venv/bin/python bench/filters.py --quick    # 100 documents, one round; its figures mean nothing

Every block filters the documents of `bench/agreement.py` (or `--documents`) as it is and by its accelerator, in turns
and both with the words of this project. Results must be equal. An accelerator that is not 1.5 times as fast is to be
removed. `--steps` compares each step, as a recipe has it, with what `atom plan` takes for it; those of code filter the
standard library. A classifier is trained by a run, and is measured by its stage. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from agreement import DOCUMENTS, results, stock_python
from datatrove.data import Document
from stock_blocks import WARM, read_texts, seconds_of

from pipeline.graph.recipe import LOCK_SUFFIX
from stages.data.curate.filters.base import Filter, FilterFunction
from stages.data.curate.filters.block import BlockStep, _stock
from stages.data.recipe import load

TARGET = 1.5
ADDRESSES = {"email_replacement": "email@example.com", "ip_replacement": "192.0.2.1"}
PATHS: dict[str, dict[str, Any]] = {
    "filters.GopherRepetitionFilter": {"words": "atom"},
    "filters.GopherQualityFilter": {"words": "atom"},
    "filters.C4QualityFilter": {"words": "atom"},
    "filters.FineWebQualityFilter": {"words": "atom"},
    "formatters.PIIFormatter": ADDRESSES,
}
"""{block below datatrove.pipeline: its settings}."""
Row = dict[str, float | None]


def filtered(function: FilterFunction, texts: list[str]) -> list[object]:
    found: list[object] = []
    for text in texts:
        try:
            result = function(Document(text, ""))
        except ZeroDivisionError:  # a text without words
            result = ""
        found.append(result if isinstance(result, str) else result.reason)
    return found


def measure(settings: dict[str, Any], texts: list[str], rounds: int) -> Row:
    """Medians over rounds in CPU seconds a MB, and the ratio with its quartiles."""
    step, megabytes = BlockStep.model_validate(settings), sum(len(text.encode()) for text in texts) / 1e6
    block = step._create()
    accelerated = step._accelerated(block)
    ways: dict[str, Callable[[], list[object]]] = {"stock": lambda: filtered(_stock(block), texts)}
    if accelerated is not None:
        ways["accelerated"] = lambda: filtered(lambda document: accelerated(document.text), texts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    filtered(step.function(), [WARM, *texts])  # the words of all documents are in the tables of both ways
    for turn in range(rounds):
        found = []
        for name in sorted(ways, reverse=turn % 2 == 0):
            spent, result = seconds_of(ways[name])
            seconds[name].append(spent / megabytes)
            found.append(result)
        assert all(each == found[0] for each in found), f"{step.name}: the accelerator gives another result"
    row: Row = {name: statistics.median(each) for name, each in seconds.items()}
    if accelerated is not None:
        ratios = [slow / fast for slow, fast in zip(seconds["stock"], seconds["accelerated"], strict=True)]
        row |= dict(zip(("low", "ratio", "high"), statistics.quantiles([*ratios, *ratios[:1]], n=4), strict=True))
    return row


def packaged_steps() -> list[tuple[str, Filter]]:
    """(kind of the source, step) of the packaged data recipes, each setting once, but for classifiers."""
    steps = dict[str, tuple[str, Filter]]()
    for path in sorted((Path(__file__).parent.parent / "data_recipes").glob("*.yaml")):
        if not path.name.endswith(LOCK_SUFFIX):
            for source in load(path).sources:
                kind = "code" if source.kind == "code" else "prose"
                steps |= {f"{kind} {step!r}": (kind, step) for step in source.steps if not step.inputs}
    return sorted(steps.values(), key=lambda row: (row[1].name, row[0]))


def measure_step(step: Filter, texts: list[str], rounds: int, table: Path) -> dict[str, float]:
    """CPU seconds a MB, of a first reading of the part as well, and the share of removed documents."""
    pq.write_table(pa.table({"text": texts}), table)
    function = step.prepared({}, table).function()

    def filtered() -> list[Any]:
        step.prepared({}, table)
        urls = (f"https://example.org/{number}" for number in range(len(texts)))
        return [function(Document(text, url, metadata={"url": url})) for text, url in zip(texts, urls, strict=True)]

    filtered()  # loads models and word lists
    seconds, results = zip(*(seconds_of(filtered) for _ in range(rounds)), strict=True)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    removed = sum(not isinstance(result, str) for result in results[0]) / len(texts)
    return {"seconds": statistics.median(seconds) / megabytes, "planned": step.seconds_per_mb, "removed": removed}


def measure_steps(prose: list[str], rounds: int) -> None:
    """Prints a row for each step."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = {"prose": prose, "code": [path.read_text(errors="replace") for path in library][: len(prose)]}
    print(f"{'step':24}{'of':>7}{'CPU s a MB':>12}{'planned':>9}{'removed':>9}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, step in packaged_steps():
            row = measure_step(step, texts[kind], rounds, Path(folder, "documents.parquet"))
            print(
                f"{step.name:24}{kind:>7}{row['seconds']:>12.3f}{row['planned']:>9.3f}{row['removed']:>9.1%}",
                flush=True,
            )
            rows.append({"step": step.name, "of": kind, **row})
    print(json.dumps({"name": "filters-steps", "steps": rows, "machine": machine()}))


def machine() -> str:
    return f"{platform.machine()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="JSON lines with a `text`")
    parser.add_argument("--spacy", action="store_true", help="measure spaCy's words as well")
    parser.add_argument("--steps", action="store_true", help="measure the steps of the packaged data recipes instead")
    parser.add_argument("--quick", action="store_true", help="to see that it works")
    options = parser.parse_args()
    texts = read_texts(options.documents)[:: 20 if options.quick else 1]
    if options.steps:
        measure_steps(texts, 1 if options.quick else 3)
        return
    stock = results(stock_python(None), options.documents) if options.spacy else {}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts)} documents, {megabytes:.1f} MB, CPU s a MB")
    print(f"{'block':24}{'spaCy':>9}{'stock':>9}{'accelerated':>13}{'ratio':>8}   quartiles")
    rows: dict[str, Row] = {}
    for path, settings in PATHS.items():
        name = path.partition(".")[2]
        row = measure({"block": f"datatrove.pipeline.{path}", **settings}, texts, 1 if options.quick else 9)
        row["spacy"] = stock[name]["seconds"] / megabytes if name in stock else None
        rows[name] = row
        columns = [row.get(column) for column in ("spacy", "stock", "accelerated", "ratio", "low", "high")]
        cells = ["" if each is None else f"{each:.3f}" for each in columns]
        print(f"{name:24}{cells[0]:>9}{cells[1]:>9}{cells[2]:>13}{cells[3]:>8}   {cells[4]} {cells[5]}")
    print(json.dumps({"name": "filters", "target": TARGET, "blocks": rows, "machine": machine()}))


if __name__ == "__main__":
    sys.exit(main())
