"""Certificates of replays that others sent: files of `atom replay --certificate` in a folder beside the release.

A release is sealed and signed before anybody replays it, so the certificates are not in it. `atom publish` puts them
on the Space of its page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import AtomError, CheckFailed
from release import untrusted
from release.audit.replay.report import METHOD
from release.audit.replay.source import Source
from release.standards.attestations import PREDICATE

MOST_CERTIFICATES, CERTIFICATE_BYTES = 1_000, 4 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESULTS = ("PASSED", "WARNED", "FAILED")


@dataclass(frozen=True)
class Certificate:
    """A certificate whose digests are those of the release. name: of its file without `.json`, which says from whom it
    is. result: of the in-toto statement. notes: its annotations, as they are."""

    name: str
    path: Path
    result: str
    notes: dict[str, Any]

    def row(self) -> list[Any]:
        """[name, result, phase, first step, last step, verdict, tensors, tensors that differ, fingerprint of the
        environment], each a short text or a number."""
        first, last = self.notes["steps"]
        phase, verdict = (str(self.notes[name])[:80] for name in ("phase", "verdict"))
        counts = int(self.notes["tensors"]), int(self.notes["tensors_that_differ"])
        return [
            self.name,
            self.result,
            phase,
            int(first),
            int(last),
            verdict,
            *counts,
            str(self.notes["environment_fingerprint"])[:80],
        ]


def folder_of(release: Path) -> Path:
    """The folder of the certificates of a release."""
    return release.with_name(f"{release.name}.replays")


def read_certificates(release: Path) -> list[Certificate]:
    """The certificates of a release, by name. Raises AtomError for one that is not about it."""
    paths = sorted(folder_of(release).glob("*.json"))
    if not paths:
        return []
    if len(paths) > MOST_CERTIFICATES:
        raise AtomError(f"{folder_of(release)} has {len(paths)} certificates; the page takes {MOST_CERTIFICATES}")
    source = Source(release)
    return [read_certificate(path, source) for path in paths]


def read_certificate(path: Path, source: Source) -> Certificate:
    """A certificate about the release of a source. Raises AtomError if it is none."""
    if not NAME.fullmatch(path.stem):
        raise AtomError(f"{path}: the name of a certificate has 1 to 64 letters, digits, points, dashes, underscores")
    try:
        body = untrusted.read_json(path, CERTIFICATE_BYTES)
        replay, *materials = body["predicate"]["configuration"]
        is_replay = (body["_type"], body["predicateType"], replay["uri"]) == (provenance.STATEMENT, PREDICATE, METHOD)
        digests = {row["name"]: row["digest"]["sha256"] for row in [*body["subject"], *materials]}
        certificate = Certificate(path.stem, path, body["predicate"]["result"], replay["annotations"])
        certificate.row()
    except (CheckFailed, KeyError, TypeError, ValueError):
        is_replay = False
    if not is_replay or not body["subject"] or certificate.result not in RESULTS:
        raise AtomError(f"{path} is no certificate of a replay; remove it, or write it by `atom replay --certificate`")
    for name, digest in digests.items():
        if source.sums.get(name) != digest:
            raise AtomError(f"{path} is about another release: its digest of {str(name)[:200]!r} is not the one here")
    return certificate
