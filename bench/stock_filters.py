"""Stock datatrove on a file of texts, in an environment of its own; a part of `filters.py` and `agreement.py`.

    python stock_filters.py DOCUMENTS MODEL [--each] [--ours | --our-words]

DOCUMENTS: JSON lines with a `text`; MODEL: the file of fastText's lid.176. Prints one JSON object: CPU `seconds`
without imports and models, and `results`. By default a document goes through STEPS until one removes it, and its result
is the SHA-256 of the kept text or [step, reason]. With `--each` every step sees every document, and `results` has by
step the reasons, null where the document passes. Without `--ours` and `--our-words`, nothing of this project is
imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS: dict[str, dict[str, Any]] = {
    "language": {"languages": ["en"]},
    "gopher_repetition": {},
    "gopher_quality": {},
    "c4": {
        "remove_citations": False,
        "filter_no_terminal_punct": False,
        "min_words_per_line": -1,
        "max_word_length": -1,
        "filter_javascript": False,
        "filter_policy": False,
    },
    "fineweb": {},
    "pii": {"email_replacement": "email@example.com", "ip_replacement": "192.0.2.1"},
}
"""{step: settings of its block}: datatrove's defaults, but for the rules of C4 that edit lines and the replacements of
personal data, in which the step of this project differs."""
OURS: dict[str, dict[str, Any]] = {name: {} for name in STEPS} | {"gopher_repetition": {"min_top_count": 1}}
"""The settings of this project's steps that have the same meaning."""

Step = Callable[[str], "str | tuple[str, str | None]"]
"""From a text to the kept text, or to the step and its reason for a removal."""


def read_texts(path: Path) -> list[str]:
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [json.loads(line)["text"] for line in content.decode().split("\n") if line]


def stock_steps(model: Path, our_words: bool) -> dict[str, Step]:
    from datatrove.data import Document
    from datatrove.pipeline import filters
    from datatrove.pipeline.formatters import PIIFormatter
    from fasttext.FastText import _FastText

    language: Any = "en"
    if our_words:
        from stages.data.curation.words import WORDS

        language = WORDS
    blocks: dict[str, Any] = {
        "language": filters.LanguageFilter(**STEPS["language"]),
        "gopher_repetition": filters.GopherRepetitionFilter(language=language, **STEPS["gopher_repetition"]),
        "gopher_quality": filters.GopherQualityFilter(language=language, **STEPS["gopher_quality"]),
        "c4": filters.C4QualityFilter(language=language, **STEPS["c4"]),
        "fineweb": filters.FineWebQualityFilter(language=language, **STEPS["fineweb"]),
    }
    blocks["language"].model._model = _FastText(str(model))

    def step(name: str, block: Any) -> Step:
        def apply(text: str) -> str | tuple[str, str | None]:
            result = block.filter(Document(text=text, id=""))
            passes, reason = result if isinstance(result, tuple) else (result, "score")
            return text if passes else (name, reason)

        return apply

    return {**{name: step(name, block) for name, block in blocks.items()}, "pii": PIIFormatter(**STEPS["pii"]).format}


def our_steps() -> dict[str, Step]:
    from importlib import import_module

    from stages.data.filters import FILTERS

    def step(name: str) -> Step:
        function = import_module(FILTERS[name]).FILTER(step=name, **OURS[name]).function()

        def apply(text: str) -> str | tuple[str, str | None]:
            result = function(text)
            return result if isinstance(result, str) else (name, result.reason)

        return apply

    return {name: step(name) for name in STEPS}


def run_chain(steps: dict[str, Step], texts: list[str]) -> list[Any]:
    results: list[Any] = []
    for text in texts:
        for step in steps.values():
            result = step(text)
            if not isinstance(result, str):
                results.append(result)
                break
            text = result
        else:
            results.append(text)
    return results


def measure(steps: dict[str, Step], texts: list[str], chain: bool) -> dict[str, Any]:
    warm = "This sentence loads the models of every step. It is short, and it is not one of the documents."
    for step in steps.values():
        step(warm)
    start = time.process_time()
    if chain:
        results = run_chain(steps, texts)
        seconds = time.process_time() - start
        kept = [hashlib.sha256(r.encode()).hexdigest() if isinstance(r, str) else r for r in results]
        return {"seconds": seconds, "results": kept}
    each: dict[str, list[Any]] = {}
    by_step = {}
    for name in [name for name in steps if name != "pii"]:
        start = time.process_time()
        results = [steps[name](text) for text in texts]
        by_step[name] = time.process_time() - start
        each[name] = [None if isinstance(result, str) else result[1] for result in results]
    return {"seconds": by_step, "results": each}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--each", action="store_true", help="every step on every document")
    parser.add_argument("--our-words", action="store_true", help="the words of this project in the blocks of datatrove")
    parser.add_argument("--ours", action="store_true", help="the steps of this project")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    steps = our_steps() if options.ours else stock_steps(options.model, options.our_words)
    print(json.dumps(measure(steps, read_texts(options.documents), chain=not options.each)))
