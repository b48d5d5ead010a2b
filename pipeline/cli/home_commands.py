"""The command that frees space under $ATOM_HOME."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import JsonOption, open_store

if TYPE_CHECKING:
    from pipeline.core.store import Store

app = typer.Typer()


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="move what is listed to the trash")] = False,
    include: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="this artifact and its work, too, whatever references it")
    ] = None,
    ignore_run: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="what only this run references is not needed any more")
    ] = None,
    restore: Annotated[list[str] | None, typer.Option(metavar="KEY|PATH", help="move this back from the trash")] = None,
    empty_trash: Annotated[bool, typer.Option("--empty-trash", help="delete all that lies in the trash")] = False,
    as_json: JsonOption = False,
) -> None:
    """List unused data, or move it to the trash.

    Data that a run references, that a release was built from or that a running job needs is never listed. Products and
    checkpoints of training are listed only if --include names them. The trash keeps a folder in $ATOM_HOME/trash for 14
    days; the next --delete after that deletes it.

    Example: atom gc --delete
    """
    if ((restore or empty_trash) and (delete or include or ignore_run)) or (restore and empty_trash):
        raise AtomError("--restore and --empty-trash stand alone; run them one after the other")
    store = open_store()
    if restore:
        _restore(store, restore, as_json)
    elif empty_trash:
        _empty_trash(store, as_json)
    else:
        _collect(store, delete, include or (), ignore_run or (), as_json)


def _restore(store: Store, names: Sequence[str], as_json: bool) -> None:
    from pipeline.operations import trash

    back = [str(path) for name in names for path in trash.restore(store, name)]
    print(json.dumps({"restored": back}) if as_json else "\n".join(back))


def _empty_trash(store: Store, as_json: bool) -> None:
    from pipeline.core.progress import human
    from pipeline.operations import trash

    freed = trash.empty(store, everything=True)
    place = store.home / "trash"
    rest = (
        f"the rest of {place} was not put there by gc" if place.is_dir() and os.listdir(place) else "the trash is empty"
    )
    print(json.dumps({"freed": freed}) if as_json else f"{human(freed)}B freed; {rest}")


def _collect(store: Store, delete: bool, include: Sequence[str], ignored_runs: Sequence[str], as_json: bool) -> None:
    from pipeline.core.progress import human
    from pipeline.operations import garbage_collection as collector
    from pipeline.operations import trash

    rows, notes = collector.loose(store, include, ignored_runs)
    freed = 0
    if delete:
        rows = collector.move(store, include, ignored_runs)
        freed = trash.empty(store)
    entries = trash.entries(store)
    if as_json:
        body = {"loose": [row.json() for row in rows], "kept": notes, "deleted": delete, "freed": freed}
        print(json.dumps({**body, "trash": [entry.json() for entry in entries]}, indent=1))
        return
    for row in rows:
        print(f"{human(row.bytes):>8}B  {row.path}  ({row.why})")
    for text in notes:
        print(text)
    total = human(sum(row.bytes for row in rows))
    print(f"{total}B {'moved to the trash' if delete else 'can go: atom gc --delete moves it to the trash'}")
    if freed:
        print(f"{human(freed)}B freed: the trash kept it for more than {trash.GRACE_DAYS} days")
    if entries:
        size = human(sum(trash.freed(entry.path for entry in entries).values()))
        print(f"{size}B in {store.home / 'trash'}: atom gc --restore KEY moves it back, --empty-trash deletes it")
