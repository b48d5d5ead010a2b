"""Escapes foreign text for messages: one line, printable, of bounded length."""

from __future__ import annotations

import re

# Characters that are invisible or change the display of others: controls, line separators, lone surrogates, characters
# without width, and the marks that turn the direction of text (CVE-2021-42574). Joiners within words are letters in
# some scripts, so they may stand between two characters that are not ASCII.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
)

# The maximum characters of one printed text; a longer one is cut in its middle.
LINE = 600


def unprintable(text: str, lines: bool = False) -> str | None:
    """Returns the first unprintable character of `text`; None if there is none.

    With `lines`, line breaks and tabs are allowed.
    """
    characters = (match[0] for match in _UNPRINTABLE.finditer(text) if not (lines and match[0] in "\n\t"))
    return next(characters, None)


def escaped(text: str, longest: int | None = None) -> str:
    r"""Returns the text in one line, cut to `longest` characters.

    Characters that move a terminal's cursor or turn the direction of text, and invalid ones, are escaped as in Python:
    `\x1b`, `\u202e`, `\udcff`.
    """
    cut = text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def printable(text: str) -> str:
    """Returns the text in one line that is safe to print; a very long one is cut in its middle."""
    return escaped(text if len(text) <= LINE else f"{text[: LINE // 2]} … {text[-LINE // 2 :]}")


def shown(value: object, longest: int = 80) -> str:
    """Returns the repr of a value in one bounded line. Only the beginning of long texts and collections is read."""
    if isinstance(value, str):
        return escaped(repr(value[: longest + 1]), longest)
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    if isinstance(value, dict):
        pairs = [f"{shown(key, 30)}: {shown(item, 30)}" for key, item in list(value.items())[:8]]
        return escaped(f"{{{', '.join(pairs)}{', …' if len(value) > 8 else ''}}}", longest)
    if isinstance(value, (list, tuple)):
        items = ", ".join(shown(item, 30) for item in value[:8])
        return escaped(f"[{items}{', …' if len(value) > 8 else ''}]", longest)
    return escaped(repr(value), longest)


def short(value: float) -> str:
    """Returns a number in few characters: 1.5M, 20k, 0.25, 3e-05, 1e21."""
    size = abs(value)
    if size >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    for limit, divisor, sign in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.4g}{sign}"
    return f"{value:.4g}" if size == 0 or size >= 1e-3 else f"{value:.2g}"
