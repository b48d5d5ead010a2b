"""Sources: the origin of documents, their license, and the digest of their files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from pipeline.core.bounds import License, SourceName, Text, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config
from pipeline.core.store import canonical, sha256_bytes, sha256_file
from stages.data.kinds import Kind
from stages.data.readers import READERS
from stages.data.readers.base import Reader
from stages.data.registry import union

if TYPE_CHECKING:
    AnyReader = Reader
else:
    AnyReader = union(READERS, "READER", "reader")

TreeDigest = Annotated[str, Words(71, "digest: write auto, or sha256:<64 hex digits>", r"auto|sha256:[0-9a-f]{64}")]


class Source(Config):
    """Settings for acquiring one source."""

    name: SourceName = Field(description="name of the source, as in the mix of a phase")
    kind: Kind = Field(description="kind of the documents; chat: conversations")
    license: License = Field(description="SPDX license; with reader.license_field, that of the collection as a whole")
    license_evidence: Text = Field(description="text or URL that shows the license")
    origin: Text = Field(description="URL or text that states where the source comes from")
    tree_digest: TreeDigest = Field(
        "auto", description="expected digest of the files; auto: computed from the files present"
    )
    reader: AnyReader = Field(description="reader of the documents")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "items":
            raise ValueError("`items` is the role of the evaluation items; choose another name")
        return name

    @model_validator(mode="after")
    def _check_kind(self) -> Source:
        chat = self.reader.conversations
        if chat != (self.kind == "chat"):
            raise ValueError(
                f"kind = {self.kind}, but reader {self.reader.reader} gives {'conversations' if chat else 'plain text'}"
                f"; {'use kind: chat' if chat else 'conversations come from messages_field and the chat readers'}"
            )
        return self


def resolve_tree_digest(source: Source) -> str:
    """`sha256:` over the sorted (relative path, sha256) of the files that the source's reader reads.

    Procedural sources read none. Raises RecipeError if the files are missing or a pinned digest differs.
    """
    files = source.reader.files(source.name)
    rows = [[relative, sha256_file(path)] for relative, path in files]
    digest = f"sha256:{sha256_bytes(canonical(rows))}"
    if source.tree_digest not in ("auto", digest):
        raise RecipeError(
            f"source {source.name}: tree_digest is pinned to {source.tree_digest} but the {len(files)} files here give "
            f"{digest}; restore the pinned files, or change the pin"
        )
    return digest
