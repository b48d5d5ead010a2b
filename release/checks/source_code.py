"""Checks that the published code is the code that made the release."""

from __future__ import annotations

from pipeline.core import provenance
from pipeline.core.store import sha256_file
from release import schema
from release.assembly.published_tables import read_json
from release.checks.check import Subject
from release.checks.findings import Findings


def source_files(subject: Subject) -> Findings:
    """Checks that the published source files are those in the statements of the published artifacts, except for stale
    ones."""
    folder = subject.folder
    release = schema.read_release(folder)
    current = {artifact.key for node, artifact in release.nodes.items() if node not in release.stale}
    digests_by_module: dict[str, set[str]] = {}
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = read_json(path)
        if not {subject["name"] for subject in body["subject"]} & current:
            continue
        for item in provenance.dependencies_of(body):
            if item.get("uri", "").startswith("atom:code/"):
                digests_by_module.setdefault(item["name"], set()).add(item["digest"]["sha256"])
    problems = []
    for module, digests in sorted(digests_by_module.items()):
        stem = folder / "code" / module.replace(".", "/")
        source_file = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)
        if source_file is None:
            problems.append(f"code: {module}, which the statements name, is not there")
        elif sha256_file(source_file) not in digests:
            problems.append(f"{source_file.relative_to(folder).as_posix()} is not the file that the statements name")
    return Findings(problems)
