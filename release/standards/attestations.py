"""In-toto statements with the predicate test-result for evaluations and gates.

Each is in evidence/attestations/: `evaluation-<model>.json` about an exported model by the digest of its artifact,
`gates.json` about all artifacts of the release, with the code and the settings of the build. Specification:
github.com/in-toto/attestation, spec/predicates/test-result.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.provenance import STATEMENT
from pipeline.core.store import canonical, sha256_bytes
from release.facts.published_tables import read_rows
from release.layout import RECIPE, RELEASE
from release.opened_release import Release

PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
FOLDER = "evidence/attestations"
ENVIRONMENT = "evidence/environment.json"
BUILD_INPUTS = (ENVIRONMENT, RECIPE, RELEASE)
"""Files that the gates' statement names by digest, beside the code: no statement about an artifact covers them."""


def test_result(
    subjects: dict[str, str], configuration: dict[str, str], passed: Iterable[str], failed: Iterable[str]
) -> dict[str, Any]:
    """Returns an in-toto statement with the predicate test-result; one failed test fails the result.

    Args:
        subjects: {name: SHA-256} of the tested files.
        configuration: {name: SHA-256} of the files that configure the tests.
        passed: The names of the passed tests.
        failed: The names of the failed tests.
    """
    passed, failed = sorted(passed), sorted(failed)
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "FAILED" if failed else "PASSED",
            "configuration": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(configuration.items())],
            "passedTests": passed,
            "failedTests": failed,
        },
    }


def evaluations(release: Release) -> dict[str, dict[str, Any]]:
    """Returns {path in the release: statement} for each model that was asked problems: which it solved."""
    statements, nodes = {}, release.info.nodes
    for node, artifact in nodes.items():
        kind, _, model = node.partition("-")
        table = release.dataset / "evaluation" / model / "items.parquet"
        # The name of the model becomes a part of a path.
        if kind != "export" or not re.fullmatch(r"[a-z0-9-]+", model) or not table.is_file():
            continue
        rows = read_rows(table, ["id", "score"])
        inputs = {nodes[name].key: nodes[name].digest for name in ("items", f"evaluate-{model}")}
        solved = {row["id"] for row in rows if row["score"] == 1}
        missed = {row["id"] for row in rows} - solved
        statements[evaluation_path(model)] = test_result({artifact.key: artifact.digest}, inputs, solved, missed)
    return statements


def evaluation_path(model: str) -> str:
    """Returns the path in a release of the statement about the evaluation of a model."""
    return f"{FOLDER}/evaluation-{model}.json"


def gates(release: Release, results: Mapping[str, bool | None]) -> dict[str, Any]:
    """Returns the statement of the gates, with the digests of the code and the settings of the build.

    Args:
        release: The release, or its evidence.
        results: {gate: whether it was passed; None if it had nothing to judge}.
    """
    subjects = {artifact.key: artifact.digest for artifact in release.info.nodes.values()}
    inputs = {path: release.digest(release.root / path) for path in BUILD_INPUTS}
    code = {path.relative_to(release.root).as_posix(): release.digest(path) for path in code_files(release.root)}
    return test_result(
        subjects,
        inputs | {"code": sha256_bytes(canonical(code))},
        [name for name, ok in results.items() if ok],
        [name for name, ok in results.items() if ok is False],
    )


def code_files(release: Path) -> list[Path]:
    """Returns the files of the folder `code/` of a release, in order."""
    return sorted(path for path in (release / "code").rglob("*") if path.is_file())
