"""In-toto statements with the predicate test-result for evaluations and gates.

Each is in evidence/attestations/: `evaluation-<model>.json` about an exported model by the digest of its artifact,
`gates.json` about all artifacts of the release. Specification: github.com/in-toto/attestation, spec/predicates/
test-result.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.provenance import STATEMENT
from release.assembly.published_tables import read_rows
from release.schema import NodeArtifact

PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
FOLDER = "evidence/attestations"


def test_result(
    subjects: dict[str, str], configuration: dict[str, str], passed: Iterable[str], failed: Iterable[str]
) -> dict[str, Any]:
    """subjects, configuration: {name: SHA-256}; passed, failed: names of tests. One failed test fails the result."""
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


def evaluations(release: Path, nodes: Mapping[str, NodeArtifact]) -> dict[str, dict[str, Any]]:
    """{path in the release: statement} for each model that was asked problems: which it solved."""
    statements = {}
    for node, artifact in nodes.items():
        kind, _, model = node.partition("-")
        table = release / "dataset/evaluation" / model / "items.parquet"
        if kind != "export" or not re.fullmatch(r"[a-z0-9-]+", model) or not table.is_file():
            continue
        rows = read_rows(table, ["id", "score"])
        inputs = {nodes[name].key: nodes[name].digest for name in ("items", f"evaluate-{model}")}
        solved = {row["id"] for row in rows if row["score"] == 1}
        path = f"{FOLDER}/evaluation-{model}.json"
        missed = {row["id"] for row in rows} - solved
        statements[path] = test_result({artifact.key: artifact.digest}, inputs, solved, missed)
    return statements


def gates(nodes: Mapping[str, NodeArtifact], results: dict[str, bool]) -> dict[str, Any]:
    """The statement of the gates. results: {gate: whether it was passed}, without those that the recipe waives."""
    subjects = {artifact.key: artifact.digest for artifact in nodes.values()}
    passed = {name for name, ok in results.items() if ok}
    return test_result(subjects, {}, passed, set(results) - passed)
