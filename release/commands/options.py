"""Shared parts of the commands about a release: arguments, the check that a folder is a release, lines of progress."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.core.store import home_folder

# The file that the folder of a whole release has.
RELEASE = "evidence/release.json"

ReleaseArgument = Annotated[Path, typer.Argument(help="a release folder made by `atom build`")]
AnyReleaseArgument = Annotated[
    Path, typer.Argument(metavar="RELEASE", help="a release folder, or the folder of one pulled repository of it")
]
TrustConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="trust configuration of another instance of Sigstore than the public one"),
]


def require_release(folder: Path, *marks: str) -> None:
    """Raises AtomError if a folder is not a release. A default home folder inside a release is moved beside it.

    Args:
        folder: A release, or one repository of it.
        marks: Files, each of which also makes a folder acceptable.
    """
    if not any((folder / mark).exists() for mark in (RELEASE, *marks)):
        raise AtomError(f"{folder} is not a release folder; make one with `atom build`, or pull one from the Hub")
    # `atom trace .` in the folder of a release would add `runs/` to it, and the release would no longer verify
    parents = home_folder().resolve().parents
    releases = [path for path in parents if path == folder.resolve() or (path / RELEASE).exists()]
    if releases and "ATOM_HOME" not in os.environ:
        os.environ["ATOM_HOME"] = str(releases[-1].with_name(f"{releases[-1].name}.runs"))


def print_line(text: str) -> None:
    """Prints a line of progress on stdout, at once."""
    print(text, flush=True)
