"""What a replay found, as data, as an in-toto statement and in lines for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import CheckFailed
from release import schema
from release.assembly.attest import PREDICATE
from release.audit.replay_source import Source
from release.layout import ALL_SUMS, RELEASE

BITWISE, CLOSE, DIFFERS = "bitwise", "within tolerance", "differs"
TOLERANCE = 1e-5
"""Of the largest difference in a tensor to its largest absolute value. Measured in fp32 on atom-smoke, two ranks
against one: 7e-7 to 8e-6 after 30 to 150 steps. Where rounding sends a token to another expert, or matrices are bf16
or FP8, an honest replay can part further; the figures then say how far."""
METHOD = "urn:atom-release:replay:v1"
SHOWN = 12


@dataclass(frozen=True)
class Replay:
    """What came of steps first + 1 .. last.

    different: tensors whose bits are others, with their largest difference by TOLERANCE's measure. state: fields of
    state.json that came out otherwise. diverges: the first step whose lines in the published log came out otherwise, if
    there is one, and such a log. ranks: processes that trained the phase; here it was one. environment: `name: then,
    now` of all that is not as it was. materials, subject: {path: sha256} of what was read, and of what was compared.
    code: `here`, or the digest of the code that trained the phase, which the release carries and which ran now.
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
    code: str = "here"

    @property
    def ok(self) -> bool:
        return self.verdict != DIFFERS

    @property
    def largest(self) -> float:
        return max(self.different.values(), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a difference that no number tells (another shape, not a number) is the string `inf`."""
        differences = {name: _number(value) for name, value in self.different.items()}
        return {
            **self.__dict__,
            "state": list(self.state),
            "environment": list(self.environment),
            "different": differences,
        }


def certificate(replay: Replay, release: Path) -> dict[str, Any]:
    """An in-toto Statement v1 about the published checkpoint, with the predicate test-result v0.1: PASSED if every bit
    is the same, WARNED if within tolerance or if the log parts, FAILED else. It names no clock, host or path of the
    machine.

    https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md
    Raises CheckFailed if the release is no longer the one that was replayed.
    """
    source = Source(release)
    release_info = schema.reader(release).release(source.json(RELEASE))
    if any(source.sums.get(path) != digest for path, digest in replay.subject.items()):
        raise CheckFailed(
            f"step {replay.last} of {replay.phase} in {release} is not the one that was replayed; replay it"
        )
    tests = {"token_shards": True, "state": not replay.state}
    tests |= {"tensors_within_tolerance": replay.largest <= replay.tolerance, "tensors_bitwise": not replay.different}
    if replay.ranks == 1:
        tests["log"] = replay.diverges is None
    missed = [name for name, passed in tests.items() if not passed]
    notes = {
        "release": f"{release_info['name']}-{release_info['version']}",
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
        "code": replay.code,
    }
    materials = {ALL_SUMS: source.sums[ALL_SUMS], **replay.materials}
    return {
        "_type": provenance.STATEMENT,
        "subject": _descriptors(replay.subject),
        "predicateType": PREDICATE,
        "predicate": {
            "result": "FAILED" if not replay.ok else "WARNED" if missed else "PASSED",
            "configuration": [{"name": "replay", "uri": METHOD, "annotations": notes}, *_descriptors(materials)],
            "passedTests": [name for name in tests if name not in missed],
            "warnedTests": missed if replay.ok else [],
            "failedTests": [] if replay.ok else missed,
        },
    }


def _descriptors(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(digests.items())]


def text(replay: Replay) -> str:
    """For a terminal."""
    steps = f"steps {replay.first + 1} to {replay.last}"
    lines = [f"{replay.phase}, {steps}, trained again from the checkpoint after step {replay.first}: {replay.verdict}"]
    if replay.different:
        lines += [
            f"{len(replay.different)} of {replay.tensors} tensors (weights and optimizer) have other bits, the first "
            f"{next(iter(replay.different))}",
            f"largest relative difference {replay.largest:.3g}, tolerance {replay.tolerance:g}",
        ]
    else:
        lines.append(f"all {replay.tensors} tensors (weights and optimizer) came out bit for bit")
    if replay.code != "here":
        lines.append(f"by the code that the release carries ({replay.code}), since the code here is another")
    if replay.state:
        lines.append(f"state.json came out with another {', '.join(replay.state)}")
    if replay.diverges is not None:
        lines.append(f"the log parts from the published one at step {replay.diverges}")
    if replay.ranks > 1:
        lines.append(
            f"{replay.ranks} ranks trained the phase and one replayed it, which adds in another order: no more than "
            f"`{CLOSE}` is to be expected"
        )
    elif replay.different and not replay.environment:
        lines.append("it was trained in this very environment by one rank, where a CPU gives the same bits")
    lines += [f"not as it was then: {difference}" for difference in replay.environment[:SHOWN]]
    if len(replay.environment) > SHOWN:
        lines.append(f"and {len(replay.environment) - SHOWN} more differences of the environment")
    return "\n  ".join(lines)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
