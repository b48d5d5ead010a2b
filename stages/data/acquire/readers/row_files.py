"""Readers `jsonl` and `parquet`: the rows of files as documents, JSON Lines also as gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from pipeline.core.bounds import License, Line, LongLine, Range, Words
from pipeline.core.errors import AtomError
from pipeline.core.stage import added
from stages.data.acquire.licenses import notices
from stages.data.acquire.licenses.expressions import LicenseMap, MapName, load_map
from stages.data.acquire.readers.base import Document, Failed, FileReader, Files, Read, Unmapped, Unreadable, is_unicode

# The name of a field or column in a user's files, or the path of a nested one, such as metadata.license.
Column = Line
# Of a title, or of all authors of a document.
MOST_CHARACTERS = 4000
# SPDX expressions by the license strings of a source.
# Values by the names of fields.
Values = Annotated[
    dict[Column, Annotated[tuple[LongLine, ...], Field(min_length=1, max_length=100)]], Field(max_length=10)
]
LicenseStrings = Annotated[dict[Annotated[str, Words(2000)], License], Field(max_length=1000)]
# Numbers by the names of fields.
Numbers = Annotated[dict[Column, Annotated[float, Range(-1e9, 1e9)]], Field(max_length=10)]
# The reasoning of a model, as sets of reasoning traces write it before the answer.
THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file.

    Attributes:
        fields: The fields by name.
        file: The file.
        name: The name of the document if no field has an id.
    """

    fields: dict[str, Any]
    file: str
    name: str


class RowReader(FileReader):
    """A reader of files of rows with a field for the text."""

    text_field: Column = "text"
    """field with the text of a document"""
    messages_field: Column | None = added(None)
    """field with messages (role, content, reasoning_content), read instead of text_field"""
    tools_field: Column | None = added(None)
    """field with the JSON schemas of the tools that a conversation offers, a list or its JSON; messages then have
    tool_calls; null: tools and calls are left out"""
    question_fields: Annotated[tuple[Column, ...], Field(max_length=10)] = added(())
    """fields whose texts, joined by a blank line, are a user's message; the answer is in answer_field"""
    answer_field: Column | None = added(None)
    """field with the assistant's answer to question_fields; a row is then a conversation of one turn"""
    id_field: Column | None = None
    """field with a unique id; null: the id is the file name and the number of the line or row"""
    license_field: Column | None = added(None)
    """field with the license of a document, or a list of licenses that all apply, such as metadata.license; null:
    that of the source"""
    license_map: MapName | None = added(None)
    """shipped map for the strings of license_field that are local to a source; null: none is"""
    license_strings: LicenseStrings = added({})
    """SPDX expressions by strings of license_field, which come before those of license_map"""
    license_notice: Literal["header", "footer"] | None = added(None)
    """place where texts may state a license of their own, which comes before license_field: header of a source file, or
    footer of a page; null: nowhere"""
    where: Values = added({})
    """values by the name of a field, such as `language: [English]`; rows with another value are left out"""
    minimum: Numbers = added({})
    """smallest number by the name of a field, such as `average_test_score: 1`; rows with a smaller one, or with none,
    are left out. A number may be text, and a field with JSON is read as such: judgement.logic.score"""
    think_tags: Literal["reasoning", "removed"] | None = added(None)
    """what becomes of <think>…</think> at the beginning of an assistant's text: reasoning of the turn, or removed, so
    that the answer alone is learnt; a text without it, or with more of it, is unreadable. null: texts have no such
    tags"""
    url_field: Column | None = added(None)
    """field with the URL of a document; null: documents have none"""
    title_field: Column | None = added(None)
    """field with the title of a document, for attribution; null: not stated"""
    author_field: Column | None = added(None)
    """field with the author of a document, or a list of them, such as metadata.authors.name; null: not stated"""
    derived_from_field: Column | None = added(None)
    """field with the id or URL of the original of a rewritten document, or a list; null: not stated"""

    @model_validator(mode="after")
    def _check_licenses(self) -> RowReader:
        if self.license_field is None and (self.license_map or self.license_strings):
            setting = "license_map" if self.license_map else "license_strings"
            raise ValueError(f"{setting} is set, but no license_field; name the field that has the strings")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> RowReader:
        if self.tools_field and not self.messages_field:
            raise ValueError("tools_field is set, but no messages_field; name the field that has the conversations")
        return self

    @model_validator(mode="after")
    def _check_think_tags(self) -> RowReader:
        if self.think_tags and not self.conversations:
            raise ValueError("think_tags is set, but rows are plain text; give messages_field, or answer_field")
        return self

    @model_validator(mode="after")
    def _check_turns(self) -> RowReader:
        if bool(self.question_fields) != (self.answer_field is not None):
            raise ValueError("question_fields and answer_field belong together: a question and its answer; give both")
        if self.messages_field and self.answer_field:
            raise ValueError(
                f"messages_field = {self.messages_field} holds whole conversations; leave it out, or answer_field and "
                "question_fields"
            )
        return self

    @property
    def conversations(self) -> bool:
        return bool(self.messages_field or self.answer_field)

    @property
    def names_files(self) -> bool:
        return self.id_field is None

    @property
    def gives_licenses(self) -> bool:
        return self.license_field is not None

    @property
    def licenses(self) -> LicenseMap:
        """The SPDX expressions of the strings of license_field."""
        shipped = load_map(self.license_map) if self.license_map else LicenseMap({}, "text")
        return shipped.extended(self.license_strings)

    def reads(self, row: Row) -> bool:
        """Returns True unless `where` or `minimum` leaves a row out."""
        return all(_has(row, field, values) for field, values in self.where.items()) and all(
            (number := _number_at(row.fields, field)) is not None and number >= least
            for field, least in self.minimum.items()
        )

    @property
    def columns(self) -> list[Column]:
        """The fields that are read."""
        content = [self.answer_field, *self.question_fields] if self.answer_field else [self.messages_field]
        names = (
            *(content if self.conversations else [self.text_field]),
            self.tools_field,
            self.id_field,
            self.license_field,
            self.url_field,
            self.title_field,
            self.author_field,
            self.derived_from_field,
            *self.where,
            # The column of a path in JSON has no columns of its own.
            *(name.partition(".")[0] for name in self.minimum),
        )
        return [name for name in names if name]

    @property
    def states_parents(self) -> bool:
        return self.derived_from_field is not None

    @property
    def states_credits(self) -> bool:
        return bool(self.title_field or self.author_field)

    @abstractmethod
    def rows(self, files: Files, columns: Sequence[Column] | None = None) -> Iterator[Row | Failed]:
        """Yields every row of every file, in order, with at least these columns, or those of the settings for None.

        Raises AtomError naming the file that is corrupt.
        """

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Read]:
        """Yields one document for each row or, with messages_field, for each turn of the assistant.

        A row whose messages are not a conversation is unreadable, one without its fields has failed, and one whose
        license is unknown is unmapped.
        """
        from stages.formats.chat import turns

        licenses = self.licenses
        for row in self.rows(files):
            if isinstance(row, Failed):
                yield row
                continue
            if not self.reads(row):
                yield None
                continue
            try:
                content, name = self._content(row), self._name(row)
                parents = _parents(row, self.derived_from_field) if self.derived_from_field else ()
            except ValueError as error:
                yield Failed(row.name, str(error))
                continue
            if isinstance(content, str):
                # A row of plain text is one document.
                yield self._document(row, licenses, name, content, parents)
                continue
            try:
                if self.think_tags:
                    content = [_without_tags(message, self.think_tags) for message in content]
                tools = None if self.tools_field is None else _tools(field_at(row.fields, self.tools_field))
                # A conversation is one document for each turn of the assistant.
                for number, (text, prompt_chars) in enumerate(turns(content, tools)):
                    yield self._document(row, licenses, f"{name}#{number}", text, parents, prompt_chars)
            except ValueError as error:
                yield Unreadable(f"{name} ({error})")

    def _document(
        self, row: Row, licenses: LicenseMap, name: str, text: str, parents: tuple[str, ...], prompt_chars: int = 0
    ) -> Document | Unmapped:
        stated_url, title, author = (
            field_at(row.fields, field) if field else None
            for field in (self.url_field, self.title_field, self.author_field)
        )
        url, credit = _url(stated_url), (_names(title), _names(author))
        document = Document(name, text, row.file, prompt_chars, None, url, "", parents, *credit)
        if self.license_notice is not None:
            notice = notices.in_header(text) if self.license_notice == "header" else notices.in_footer(text)
            if notice is not None:
                return document.under(notice)
        if self.license_field is None:
            return document
        stated = field_at(row.fields, self.license_field)
        expression = licenses.expression(stated)
        if expression is None:
            return Unmapped(name, text, in_words(stated))
        return replace(document, license=expression, license_found="field", stated=in_words(stated))

    def _content(self, row: Row) -> str | list[Any]:
        """Returns the text, or the list of messages. Raises ValueError in words."""
        if self.answer_field:
            question = [_text_at(row, field) for field in self.question_fields]
            messages = {"user": "\n\n".join(filter(None, question)), "assistant": _text_at(row, self.answer_field)}
            return [{"role": role, "content": content} for role, content in messages.items()]
        field = self.messages_field or self.text_field
        content = field_at(row.fields, field)
        if not isinstance(content, list if self.messages_field else str):
            available = ", ".join(sorted(map(str, row.fields)))
            kind, setting = ("list of messages", "messages_field") if self.messages_field else ("text", "text_field")
            raise ValueError(f"no {kind} in field {field!r} (fields: {available}); set reader.{setting}")
        # Messages are checked as a whole: a surrogate may stand in any of their fields.
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        if not is_unicode(text):
            raise ValueError(f"field {field!r} holds a lone surrogate, which is not Unicode")
        result: str | list[Any] = content
        return result

    def _name(self, row: Row) -> str:
        if self.id_field is None:
            return row.name
        value = field_at(row.fields, self.id_field)
        if value in (None, ""):
            raise ValueError(f"no id in field {self.id_field!r}; set reader.id_field to a field that every row has")
        name = str(value)
        if not is_unicode(name):
            raise ValueError(f"the id in field {self.id_field!r} holds a lone surrogate, which is not Unicode")
        return name


def field_at(fields: Mapping[str, Any], path: str) -> Any:
    """Returns the value of a field, or of a nested field whose names are joined by dots; None if there is none.

    A field below a list of mappings has the list of their values.
    """
    value: Any = fields
    # A field may have a dot in its own name, so the whole path is tried first.
    for name in (path,) if path in fields else path.split("."):
        if isinstance(value, list):
            value = [element.get(name) if isinstance(element, dict) else None for element in value]
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _has(row: Row, field: str, values: Sequence[str]) -> bool:
    """Returns True if a field has one of the values, or a list with one of them."""
    value = field_at(row.fields, field)
    return any(str(each) in values for each in (value if isinstance(value, list) else [value]))


def _number_at(fields: Mapping[str, Any], path: str) -> float | None:
    """Returns the number of a field, of which a part may be JSON; None if it is none."""
    value: Any = fields
    for name in (path,) if path in fields else path.split("."):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            return None
        value = value.get(name) if isinstance(value, Mapping) else None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _without_tags(message: Any, use: str) -> Any:
    """Returns a message whose reasoning is a field of its own, or removed.

    Raises ValueError in words for a text of the assistant that does not begin with one reasoning. Calls of tools need
    no text, and reasoning that has a field already stays there.
    """
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    content, fields = message.get("content"), dict(message)
    if use == "removed":
        fields.pop("reasoning_content", None)
    if message.get("reasoning_content") or (message.get("tool_calls") and not content):
        return fields
    match = THOUGHT.fullmatch(content) if isinstance(content, str) else None
    if match is None:
        raise ValueError("a message of the assistant does not begin with <think>…</think>")
    fields["content"] = match[2].strip()
    if not fields["content"] and not message.get("tool_calls"):
        raise ValueError("a message of the assistant has no answer after its reasoning")
    return fields | ({"reasoning_content": match[1].strip()} if use == "reasoning" else {})


def _tools(value: Any) -> list[Any]:
    """Returns the schemas of tools in a field; none if it is empty. Raises ValueError in words."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("its tools are no list of JSON schemas")
    if not is_unicode(json.dumps(tools, ensure_ascii=False, default=str)):
        raise ValueError("its tools hold a lone surrogate, which is not Unicode")
    return tools


def _text_at(row: Row, field: str) -> str:
    """Returns the text of a field, which may be empty. Raises ValueError in words."""
    content = field_at(row.fields, field)
    if not isinstance(content, str):
        available = ", ".join(sorted(map(str, row.fields)))
        raise ValueError(
            f"no text in field {field!r} (fields: {available}); set reader.question_fields and answer_field"
        )
    if not is_unicode(content):
        raise ValueError(f"field {field!r} holds a lone surrogate, which is not Unicode")
    return content


def in_words(stated: object) -> str:
    """Returns the license that a row states, in its own words; empty if it states nothing."""
    if stated is None or stated == []:
        return ""
    # A list or a mapping is shown as the row has it.
    text = stated if isinstance(stated, str) else json.dumps(stated, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()


def _url(value: object) -> str:
    """Returns a web address, or an empty text for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    is_address = text.startswith(("http://", "https://")) and len(text) <= 8192 and text.isprintable()
    return text if is_address else ""


def _names(value: object) -> str:
    """Returns a title or a name, or a list of them, in one line; an empty text for anything else."""
    values = value if isinstance(value, list) else [value]
    names = [" ".join(name.split()) for name in values if isinstance(name, str) and is_unicode(name)]
    return "; ".join(filter(None, names))[:MOST_CHARACTERS]


def _parents(row: Row, field: str) -> tuple[str, ...]:
    """Returns the ids or URLs of the documents that a row was made from.

    Raises ValueError in words if that is not stated.
    """
    value = row.fields.get(field, 0)  # without the field nothing is stated; null states that there is none
    parents = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(parent, str) and parent and is_unicode(parent) for parent in parents):
        raise ValueError(f"field {field!r} does not name what it was made from: an id, a URL, a list of them, or null")
    return tuple(dict.fromkeys(parents))


def decompressed(file: IO[bytes]) -> IO[bytes]:
    """Returns the bytes of an open file of Zstandard, which may have several frames.

    Reading raises OSError if it is cut short or corrupt.
    """
    import pyarrow as pa

    return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(file, "zstd"), 2**20))


# Bytes of a line. A longer one fails alone, because a file of a megabyte can hold a line of a terabyte.
MAX_LINE = 2**28


class Jsonl(RowReader):
    """JSON Lines files, plain, gzip or Zstandard.

    `path` is a file or a folder of *.jsonl, *.jsonl.gz and *.jsonl.zst.
    """

    suffixes: ClassVar = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    reader: Literal["jsonl"]
    """selects this reader"""

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        for relative, path in files:
            for number, line in _read_lines(path):
                name = f"{relative}:{number}"
                if line is None:
                    yield Failed(name, f"longer than {MAX_LINE} bytes")
                    continue
                try:
                    fields = json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    # Only the last line of a file can lack its end: then the file is cut short, and more may be
                    # missing.
                    if not line.endswith(b"\n"):
                        raise AtomError(
                            f"{path}, line {number}: not a JSON object ({error}); the file is cut short"
                        ) from None
                    yield Failed(name, f"not a JSON object: {error}")
                    continue
                if isinstance(fields, dict):
                    yield Row(fields, relative, name)
                else:
                    yield Failed(name, f"a JSON object is expected, not {type(fields).__name__}")


def _read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line) of every line that is not blank; None for one that is too long."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE):
                number += 1
                # readline stops at the bound; the rest of such a line must not be read as lines of its own.
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield number, None
                elif line.strip():
                    yield number, line
    except (EOFError, OSError, zlib.error) as error:
        raise AtomError(f"{path} cannot be read at line {number + 1} ({error}); it is cut short or corrupt") from None


def _skip_line(file: IO[bytes]) -> None:
    """Reads up to the end of a line."""
    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
        pass


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return decompressed(open(path, "rb")) if path.name.endswith(".zst") else open(path, "rb")


class Parquet(RowReader):
    """Parquet files; `path` is a file or a folder of *.parquet."""

    suffixes: ClassVar = (".parquet",)

    reader: Literal["parquet"]
    """selects this reader"""

    def rows(self, files: Files, columns: Sequence[str] | None = None) -> Iterator[Row | Failed]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for relative, path in files:
            number = 0
            try:
                parquet = pq.ParquetFile(path)
                places = columns_to_read(path, parquet.schema_arrow, self.columns if columns is None else columns)
                for batch in parquet.iter_batches(batch_size=1000, columns=places):
                    for fields in _rows_of(batch):
                        number += 1
                        name = f"{relative}:{number}"
                        yield Failed(name, fields) if isinstance(fields, str) else Row(fields, relative, name)
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                message = f"{path} cannot be read after row {number} ({reason}); it is cut short or not Parquet"
                raise AtomError(message) from None


def columns_to_read(path: Path | str, schema: Any, names: Sequence[Column]) -> list[str]:
    """Returns the columns of a Parquet file that have these fields. Raises AtomError if there is none for one."""
    places = {name: _column_to_read(schema, name) for name in names}
    missing = sorted(name for name, place in places.items() if place is None)
    if missing:
        raise AtomError(
            f"{path} has no column {missing[0]!r} (columns: {', '.join(schema.names)}); set reader.text_field, "
            "id_field, license_field, url_field, title_field or author_field"
        )
    return [place for place in places.values() if place is not None]


def _column_to_read(schema: Any, path: str) -> str | None:
    """Returns the column that has the field of a path, alone where it is nested in columns without lists.

    None if there is none.
    """
    import pyarrow.types as types

    if path in schema.names:
        return path
    top, *names = path.split(".")
    if top not in schema.names:
        return None
    kind, has_list = schema.field(top).type, False
    for name in names:
        # Arrow reads a nested column by its path, but not through lists: then the top column is read as a whole.
        while types.is_list(kind) or types.is_large_list(kind):
            kind, has_list = kind.value_type, True
        position = kind.get_field_index(name) if types.is_struct(kind) else -1
        if position < 0:
            return None
        kind = kind.field(position).type
    return top if has_list else path


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yields the fields of each row, or the reason why a row has none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row: find the row, and keep the others
        for n in range(batch.num_rows):
            try:
                yield from batch.slice(n, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield f"a field is not UTF-8: {error}"
