"""The command that frees space under $ATOM_HOME."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import JsonOption, confirm, open_store

app = typer.Typer()


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed, after a question")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before deleting")] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="this artifact and its work, too, whatever references it")
    ] = None,
    ignore_run: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="what only this run references is not needed any more")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List unused data, or delete it.

    Data that a run references, that a release was built from or that a running job needs is never listed. Products and
    checkpoints of training are listed only if --include names them. What is deleted is gone.

    Example: atom gc --delete
    """
    from pipeline.core.progress import human
    from pipeline.operations import garbage_collection as collector

    if as_json and delete and not yes:
        raise AtomError("atom gc --delete --json asks no question; add --yes")
    store, named, ignored = open_store(), include or (), ignore_run or ()
    rows, notes = collector.loose(store, named, ignored)
    if not as_json:
        for row in rows:
            print(f"{human(row.bytes):>8}B  {row.path}  ({row.why})")
        print(*notes, f"{human(sum(row.bytes for row in rows))}B can be deleted", sep="\n")
    if delete:
        if rows and not yes:
            confirm(f"{len(rows)} folders are to be deleted", "delete them")
        rows = collector.delete(store, {row.path for row in rows}, named, ignored)
    if as_json:
        print(json.dumps({"loose": [row.json() for row in rows], "kept": notes, "deleted": delete}, indent=1))
    elif delete:
        print(f"{human(sum(row.bytes for row in rows))}B freed")
