"""Checks that every file leads back to an artifact, by manifests and the origins of copies."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.store import digest_of
from release import untrusted
from release.assembly.assemble import unexplained
from release.assembly.published_tables import read_manifests
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import ORIGINS
from release.repositories import files_below


def manifests(subject: Subject) -> Findings:
    """Checks that each manifest's digest is the digest of its rows."""
    findings = Findings()
    for node, manifest in read_manifests(subject.folder).items():
        if digest_of(list(manifest.files)) != manifest.digest:
            findings.problems.append(f"evidence/manifests/{node}.json: its digest is not that of its rows")
    return findings


def origins(subject: Subject) -> Findings:
    """Checks that every file has an origin, and that each file copied from an artifact is, byte for byte, the one in
    the artifact's manifest."""
    folder, paths = subject.folder, files_below(subject.folder)
    origins_by_path = untrusted.read_json(folder / ORIGINS, follow=True)
    problems = [f"{path} has no origin" for path in unexplained(origins_by_path, paths)]
    manifest_digests: dict[tuple[str, str], str] = {}
    for node, manifest in read_manifests(folder).items():
        manifest_digests |= {(node, path): digest for path, digest in manifest.digests.items()}
    present, copies = set(paths), 0
    for path, origin in sorted(origins_by_path.items()):
        copies += "artifact" in origin
        if path not in present:  # and ../ does not lead out of the release
            if _part_is_there(folder, path):
                problems.append(f"{path} is missing (listed in {ORIGINS})")
        elif "artifact" in origin and manifest_digests.get((origin["artifact"], origin["file"])) != subject.digest(
            folder / path
        ):
            problems.append(f"{path} is not {origin['file']} of the artifact {origin['artifact']}")
    generated = len(origins_by_path) - copies
    return Findings(problems, summary=f"{copies} files copied from stated artifacts, {generated} generated and listed")


def _part_is_there(folder: Path, path: str) -> bool:
    """Whether the repository of a file exists here; beside a release's evidence alone, the others do not."""
    return (folder / path.split("/")[0]).exists()
