"""Checks that the published code is the code that made the release."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.core import provenance
from pipeline.core.code_snapshot import roots
from release import schema
from release.assembly.attest import code_files
from release.assembly.published_tables import read_json
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import CODE_README

AS_RUN = "code/as-run/"
"""The folder of the recipe files, which are data."""


def source_files(subject: Subject) -> Findings:
    """Checks that the published source files are those in the statements of the published artifacts, except for stale
    ones. Says which files of the code are not those of this atom: they are to be read before they are run."""
    folder = subject.folder
    release = schema.read_release(folder)
    current = {artifact.key for node, artifact in release.nodes.items() if node not in release.stale}
    stated = _stated(folder, current)
    findings = Findings(compared=bool(stated))
    for module, digests in sorted(stated.items()):
        stem = folder / "code" / module.replace(".", "/")
        source_file = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)
        if source_file is None:
            findings.problems.append(f"code: {module}, which the statements name, is not there")
        elif subject.digest(source_file) not in digests:
            findings.problems.append(
                f"{source_file.relative_to(folder).as_posix()} is not the file that the statements name"
            )
    if others := _others(folder):
        findings.skipped["code"] = (
            f"{others[0]} and {len(others) - 1} further files of the code are not, or not like this, in the atom that "
            "is installed here; read them before you run them"
        )
    return findings


def _stated(folder: Path, artifacts: set[str]) -> Mapping[str, set[str]]:
    """{module: digests of its file} by the statements about these artifacts."""
    digests_by_module: dict[str, set[str]] = {}
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = read_json(path)
        if {subject["name"] for subject in body["subject"]} & artifacts:
            for module, digest in provenance.code_of(body).items():
                digests_by_module.setdefault(module, set()).add(digest)
    return digests_by_module


def _others(release: Path) -> list[str]:
    """The files of the published code that the installed atom does not have, or has with other bytes."""
    names = [path.relative_to(release).as_posix() for path in code_files(release)]
    return [
        name
        for name in names
        if not name.startswith(AS_RUN)
        and name != CODE_README
        and not any(_same(release / name, root / name.removeprefix("code/")) for root in roots())
    ]


def _same(published: Path, own: Path) -> bool:
    return own.is_file() and own.read_bytes() == published.read_bytes()
