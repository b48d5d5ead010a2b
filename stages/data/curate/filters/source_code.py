"""Filters of source code: `code_shape`, by lengths of lines and kinds of characters, and `python_syntax`."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Literal

from pydantic import model_validator

from pipeline.core.bounds import Share
from stages.data.curate.filters.base import Amount, Document, Filter, FilterFunction, Length, Removal


class PythonSyntax(Filter):
    """Keeps documents that the parser of Python accepts."""

    step: Literal["python_syntax"]
    """selects this step"""

    def function(self) -> FilterFunction:
        return _parse


def _parse(document: Document) -> str | Removal:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(document.text)
    # The parser raises MemoryError for code that is nested too deeply, whatever memory there is.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Removal("does_not_parse", 0.0, 1.0)
    return document.text


class CodeShape(Filter):
    """Removes code files by number and length of lines and by characters, such as generated tables and data blobs."""

    step: Literal["code_shape"]
    """selects this step"""
    min_lines: Amount = 3
    """minimum number of lines"""
    max_lines: Amount = 400
    """maximum number of lines"""
    max_line_length: Amount = 120
    """maximum length of any line in characters"""
    max_average_line_length: Length = 80
    """maximum average line length in characters"""
    min_alphanumeric_fraction: Share = 0.5
    """minimum share of letters and digits, whitespace not counted"""
    max_digit_fraction: Share = 0.2
    """maximum share of digits, whitespace not counted"""

    @model_validator(mode="after")
    def _check_ranges(self) -> CodeShape:
        if self.min_lines > self.max_lines:
            raise ValueError(
                f"min_lines = {self.min_lines} is above max_lines = {self.max_lines}; nothing would be kept"
            )
        return self

    def function(self) -> FilterFunction:
        return self._apply

    def _apply(self, document: Document) -> str | Removal:
        text = document.text
        lines = text.splitlines() or [""]
        visible = re.sub(r"\s", "", text) or " "  # so that indentation changes no fraction
        lengths = [len(line) for line in lines]
        average = sum(lengths) / len(lines)
        alphanumeric = sum(c.isalnum() for c in visible) / len(visible)
        digits = sum(c.isdigit() for c in visible) / len(visible)
        if len(lines) < self.min_lines:
            return Removal("too_few_lines", len(lines), self.min_lines)
        if len(lines) > self.max_lines:
            return Removal("too_many_lines", len(lines), self.max_lines)
        if max(lengths) > self.max_line_length:
            return Removal("long_line", max(lengths), self.max_line_length)
        if average > self.max_average_line_length:
            return Removal("long_lines_on_average", average, self.max_average_line_length)
        if alphanumeric < self.min_alphanumeric_fraction:
            return Removal("few_letters_and_digits", alphanumeric, self.min_alphanumeric_fraction)
        if digits > self.max_digit_fraction:
            return Removal("many_digits", digits, self.max_digit_fraction)
        return text
