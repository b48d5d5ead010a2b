"""The license of each file of a source distribution (PEP 639), by its PKG-INFO.

`License-Expression` is about the distribution as a whole; without one, a classifier or the field `License` may name a
license. A folder with a license file of its own, whose text is none of the distribution's, holds files of others: their
license is unknown here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import PurePosixPath

from pipeline.core.store import sha256_bytes
from stages.data.acquire.licenses.expressions import LicenseMap
from stages.data.acquire.licenses.free_text import stated_spdx
from stages.data.acquire.packages.stated_licenses import License
from stages.data.acquire.packages.texts import CODE

LICENSE_FILE = re.compile(r"(licen[cs]e|copying|unlicense)([-._].*)?", re.IGNORECASE)
NOTICE_FILE = re.compile(r"notices?(\.(txt|md|rst))?", re.IGNORECASE)
# Of manuals, which may have a page `license.rst` about their license.
PAGES = (".md", ".rst")
# A folder of nothing but license texts.
TEXTS_FOLDER = re.compile(r"licen[cs]es?", re.IGNORECASE)


def is_metadata(path: str) -> bool:
    """Returns True for the path of PKG-INFO, or of a license file, in a source distribution."""
    names = path.split("/")[1:]
    if names == ["PKG-INFO"]:
        return True
    if not names or not LICENSE_FILE.fullmatch(names[-1]):
        return False
    suffix = PurePosixPath(names[-1]).suffix
    return suffix.lower() not in CODE and not (suffix in PAGES and names[-1].islower())


def is_notice(path: str) -> bool:
    """Returns True for the path of a license file, or of a NOTICE of the Apache license, in a source distribution."""
    name = path.rpartition("/")[2]
    return (is_metadata(path) and name != "PKG-INFO") or bool(NOTICE_FILE.fullmatch(name))


@dataclass(frozen=True)
class Metadata:
    """The licenses of a source distribution.

    Attributes:
        license: The license of the distribution.
        foreign: {folder with files of others: its license file}.
    """

    license: License
    foreign: Mapping[str, str]

    def license_of(self, path: str) -> License:
        """Returns the license of a file by its path in the distribution, without the first folder."""
        for folder in PurePosixPath(path).parents:
            if str(folder) in self.foreign:
                return License(f"its folder has a license file of its own, {self.foreign[str(folder)]}", None)
        return self.license


def parse(files: Iterable[tuple[str, str]], classifiers: LicenseMap) -> Metadata:
    """Reads the metadata of a source distribution.

    Args:
        files: (path without the first folder, text) of PKG-INFO and of the license files, in any order.
        classifiers: The map from trove classifiers to SPDX.
    """
    pkg_info, digests = "", {}
    for path, text in files:
        if path == "PKG-INFO":
            pkg_info = text
        else:
            digests[path] = sha256_bytes(" ".join(text.casefold().split()).encode())
    # Copies of the distribution's own license deeper in the tree do not make a folder foreign.
    of_distribution = {digest for path, digest in digests.items() if "/" not in path or _is_of_texts(path)}
    foreign: dict[str, str] = {}
    for path, digest in sorted(digests.items()):
        if "/" in path and not _is_of_texts(path) and digest not in of_distribution:
            foreign.setdefault(str(PurePosixPath(path).parent), path)
    return Metadata(_license(pkg_info, classifiers), foreign)


def _is_of_texts(path: str) -> bool:
    return bool(TEXTS_FOLDER.fullmatch(PurePosixPath(path).parent.name))


def _license(pkg_info: str, classifiers: LicenseMap) -> License:
    """Returns the license by the field License-Expression.

    Without that field, it is the license by the classifiers or the field License, if they agree.
    """
    fields = HeaderParser().parsestr(pkg_info)
    if expression := fields.get("License-Expression"):
        return License(str(expression), stated_spdx(str(expression)))
    stated = [name for name in map(str, fields.get_all("Classifier") or []) if name.startswith("License ::")]
    # A classifier and the field License may contradict each other; then the license is unknown.
    classified = classifiers.expression(stated) if stated else None
    name = " ".join(str(fields.get("License") or "").split())
    by_name = stated_spdx(name) if len(name) <= 200 else None
    expression = classified if by_name in (None, classified) else by_name if classified is None else None
    return License("; ".join(stated + ([name[:200]] if name else [])), expression)
