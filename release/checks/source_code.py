"""Checks that the published code is the code that made the release, and that no file has a secret."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import provenance
from pipeline.core.environment import COMMON_PATHS
from pipeline.core.source_code import roots
from pipeline.core.text import escaped
from release.checks.check import BuildContext, Findings
from release.facts.published_tables import TEXT_BATCH
from release.hub.local.server import LOCAL_TOKEN
from release.layout import CODE_README, RECIPE, SUMS
from release.opened_release import Release
from release.standards.attestations import code_files
from stages.data.curate.secret_patterns import PATTERNS, Pattern

AS_RUN = "code/as-run/"
"""The folder of the recipe files, which are data."""
NAMED = 10
"""The maximum number of files that a sentence names."""


def source_files(release: Release) -> Findings:
    """Checks that the published source files are those in the statements of the published artifacts.

    Stale artifacts are left out. The findings also name the files of the code that the atom installed here does not
    have in this form, since they are to be read before they are run.
    """
    folder, info = release.root, release.info
    current = {artifact.key for node, artifact in info.nodes.items() if node not in info.stale}
    stated = _stated(release, current)
    findings = Findings(compared=bool(stated))
    for module, digests in sorted(stated.items()):
        stem = folder / "code" / module.replace(".", "/")
        places = (stem.with_suffix(".py"), stem / "__init__.py", folder / "code" / module)
        # A name with a slash is the path of a template or a table.
        source_file = next((p for p in places if p.is_file()), None)
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
    """Returns the first NAMED names, and the number of the others."""
    shown = ", ".join(map(escaped, names[:NAMED]))
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} further files"


def _stated(release: Release, artifacts: set[str]) -> Mapping[str, set[str]]:
    """Returns {module: digests of its file} by the statements about these artifacts."""
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
    """Checks that no file contains a token, a private key, or a path of this machine.

    What a model wrote may have the form of a key: it is stated.
    """
    # Checksum files hold digests and paths, and no text of anybody.
    paths = [path for path in build.release.files if Path(path).name != SUMS]
    scan = scan_files(build.release.root, paths, build.machine)
    summary = "; ".join([f"{len(paths)} files searched", *(f"by a model: {text}" for text in scan.invented)])
    return Findings(scan.secrets, summary=summary)


SECRET_VARIABLES = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
TEXT_COLUMNS = frozenset({"text", "prompt", "output", "match"})
BY_MODELS = ("dataset/rl/", "dataset/evaluation/")
"""Folders whose tables hold what models wrote."""


def machine_patterns(paths: list[Path]) -> dict[str, Pattern]:
    """Returns patterns that identify this machine: its host name, the user's home, and the folders of the run.

    A host name that is a common word or very short would match everywhere and is left out.
    """
    patterns = {}
    host = socket.gethostname()
    if len(host) >= 6 and host not in ("localhost", "debian", "ubuntu"):
        name = host.encode()
        patterns["the host name"] = Pattern(rb"(?<![A-Za-z0-9])" + re.escape(name) + rb"(?![A-Za-z0-9])", name)
    for path in [Path.home(), *paths]:
        if str(path) not in COMMON_PATHS:
            # Only as the start of a longer path: a URL that contains it, or the bare name of a common home, reveals
            # nothing.
            start = str(path).encode()
            expression = rb"(?<![A-Za-z0-9.\-/])" + re.escape(start) + rb"/\w"
            patterns[f"the machine's path {path}"] = Pattern(expression, start)
    return patterns


def secret_values() -> dict[str, Pattern]:
    """Returns the secrets in the environment of this process.

    The token of the local Hub is in the code of atom: it is not a secret.
    """
    values = {name: os.environ.get(name, "") for name in SECRET_VARIABLES}
    secret = {name: value for name, value in values.items() if len(value) >= 8 and value != LOCAL_TOKEN}
    return {
        f"the value of {name}": Pattern(re.escape(value.encode()), value.encode()) for name, value in secret.items()
    }


@dataclass
class Scan:
    """The result of a search.

    Attributes:
        secrets: `file holds finding` for each secret or name of the machine.
        invented: The same for keys in what models wrote: no document and no task has one, so the model made it up.
    """

    secrets: list[str]
    invented: list[str]


def scan_files(folder: Path, paths: list[str], machine: list[Path]) -> Scan:
    """Searches files of a release. Weights are skipped; Parquet is read column by column.

    Document text is searched for secrets but not for names of the machine, because a manual may contain a common home.
    """
    values = secret_values()
    # Texts of documents are searched with fewer patterns: a manual may contain a common home.
    everything = {**PATTERNS, **values, **machine_patterns(machine)}
    secrets, invented = set[str](), set[str]()
    for name in paths:
        by_model = name.startswith(BY_MODELS) and name.endswith(".parquet")
        for kind, data in _contents(folder / name):
            patterns = {**PATTERNS, **values} if kind == "document" else everything
            for finding, pattern in patterns.items():
                if pattern.is_in(data):
                    # A model may write what has the form of a key, but it cannot know this machine's secrets.
                    (invented if by_model and finding in PATTERNS else secrets).add(f"{name} holds {finding}")
    return Scan(sorted(secrets), sorted(invented))


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix in (".gguf", ".safetensors"):
        return
    if path.suffix != ".parquet":
        yield "file", path.read_bytes()
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=TEXT_BATCH):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                # A NUL stands between the values, so that no secret is found across two of them.
                joined = "\0".join(value for value in column.to_pylist() if value)
                yield ("document" if name in TEXT_COLUMNS else "file"), joined.encode()
