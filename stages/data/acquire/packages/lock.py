"""The lock file of a folder of packages: name, version, SHA-256, size and origin of each file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.core.bounds import Line, LongLine, Range, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file

# Of a lock file; a corpus of more has several sources.
MAX_PACKAGES = 1000


class LockedPackage(Config):
    """A package of a lock file."""

    file: Annotated[str, Words(255, "file name of a .deb or .tar.gz", r"[A-Za-z0-9][\w.+~%:-]*(\.deb|\.tar\.gz)")]
    """name of the file"""
    name: Line
    """name of the package"""
    version: Line
    """version of the package"""
    sha256: Annotated[str, Words(64, "SHA-256 of 64 hex digits", r"[0-9a-f]{64}")]
    """digest of the file"""
    bytes: Annotated[int, Range(1, 2**40)]
    """size of the file"""
    origin: LongLine
    """path of the file in the archive or index that published it"""


class Lock(Config):
    """A lock file."""

    packages: tuple[LockedPackage, ...] = Field(min_length=1, max_length=MAX_PACKAGES)
    """packages, by file"""

    @model_validator(mode="after")
    def _check_order(self) -> Lock:
        names = [package.file for package in self.packages]
        for first, second in pairwise(names):
            if first >= second:
                raise ValueError(f"packages must be sorted by file, each once; {second} comes after {first}")
        return self


def read_lock(path: Path) -> Lock:
    """Reads a lock file. Raises RecipeError in one sentence if it is missing, or no lock file."""
    title = f"lock file {escaped(str(path), 200)}"
    if not path.is_file():
        raise RecipeError(f"there is no {title}; write one by `python -m stages.data.acquire.packages.fetch`")
    try:
        return Lock.model_validate(parse_yaml(read_file(path, title), title))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "packages"
        raise RecipeError(f"{title}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def write_lock(path: Path, packages: list[LockedPackage], about: str) -> None:
    """Writes one line for each package; `about` are the lines of a comment at the top."""
    rows = [package.model_dump() for package in sorted(packages, key=lambda package: package.file)]
    lines = [yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=10**6).strip() for row in rows]
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    path.write_text(f"{comment}packages:\n" + "".join(f"  - {line}\n" for line in lines), encoding="utf-8")
