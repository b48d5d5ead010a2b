"""The result of a replay: as data, as an in-toto statement, and as text; and the certificates that others sent.

A certificate is a file of `atom replay --certificate` in a folder beside the release, which was sealed and signed
before anybody replayed it. `atom publish` puts the certificates on the Space of its page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import AtomError, CheckFailed
from release import schema, untrusted
from release.audit.replay.source import Source
from release.layout import ALL_SUMS, RELEASE
from release.standards.attestations import PREDICATE

BITWISE, CLOSE, DIFFERS = "bitwise", "within tolerance", "differs"
TOLERANCE = 1e-5
"""The ratio of the largest difference in a tensor to its largest absolute value. Measured in fp32 on atom-smoke, two
ranks against one: 7e-7 to 8e-6 after 30 to 150 steps. If rounding routes a token to another expert, or matrices are
bf16 or FP8, an honest replay can differ by more; the figures then state by how much."""
METHOD = "urn:atom-release:replay:v1"
DATA = {"token_shards": "/train/", "answers": "dataset/rl/"}
"""{test that a replay without an error has passed: a part of the paths that it read}: the documents give the token
shards that were trained on, and the answers or pairs are those that the phase asks for, in their order."""
SHOWN = 12
"""Differences of the environment that the text names."""
CODE = "code of "
"""The beginning of the differences of the environment that are of modules."""


@dataclass(frozen=True)
class Replay:
    """The result for the steps first + 1 to last.

    Attributes:
        phase: The phase.
        first: The step of the checkpoint that the replay began with.
        last: The last step.
        verdict: BITWISE, CLOSE or DIFFERS.
        tensors: The number of tensors that were compared.
        different: {name: relative difference} of the tensors whose bits differ, by TOLERANCE's measure.
        state: The fields of state.json that differ.
        diverges: The first step whose lines in the published log differ; None if none do, or no log is published.
        ranks: The number of processes that trained the phase; here it was one.
        environment: A line `name: then, now` for each value that differs.
        fingerprint: The fingerprint of the environment here.
        materials: {path: SHA-256} of what was read.
        subject: {path: SHA-256} of what was compared.
        tolerance: The relative difference up to which the verdict is CLOSE.
    """

    phase: str
    first: int
    last: int
    verdict: str
    tensors: int
    different: dict[str, float]
    state: tuple[str, ...]
    diverges: int | None
    ranks: int
    environment: tuple[str, ...]
    fingerprint: str
    materials: dict[str, str]
    subject: dict[str, str]
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        return self.verdict != DIFFERS

    @property
    def largest(self) -> float:
        return max(self.different.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain JSON.

        A difference without a finite number (another shape, not a number) is the string `inf`.
        """
        differences = {name: _number(value) for name, value in self.different.items()}
        return {
            **self.__dict__,
            "state": list(self.state),
            "environment": list(self.environment),
            "different": differences,
        }


def certificate(replay: Replay, release: Path) -> dict[str, Any]:
    """Returns an in-toto Statement v1 about the published checkpoint, with the predicate test-result v0.1.

    The result is PASSED if every bit is the same, WARNED if the weights are within tolerance or the log diverges, and
    FAILED otherwise. The statement contains no clock, host or path of the machine.

    https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md

    Raises CheckFailed if the release was changed since the replay.
    """
    source = Source(release)
    source.file(RELEASE)  # compares it with the checksums before it is read
    release_info = schema.read_release(release)
    if any(source.sums.get(path) != digest for path, digest in replay.subject.items()):
        raise CheckFailed(
            f"step {replay.last} of {replay.phase} in {release} is not the one that was replayed; replay it"
        )
    tests = {name: True for name, part in DATA.items() if any(part in path for path in replay.materials)}
    tests["state"] = not replay.state
    tests |= {"tensors_within_tolerance": replay.largest <= replay.tolerance, "tensors_bitwise": not replay.different}
    # One process adds numbers in another order than several did, so its log need not be the same.
    if replay.ranks == 1:
        tests["log"] = replay.diverges is None
    missed = [name for name, passed in tests.items() if not passed]
    notes = {
        "release": f"{release_info.name}-{release_info.version}",
        "phase": replay.phase,
        "steps": [replay.first + 1, replay.last],
        "verdict": replay.verdict,
        "tensors": replay.tensors,
        "tensors_that_differ": len(replay.different),
        "largest_relative_difference": _number(replay.largest),
        "tolerance": replay.tolerance,
        "ranks": {"then": replay.ranks, "now": 1},
        "log_diverges_at_step": replay.diverges,
        "environment_differences": list(replay.environment),
        "environment_fingerprint": replay.fingerprint,
    }
    materials = {ALL_SUMS: source.sums[ALL_SUMS], **replay.materials}
    result = "FAILED"
    if replay.ok:
        result = "WARNED" if missed else "PASSED"
    return {
        "_type": provenance.STATEMENT,
        "subject": _descriptors(replay.subject),
        "predicateType": PREDICATE,
        "predicate": {
            "result": result,
            "configuration": [{"name": "replay", "uri": METHOD, "annotations": notes}, *_descriptors(materials)],
            "passedTests": [name for name in tests if name not in missed],
            "warnedTests": missed if replay.ok else [],
            "failedTests": [] if replay.ok else missed,
        },
    }


def _descriptors(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(digests.items())]


def text(replay: Replay) -> str:
    """Returns the result for a terminal: the verdict, then one line for each finding."""
    steps = f"steps {replay.first + 1} to {replay.last}"
    start = next((path.split("/")[1] for path in replay.materials if path.startswith("checkpoints/")), "")
    previous, _, step = start.rpartition("-step-")
    origin = f"step {step}" if previous == replay.phase else f"step {step} of {previous}"
    lines = [f"{replay.phase}, {steps}, retrained from the checkpoint of {origin}: {replay.verdict}"]
    if replay.different:
        lines += [
            f"{len(replay.different)} of {replay.tensors} tensors (weights and optimizer) differ, first "
            f"{next(iter(replay.different))}",
            f"largest relative difference {replay.largest:.3g}, tolerance {replay.tolerance:g}",
        ]
    else:
        lines.append(f"all {replay.tensors} tensors (weights and optimizer) are equal bit for bit")
    if replay.state:
        lines.append(f"state.json differs in {', '.join(replay.state)}")
    if replay.diverges is not None:
        lines.append(f"the log diverges from the published one at step {replay.diverges}")
    if replay.ranks > 1:
        lines.append(
            f"{replay.ranks} ranks trained the phase and one replayed it, which adds numbers in another order: expect "
            f"`{CLOSE}` at best"
        )
    elif replay.different and not replay.environment:
        lines.append("one rank trained it in this very environment, where a CPU gives the same bits")
    lines += [f"differs from the training environment: {difference}" for difference in replay.environment[:SHOWN]]
    if len(replay.environment) > SHOWN:
        lines.append(f"and {len(replay.environment) - SHOWN} more differences of the environment")
    if any(difference.startswith(CODE) for difference in replay.environment):
        lines.append("other code trained it than is here: a copy of `code/` in the release has that code")
    return "\n  ".join(lines)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


MOST_CERTIFICATES, CERTIFICATE_BYTES = 1_000, 4 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
RESULTS = ("PASSED", "WARNED", "FAILED")


@dataclass(frozen=True)
class Certificate:
    """A certificate whose digests are those of the release.

    Attributes:
        name: The name of its file without `.json`, which says from whom it is.
        path: The file.
        result: The result of the in-toto statement.
        notes: Its annotations, as they are.
    """

    name: str
    path: Path
    result: str
    notes: dict[str, Any]

    def row(self) -> list[Any]:
        """Returns the cells of the certificate's row in a table, each a short text or a number.

        They are name, result, phase, first step, last step, verdict, tensors, tensors that differ, and the fingerprint
        of the environment.
        """
        first, last = self.notes["steps"]
        # A certificate may come from anybody, so its texts are cut for the table.
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
    """Returns the folder of the certificates of a release."""
    return release.with_name(f"{release.name}.replays")


def read_certificates(release: Path) -> list[Certificate]:
    """Returns the certificates of a release, by name. Raises AtomError for one that is not about it."""
    paths = sorted(folder_of(release).glob("*.json"))
    if not paths:
        return []
    if len(paths) > MOST_CERTIFICATES:
        raise AtomError(f"{folder_of(release)} has {len(paths)} certificates; the page takes {MOST_CERTIFICATES}")
    source = Source(release)
    return [read_certificate(path, source) for path in paths]


def read_certificate(path: Path, source: Source) -> Certificate:
    """Returns a certificate about the release of a source. Raises AtomError if it is none."""
    if not NAME.fullmatch(path.stem):
        raise AtomError(f"{path}: the name of a certificate has 1 to 64 letters, digits, points, dashes, underscores")
    try:
        body = untrusted.read_json(path, CERTIFICATE_BYTES)
        replay, *materials = body["predicate"]["configuration"]
        is_replay = (body["_type"], body["predicateType"], replay["uri"]) == (provenance.STATEMENT, PREDICATE, METHOD)
        digests = {row["name"]: row["digest"]["sha256"] for row in [*body["subject"], *materials]}
        certificate = Certificate(path.stem, path, body["predicate"]["result"], replay["annotations"])
        # Notes that lack a field or have another type raise their error here, and not while a page is written.
        certificate.row()
    except (CheckFailed, KeyError, TypeError, ValueError):
        is_replay = False
    if not is_replay or not body["subject"] or certificate.result not in RESULTS:
        raise AtomError(f"{path} is no certificate of a replay; remove it, or write it by `atom replay --certificate`")
    for name, digest in digests.items():
        if source.sums.get(name) != digest:
            raise AtomError(f"{path} is about another release: its digest of {str(name)[:200]!r} is not the one here")
    return certificate
