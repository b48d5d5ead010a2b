"""Scans for access tokens, private keys and paths of this machine, which must never be published."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.environment import COMMON_PATHS
from release.facts.published_tables import TEXT_BATCH
from release.hub.local.server import LOCAL_TOKEN
from stages.data.curate.secret_patterns import PATTERNS, Pattern

SECRET_VARIABLES = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
TEXT_COLUMNS = frozenset({"text", "prompt", "output", "match"})
BY_MODELS = ("dataset/rl/", "dataset/evaluation/")
"""Folders whose tables hold what models wrote."""


def machine_patterns(paths: list[Path]) -> dict[str, Pattern]:
    """Patterns that identify this machine: its host name, the user's home, and the folders of the run.

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
    """The secrets in the environment of this process. The token of the local Hub is in the code of atom: it is not a
    secret."""
    values = {name: os.environ.get(name, "") for name in SECRET_VARIABLES}
    secret = {name: value for name, value in values.items() if len(value) >= 8 and value != LOCAL_TOKEN}
    return {
        f"the value of {name}": Pattern(re.escape(value.encode()), value.encode()) for name, value in secret.items()
    }


@dataclass
class Scan:
    """What a search found.

    Attributes:
        secrets: `file holds finding` for each secret or name of the machine.
        invented: The same for keys in what models wrote: no document and no task has one, so the model made it up.
    """

    secrets: list[str]
    invented: list[str]


def scan(folder: Path, paths: list[str], machine: list[Path]) -> Scan:
    """Searches files of a release. Weights are skipped; Parquet is read column by column.

    Document text is searched for secrets but not for names of the machine, because a manual may contain a common home.
    """
    values = secret_values()
    everything = {**PATTERNS, **values, **machine_patterns(machine)}
    secrets, invented = set[str](), set[str]()
    for name in paths:
        by_model = name.startswith(BY_MODELS) and name.endswith(".parquet")
        for kind, data in _contents(folder / name):
            patterns = {**PATTERNS, **values} if kind == "document" else everything
            for finding, pattern in patterns.items():
                if pattern.is_in(data):
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
                joined = "\0".join(value for value in column.to_pylist() if value)
                yield ("document" if name in TEXT_COLUMNS else "file"), joined.encode()
