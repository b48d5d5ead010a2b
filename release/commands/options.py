"""Shared parts of the commands about a release: arguments, the check that a folder is a release, lines of progress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core.errors import AtomError

ReleaseArgument = Annotated[Path, typer.Argument(help="a release folder made by `atom build`")]
AnyReleaseArgument = Annotated[
    Path, typer.Argument(metavar="RELEASE", help="a release folder, or the folder of one pulled repository of it")
]
TrustConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="trust configuration of another instance of Sigstore than the public one"),
]


def require_release(folder: Path, *marks: str) -> None:
    """Raises AtomError if a folder is not a release. marks: files, each of which also makes a folder acceptable."""
    if not any((folder / mark).exists() for mark in ("evidence/release.json", *marks)):
        raise AtomError(f"{folder} is not a release folder; make one with `atom build`, or pull one from the Hub")


def print_line(text: str) -> None:
    """Progress on stdout, at once."""
    print(text, flush=True)
