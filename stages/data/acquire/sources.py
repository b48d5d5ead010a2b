"""Sources: the origin of documents, their license, and the digest of their files."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from pydantic import field_validator, model_validator

from pipeline.core.bounds import License, SourceName, Text
from pipeline.core.errors import RecipeError
from pipeline.core.parts import PartCount, part_slice
from pipeline.core.stage import Config, added, operational
from stages.data.acquire import readers
from stages.data.acquire.licenses.expressions import UNKNOWN_WEB
from stages.data.acquire.readers import READERS
from stages.data.acquire.readers.base import FileReader, Files, Reader
from stages.data.acquire.readers.generated import Generated
from stages.data.blocks import union_of
from stages.data.estimates import Size
from stages.formats.file_digests import TreeDigest, tree_digest
from stages.formats.table import Kind

if TYPE_CHECKING:
    AnyReader = Reader
else:
    AnyReader = union_of(READERS, "reader")

# Licenses that govern the rights over a database, and not its contents individually (preamble of each).
COLLECTION_LICENSES = ("ODC-By-1.0", "ODbL-1.0")


class Source(Config):
    """Settings for acquiring one source."""

    name: SourceName
    """name of the source, as in the mix of a phase; prefix of its document ids"""
    kind: Kind
    """kind of the documents; chat: conversations"""
    license: License
    """SPDX license of every document; only of the collection if documents have their own, or if document_license is
    set"""
    license_evidence: Text
    """text or URL that shows the license"""
    origin: Text
    """URL or text that states where the source comes from; {python_version} stands for the version of the running
    Python, such as 3.11.7"""
    tree_digest: TreeDigest = "auto"
    """expected digest of the files, `sha256:…`; auto: computed from the files present"""
    reader: AnyReader
    """reader of the documents, with its settings"""
    document_license: License | None = added(None)
    """SPDX license of documents of unknown license, if `license` covers only the collection, such as
    LicenseRef-unknown-web; null: `license`"""
    parts: PartCount = added(1)
    """parts into which the files of the source are divided, in their order; jobs process the parts one by one"""
    expected: Size | None = operational(None)
    """expected `documents` of the source and `bytes` of their text, for `atom plan`; null: unknown"""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        # Sources are inputs of stage filter under their names, beside these two.
        if name in ("items", "benchmarks"):
            raise ValueError(f"`{name}` is the role of evaluation items; choose another name")
        return name

    @field_validator("origin")
    @classmethod
    def _fill_python_version(cls, origin: str) -> str:
        return origin.replace("{python_version}", platform.python_version())

    @model_validator(mode="after")
    def _check_kind(self) -> Source:
        chat = self.reader.conversations
        if chat != (self.kind == "chat"):
            raise ValueError(
                f"kind = {self.kind}, but reader {self.reader.reader} gives {'conversations' if chat else 'plain text'}"
                f"; {'use kind: chat' if chat else 'conversations come from messages_field and the chat readers'}"
            )
        return self

    @model_validator(mode="after")
    def _check_collection_license(self) -> Source:
        covers_texts = self.document_license is not None or self.reader.gives_licenses
        if self.license in COLLECTION_LICENSES and not covers_texts:
            raise ValueError(
                f"license = {self.license} covers a collection, not the texts in it; set document_license (of web "
                f"text: {UNKNOWN_WEB}), or reader.license_field"
            )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Source:
        if isinstance(self.reader, Generated):
            return self
        if self.parts > 1 and not isinstance(self.reader, FileReader):
            raise ValueError(f"parts = {self.parts}, but reader {self.reader.reader} reads no files of yours; use 1")
        # A limit is drawn from all documents of a source, and a part sees only its own.
        if self.parts > 1 and isinstance(self.reader, FileReader) and self.reader.limit is not None:
            raise ValueError(f"parts = {self.parts}, but reader.limit selects from the whole source; leave one out")
        return self

    @property
    def code(self) -> dict[str, list[str]]:
        """{registry of readers: the module in it that this source uses}, for the digest of a stage's code."""
        return {readers.__name__: [READERS[self.reader.reader].partition(":")[0]]}

    def files(self) -> Files:
        """Returns the files of all parts. Raises RecipeError if they are missing, or fewer than the parts."""
        files = self.reader.files(self.name)
        if isinstance(self.reader, Generated):
            return files
        if len(files) < self.parts > 1:
            raise RecipeError(
                f"source {self.name}: parts = {self.parts}, but its reader finds {len(files)} files; use no more parts"
            )
        return files

    def files_of(self, part: int) -> Files:
        """Returns the files of one part."""
        files = self.files()
        return files[part_slice(len(files), part, self.parts)]


def resolve_tree_digest(source: Source) -> str:
    """Returns the pinned digest, or the `tree_digest` of the files that the source's reader reads, which may be none.

    The files of a generator must be pinned, because its name stands for them. Any other pin is compared with the files
    when they are acquired: planning need not read a large corpus. Raises RecipeError if the files are missing, or fewer
    than the parts, or those of a generator with another digest.
    """
    files = source.files()
    if isinstance(source.reader, Generated):
        require_generator(source, files)
    if source.tree_digest != "auto":
        return source.tree_digest
    return _digest_of(source, files)


def require_tree(source: Source, digest: str, files: int) -> None:
    """Raises RecipeError if a source is pinned to another tree digest than that of its files."""
    if source.tree_digest not in ("auto", digest):
        raise RecipeError(
            f"source {source.name}: tree_digest is pinned to {source.tree_digest} but the {files} files here give "
            f"{digest}; restore the pinned files, or change the pin"
        )


def require_generator(source: Source, files: Files) -> None:
    """Raises RecipeError if the files of a source's generator do not have the pinned digest."""
    assert isinstance(source.reader, Generated)
    name, digest = source.reader.generator, _digest_of(source, files)
    if source.tree_digest == "auto":
        raise RecipeError(
            f"source {source.name}: tree_digest must pin the generator {name}; its files at {source.reader.path} have "
            f"{digest}"
        )
    if source.tree_digest != digest:
        raise RecipeError(
            f"source {source.name}: the generator {name} is pinned to {source.tree_digest}, but its files at "
            f"{source.reader.path} have {digest}; restore them, or name the other generator and pin it"
        )


def _digest_of(source: Source, files: Files) -> str:
    names = [name for name, _ in files]
    return tree_digest(zip(names, source.reader.digests(source.name, files), strict=True))
