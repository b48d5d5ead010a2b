"""Reader `packages`: the documentation or the source code in Debian packages and source distributions of PyPI."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Literal

from pipeline.core.bounds import LongLine
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import operational
from stages.data.acquire.licenses.expressions import LicenseMap, load_map
from stages.data.acquire.packages import python_metadata, stated_licenses
from stages.data.acquire.packages.archives import ArchiveError, Member, gunzip, members
from stages.data.acquire.packages.fetch import LockedPackage, read_lock
from stages.data.acquire.packages.stated_licenses import License
from stages.data.acquire.packages.texts import Content, NotText, content_of, decoded, plain_text, spdx_tag
from stages.data.acquire.readers.base import Document, Failed, FileReader, Files, Notice, Read, Unmapped, Unreadable
from stages.formats.file_digests import file_digests
from stages.formats.seeds import seed_of

# The license of a file of a package, by its path.
LicenseOf = Callable[[str], License]
SPDX = LicenseMap({})


class Packages(FileReader):
    """Text files of the packages that a lock file pins; `path` is the folder with their .deb and .tar.gz files.

    The license of a document is the one that the file states of itself by an SPDX tag, or else the one that the
    package's copyright file (DEP-5) or metadata (PEP 639) gives it.
    """

    suffixes: ClassVar = (".deb", ".tar.gz")
    remedy: ClassVar = "fetch them by `python -m stages.data.acquire.packages.fetch locked LOCK FOLDER`"

    reader: Literal["packages"]
    """selects this reader"""
    lock: LongLine = operational(...)
    """lock file of the packages: name, version, SHA-256, size and origin of each"""
    content: Content
    """files to read: documentation without its markup, or source code, by suffix"""
    _share: float = 1.0

    @property
    def names_files(self) -> bool:
        return True

    @property
    def work(self) -> str:
        """The source package without its version, such as attrs of pool/main/p/python-attrs/ and attrs-25.1.tar.gz."""
        return r"/(?:python-)?([^/]+?)(?:-\d[^/]*)?(?:/[^/]+\.deb|\.tar\.gz):"

    @property
    def gives_licenses(self) -> bool:
        return True

    @property
    def seconds_per_mb(self) -> float:
        """Measured on the data recipe `packages`: most of it is text out of HTML, and decompression."""
        return {"documentation": 1.1, "code": 0.2}[self.content]

    def missing(self, source: str) -> str | None:
        names = [package.file for package in self._packages() if not Path(self.path, package.file).is_file()]
        if not names:
            return None
        others = f" and {len(names) - 1} others of {self.lock}" if len(names) > 1 else ""
        return f"source {source}: no package {names[0]}{others} at {self.path}"

    def files(self, source: str) -> Files:
        """Returns the files of the lock file: others in the folder are not read."""
        if missing := self.missing(source):
            raise RecipeError(f"{missing}; {self.remedy}, or check reader.path")
        return [(package.file, Path(self.path, package.file)) for package in self._packages()]

    def digests(self, source: str, files: Files) -> list[str]:
        """Returns the digests of the lock file, with which `pull` compares the files."""
        locked = {package.file: package.sha256 for package in self._packages()}
        return [locked[name] for name, _ in files]

    def pull(self, source: str, files: Files) -> None:
        """Raises AtomError if a file is not the one that is locked."""
        pinned = self.digests(source, files)
        for (_, path), digest, expected in zip(files, file_digests([path for _, path in files]), pinned, strict=True):
            if digest != expected:
                raise AtomError(f"source {source}: {path} is not the file that {self.lock} pins; fetch it again")

    def absolute(self, folder: Path) -> Packages:
        return self.model_copy(
            update={name: str((folder / getattr(self, name)).resolve()) for name in ("path", "lock")}
        )

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Read]:
        """Yields the text files of each package, in the order of its archive.

        A file whose license has no SPDX expression is unmapped, and one that is no text is skipped. A package that is
        corrupt has failed, after what could be read.
        """
        locked = {package.file: package for package in self._packages()}
        for name, path in files:
            yield from self._documents_of(locked[name], path)

    def thinned(self, share: float) -> Packages:
        """Returns the reader of a share of the text files, by a hash of their names."""
        reader = self.model_copy()
        reader._share = share
        return reader

    @property
    def has_notices(self) -> bool:
        return True

    def notices(self, files: Files) -> Iterator[Notice]:
        """Yields the copyright file of each Debian package, the license files and NOTICEs of each source distribution.

        Of a corrupt package only those before the damage are found; `documents` reports the damage.
        """
        for name, path in files:
            is_debian = path.name.endswith(".deb")
            wanted = stated_licenses.is_copyright_file if is_debian else python_metadata.is_notice
            # `documents` reports the damage.
            with suppress(ArchiveError):
                for member in members(path, wanted):
                    if member.content is not None:
                        yield Notice(name, member.path, _characters(member))

    def _packages(self) -> tuple[LockedPackage, ...]:
        return read_lock(Path(self.lock)).packages

    def _documents_of(self, package: LockedPackage, path: Path) -> Iterator[Read]:
        is_debian = path.name.endswith(".deb")
        paths = set[str]()

        def is_wanted(path: str) -> bool:
            if content_of(path.removesuffix(".gz")) != self.content:
                return False
            return self._share >= 1 or seed_of(f"{package.file}/{path}", 0) < self._share * 2**64

        try:
            license_of = _debian_licenses(path) if is_debian else _python_licenses(path)
            # Names must be unique, and an archive may hold a path twice.
            for number, member in enumerate(members(path, is_wanted)):
                if member.path in paths:
                    yield Failed(f"{package.file}#{number}", f"the package has {member.path} twice")
                    continue
                paths.add(member.path)
                if (document := _document(package, member, license_of)) is not None:
                    yield document
        except ArchiveError as error:
            yield Failed(package.file, str(error))


def _document(package: LockedPackage, member: Member, license_of: LicenseOf) -> Read | None:
    """Returns a file of a package as a document; None if it has no text.

    Its license and its kind are those of its path without .gz, which the file in the source does not have.
    """
    name, path = f"{package.file}/{member.path}", member.path.removesuffix(".gz")
    if member.content is None:
        return Failed(name, member.problem)
    try:
        source_text = decoded(member.path, member.content)
    except NotText as error:
        return Unreadable(f"{name} ({error})")
    except ArchiveError as error:
        return Failed(name, str(error))
    text = plain_text(path, source_text)
    if not text.strip():
        return None
    # A tag in the file itself goes before what the package says of it.
    license = license_of(path)
    if (tag := spdx_tag(source_text)) is not None:
        license = License(tag, SPDX.expression(tag))
    if license.expression is None:
        return Unmapped(name, text, license.name)
    return Document(name, text, f"{package.origin}:{member.path}", license=license.expression, license_found="file")


def _debian_licenses(path: Path) -> LicenseOf:
    """Returns the licenses of a Debian package, by its own copyright file."""
    names = load_map("dep5")
    for member in members(path, stated_licenses.is_copyright_file):
        if member.content is not None:
            copyright = stated_licenses.parse(_characters(member), names)
            if copyright:
                return copyright.license_of
            return lambda _: License(f"{member.path} is not machine-readable", None)
    return lambda _: License("the package has no copyright file of its own", None)


def _python_licenses(path: Path) -> LicenseOf:
    """Returns the licenses of a source distribution, by its PKG-INFO and the places of its license files."""
    files = (
        (m.path.partition("/")[2], _characters(m)) for m in members(path, python_metadata.is_metadata) if m.content
    )
    metadata = python_metadata.parse(files, load_map("pep639"))
    return lambda path: metadata.license_of(path.partition("/")[2])


def _characters(member: Member) -> str:
    content = member.content or b""
    return (gunzip(content) if member.path.endswith(".gz") else content).decode(errors="replace")
