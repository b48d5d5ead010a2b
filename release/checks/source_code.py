"""Checks that the published code is the code that made the release, and that no file has a secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.core import provenance
from pipeline.core.code_snapshot import roots
from pipeline.core.text import escaped
from release.checks import secret_scan
from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.layout import CODE_README, RECIPE, SUMS
from release.opened_release import Release
from release.standards.attestations import code_files

AS_RUN = "code/as-run/"
"""The folder of the recipe files, which are data."""
NAMED = 10
"""The maximum number of files that a sentence names."""


def source_files(release: Release) -> Findings:
    """Checks that the published source files are those in the statements of the published artifacts, except for stale
    ones. Says which files of the code are not those of this atom: they are to be read before they are run."""
    folder, info = release.root, release.info
    current = {artifact.key for node, artifact in info.nodes.items() if node not in info.stale}
    stated = _stated(release, current)
    findings = Findings(compared=bool(stated))
    for module, digests in sorted(stated.items()):
        stem = folder / "code" / module.replace(".", "/")
        source_file = next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)
        if source_file is None:
            findings.problems.append(f"code: {module}, which the statements name, is not there")
        elif release.digest(source_file) not in digests:
            findings.problems.append(
                f"{source_file.relative_to(folder).as_posix()} is not the file that the statements name"
            )
    if others := _others(folder):
        new, changed = ([name for name, is_new in others.items() if is_new == wanted] for wanted in (True, False))
        parts = [f"{_listed(new)}: not in the atom that is installed here"] if new else []
        parts += [f"{_listed(changed)}: not like this in the atom that is installed here"] if changed else []
        findings.skipped["code"] = f"{'; '.join(parts)}; read these files before you run them"
    if as_run := sorted(path.relative_to(folder).as_posix() for path in (folder / AS_RUN).rglob("*.y*ml")):
        findings.skipped["recipes"] = f"{_listed(as_run)}: not compared with {RECIPE}; read them before you run them"
    return findings


def _listed(names: Sequence[str]) -> str:
    """The first NAMED names, and the number of the others."""
    shown = ", ".join(map(escaped, names[:NAMED]))
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} further files"


def _stated(release: Release, artifacts: set[str]) -> Mapping[str, set[str]]:
    """{module: digests of its file} by the statements about these artifacts."""
    digests_by_module: dict[str, set[str]] = {}
    for body in release.statements.values():
        if {subject["name"] for subject in body["subject"]} & artifacts:
            for module, digest in provenance.code_of(body).items():
                digests_by_module.setdefault(module, set()).add(digest)
    return digests_by_module


def _others(release: Path) -> dict[str, bool]:
    """Returns the files of the published code that the installed atom lacks, or has with other bytes.

    Returns:
        For each file, True if the installed atom has none of its name.
    """
    others = {}
    for path in code_files(release):
        name = path.relative_to(release).as_posix()
        installed = [root / name.removeprefix("code/") for root in roots()]
        is_data = name.startswith(AS_RUN) or name == CODE_README
        if not is_data and not any(file.is_file() and file.read_bytes() == path.read_bytes() for file in installed):
            others[name] = not any(file.is_file() for file in installed)
    return others


def no_secrets(build: BuildContext) -> Findings:
    """Checks that no file contains a token, a private key, or a path of this machine. What a model wrote may have the
    form of a key: it is stated."""
    paths = [path for path in build.release.files if Path(path).name != SUMS]
    scan = secret_scan.scan(build.release.root, paths, build.machine)
    summary = "; ".join([f"{len(paths)} files searched", *(f"by a model: {text}" for text in scan.invented)])
    return Findings(scan.secrets, summary=summary)
