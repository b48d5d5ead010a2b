"""Checks the evidence of a release: that every file leads back to a statement, and the documents by standards.

The origins of copies lead to the manifest of an artifact, and from there to the in-toto statement about it. Then come
the results of the gates, the attestations about them, and the bundle of documents that others read by standards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import installing
from pipeline.core.provenance import BUILD_TYPE, PREDICATE, STATEMENT
from pipeline.core.store import Artifact, canonical, digest_of, sha256_bytes
from pipeline.core.text import escaped
from release import references, untrusted
from release.checks.check import (
    Absent,
    Checks,
    Findings,
    gates_computed_again,
    names_of_gates,
    require_file,
    required_gates,
)
from release.facts.published_tables import read_json
from release.layout import GATES, GATES_STATED, ORIGINS, RELEASE, STANDARDS
from release.opened_release import Release
from release.published_files import earlier_placements, made, origin_of_copy, placements, unexplained
from release.standards import attestations as statements_of
from release.standards import standard_facts, validation
from release.standards.attestations import ENVIRONMENT
from release.standards.bundle import DOCUMENTS, RECORDED
from release.standards.standard_facts import read_facts


def manifest_digests(release: Release) -> Findings:
    """Checks that each manifest's digest is the digest of its rows."""
    by_node = release.manifests
    findings = Findings(compared=bool(by_node))
    for node, manifest in by_node.items():
        if digest_of(list(manifest.files)) != manifest.digest:
            findings.problems.append(f"evidence/manifests/{node}.json: its digest is not that of its rows")
    return findings


def origins(release: Release) -> Findings:
    """Checks that every file has an origin, and that each copy is the file of its artifact's manifest.

    A copy must be the same byte for byte, and stand in the place in which the build puts it. The other files must be
    files that the build makes.
    """
    folder, paths = release.root, release.files
    stated = untrusted.read_json(folder / ORIGINS, follow=True)
    problems = [f"{path} has no origin" for path in unexplained(stated, paths)]
    # Several nodes may have files of one name.
    manifest_digests: dict[tuple[str, str], str] = {}
    for node, manifest in release.manifests.items():
        manifest_digests |= {(node, path): digest for path, digest in manifest.digests.items()}
    present, copies = set(paths), 0
    for path, origin in sorted(stated.items()):
        copies += "artifact" in origin
        if path not in present:  # and ../ does not lead out of the release
            # Beside a release's evidence alone, the repositories of other files are not there.
            if (folder / path.split("/")[0]).exists():
                problems.append(f"{path} is missing (listed in {ORIGINS})")
        elif "artifact" in origin and manifest_digests.get((origin["artifact"], origin["file"])) != release.digest(
            folder / path
        ):
            problems.append(f"{path} is not {origin['file']} of the artifact {origin['artifact']}")
    generated = len(stated) - copies
    problems += _misplaced(release, stated)
    return Findings(problems, summary=f"{copies} files copied from stated artifacts, {generated} generated and listed")


def _misplaced(release: Release, stated: Mapping[str, Any]) -> Iterator[str]:
    """Yields sentences about origins that are not those that the build gives to the artifacts of the release."""
    nodes, manifests = release.info.nodes, release.manifests
    artifacts = {name: Artifact(row.key, row.digest, release.root, row.files) for name, row in manifests.items()}
    present = {node: artifacts[node] for node in nodes if node in artifacts}
    earlier = {name: artifact for name, artifact in artifacts.items() if name not in nodes}
    for node, stated_artifact in nodes.items():
        key, digest = stated_artifact.key, stated_artifact.digest
        if node not in present or (present[node].key, present[node].digest) != (key, digest):
            yield f"evidence/manifests/{node}.json is not the manifest of {key} in {RELEASE}"
    for name, artifact in earlier.items():
        if name != artifact.key:
            yield f"evidence/manifests/{name}.json is of no artifact of the release"
    by_reference = references.read(release.dataset).keys()
    expected: dict[str, dict[str, str]] = {}
    for name, file, path in (*placements(present), *earlier_placements(earlier)):
        expected[path] = origin_of_copy(name, artifacts[name], file, path, by_reference)
    for path in sorted(expected.keys() | stated.keys()):
        origin, wanted = stated.get(path, {}), expected.get(path, {})
        if wanted and origin != wanted:
            yield f"{path} is not stated to be {' of '.join(wanted.values())}, as the build states it"
        elif not wanted and ("artifact" in origin or made(path) is None):
            yield f"{path} is no published file of an artifact, and none that the build makes"


ARTIFACT_URI = "atom:artifact/"


def statements(release: Release) -> Findings:
    """Checks that each artifact is the subject of a statement, and that the statement describes it.

    Its materials must be artifacts of the release, and the summary in it must be that of its product.
    """
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
        # A failed attempt has a statement, but no artifact here; its materials may be gone.
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
    """Compares the timed metrics with the statements about the artifacts.

    `stated` is {key of an artifact: digests of metrics by its statements}.
    """
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
    """Compares the commit and the environment of the build with those of the artifacts.

    A build may come later, from another commit and elsewhere, so that no statement has them.
    """
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
    """Returns the byproduct that a statement about an artifact should have, by the key of the artifact.

    These are the artifacts whose summary.json is published.
    """
    summaries, present = {}, set(release.files)
    for path, origin in read_json(release.root / ORIGINS).items():
        if origin.get("file") == provenance.SUMMARY and path in present:
            manifest = release.manifests[origin["artifact"]]
            row = next(row for row in manifest.files if row.path == provenance.SUMMARY)
            product = Artifact(manifest.key, "", (release.root / path).parent, (row,))
            summaries[manifest.key] = next(provenance.summaries(product))
    return summaries


def passed_gates(checks: Callable[[], Checks], release: Release) -> Findings:
    """Checks that no gate failed when the release was built, and that the results of the gates are true.

    All gates which apply must be there and no others. Those which follow from the published files must have the result
    that these give.

    Args:
        checks: Gives all checks of the registry, which names this one.
        release: The release.
    """
    published = untrusted.read_json(release.root / GATES, follow=True)
    failed = [(name, gate["detail"]) for name, gate in sorted(published.items()) if gate["ok"] is False]
    findings = Findings([f"{GATES}: gate {name} failed: {detail}" for name, detail in failed])
    findings.skipped = {
        name: f"gate {name}: {gate['detail']}" for name, gate in sorted(published.items()) if gate["ok"] is None
    }
    findings.problems += _gate_problems(checks(), release, published, findings)
    return findings


def _gate_problems(checks: Checks, release: Release, published: Mapping[str, Any], findings: Findings) -> Iterator[str]:
    """Yields sentences about gates that are invented, missing, or not what the published files give."""
    yield from (
        f"{GATES}: there is no gate {escaped(name)}" for name in sorted(published.keys() - set(names_of_gates(checks)))
    )
    lacking = required_gates(checks, release) - published.keys()
    yield from (f"{GATES}: gate {name} applies to the release, and is not there" for name in sorted(lacking))
    again = gates_computed_again(checks, release) if release.is_whole else {}
    for name, result in again.items():
        expected = {"ok": result.ok, "detail": result.detail} if result else None
        if published.get(name) != expected and name not in lacking:
            yield f"{GATES}: gate {name} is not what the files of the release give"
    words = sorted(name for name in published.keys() - again.keys() if published[name]["ok"])
    if words:
        findings.skipped["details"] = f"details of the gates {', '.join(map(escaped, words))}: the words of the maker"


def attestations(release: Release) -> Findings:
    """Checks that the statements about evaluations and gates match the tables."""
    folder, nodes = release.root, release.info.nodes
    has_data = (folder / "dataset").is_dir()
    expected = statements_of.evaluations(release) if has_data else {}
    results = {name: gate["ok"] for name, gate in read_json(folder / GATES).items()}
    expected[GATES_STATED] = statements_of.gates(release, results)
    present = {
        path.relative_to(folder).as_posix() for path in (folder / statements_of.FOLDER).rglob("*") if path.is_file()
    }
    problems = [f"{path} is about nothing in the release" for path in sorted(present - expected.keys()) if has_data]
    evaluated = {
        statements_of.evaluation_path(node.partition("-")[2]) for node in nodes if node.startswith("evaluate-")
    }
    problems += [f"{path} is missing" for path in sorted((expected.keys() | evaluated) - present)]
    common = sorted(present & expected.keys())
    problems += [f"{path} is not what the tables give" for path in common if read_json(folder / path) != expected[path]]
    return Findings(problems)


def standard_documents(release: Release) -> Findings:
    """Checks that each document is, byte for byte, what the files of a whole release give."""
    folder, facts = release.root, read_facts(release)
    findings = Findings(summary=f"{len(DOCUMENTS)} documents follow from the release")
    listed = [(package.name, package.version) for package in facts.packages]
    if listed != standard_facts.package_versions(release):
        findings.problems.append(f"{RECORDED} does not list the packages of the statements")
    present = {path.relative_to(folder).as_posix() for path in (folder / STANDARDS).rglob("*") if path.is_file()}
    findings.problems += [f"{path} is no document of the bundle" for path in sorted(present - {*DOCUMENTS, RECORDED})]
    for path, make in DOCUMENTS.items():
        if not (folder / path).is_file():
            findings.problems.append(f"{path} is missing")
        elif (folder / path).read_bytes() != make(facts):
            findings.problems.append(f"{path} is not what the release gives")
    return findings


def valid_standards(release: Release) -> Findings:
    """Checks that the tool or the schema of each standard finds no error."""
    try:
        require_file(release.root, STANDARDS)
        problems = validation.problems(release.root)
    except ImportError as error:
        raise Absent(f"not checked, because it needs {error.name or error}; {installing('report')}") from None
    return Findings(problems, summary=f"{len(validation.VALIDATORS)} valid by their standards")
