"""Checks that the in-toto statements of a release are about its artifacts, and match the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core import provenance
from pipeline.core.provenance import BUILD_TYPE, PREDICATE, STATEMENT
from pipeline.core.store import Artifact, canonical, sha256_bytes
from release.checks.findings import Findings
from release.facts.published_tables import read_json
from release.layout import ORIGINS
from release.opened_release import Release
from release.standards.attestations import ENVIRONMENT

ARTIFACT_URI = "atom:artifact/"


def statements(release: Release) -> Findings:
    """Checks that each artifact is the subject of a statement, that each statement's materials are the artifacts of the
    release, and that the summary in it is that of its product."""
    folder, manifests = release.root, release.manifests
    artifact_digests = {manifest.key: manifest.digest for manifest in manifests.values()}
    published_summaries = _summaries(release)
    stated_artifacts: set[tuple[str, str]] = set()
    stated_metrics: dict[str, set[str]] = {}
    problems = []
    for path, body in release.statements.items():
        name = path.relative_to(folder).as_posix()
        if path.stem != release.digest(path):
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
        if build["externalParameters"]["key"] not in artifact_digests:
            problems.append(f"{name} is about nothing in the release")
        if artifacts and (curves := provenance.metrics(body)) is not None:
            for key, _ in artifacts:
                stated_metrics.setdefault(key, set()).add(curves)
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
    findings = Findings(problems, compared=bool(stated_artifacts))
    _compare_metrics(release, stated_metrics, findings)
    _compare_build(release, findings)
    return findings


def _compare_metrics(release: Release, stated: Mapping[str, set[str]], findings: Findings) -> None:
    """Compares the timed metrics with the statements about the artifacts. stated: {key: digests by its statements}."""
    unstated = []
    for name, manifest in release.manifests.items():
        path = release.root / f"evidence/metrics/{name}.jsonl"
        if manifest.key in stated:
            if not path.is_file() or release.digest(path) not in stated[manifest.key]:
                problem = f"evidence/metrics/{name}.jsonl is not the file that the statement about {manifest.key} names"
                findings.problems.append(problem)
        elif path.is_file():
            unstated.append(name)
    if unstated:
        findings.skipped["metrics"] = f"metrics: no statement names those of {', '.join(unstated)}"


def _compare_build(release: Release, findings: Findings) -> None:
    """Compares the commit and the environment of the build with those of the artifacts. A build may come later, from
    another commit and elsewhere, so that no statement has them."""
    commit, environment = release.info.commit, read_json(release.root / ENVIRONMENT)
    commits, environments = set(), []
    for body in release.statements.values():
        commits |= {start["commit"] for start in provenance.starts(body)}
        environments.append(provenance.environment_of(body))
    if commit not in commits:
        findings.skipped["commit"] = f"commit: no statement about training names {commit}, that of the build"
    fingerprint = sha256_bytes(canonical({name: environment.get(name) for name in ("python", "packages", "device")}))
    if environment.get("fingerprint") != fingerprint:
        findings.problems.append(f"{ENVIRONMENT}: its fingerprint is not that of its packages and its device")
    if environment not in environments:
        findings.skipped["environment"] = "environment: no statement names that of the build"


def _summaries(release: Release) -> dict[str, Any]:
    """{key: the byproduct that a statement about it should have} of each artifact whose summary.json is published."""
    summaries, present = {}, set(release.files)
    for path, origin in read_json(release.root / ORIGINS).items():
        if origin.get("file") == provenance.SUMMARY and path in present:
            manifest = release.manifests[origin["artifact"]]
            row = next(row for row in manifest.files if row.path == provenance.SUMMARY)
            product = Artifact(manifest.key, "", (release.root / path).parent, (row,))
            summaries[manifest.key] = next(provenance.summaries(product))
    return summaries
