"""Blocks of datatrove with the words of spaCy, in an environment of its own; a part of `filters.py` and `agreement.py`.

    python stock_blocks.py DOCUMENTS MODEL

DOCUMENTS: JSON lines with a `text`; MODEL: the file of fastText's lid.176. Every block of BLOCKS gets every document.
Prints one JSON object: for each block CPU `seconds` without imports and models, and for each document the `reasons` of
its removal, null where it passes. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCKS: dict[str, dict[str, Any]] = {
    "LanguageFilter": {"languages": ["en"]},
    "GopherRepetitionFilter": {},
    "GopherQualityFilter": {},
    "C4QualityFilter": {},
    "FineWebQualityFilter": {},
}
"""{filter of datatrove: its parameters}."""
WARM = "This sentence loads the models of every block. It is short, and it is not one of the documents."


def read_texts(path: Path) -> list[str]:
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [json.loads(line)["text"] for line in content.decode().split("\n") if line]


def reasons_of(block: Any, texts: list[str]) -> list[str | None]:
    """For each text why a filter removes it; null if it passes, and the name of an exception."""
    from datatrove.data import Document
    from datatrove.pipeline.filters.base_filter import get_filter_result

    reasons: list[str | None] = []
    for text in texts:
        try:
            passes, reason = get_filter_result(block.filter(Document(text, "")))
            reasons.append(None if passes else reason or "score")
        except ZeroDivisionError as error:  # a text without words
            reasons.append(type(error).__name__)
    return reasons


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main(documents: Path, model: Path) -> None:
    from datatrove.pipeline import filters
    from fasttext.FastText import _FastText

    texts, results = read_texts(documents), {}
    for name, parameters in BLOCKS.items():
        block = getattr(filters, name)(**parameters)
        if name == "LanguageFilter":
            block.model._model = _FastText(str(model))
        reasons_of(block, [WARM])
        seconds, reasons = seconds_of(lambda block=block: reasons_of(block, texts))
        results[name] = {"seconds": seconds, "reasons": reasons}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
