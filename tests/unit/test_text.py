"""Characters that cannot be seen, or that turn the text around them."""

from __future__ import annotations

import pytest

from pipeline.core.text import unprintable


@pytest.mark.parametrize("code", [0x1B, 0xAD, 0x61C, 0x200B, 0x200E, 0x202E, 0x2060, 0x2066, 0xFEFF, 0xE0041])
def test_a_character_that_cannot_be_seen_is_found(code: int) -> None:
    assert unprintable(f"a model{chr(code)} card") == chr(code)


def test_a_joiner_is_a_letter_only_between_letters_of_its_script() -> None:
    assert unprintable("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") is None  # Persian: I want
    assert unprintable("\U0001f469\u200d\U0001f4bb") is None  # a woman at a computer
    for text in ("ma\u200clice", "\u200d\u0645", "\u0645\u200c", "\u0645\u200ca"):
        assert unprintable(text) in ("\u200c", "\u200d")


def test_lines_and_tabs_are_found_in_a_line_only() -> None:
    assert unprintable("a\n\tb") == "\n" and unprintable("a\n\tb", lines=True) is None
