"""Kinds of sources."""

from __future__ import annotations

from typing import Literal

Kind = Literal["prose", "code", "problems", "chat"]
"""The kind of a source's documents."""
