"""The history of signing keys: which key named its successor, until when each may sign, and which are revoked.

A history is a JSON file, `{"schema": 1, "statements": [envelope, …]}`, to which statements are only added. An envelope
is one of DSSE v1; its payload is a statement in canonical JSON:

    {"kind": "key", "key": PEM, "expires": time or null}                 signed by this key
    {"kind": "rotation", "key": fingerprint, "successor": PEM, "expires": time or null, "time": time}   signed by both
    {"kind": "revocation", "key": fingerprint, "time": time, "reason": text}     signed by it, or by a later key of it

Times are RFC 3339 in UTC with seconds: `2027-01-31T00:00:00Z`. They are what the holder of the key says. A key that
another one named, or that named another one, has the same holder: whoever trusts one trusts all keys of its line.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import canonical
from pipeline.core.text import printable
from release import untrusted
from release.signing.keys import SigningKey, fingerprint

SCHEMA = 1
PAYLOAD_TYPE = "application/vnd.atom.signing-key+json"
HISTORY_BYTES = 4 << 20
"""The maximum size of a history."""
TIME = "%Y-%m-%dT%H:%M:%SZ"
FIELDS = {
    "key": {"key", "expires"},
    "rotation": {"key", "successor", "expires", "time"},
    "revocation": {"key", "time", "reason"},
}
"""{kind of statement: its fields beside `kind`}"""


@dataclass(frozen=True)
class Key:
    """A key as its history has it. pem: the public key. successor: the fingerprint of the key that it named at
    `rotated`; reason: why it was revoked."""

    pem: bytes
    expires: datetime.datetime | None = None
    predecessor: str | None = None
    successor: str | None = None
    rotated: datetime.datetime | None = None
    revoked: datetime.datetime | None = None
    reason: str = ""


class KeyHistory:
    """The keys of a history by fingerprint, each statement of which is signed as it must be."""

    def __init__(self, envelopes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Raises ValueError with a sentence about the first statement that does not hold."""
        self.keys: dict[str, Key] = {}
        self.envelopes: list[Mapping[str, Any]] = []
        for envelope in envelopes:
            self.add(envelope)

    @classmethod
    def read(cls, path: Path) -> KeyHistory:
        """Raises AtomError if it is missing, or if a statement does not hold."""
        try:
            body = untrusted.read_json(path, HISTORY_BYTES, follow=True)
            if not isinstance(body, dict) or body.get("schema") != SCHEMA or not isinstance(body["statements"], list):
                raise ValueError(f"it is no history of keys of schema {SCHEMA}")
            return cls(body["statements"])
        except (CheckFailed, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = printable(" ".join(str(error).split()))
            raise AtomError(f"{path} is no history of keys that can be used: {reason}; fetch it again") from None

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        body = {"schema": SCHEMA, "statements": self.envelopes}
        atomic_files.write(path, json.dumps(body, indent=1, sort_keys=True) + "\n")

    def line(self, name: str) -> list[str]:
        """The fingerprints of the keys of one holder, the first one first; only `name` if the history lacks it."""
        first = name
        while (key := self.keys.get(first)) and key.predecessor:
            first = key.predecessor
        names = [first]
        while (key := self.keys.get(names[-1])) and key.successor:
            names.append(key.successor)
        return names

    def add(self, envelope: Mapping[str, Any]) -> None:
        """Adds a statement. Raises ValueError if it does not hold."""
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"a statement has the type {envelope['payloadType']}, not {PAYLOAD_TYPE}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        statement = untrusted.parse_json(payload, "a statement")
        kind = statement.get("kind")
        if kind not in FIELDS or set(statement) != FIELDS[kind] | {"kind"} or canonical(statement) != payload:
            raise ValueError(f"a statement of kind {kind} is not written as `atom keys` writes it")
        signers = {row["keyid"]: base64.b64decode(row["sig"], validate=True) for row in envelope["signatures"]}
        number = len(self.envelopes) + 1
        changed = getattr(self, f"_{kind}")(statement, set(signers), f"statement {number}")
        known = {name: key.pem for name, key in {**self.keys, **changed}.items()}
        for name, signature in signers.items():
            _check_signature(known[name], payload, signature, f"statement {number}")
        self.keys |= changed
        self.envelopes.append(envelope)

    def _key(self, statement: Mapping[str, Any], signers: set[str], label: str) -> dict[str, Key]:
        pem = statement["key"].encode()
        name = fingerprint(pem, exact=True)
        if name in self.keys:
            raise ValueError(f"{label} is about the key {name}, which is in the history already")
        _require(signers, {name}, label)
        return {name: Key(pem, _expiry(statement["expires"]))}

    def _rotation(self, statement: Mapping[str, Any], signers: set[str], label: str) -> dict[str, Key]:
        old_name, pem, time = statement["key"], statement["successor"].encode(), _time(statement["time"])
        name = fingerprint(pem, exact=True)
        old = self._known(old_name, label)
        if name in self.keys or old.successor:
            raise ValueError(f"{label} gives {old_name} a successor, and that key has one or is in the history already")
        if old.revoked or (old.expires and time > old.expires):
            raise ValueError(f"{label} is by {old_name}, which was revoked or had expired by then")
        _require(signers, {old_name, name}, label)
        successor = Key(pem, _expiry(statement["expires"]), predecessor=old_name)
        return {old_name: replace(old, successor=name, rotated=time), name: successor}

    def _revocation(self, statement: Mapping[str, Any], signers: set[str], label: str) -> dict[str, Key]:
        name = statement["key"]
        key, line = self._known(name, label), self.line(name)
        if not isinstance(statement["reason"], str) or len(signers) != 1:
            raise ValueError(f"{label} revokes a key without one signature or a reason")
        if not signers <= set(line[line.index(name) :]):
            raise ValueError(f"{label} revokes {name}, and is signed neither by it nor by a later key of it")
        time = _time(statement["time"])
        return {name: replace(key, revoked=min(key.revoked or time, time), reason=statement["reason"])}

    def _known(self, name: str, label: str) -> Key:
        if name not in self.keys:
            raise ValueError(f"{label} is about the key {name}, which the history does not have before")
        return self.keys[name]


def signed_statement(statement: Mapping[str, Any], *keys: SigningKey) -> dict[str, Any]:
    """A statement in an envelope, signed by keys on an elliptic curve with SHA-256. Raises AtomError for a key that
    cannot be used."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = canonical(statement)
    signatures = []
    for key in keys:
        name = fingerprint(key.public_key())  # reports a key that cannot be used
        password = None if key.password is None else key.password.encode()
        private = serialization.load_pem_private_key(key.path.read_bytes(), password)
        assert isinstance(private, ec.EllipticCurvePrivateKey), "public_key checked it"
        signature = private.sign(_encoded(payload), ec.ECDSA(hashes.SHA256()))
        signatures.append({"keyid": name, "sig": base64.b64encode(signature).decode()})
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": signatures,
    }


def format_time(time: datetime.datetime) -> str:
    return time.astimezone(datetime.UTC).strftime(TIME)


def parse_time(text: str) -> datetime.datetime:
    """A time, or a day, which stands for its beginning in UTC. Raises AtomError."""
    for form in (TIME, "%Y-%m-%d"):
        try:
            return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC)
        except ValueError:
            continue
    raise AtomError(f"{printable(text)} is no time; write 2027-01-31 or 2027-01-31T00:00:00Z, in UTC")


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.strptime(text, TIME).replace(tzinfo=datetime.UTC)


def _expiry(text: str | None) -> datetime.datetime | None:
    return None if text is None else _time(text)


def _require(signers: set[str], expected: set[str], label: str) -> None:
    if signers != expected:
        raise ValueError(f"{label} is not signed by {' and '.join(sorted(expected))} alone")


def _encoded(payload: bytes) -> bytes:
    """The pre-authentication encoding of DSSE v1."""
    return f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode() + payload


def _check_signature(pem: bytes, payload: bytes, signature: bytes, label: str) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_public_key(pem)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{label} is by a key that is not on an elliptic curve")
    try:
        key.verify(signature, _encoded(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise ValueError(f"{label} is altered, or not signed by the key that it names") from None
