"""Fills a folder with packages, and writes the lock file that pins them.

    python -m stages.data.acquire.packages.fetch debian NAMES.txt FOLDER LOCK.yaml
    python -m stages.data.acquire.packages.fetch pypi NAMES.txt FOLDER LOCK.yaml
    python -m stages.data.acquire.packages.fetch locked LOCK.yaml FOLDER

NAMES.txt has a name, or a name and a version (`git-doc=1:2.47.3-0+deb13u1`, `attrs==26.1.0`), in each line. `locked`
fetches what a lock file pins. This is the only command of the data plane that uses the network, through `apt-get
download` and `pip download` as they are configured on this machine: they choose the mirror, and check signatures and
digests. To learn the metadata of a source distribution, pip runs the build backend of that package: fetch only what you
would install. A package that is in the folder already is not fetched again. The lock file is written at the end, when
all packages are there.

Debian's mirrors keep only the newest version of a suite. Older ones are in its snapshot archive, and any copy of a file
will do: the lock file pins its digest.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.core.bounds import Line, LongLine, Range, Words
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file

# Of a lock file; a corpus of more has several sources.
MAX_PACKAGES = 1000


class LockedPackage(Config):
    """A package of a lock file."""

    file: Annotated[str, Words(255, "file name of a .deb or .tar.gz", r"[A-Za-z0-9][\w.+~%:-]*(\.deb|\.tar\.gz)")]
    """name of the file"""
    name: Line
    """name of the package"""
    version: Line
    """version of the package"""
    sha256: Annotated[str, Words(64, "SHA-256 of 64 hex digits", r"[0-9a-f]{64}")]
    """digest of the file"""
    bytes: Annotated[int, Range(1, 2**40)]
    """size of the file"""
    origin: LongLine
    """path of the file in the archive or index that published it"""


class Lock(Config):
    """A lock file."""

    packages: tuple[LockedPackage, ...] = Field(min_length=1, max_length=MAX_PACKAGES)
    """packages, by file"""

    @model_validator(mode="after")
    def _check_order(self) -> Lock:
        names = [package.file for package in self.packages]
        for first, second in pairwise(names):
            if first >= second:
                raise ValueError(f"packages must be sorted by file, each once; {second} comes after {first}")
        return self


def read_lock(path: Path) -> Lock:
    """Reads a lock file. Raises RecipeError in one sentence if it is missing, or no lock file."""
    title = f"lock file {escaped(str(path), 200)}"
    if not path.is_file():
        raise RecipeError(f"there is no {title}; write one by `python -m stages.data.acquire.packages.fetch`")
    try:
        return Lock.model_validate(parse_yaml(read_file(path, title), title))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "packages"
        raise RecipeError(f"{title}: {where}: {first['msg'].removeprefix('Value error, ')}") from None


def write_lock(path: Path, packages: list[LockedPackage], about: str) -> None:
    """Writes one line for each package; `about` are the lines of a comment at the top."""
    rows = [package.model_dump() for package in sorted(packages, key=lambda package: package.file)]
    lines = [yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=10**6).strip() for row in rows]
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    path.write_text(f"{comment}packages:\n" + "".join(f"  - {line}\n" for line in lines), encoding="utf-8")


ABOUT = """Written by `python -m stages.data.acquire.packages.fetch {kind}` from what {client} fetched; `origin` is the
path in {archive}. The digests are in the key of a source: a changed line is another corpus."""
CLIENTS = {
    "debian": {"client": "apt-get", "archive": "Debian's archive"},
    "pypi": {"client": "pip", "archive": "the file store of PyPI"},
}


def debian_packages(names: Sequence[str], folder: Path) -> list[LockedPackage]:
    """Fetches packages by apt-get, which checks them against the signed index of the archive."""
    with tempfile.TemporaryDirectory() as empty:  # files that are there already are not printed
        output = _run(["apt-get", "download", "--print-uris", "-q", *names], Path(empty))
    # The printed list holds the digests of the signed index, before anything is fetched.
    rows = re.findall(r"^'(\S+/pool/\S+)' (\S+\.deb) (\d+) SHA256:([0-9a-f]{64})$", output, re.MULTILINE)
    if len(rows) != len(set(names)):
        raise AtomError(f"apt-get knows {len(rows)} of {len(set(names))} packages in an archive; run apt-get update")
    packages = []
    for uri, file, size, sha256 in rows:
        name, version = map(unquote, file.split("_")[:2])
        pool = unquote(urlsplit(uri).path).partition("/pool/")[2]
        package = LockedPackage(
            file=file, name=name, version=version, sha256=sha256, bytes=int(size), origin=f"pool/{pool}"
        )
        packages.append(package)
    _download(packages, folder)
    return packages


def _download(packages: Sequence[LockedPackage], folder: Path) -> None:
    """Fetches the Debian packages that the folder lacks."""
    absent = [f"{package.name}={package.version}" for package in packages if not (folder / package.file).is_file()]
    if absent:
        _run(["apt-get", "download", "-q", *absent], folder)


def python_package(requirement: str, folder: Path) -> LockedPackage:
    """Fetches a source distribution by pip, which has checked it against the digest of the index."""
    name, _, version = requirement.partition("==")
    for path in sorted(folder.glob("*.tar.gz")):
        present = _locked_distribution(path)
        if _normalized(present.name) == _normalized(name) and version in ("", present.version):
            return present
    # pip does not say which file it wrote, so each requirement gets a folder of its own.
    drop = folder / f".{name}"
    drop.mkdir(exist_ok=True)
    # Source distributions only: a wheel may hold binaries and lack the sources' licenses.
    command = ["download", "-q", "--no-deps", "--no-binary", name, "-d", drop.name, requirement]
    _run([sys.executable, "-P", "-m", "pip", *command], folder)
    files = sorted(drop.iterdir())
    if len(files) != 1 or not files[0].name.endswith(".tar.gz"):
        raise AtomError(f"pip fetched {', '.join(file.name for file in files) or 'nothing'} for {name}, and no .tar.gz")
    path = files[0].rename(folder / files[0].name)
    drop.rmdir()
    return _locked_distribution(path)


def _locked_distribution(path: Path) -> LockedPackage:
    """Returns the entry of a source distribution.

    Its path in PyPI's file store is the BLAKE2b-256 digest of the file.
    """
    name, _, version = path.name.removesuffix(".tar.gz").rpartition("-")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return LockedPackage(
        file=path.name,
        name=name,
        version=version,
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        origin=f"packages/{digest[:2]}/{digest[2:4]}/{digest[4:]}/{path.name}",
    )


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fetch_locked(lock: Path, folder: Path) -> None:
    """Fetches the packages of a lock file."""
    packages = read_lock(lock).packages
    _download([package for package in packages if package.file.endswith(".deb")], folder)
    for package in packages:
        if not package.file.endswith(".deb") and not (folder / package.file).is_file():
            python_package(f"{package.name}=={package.version}", folder)


def require_digests(packages: Sequence[LockedPackage], folder: Path) -> None:
    """Raises AtomError if a file of the folder is not the one that is locked."""
    for package in packages:
        path = folder / package.file
        if not path.is_file():
            raise AtomError(f"the client fetched no {path}; look for another name of the file there")
        if sha256_file(path) != package.sha256:
            raise AtomError(f"{path} has another SHA-256 than {package.sha256}; remove it, and fetch it again")


def _run(command: list[str], folder: Path) -> str:
    """Returns the output of a client. Raises AtomError with its last line if it fails."""
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AtomError(f"there is no {command[0]} on this machine; fetch Debian packages where there is one") from None
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no message"]
        raise AtomError(f"{' '.join(command)} failed: {escaped(lines[-1], 300)}")
    return process.stdout


def fetch(kind: str, listed: Path, folder: Path, lock: Path) -> int:
    """Fetches what is listed, and writes the lock file at the end. Returns the number of packages."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "locked":
        fetch_locked(listed, folder)
        packages = list(read_lock(listed).packages)
    else:
        names = listed.read_text(encoding="utf-8").split()
        packages = debian_packages(names, folder) if kind == "debian" else [python_package(n, folder) for n in names]
    require_digests(packages, folder)
    if kind != "locked":
        write_lock(lock, packages, ABOUT.format(kind=kind, **CLIENTS[kind]))
    return len(packages)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.data.acquire.packages.fetch", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in (*CLIENTS, "locked"):
        command = kinds.add_parser(kind)
        command.add_argument("listed", type=Path, help="lock file" if kind == "locked" else "file of names")
        command.add_argument("folder", type=Path, help="folder of the packages")
        if kind != "locked":
            command.add_argument("lock", type=Path, help="lock file to write")
    options = parser.parse_args(arguments)
    try:
        count = fetch(options.kind, options.listed, options.folder, getattr(options, "lock", options.listed))
    except (AtomError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder} has all {count} packages of {options.listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
