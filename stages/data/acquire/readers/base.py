"""The interface of a data reader: its settings, the files that it reads, and the documents in them.

A reader is a class in a module of this folder, which is named in READERS. The module is imported when a recipe is
planned, so heavy imports are inside `documents`.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pipeline.core.bounds import LongLine, Range
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, operational
from stages.formats.file_digests import file_digests

# The maximum number of files and folders under a source's path; FineWeb-Edu, of 1.3 trillion tokens, has some two
# thousand.
MAX_ENTRIES = 100_000

Documents = Annotated[int, Range(1, 1e12)]
# Procedural documents.
Drawn = Annotated[int, Range(1, 1e8, "they are drawn in memory")]

# (path relative to the source, path) of every file that a reader reads, sorted.
Files = Sequence[tuple[str, Path]]


# How the license of a document was found: in a field of its row, in a file beside it, on its page, with the document
# that it was made from, or not at all. Empty: it is the declaration of the source.
LicenseFound = Literal["field", "file", "page", "parent", "none", ""]


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
# What a reader yields.
Read = Document | Unreadable | Failed | Unmapped | Refused


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
        """True if the name of every document contains that of its file, so that documents of two files differ."""
        return False

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
