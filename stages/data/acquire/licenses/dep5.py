"""The license field of machine-readable debian/copyright files (DEP-5), as an SPDX expression.

https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/, section 7.2: `and` binds more strongly than `or`,
unless a comma stands before it; `with … exception` adds permissions to a license. The specification does not know
`and/or`, which leaves the choice to the reader, as `or` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

EXCEPTIONS = {"font": "Font-exception-2.0"}
"""{keyword of an exception: its SPDX identifier}. An exception only adds permissions, so a license with one that has no
identifier is stated without it."""
OR_LATER = re.compile(
    r"\+?[ -]or[ -](?:\(at your option\) )?(?:any[ -])?(?:later|newer)(?:[ -]versions?)?\b", re.IGNORECASE
)
"""Other spellings of `+`."""


def normalized_name(name: str) -> str:
    """A short name in lower case, without the zeros at the end of its version: GPL-2.0+ and gpl-2+ are equal."""
    return re.sub(r"(?<=\d)(\.0)+(?=\+?$)", "", name.casefold())


def expression(text: str, names: Mapping[str, str]) -> str | None:
    """The SPDX expression of the first line of a license field; None if one of its names is unknown.

    names: {normalized short name: SPDX expression}.
    """
    text = OR_LATER.sub("+", " ".join(text.split()))
    text = re.sub(r" and/or ", " or ", text, flags=re.IGNORECASE)
    parts = re.split(r",\s+(and|or)\s+", text, flags=re.IGNORECASE)
    result = _alternatives(parts[0], names)
    for conjunction, part in zip(parts[1::2], parts[2::2], strict=True):
        operand = _alternatives(part, names)
        if result is None or operand is None:
            return None
        result = f"{_grouped(result)} {conjunction.upper()} {_grouped(operand)}"
    return result


def _alternatives(text: str, names: Mapping[str, str]) -> str | None:
    """The expression of a text without commas."""
    alternatives = []
    for alternative in re.split(r"\s+or\s+", text, flags=re.IGNORECASE):
        operands = [_license(operand, names) for operand in re.split(r"\s+and\s+", alternative, flags=re.IGNORECASE)]
        licenses = [operand for operand in operands if operand is not None]
        if len(licenses) < len(operands):
            return None
        alternatives.append(licenses[0] if len(licenses) == 1 else " AND ".join(map(_grouped, licenses)))
    return " OR ".join(alternatives)


def _license(text: str, names: Mapping[str, str]) -> str | None:
    """The expression of a short name, which a `+` and an exception may follow."""
    name, _, exception = (part.strip() for part in re.sub(r"\s+with\s+", "\0", text, flags=re.I).partition("\0"))
    license = _or_later(normalized_name(name), names)
    if license is None or not exception:
        return license
    keyword = re.fullmatch(r"(.+?)\s+exception", exception, re.IGNORECASE)
    if keyword is None:
        return None
    identifier = EXCEPTIONS.get(keyword[1].casefold())
    return license if identifier is None or " " in license else f"{license} WITH {identifier}"


def _or_later(name: str, names: Mapping[str, str]) -> str | None:
    """The license of a normalized name: with `+`, also its later versions."""
    if not name.endswith("+"):
        return names.get(name)
    license = names.get(name[:-1])
    if license is None or " " in license or license.startswith("LicenseRef-"):
        return None
    return f"{license.removesuffix('-only')}-or-later" if license.endswith("-only") else f"{license}+"


def _grouped(expression: str) -> str:
    return f"({expression})" if " OR " in expression or " AND " in expression else expression
