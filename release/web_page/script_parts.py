"""Parts of the page: scripts that hand their data to it, because a browser that opens a file may load scripts and
nothing else.

A part is one call, `atomPart(NAME, VALUE);`. The value is JSON in ASCII without the signs of markup, so it is harmless
in a script, in HTML and in a file that is read as text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

MARKUP = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def embedded(value: Any) -> str:
    """A value as JSON that may stand in a script of an HTML page: no text in it ends the script or begins a comment.
    Numbers that JSON cannot express become null."""
    return json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(MARKUP)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def is_part(data: bytes, name: str) -> bool:
    """Returns True if a file is one call that hands JSON to the page, and so can do nothing else."""
    head, tail = f"atomPart({embedded(name)},".encode(), b");\n"
    value = data[len(head) : -len(tail)]
    if not (data.startswith(head) and data.endswith(tail) and value.isascii()) or set(value) & set(b"<>&\n\r"):
        return False
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


class PartWriter:
    """Writes parts below a folder. names: of those written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []

    def write(self, name: str, value: Any) -> None:
        """name: the path of the part without its suffix, such as `search/terms-0`."""
        path = self.folder / f"{name}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"atomPart({embedded(name)},{embedded(value)});\n", encoding="ascii")
        self.names.append(name)
