"""What the verification of a published release writes again has a version, which rises with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from release.assembly import serving
from release.assembly.assemble import license_text, to_json
from release.cards import versions
from release.checks.tool_files import OWN_VERIFIER
from stages.data.chat_templates import inference_template, training_template
from stages.data.curation.agreement import read_figures
from stages.data.tokenizer import SPECIAL_TOKENS, tokenizer_config
from stages.export.hf import generation_config

ROOT = Path(__file__).parents[2]


def sources(*paths: Path) -> list[bytes]:
    """The names and the contents of files, in order."""
    return [part for path in sorted(paths) for part in (path.name.encode(), path.read_bytes())]


def page(folder: Path) -> list[bytes]:
    return sources(*(path for path in (ROOT / "release/web_page").iterdir() if path.is_file()))


def words(folder: Path) -> list[bytes]:
    cards = ROOT / "release/cards"
    pinned = {*cards.glob("*.jinja"), *cards.glob("*.py")} - {cards / "versions.py"}  # which has the pin itself
    return sources(*pinned)


def tool_files(folder: Path) -> list[bytes]:
    """The files that this tool writes for a small model."""
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return [
        OWN_VERIFIER.read_bytes(),
        serving.serve_config(folder, "local/tiny", "0.1.0").encode(),
        inference_template().encode(),
        training_template().encode(),
        to_json(tokenizer_config()),
        generation_config(False, ids),
        generation_config(True, ids),
        to_json(read_figures()),
        license_text("MIT", "Apache-2.0", []),
    ]


WRITTEN: dict[str, Callable[[Path], Iterable[bytes]]] = {"page": page, "words": words, "tool_files": tool_files}


@pytest.mark.parametrize("part", WRITTEN)
def test_whoever_changes_what_published_releases_hold_raises_its_version(part: str, tmp_path: Path) -> None:
    digest = hashlib.sha256()
    for content in WRITTEN[part](tmp_path):
        digest.update(content + b"\0")
    assert (versions.PARTS[part], digest.hexdigest()) == versions.SOURCES[part], (
        f"{part} is not what release/cards/versions.py pins: if releases with the present form are published and its "
        f"bytes change, raise SCHEMA and PARTS[{part!r}]; then pin {digest.hexdigest()} with that number"
    )


def test_the_words_are_written_by_every_file_beside_the_versions() -> None:
    """Their tables, captions and caveats are on the cards, too."""
    names = {part.decode() for part in words(ROOT)[::2]}
    present = {path.name for path in (ROOT / "release/cards").iterdir() if path.is_file()}
    assert names == present - {"versions.py"}
