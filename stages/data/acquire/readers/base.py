"""The interface of a data reader: its settings, its files, the documents in them, and those that are not used.

A reader is a class in a module of this folder, which is named in READERS. The module is imported when a recipe is
planned, so heavy imports are inside `documents`.

A failed document cannot be read or curated: it is counted, the first ones by name, and many of them are an error. A
refused document is in order, but its author or its license does not allow the use.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pipeline.core.bounds import LongLine, Range
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Report, operational
from stages.data.acquire.licenses.expressions import UNKNOWN_WEB, UNMAPPED
from stages.data.acquire.licenses.notices import Notice as LicenseNotice
from stages.formats.file_digests import file_digests
from stages.formats.table import FailedRow

# The maximum number of files and folders under a source's path; FineWeb-Edu, of 1.3 trillion tokens, has some two
# thousand.
MAX_ENTRIES = 100_000

# The rule of the dispositions of failed documents.
FAILED_RULE = "failed/parse"
MOST = 10
# More failures than MOST, and than MOST_SHARE of the documents of a part, stop the stage.
MOST_SHARE = 0.01
# The failures that a sentence names.
SHOWN = 3
# {kind of refusal: its name in the counts of `source.json`}.
COUNTS = {
    "license": "documents_unmapped",
    "opt_out": "documents_opted_out",
    "page": "documents_unusable",
    "derivatives": "documents_no_derivatives",
    "generation": "documents_not_generated",
}
# Different license strings that are counted in a part; there may be one for each document.
MOST_STRINGS = 1000
# License strings that `source.json` lists, the most frequent ones.
LISTED = 100

Documents = Annotated[int, Range(1, 1e12)]
# Procedural documents.
Drawn = Annotated[int, Range(1, 1e8, "they are drawn in memory")]

# (path relative to the source, path) of every file that a reader reads, sorted.
Files = Sequence[tuple[str, Path]]

# How the license of a document was found: in a field of its row, in a file beside it, on its page, with the document
# that it was made from, in a notice in its text, or not at all. Empty: it is the declaration of the source.
LicenseFound = Literal["field", "file", "page", "parent", "notice", "none", ""]


@dataclass(frozen=True, slots=True)
class Document:
    """A document as a reader yields it.

    Attributes:
        name: Unique in the source.
        text: The text.
        location: The place in the origin, such as a file.
        prompt_chars: Leading characters that carry no loss in training.
        license: The document's SPDX license; None for that of the source.
        url: The address of a web document.
        license_found: The way in which the license was found.
        derived_from: Ids or URLs of the documents that it was made from, for a reader that `states_parents`.
        title: As stated, for a reader that `states_credits`.
        author: As stated, for a reader that `states_credits`.
        stated: The license in the words of the place where it was found; empty if it is the declaration of the source.
    """

    name: str
    text: str
    location: str = ""
    prompt_chars: int = 0
    license: str | None = None
    url: str = ""
    license_found: LicenseFound = ""
    derived_from: tuple[str, ...] = ()
    title: str = ""
    author: str = ""
    stated: str = ""

    def under(self, notice: LicenseNotice | None) -> Document | Unmapped:
        """Returns the document under the license of a notice in its own text, which goes before any other."""
        if notice is None:
            return self
        if notice.license is None:
            return Unmapped(self.name, self.text, notice.stated, "notice")
        return replace(self, license=notice.license, license_found="notice", stated=notice.stated)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file or conversation that is skipped and counted in `source.json`, the first ones by name.

    Where they are most of a part, they stop the stage.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A document that cannot be read, while the reader can go on with the next one.

    Curation removes it with the rule `failed/parse`; many of them stop the stage, because then the settings are wrong.

    Attributes:
        name: Unique in the source, such as the file and the line.
        reason: The reason in a few words.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unmapped:
    """A document whose license has no SPDX expression. Curation removes it with the rule `license/unmapped`.

    Attributes:
        name: Unique in the source.
        text: The text.
        license: The license in the document's own words; empty if it states none.
        license_found: The place where it states the license.
    """

    name: str
    text: str
    license: str
    license_found: LicenseFound = "field"


@dataclass(frozen=True, slots=True)
class Refused:
    """A document that is not used, while its source is in order: many of them do not stop the stage.

    Curation removes it with the rule of its kind (`REFUSED_RULES`).

    Attributes:
        name: Unique in the source.
        kind: `opt_out` of a page whose author does not want it in a training set; `page` without usable text;
            `derivatives` if the license forbids derived texts; `generation` if no usable text was written from it.
        reason: The reason in a few words.
        license: None if it is not known.
    """

    name: str
    kind: Literal["opt_out", "page", "derivatives", "generation"]
    reason: str
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """The text of a license or a notice in a file of a package.

    Attributes:
        package: The file of the package, with which the names of its documents begin, before a slash.
        path: The path in the package.
        text: The text.
    """

    package: str
    path: str
    text: str


# {kind of refusal, with which the reason in the table of failed documents begins: rule of their dispositions}.
REFUSED_RULES = {
    "license": "license/unmapped",
    "opt_out": "opt_out/page",
    "page": "page/unusable",
    "derivatives": "license/no-derivatives",
    "generation": "generation/unusable",
}
# What a reader yields; None for a row that its settings leave out, which is counted and is no document of the source.
Read = Document | Unreadable | Failed | Unmapped | Refused | None


def is_unicode(text: str) -> bool:
    """Returns False for text with lone surrogates, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Reader(Config):
    """Base of the settings of a reader."""

    # What to do where `missing` has a message.
    remedy: ClassVar[str] = "put it there"

    reader: str
    """selects this reader"""

    @property
    def conversations(self) -> bool:
        """True if the documents are turns of conversations, so that the source has the kind chat."""
        return False

    @property
    def names_files(self) -> bool:
        """True if every name states a file and a place in it, so that no two documents have the same."""
        return False

    @property
    def work(self) -> str:
        """The pattern in id and origin whose first group names the work of a document; empty: it is one by itself."""
        return ""

    @property
    def gives_licenses(self) -> bool:
        """True if every document has a license of its own, or the statement that it has none."""
        return False

    @property
    def states_parents(self) -> bool:
        """True if documents state what they were made from, so that an opt-out of one reaches the others."""
        return False

    @property
    def states_credits(self) -> bool:
        """True if documents state their titles or authors."""
        return False

    @property
    def seconds_per_mb(self) -> float:
        """Core seconds to make a MB of text from its files, beside the law of `acquire`; for `atom plan` alone."""
        return 0.0

    def expected_tokens(self, bytes_per_token: float) -> float | None:
        """Returns the expected tokens of the different texts that it draws; None for a reader of files."""
        return None

    @property
    def declared(self) -> dict[str, Any]:
        """Further entries of source.json."""
        return {}

    @property
    def has_notices(self) -> bool:
        """True if documents are files of packages with notices of their own."""
        return False

    def notices(self, files: Files) -> Iterator[Notice]:
        """Yields the notices of the packages that are `files`, in their order."""
        return iter(())

    def missing(self, source: str) -> str | None:
        """Returns the start of an error message if the files of the source are missing.

        None if they exist or none are needed.
        """
        return None

    def files(self, source: str) -> Files:
        """Returns the files to read; their content is in the key of the source.

        Raises RecipeError if they are missing.
        """
        return []

    def digests(self, source: str, files: Files) -> list[str]:
        """Returns the digest of each of these files, as it enters the tree digest of the source.

        It is SHA-256 unless a reader states another one. It may be known before `pull`.
        """
        return file_digests([path for _, path in files])

    def pull(self, source: str, files: Files) -> None:
        """Brings the files of one part to this machine, if they are elsewhere, and compares them with `digests`."""

    def absolute(self, folder: Path) -> Reader:
        """Returns the reader with paths relative to `folder` made absolute."""
        return self

    def locked(self, lock: Path) -> Reader:
        """Returns the reader with the lock file of its data recipe, which may be missing."""
        return self

    def thinned(self, share: float) -> Reader | None:
        """Returns a reader that reads a random share of the documents and skips the others cheaply; None: it cannot."""
        return None

    def inspect(self) -> str | None:
        """Imports what the reader needs, and returns a note on it for `atom validate`.

        Raises:
            RecipeError: The reader cannot run with these settings.
        """
        return None

    @abstractmethod
    def documents(self, source: str, seed: int, files: Files) -> Iterator[Read]:
        """Yields the documents of `files`, in an order that depends only on the files, the settings and the seed.

        A call gets the files of one part of the source, and the documents of a file do not depend on the
        others.

        Raises AtomError naming a file that is corrupt.
        """


class SampledReader(Reader):
    """A reader whose documents can be subsampled."""

    limit: Documents | None = None
    """maximum number of documents, chosen by a seeded hash of the id; null: all"""


class FileReader(SampledReader):
    """A reader of files with certain suffixes; `path` is a file or a folder of such files."""

    suffixes: ClassVar[tuple[str, ...]]

    path: LongLine = operational(...)
    """file or folder; the tree digest, not the path, is part of the key"""

    def missing(self, source: str) -> str | None:
        root = Path(self.path)
        if root.is_file() or any(self._walk(source, root)):
            return None
        return f"source {source}: no {' or '.join(self.suffixes)} file at {root}"

    def files(self, source: str) -> Files:
        root = Path(self.path)
        if root.is_file():
            return [(root.name, root)]
        files = sorted((path.relative_to(root).as_posix(), path) for path in self._walk(source, root))
        if not files:
            raise RecipeError(f"{self.missing(source)}; check reader.path")
        return files

    def absolute(self, folder: Path) -> Reader:
        return self.model_copy(update={"path": str((folder / self.path).resolve())})

    def _walk(self, source: str, root: Path) -> Iterator[Path]:
        """Yields the regular files with the reader's suffixes under a folder.

        Raises RecipeError if it holds more than MAX_ENTRIES entries, as a wrong path such as a root folder
        does.
        """
        count = 0
        for folder, folders, names in os.walk(root):
            count += len(folders) + len(names)
            # Counted while walking: listing / would take minutes before it failed.
            if count > MAX_ENTRIES:
                raise RecipeError(
                    f"source {source}: {root} holds more than {MAX_ENTRIES} files and folders; name the corpus alone"
                )
            yield from (
                path for name in names if name.endswith(self.suffixes) and (path := Path(folder, name)).is_file()
            )


class Failures:
    """The failed documents of a part, or of the parts of a source."""

    def __init__(self, subject: str = "", problem: str = "", most_share: float = MOST_SHARE, kept: int = SHOWN) -> None:
        """Begins without failures.

        Args:
            subject: The beginning of the sentence if there are too many: `subject: 11 of 100 documents`.
            problem: The rest of that sentence.
            most_share: The largest share of failures that is no error.
            kept: The number of failures whose names are kept.
        """
        self.subject, self.problem, self.most_share, self.kept = subject, problem, most_share, kept
        self.count = 0
        self.first: list[tuple[str, str]] = []

    def __str__(self) -> str:
        names = ", ".join(_name(*failure) for failure in self.first[:SHOWN])
        total = f", … ({self.count} in all)" if self.count > SHOWN else ""
        return f"{'document' if self.count == 1 else 'documents'} {names}{total}"

    def add(self, id: str, reason: str = "") -> None:
        self.count += 1
        if len(self.first) < self.kept:
            # Reasons can quote a document; a line of the log must stay one line.
            self.first.append((id, " ".join(reason.split())[:200]))

    def require_few(self, documents: int) -> None:
        """Raises AtomError if so many of the documents of a part failed that the settings must be wrong."""
        if self.count > MOST and self.count > self.most_share * documents:
            raise AtomError(
                f"{self.subject}: {self.count} of {documents} documents {self.problem}; the first is "
                f"{_name(*self.first[0])}"
            )

    def facts(self) -> dict[str, Any]:
        """Returns the number of failures, and the (id, reason) of the first ones."""
        return {"count": self.count, "first": self.first}

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]], kept: int = SHOWN) -> Failures:
        """Returns the failures of all parts."""
        failures = cls(kept=kept)
        for facts in parts:
            failures.count += facts["count"]
            failures.first += [(id, reason) for id, reason in facts["first"][: kept - len(failures.first)]]
        return failures


def _name(id: str, reason: str) -> str:
    return f"{id} ({reason})" if reason else id


def kind_of(document: Unmapped | Refused) -> str:
    return "license" if isinstance(document, Unmapped) else document.kind


def refused_row(source: str, id: str, document: Unmapped | Refused) -> FailedRow:
    """Returns the row of `failed`. Its license is not that of the source, which covers the documents that are used."""
    if isinstance(document, Refused):
        license, reason = document.license or UNKNOWN_WEB, document.reason
    else:
        stated = document.license.encode(errors="replace").decode()[:500]
        license, reason = UNMAPPED, f"no map knows {stated!r}" if stated else "the document states none"
    return {"id": id, "source": source, "license": license, "reason": f"{kind_of(document)}: {reason}"}


def report_refusals(source: str, refusals: Counter[str], licenses: dict[str, Any], report: Report) -> None:
    """Notes the counts of refusals, and the most frequent license strings that no map knows."""
    for kind, count in sorted(refusals.items()):
        report.note(f"source {source}: {count} documents will be removed by curation: {REFUSED_RULES[kind]}")
    for row in licenses.get("licenses_unmapped", [])[:5]:
        stated = f"the license {row['string']!r}, which no map knows" if row["string"] else "no license"
        report.note(f"source {source}: {row['documents']} documents state {stated}")


class LicenseTally:
    """Counts of documents and bytes by license and how it was found, and of the strings that state licenses."""

    def __init__(self) -> None:
        self.documents = Counter[tuple[str, str]]()
        self.bytes = Counter[tuple[str, str]]()
        self.strings = Counter[tuple[str, str]]()

    def add(self, license: str, basis: str, size: int, stated: str = "") -> None:
        self.documents[license, basis] += 1
        self.bytes[license, basis] += size
        key = (license, " ".join(stated.split())[:200])
        # An expression is its own evidence. A free text could differ in every document; memory must not grow with them.
        if basis and stated != license and (key in self.strings or len(self.strings) < MOST_STRINGS):
            self.strings[key] += 1

    def add_unmapped(self, document: Unmapped) -> None:
        basis = document.license_found if document.license else "none"
        self.add(UNMAPPED, basis, len(document.text.encode()), document.license)

    def facts(self) -> dict[str, Any]:
        """Returns the counts as JSON: `licenses`, and the most frequent strings, with and without a license.

        Empty for a source whose license is that of every document.
        """
        # An empty basis means that the declaration of the source is the license.
        if all(basis == "" for _, basis in self.documents):
            return {}
        rows = [
            {"license": license, "found": basis, "documents": count, "bytes": self.bytes[license, basis]}
            for (license, basis), count in sorted(self.documents.items())
        ]
        strings = sorted(self.strings.items(), key=lambda item: (-item[1], item[0]))
        unmapped = [{"string": text, "documents": n} for (license, text), n in strings if license == UNMAPPED]
        stated = [
            {"string": text, "license": license, "documents": n}
            for (license, text), n in strings
            if text and license != UNMAPPED
        ]
        lists = {"licenses_stated": stated[:LISTED], "licenses_unmapped": unmapped[:LISTED]}
        return {"licenses": rows} | {name: listed for name, listed in lists.items() if listed}

    def part_facts(self) -> dict[str, Any]:
        """Returns the counts as JSON, for `joined`."""
        counts = [[*key, count, self.bytes[key]] for key, count in sorted(self.documents.items())]
        return {"counts": counts, "strings": [[*key, count] for key, count in sorted(self.strings.items())]}

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]]) -> LicenseTally:
        """Returns the counts of all parts."""
        tally = cls()
        for part in parts:
            for license, basis, documents, size in part["counts"]:
                tally.documents[license, basis] += documents
                tally.bytes[license, basis] += size
            for license, string, documents in part["strings"]:
                tally.strings[license, string] += documents
        return tally
