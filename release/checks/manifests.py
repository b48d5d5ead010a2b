"""Checks that every file leads back to an artifact, by manifests and the origins of copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.store import Artifact, digest_of
from release import references, untrusted
from release.checks.findings import Findings
from release.layout import ORIGINS, RELEASE
from release.opened_release import Release
from release.published_files import earlier_placements, made, origin_of_copy, placements, unexplained


def manifests(release: Release) -> Findings:
    """Checks that each manifest's digest is the digest of its rows."""
    by_node = release.manifests
    findings = Findings(compared=bool(by_node))
    for node, manifest in by_node.items():
        if digest_of(list(manifest.files)) != manifest.digest:
            findings.problems.append(f"evidence/manifests/{node}.json: its digest is not that of its rows")
    return findings


def origins(release: Release) -> Findings:
    """Checks that every file has an origin: that each copy is, byte for byte, the file of its artifact's manifest, in
    the place in which the build puts it, and that the others are files that the build makes."""
    folder, paths = release.root, release.files
    stated = untrusted.read_json(folder / ORIGINS, follow=True)
    problems = [f"{path} has no origin" for path in unexplained(stated, paths)]
    manifest_digests: dict[tuple[str, str], str] = {}
    for node, manifest in release.manifests.items():
        manifest_digests |= {(node, path): digest for path, digest in manifest.digests.items()}
    present, copies = set(paths), 0
    for path, origin in sorted(stated.items()):
        copies += "artifact" in origin
        if path not in present:  # and ../ does not lead out of the release
            if _part_is_there(folder, path):
                problems.append(f"{path} is missing (listed in {ORIGINS})")
        elif "artifact" in origin and manifest_digests.get((origin["artifact"], origin["file"])) != release.digest(
            folder / path
        ):
            problems.append(f"{path} is not {origin['file']} of the artifact {origin['artifact']}")
    generated = len(stated) - copies
    problems += _misplaced(release, stated)
    return Findings(problems, summary=f"{copies} files copied from stated artifacts, {generated} generated and listed")


def _misplaced(release: Release, stated: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about origins that are not those that the build gives to the artifacts of the release."""
    nodes, manifests = release.info.nodes, release.manifests
    artifacts = {name: Artifact(row.key, row.digest, release.root, row.files) for name, row in manifests.items()}
    own = {node: artifacts[node] for node in nodes if node in artifacts}
    earlier = {name: artifact for name, artifact in artifacts.items() if name not in nodes}
    for node, stated_artifact in nodes.items():
        key, digest = stated_artifact.key, stated_artifact.digest
        if node not in own or (own[node].key, own[node].digest) != (key, digest):
            yield f"evidence/manifests/{node}.json is not the manifest of {key} in {RELEASE}"
    for name, artifact in earlier.items():
        if name != artifact.key:
            yield f"evidence/manifests/{name}.json is of no artifact of the release"
    by_reference = references.read(release.dataset).keys()
    expected: dict[str, dict[str, str]] = {}
    for name, file, path in (*placements(own), *earlier_placements(earlier)):
        expected[path] = origin_of_copy(name, artifacts[name], file, path, by_reference)
    for path in sorted(expected.keys() | stated.keys()):
        origin, wanted = stated.get(path, {}), expected.get(path, {})
        if wanted and origin != wanted:
            yield f"{path} is not stated to be {' of '.join(wanted.values())}, as the build states it"
        elif not wanted and ("artifact" in origin or made(path) is None):
            yield f"{path} is no published file of an artifact, and none that the build makes"


def _part_is_there(folder: Path, path: str) -> bool:
    """Whether the repository of a file exists here; beside a release's evidence alone, the others do not."""
    return (folder / path.split("/")[0]).exists()
