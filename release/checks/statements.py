"""Checks that the in-toto statements of a release are about its artifacts, and match the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.provenance import BUILD_TYPE, PREDICATE, STATEMENT
from pipeline.core.store import Artifact
from release.assembly.published_tables import Manifest, read_json, read_manifests
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import ORIGINS
from release.repositories import files_below

ARTIFACT_URI = "atom:artifact/"


def statements(subject: Subject) -> Findings:
    """Checks that each artifact is the subject of a statement, that each statement's materials are the artifacts of the
    release, and that the summary in it is that of its product."""
    folder = subject.folder
    manifests = read_manifests(folder)
    artifact_digests = {manifest.key: manifest.digest for manifest in manifests.values()}
    published_summaries = _summaries(folder, manifests)
    stated_artifacts: set[tuple[str, str]] = set()
    problems = []
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = read_json(path)
        name = path.relative_to(folder).as_posix()
        if path.stem != subject.digest(path):
            problems.append(f"{name} is not named by its digest")
        build = body["predicate"]["buildDefinition"]
        types = {
            "_type": body.get("_type"),
            "predicateType": body.get("predicateType"),
            "buildType": build.get("buildType"),
        }
        kinds = {"_type": STATEMENT, "predicateType": PREDICATE, "buildType": BUILD_TYPE}
        problems += [
            f"{name}: its {field} is {types[field]}, not {kind}"
            for field, kind in kinds.items()
            if types[field] != kind
        ]
        subjects = {(subject["name"], subject["digest"]["sha256"]) for subject in body["subject"]}
        artifacts = subjects & set(artifact_digests.items())
        stated_artifacts |= artifacts
        for key, _ in artifacts:
            if (summary := provenance.summary(body)) and published_summaries.get(key, summary) != summary:
                problems.append(f"{name}: what it says is in {provenance.SUMMARY} of {key} is not what is there")
        for material in provenance.dependencies_of(body) if artifacts else ():
            uri = material.get("uri", "")
            key = uri.removeprefix(ARTIFACT_URI)
            if uri.startswith(ARTIFACT_URI) and artifact_digests.get(key) != material["digest"]["sha256"]:
                problems.append(f"{name}: its material {key} is not an artifact of this release")
    problems += [
        f"evidence/statements: none is about {key} as it is here"
        for key in sorted(set(artifact_digests) - {k for k, _ in stated_artifacts})
    ]
    return Findings(problems)


def _summaries(folder: Path, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """{key: the byproduct that a statement about it should have} of each artifact whose summary.json is published."""
    summaries, present = {}, set(files_below(folder))
    for path, origin in read_json(folder / ORIGINS).items():
        if origin.get("file") == provenance.SUMMARY and path in present:
            manifest = manifests[origin["artifact"]]
            row = next(row for row in manifest.files if row.path == provenance.SUMMARY)
            product = Artifact(manifest.key, "", (folder / path).parent, (row,))
            summaries[manifest.key] = next(provenance.summaries(product))
    return summaries
