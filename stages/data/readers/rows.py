"""Base of the readers of files of rows: the fields of a row as a document, or the reason why it is none."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pipeline.core.bounds import Line, spdx
from pipeline.core.stage import added
from stages.data import chat
from stages.data.readers.base import Document, Failed, FileReader, Files, Unreadable, is_unicode

Column = Line
"""The name of a field or column in a user's files."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file: its fields, its file, and its name, which is that of the document if no field has an id."""

    fields: dict[str, Any]
    file: str
    name: str


class RowReader(FileReader):
    """A reader of files of rows with a field for the text."""

    text_field: Column = Field("text", description="field with the text of a document")
    messages_field: Column | None = added(
        None, "field with messages (role, content, reasoning_content), read instead of text_field"
    )
    id_field: Column | None = Field(
        None, description="field with a unique id; null: the id is the file name and the number of the line or row"
    )
    license_field: Column | None = added(
        None, "field with the SPDX license of a document, or a list of them; null: the source's"
    )

    @property
    def conversations(self) -> bool:
        return bool(self.messages_field)

    @property
    def names_files(self) -> bool:
        return self.id_field is None

    @abstractmethod
    def rows(self, files: Files) -> Iterator[Row | Failed]:
        """Every row of every file, in order. Raises AtomError naming the file that is corrupt."""

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Unreadable | Failed]:
        """One document for each row or, with messages_field, for each turn of the assistant; a row whose messages are
        not a conversation is unreadable, and one without its fields has failed."""
        for row in self.rows(files):
            if isinstance(row, Failed):
                yield row
                continue
            try:
                content, name = self._content(row), self._name(row)
                license = _license(row, self.license_field) if self.license_field else None
            except ValueError as error:
                yield Failed(row.name, str(error))
                continue
            if isinstance(content, str):
                yield Document(name, content, row.file, license=license)
                continue
            try:
                for number, (text, prompt_chars) in enumerate(chat.turns(content)):
                    yield Document(f"{name}#{number}", text, row.file, prompt_chars, license)
            except ValueError as error:
                yield Unreadable(f"{name} ({error})")

    def _content(self, row: Row) -> str | list[Any]:
        """The text, or the list of messages. Raises ValueError in words."""
        field = self.messages_field or self.text_field
        content = row.fields.get(field)
        if not isinstance(content, list if self.messages_field else str):
            available = ", ".join(sorted(map(str, row.fields)))
            kind, setting = ("list of messages", "messages_field") if self.messages_field else ("text", "text_field")
            raise ValueError(f"no {kind} in field {field!r} (fields: {available}); set reader.{setting}")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        if not is_unicode(text):
            raise ValueError(f"field {field!r} holds a lone surrogate, which is not Unicode")
        result: str | list[Any] = content
        return result

    def _name(self, row: Row) -> str:
        if self.id_field is None:
            return row.name
        if row.fields.get(self.id_field) in (None, ""):
            raise ValueError(f"no id in field {self.id_field!r}; set reader.id_field to a field that every row has")
        name = str(row.fields[self.id_field])
        if not is_unicode(name):
            raise ValueError(f"the id in field {self.id_field!r} holds a lone surrogate, which is not Unicode")
        return name


def _license(row: Row, field: str) -> str:
    """The SPDX expression of a row's licenses, joined by AND. Raises ValueError in words if there is none, or if it is
    not SPDX."""
    value = row.fields.get(field)
    names = value if isinstance(value, list) else [value]
    try:
        return spdx(" AND ".join(f"({name})" if " " in name else name for name in sorted(names, key=str.lower)))
    except (ValueError, TypeError):
        raise ValueError(
            f"field {field!r} holds {value!r}, which is no SPDX license or list of them (spdx.org/licenses)"
        ) from None
