"""Filter `python_syntax`: documents that are Python."""

from __future__ import annotations

import ast
import warnings
from typing import Literal

from pydantic import Field

from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal


class PythonSyntax(Filter):
    """Keep documents that the parser of Python accepts."""

    step: Literal["python_syntax"] = Field(description="selects this step")

    def function(self) -> FilterFunction:
        return _parse


def _parse(document: Document) -> str | Removal:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Removal("does_not_parse", 0.0, 1.0)
    return document.text


FILTER = PythonSyntax
