"""The YAML block at the head of a README: its metadata, or its error."""

from __future__ import annotations

import re
from typing import Any

BLOCK = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)


def metadata(text: str) -> tuple[dict[str, Any] | None, str]:
    """(metadata, "") or (None, the error). A README without a block has empty metadata."""
    import yaml

    block = BLOCK.match(text)
    if block is None:
        return {}, ""
    try:
        data = yaml.safe_load(block[1]) or {}
    except yaml.YAMLError as error:
        return None, f"the metadata is not YAML: {error}"
    if not isinstance(data, dict):
        return None, "the metadata is not a mapping"
    return data, ""
