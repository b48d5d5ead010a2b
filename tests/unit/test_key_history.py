"""The history of signing keys: what it says, and which statements are refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from release import signing
from release.commands import signing_keys
from release.signing import key_history
from release.signing.key_history import KeyHistory

Names = dict[str, str]


@pytest.fixture
def key(tmp_path: Path) -> Callable[[str], Path]:
    """A private key by name, made once."""

    def path_of(name: str) -> Path:
        path = tmp_path / f"{name}.pem"
        if not path.exists():
            signing.keys.make_key(path)
        return path

    return path_of


def name_of(path: Path) -> str:
    return signing.fingerprint(signing.SigningKey(path).public_key())


def command(history: Path, **options: Any) -> None:
    defaults = dict.fromkeys(("add", "rotate", "to", "revoke", "by", "since", "expires"))
    signing_keys.keys(history, **{**defaults, "reason": "not stated", **options})


def test_a_line_of_three_keys(tmp_path: Path, key: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    a, b, c = map(key, "abc")
    command(path, add=a, expires="2027-01-31")
    command(path, rotate=a, to=b)
    command(path, rotate=b, to=c, expires="2029-01-31T12:00:00Z")
    command(path, revoke=name_of(b), by=c, since="2026-01-01", reason="the laptop was stolen")
    history = KeyHistory.read(path)
    line = [name_of(part) for part in (a, b, c)]
    assert all(history.line(name) == line for name in line) and history.line("sha256:else") == ["sha256:else"]
    revoked = history.keys[name_of(b)].revoked
    assert revoked == key_history.parse_time("2026-01-01") and history.keys[line[0]].successor == line[1]
    capsys.readouterr()
    command(path)
    page = capsys.readouterr().out.splitlines()
    assert f"{line[0]}: expires 2027-01-31T00:00:00Z; replaced by {line[1]}" in page[0]
    assert page[1].endswith("revoked as of 2026-01-01T00:00:00Z: the laptop was stolen")
    assert page[2] == f"{line[2]}: expires 2029-01-31T12:00:00Z"


def test_statements_that_do_not_hold_change_nothing(tmp_path: Path, key: Callable[[str], Path]) -> None:
    path = tmp_path / "keys.json"
    a, b, stranger = map(key, ("a", "b", "stranger"))
    command(path, add=a)
    command(path, rotate=a, to=b)
    before = path.read_bytes()
    for options, reason in (
        ({"add": b}, "which is in the history already"),
        ({"rotate": a, "to": stranger}, "gives .* a successor, and that key has one"),
        ({"rotate": stranger, "to": key("new")}, "which the history does not have before"),
        ({"revoke": name_of(b), "by": a}, "signed neither by it nor by a later key of it"),
        ({"revoke": name_of(a), "by": stranger}, "signed neither by it nor by a later key of it"),
        ({"revoke": name_of(a)}, "give it with --by"),
        ({"rotate": b}, "give --rotate OLD and --to NEW"),
        ({"add": stranger, "revoke": name_of(a)}, "makes one statement"),
        ({"revoke": name_of(a), "by": b, "since": "yesterday"}, "yesterday is no time"),
        ({"add": tmp_path / "none.pem"}, "there is no key"),
    ):
        with pytest.raises(AtomError, match=reason):
            command(path, **options)
        assert path.read_bytes() == before
    command(path, revoke=name_of(b), by=b)
    with pytest.raises(AtomError, match="was revoked or had expired by then"):
        command(path, rotate=b, to=stranger)
    with pytest.raises(AtomError, match="there is no history"):
        command(tmp_path / "none.json")


def test_a_history_that_someone_changed_is_refused(tmp_path: Path, key: Callable[[str], Path]) -> None:
    path = tmp_path / "keys.json"
    command(path, add=key("a"), expires="2027-01-31")
    command(path, rotate=key("a"), to=key("b"))
    body = json.loads(path.read_text())

    def payload(number: int, **changed: Any) -> dict[str, Any]:
        statement = {**json.loads(base64.b64decode(body["statements"][number]["payload"])), **changed}
        return {**body["statements"][number], "payload": base64.b64encode(key_history.canonical(statement)).decode()}

    first, second = body["statements"]
    stranger = key_history.signed_statement(
        json.loads(base64.b64decode(second["payload"])), signing.SigningKey(key("stranger"))
    )
    for statements, reason in (
        ([payload(0, expires=None), second], "statement 1 is altered"),
        ([first, payload(1, time="2020-01-01T00:00:00Z")], "statement 2 is altered"),
        ([second, first], "which the history does not have before"),
        ([first, {**second, "signatures": second["signatures"][:1]}], "is not signed by"),
        ([first, stranger], "is not signed by"),
        ([payload(0, more=1)], "is not written as"),
        ([{**first, "payloadType": "x"}], "has the type x"),
        ([{}], "payloadType"),
        ("x", "no history of keys of schema"),
    ):
        path.write_text(json.dumps({"schema": 1, "statements": statements}))
        with pytest.raises(AtomError, match=f"is no history of keys that can be used: .*{reason}"):
            KeyHistory.read(path)
    for text in ("", "[]", '{"schema": 2, "statements": []}'):
        path.write_text(text)
        with pytest.raises(AtomError, match="is no history of keys that can be used"):
            KeyHistory.read(path)
