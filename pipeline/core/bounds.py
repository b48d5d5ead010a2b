"""The bounds of settings: every number of a recipe has a range, every text a length, every list a size.

A bound is wide enough for any published training run and narrow enough to refuse a typing error or a hostile file in
one sentence before anything is computed from it. docs/limits.md lists the bounds with their reasons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Lt
from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Strict
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from pipeline.core.text import shown, unprintable

# The type of the errors below: their message continues after `field = value`.
OUT_OF_BOUNDS = "out_of_bounds"


@dataclass(frozen=True)
class Range(GroupedMetadata):
    """A number from `low` to `high`. Integers must be integers: no boolean, no text, no 3.0."""

    low: float
    high: float
    # The usual value, for docs/configuration.md.
    hint: str = ""
    # Exclude the low end, or the high end.
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if not (self.above or self.below):
            return f"{low} to {high}"
        lower_bound, upper_bound = "more than" if self.above else "at least", "less than" if self.below else "at most"
        return f"{lower_bound} {low} and {upper_bound} {high}"

    def __iter__(self) -> Iterator[BaseMetadata]:
        # Whole bounds become integers, so that messages and schemas show them without a fraction.
        low, high = (int(end) if float(end).is_integer() else end for end in (self.low, self.high))
        yield Strict()
        yield Gt(low) if self.above else Ge(low)
        yield Lt(high) if self.below else Le(high)


@dataclass(frozen=True)
class Words:
    """A text of at most `longest` characters."""

    longest: int
    # The required form, for the error message, as in "is no name of lower-case letters".
    what: str = ""
    # Must match the whole text.
    pattern: str = ""
    # Allow several lines, or an empty text.
    lines: bool = False
    empty: bool = False
    # Returns the error in words, or None.
    test: Callable[[str], str | None] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, core_schema.str_schema(strict=True))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        pattern = {"pattern": f"^(?:{self.pattern})$"} if self.pattern else {}
        return handler(schema) | {"minLength": int(not self.empty), "maxLength": self.longest} | pattern

    def _check(self, value: str) -> str:
        if not value.strip() and not self.empty:
            raise _validation_error("is empty; write something, or leave the field out")
        if len(value) > self.longest:
            raise _validation_error(f"has {len(value)} characters; use at most {self.longest}")
        if character := unprintable(value, self.lines):
            kind = "several lines" if character == "\n" else f"the character U+{ord(character):04X}"
            raise _validation_error(f"has {kind}; use one line of printable text")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise _validation_error(f"is no {self.what}")
        if self.test and (problem := self.test(value)):
            raise _validation_error(problem)
        return value


def _validation_error(message: str) -> PydanticCustomError:
    return PydanticCustomError(OUT_OF_BOUNDS, "{message}", {"message": message})


def _number(value: float) -> str:
    short = f"{value:.0e}"  # one digit and zeros after it
    return short.replace("e+0", "e").replace("e+", "e") if 1e7 <= value == float(short) else f"{value:.16g}"


MOST_SOURCES = 1000
MOST_RAMP_STEPS = 100
# true or false: a number or the word `yes` is neither.
Flag = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, Range(0, 2**53 - 1, "larger ones lose digits in some readers of JSON")]
Sha256 = Annotated[str, Words(71, "digest of the form sha256:<64 hex digits>", r"sha256:[0-9a-f]{64}")]
Share = Annotated[float, Range(0, 1)]
# A share above 0.
PositiveShare = Annotated[float, Range(0, 1, above=True)]
# Tokens of a row, an answer or a text.
Context = Annotated[int, Range(1, 2**24, "tokens; Llama 4 Scout: 1e7")]
# Steps of a phase, or an interval in steps.
Steps = Annotated[int, Range(1, 1e8, "SmolLM3, with small batches, took 4.7e6")]
Line = Annotated[str, Words(200)]
# An address, a command, or a path.
LongLine = Annotated[str, Words(4096)]
Text = Annotated[str, Words(2000, lines=True)]


def _repository(name: str) -> str | None:
    """Returns the reason why the Hub refuses this name, with a suffix or without; None if it takes it."""
    # The rules of `huggingface_hub.utils.validate_repo_id`; the tests compare them.
    if "--" in name or ".." in name:
        return "has -- or .., which the Hub refuses in names of repositories; use one"
    if name[-1] in ".-" or name.endswith(".git"):
        return "ends as no repository of the Hub may: by a dot, a hyphen or .git; leave the end out"
    return None


# The suffixes of a release's repositories fit into the Hub's limit of 96 characters as well.
ReleaseName = Annotated[
    str, Words(64, "name of lower-case letters, digits, '.', '_' and '-'", r"[a-z0-9][a-z0-9._-]*", test=_repository)
]
Version = Annotated[str, Words(30, "semantic version, such as 0.1.0", r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}")]
Namespace = Annotated[
    str, Words(42, "user or organization of the Hub", r"[A-Za-z0-9][A-Za-z0-9._-]*", test=_repository)
]
SourceName = Annotated[str, Words(64, "name of lower-case letters, digits and '_', first a letter", r"[a-z][a-z0-9_]*")]
# The name of a thing that another package knows: a dataset, a verifier, an argument.
Key = Annotated[str, Words(100, "name of letters, digits, '.', '_' and '-'", r"[A-Za-z0-9_][A-Za-z0-9._-]*")]
Variable = Annotated[str, Words(200, "name of an environment variable", r"[A-Za-z_][A-Za-z0-9_]*")]


# Shares of sources; they sum to 1.
Mix = Annotated[dict[SourceName, PositiveShare], Field(min_length=1, max_length=MOST_SOURCES)]


def spdx(expression: str) -> str:
    """Returns the expression in the spelling of SPDX. Raises ValueError for an invalid expression."""
    from packaging.licenses import canonicalize_license_expression

    return str(canonicalize_license_expression(expression))


@dataclass(frozen=True)
class _Spdx(Words):
    """Converts the text to the spelling of SPDX."""

    def _check(self, value: str) -> str:
        try:
            return spdx(super()._check(value))
        except PydanticCustomError:
            raise
        except ValueError:
            raise _validation_error(
                "is not an SPDX expression (spdx.org/licenses); use such as Apache-2.0, CC-BY-4.0 or LicenseRef-NAME"
            ) from None


# An SPDX license expression.
License = Annotated[str, _Spdx(500)]

# A valid `language` of the Hub and `inLanguage` of Croissant: ISO 639, as BCP 47 writes it, or two words of the Hub.
Language = Annotated[
    str,
    Words(
        20,
        "language; use ISO 639 codes, such as en, de or swh, with a script or region if need be (zh-Hant)",
        r"code|multilingual|[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|[0-9]{3}))?",
    ),
]


def setting(value: object, depth: int = 0) -> object:
    """Returns a value that is passed unchanged to another package.

    Raises:
        ValueError: It is no text, number, flag, null, or short list or mapping of these.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and abs(value) < (2**53 if isinstance(value, int) else 1e300):
        return value
    if isinstance(value, str) and len(value) <= 4096:
        return value
    if isinstance(value, (list, tuple)) and depth < 3 and len(value) <= 1000:
        return [setting(item, depth + 1) for item in value]
    if isinstance(value, dict) and depth < 3 and len(value) <= 100:
        for key in value:
            if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", key):
                raise ValueError(f"{shown(key)} is no name of an argument; use letters, digits, '.', '_' and '-'")
        return {key: setting(item, depth + 1) for key, item in value.items()}
    raise ValueError(
        f"{shown(value)} cannot be handed on; use text, numbers, true, false or null, in lists and mappings of these"
    )


# Keyword arguments for an object of another package.
Settings = Annotated[dict[str, Any], AfterValidator(lambda values: setting(values))]
