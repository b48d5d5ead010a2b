"""packages.json: the installed packages of every environment of a release, with licenses and hashes.

The names and versions are those of the published statements. License and hashes are looked up when the release is
built: in the metadata of the package, if that version is installed, and in the lock files of the checkout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from release.facts.published_tables import read_json
from release.opened_release import Release
from stages.data.licenses.maps import load_map
from stages.data.packages.python_metadata import parse

PACKAGES = "packages.json"
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
ENTRY = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;\\]+)")
MOST_STATED = 200
"""Characters of a license in a package's own words."""


@dataclass(frozen=True)
class Package:
    """A package of Python. license: an SPDX expression, None if none is known; stated: the license in the package's own
    words, where they are no expression. hashes: SHA-256 of the files that the lock allows for this version."""

    name: str
    version: str
    license: str | None
    stated: str
    hashes: list[str]


def versions(release: Release) -> list[tuple[str, str]]:
    """Returns (name, version) of the packages in a release's statements and in the environment of its build."""
    environments: list[Mapping[str, Any]] = [read_json(release.root / "evidence/environment.json")]
    environments += [provenance.environment_of(body) for body in release.statements.values()]
    return sorted({(str(n), str(v)) for each in environments for n, v in each.get("packages", {}).items()})


def describe(pairs: list[tuple[str, str]], roots: list[Path]) -> list[dict[str, Any]]:
    """The content of packages.json. roots: checkouts, whose `requirements/*.lock` are read."""
    hashes = locked(roots)
    return [asdict(_package(name, version, hashes.get((normalized(name), version), []))) for name, version in pairs]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(roots: list[Path]) -> dict[tuple[str, str], list[str]]:
    """{(normalized name, version): SHA-256 of its files} of all lock files."""
    hashes: dict[tuple[str, str], set[str]] = {}
    for path in sorted(path for root in roots for path in root.glob("requirements/*.lock")):
        for entry in re.split(r"\n(?=\S)", path.read_text()):
            if match := ENTRY.match(entry):
                hashes.setdefault((normalized(match[1]), match[2]), set()).update(HASH.findall(entry))
    return {pin: sorted(digests) for pin, digests in hashes.items()}


def _package(name: str, version: str, hashes: list[str]) -> Package:
    license, stated = None, ""
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        distribution = None
    if distribution is not None and distribution.version == version:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        declared = parse([("PKG-INFO", text)], load_map("pep639")).license
        license = declared.expression
        stated = "" if license else " ".join(declared.name.split())[:MOST_STATED]
    return Package(name, version, license, stated, hashes)
