"""Whether a key or a certificate could sign at a time: expiry, revocation, rotation.

A time counts that a trusted timestamp proves. Without one, a signature may have been made at any time up to now.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from release.signing.key_history import Key, format_time

NO_PROOF = "no trusted timestamp proves that it was made before"


@dataclass(frozen=True)
class SigningTime:
    """proven: the time that a trusted timestamp gives, None without one. untrusted: whether there is a timestamp, and
    no authority was trusted. now: the time of verification."""

    proven: datetime.datetime | None
    untrusted: bool
    now: datetime.datetime

    def before(self, end: datetime.datetime) -> bool:
        """Whether a signature is proven to have been made before a time."""
        return self.proven is not None and self.proven < end

    def missing(self) -> str:
        """Why no time is proven, or which time is."""
        if self.proven is not None:
            return f"its timestamp says {format_time(self.proven)}"
        if self.untrusted:
            return f"{NO_PROOF}: it has a timestamp, so give --timestamp-authority"
        return NO_PROOF


@dataclass(frozen=True)
class Validity:
    """problem: why a signature does not count, "" if it does. note: what speaks against the key and is outweighed."""

    problem: str = ""
    note: str = ""


def of_key(name: str, key: Key, time: SigningTime) -> Validity:
    """Of a signature with a key of a history. name: its fingerprint."""
    short, notes = f"{name[:23]}…", []
    if key.revoked is not None:
        at = f"the key {short} was revoked as of {format_time(key.revoked)} ({key.reason})"
        if not time.before(key.revoked):
            return Validity(f"{at}, and {time.missing()}")
        notes.append(f"{at}, after this signature")
    if key.expires is not None:
        at = f"the key {short} expired at {format_time(key.expires)}"
        if (time.proven or time.now) >= key.expires:
            return Validity(f"{at}, and {time.missing()}")
        if time.now >= key.expires:
            notes.append(f"{at}, after this signature")
    if key.successor is not None and key.rotated is not None:
        at = f"the key {short} named {key.successor[:23]}… its successor at {format_time(key.rotated)}"
        if time.proven is not None and time.proven >= key.rotated:
            return Validity(f"{at}, and its timestamp says {format_time(time.proven)}")
        notes.append(at)
    if notes and time.proven is not None:
        notes.append(f"it was made by {format_time(time.proven)}, as a trusted timestamp proves")
    return Validity(note="; ".join(notes))


def of_certificate(certificate: Any, time: SigningTime) -> Validity:
    """Of a signature with a certificate of the cryptography library, by its own period of validity."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if (time.proven or time.now) > end:
        return Validity(f"its certificate expired at {format_time(end)}, and {time.missing()}")
    if (time.proven or time.now) < start:
        return Validity(f"its certificate is valid from {format_time(start)} on, and {time.missing()}")
    if time.now > end and time.proven is not None:
        proof = f"it was made by {format_time(time.proven)}, as a trusted timestamp proves"
        return Validity(note=f"its certificate expired at {format_time(end)}, after this signature; {proof}")
    return Validity()
