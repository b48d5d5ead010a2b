"""The command that keeps the history of signing keys."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.errors import AtomError
from pipeline.core.text import printable
from pipeline.operations.command_options import RELEASE

app = typer.Typer()


@app.command(rich_help_panel=RELEASE)
def keys(
    history: Annotated[Path, typer.Argument(metavar="FILE", help="the history of keys, a JSON file; made if missing")],
    add: Annotated[Path | None, typer.Option(metavar="KEY", help="the first private key of a holder, as PEM")] = None,
    rotate: Annotated[
        Path | None, typer.Option(metavar="KEY", help="the private key that names --to its successor")
    ] = None,
    to: Annotated[Path | None, typer.Option(metavar="KEY", help="the new private key of --rotate")] = None,
    revoke: Annotated[
        str | None, typer.Option(metavar="KEY", help="the fingerprint of a key that must not be trusted any more")
    ] = None,
    by: Annotated[
        Path | None, typer.Option(metavar="KEY", help="the private key that signs --revoke: itself, or a later one")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="of --revoke: what the key signed from then on is void; default: now"),
    ] = None,
    reason: Annotated[str, typer.Option(help="of --revoke")] = "not stated",
    expires: Annotated[str | None, typer.Option(metavar="TIME", help="of --add and --to: when the key expires")] = None,
) -> None:
    """Show or extend the history of a signer's keys.

    A history has signed statements: a key and its expiry, a key that names its successor, a key that is revoked.
    Publish it where your users find your fingerprint, not in a release; `atom verify --keys` reads it.
    ATOM_KEY_PASSWORD opens the private keys.

    Example: atom keys keys.json --rotate old.pem --to new.pem
    """
    from release.signing import fingerprint, key_history
    from release.signing.keys import SigningKey

    actions = [action for action in (add, rotate, revoke) if action is not None]
    if len(actions) > 1:
        raise AtomError("atom keys makes one statement: give --add, --rotate or --revoke")
    if (to is None) != (rotate is None):
        raise AtomError("a key names its successor by both: give --rotate OLD and --to NEW")
    if revoke is None and (by is not None or since is not None):
        raise AtomError("--by and --since are about a key that is revoked; give them with --revoke")
    if expires is not None and add is None and rotate is None:
        raise AtomError("--expires is about a new key; give it with --add or --rotate")
    if not history.exists() and add is None:
        raise AtomError(f"there is no history of keys {history}; begin one: atom keys {history} --add KEY")
    known = key_history.KeyHistory.read(history) if history.exists() else key_history.KeyHistory()
    until = None if expires is None else key_history.format_time(key_history.parse_time(expires))
    now = datetime.datetime.now(datetime.UTC)

    def key_of(path: Path) -> SigningKey:
        return SigningKey(path, password=os.environ.get("ATOM_KEY_PASSWORD"))

    statement: dict[str, Any]
    if add is not None:
        signers = [key_of(add)]
        statement = {"kind": "key", "key": signers[0].public_key().decode(), "expires": until}
    elif rotate is not None and to is not None:
        signers = [key_of(rotate), key_of(to)]
        names = {"key": fingerprint(signers[0].public_key()), "successor": signers[1].public_key().decode()}
        statement = {"kind": "rotation", **names, "expires": until, "time": key_history.format_time(now)}
    elif revoke is not None:
        if by is None:
            raise AtomError("a revocation is signed by the key itself or by a later one; give it with --by")
        signers = [key_of(by)]
        time = key_history.format_time(now if since is None else key_history.parse_time(since))
        statement = {"kind": "revocation", "key": revoke, "time": time, "reason": reason}
    else:
        print("\n".join(_lines(known)))
        return
    try:
        known.add(key_history.signed_statement(statement, *signers))
    except ValueError as error:
        raise AtomError(f"{history} stays as it is: {printable(str(error))}") from None
    known.write(history)
    print("\n".join(_lines(known)))


def _lines(history: Any) -> list[str]:
    """A line for each key, in the order of the statements."""
    from release.signing.key_history import format_time

    lines = []
    for name, key in history.keys.items():
        facts = [f"expires {format_time(key.expires)}"] if key.expires else []
        facts += [f"replaced by {key.successor} at {format_time(key.rotated)}"] if key.successor else []
        facts += [f"revoked as of {format_time(key.revoked)}: {printable(key.reason)}"] if key.revoked else []
        lines.append(f"{name}: {'; '.join(facts) or 'in use'}")
    return lines
