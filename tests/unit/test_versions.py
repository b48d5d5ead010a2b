"""What the verification of a published release writes again has a version, which rises with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from release.checks.tool_files import OWN_VERIFIER
from release.facts import model_facts
from release.facts.published_tables import to_json
from release.published_files import license_text
from stages.export.hf import generation_config
from stages.formats.tokenizer import SPECIAL_TOKENS, inference_template, tokenizer_config, training_template

ROOT = Path(__file__).parents[2]


def sources(*paths: Path) -> list[bytes]:
    """The names and the contents of files, in order."""
    return [part for path in sorted(paths) for part in (path.name.encode(), path.read_bytes())]


def page(folder: Path) -> list[bytes]:
    return sources(*(path for path in (ROOT / "release/web_page").iterdir() if path.is_file()))


def words(folder: Path) -> list[bytes]:
    cards = ROOT / "release/cards"
    return sources(*(path for pattern in ("*.jinja", "*.py", "*.yaml") for path in cards.glob(pattern)))


def tool_files(folder: Path) -> list[bytes]:
    """The files that this tool writes for a small model."""
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return [
        OWN_VERIFIER.read_bytes(),
        model_facts.serve_config(folder, "local/tiny", "0.1.0").encode(),
        inference_template().encode(),
        training_template().encode(),
        to_json(tokenizer_config()),
        generation_config(False, ids),
        generation_config(True, ids),
        license_text("MIT", "Apache-2.0", ROOT),
    ]


WRITTEN: dict[str, tuple[Callable[[Path], Iterable[bytes]], str]] = {
    "page": (page, "e05d5b913c2501bdb8173818fe0497f6532667c887cd66096e075c65f39f5b90"),
    "words": (words, "2188c0712a6e86f6c0fc23031b22e5fdeee7b1e506658c00c4ea766493b23d53"),
    "tool_files": (tool_files, "a157bbca69705d4b2f5ee24511c9b7b2e522eee6602253c50016d2784dd08435"),
}
"""{part of a release that verification writes again: (its sources, their digest)}"""


@pytest.mark.parametrize("part", WRITTEN)
def test_whoever_changes_what_published_releases_hold_raises_its_version(part: str, tmp_path: Path) -> None:
    contents, pinned = WRITTEN[part]
    digest = hashlib.sha256(b"".join(content + b"\0" for content in contents(tmp_path))).hexdigest()
    assert digest == pinned, (
        f"{part} is not what is pinned here: if releases with the present form are published, raise CARDS of "
        f"release/schema.py, and FORMAT if names or files change; then pin {digest}"
    )


def test_the_words_are_written_by_every_file_of_the_cards() -> None:
    """Their tables, captions and caveats are on the cards, too."""
    names = {part.decode() for part in words(ROOT)[::2]}
    assert names == {path.name for path in (ROOT / "release/cards").iterdir() if path.is_file()}
