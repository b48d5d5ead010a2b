"""Reads the YAML of recipes and profiles: bounded in size, depth and expansion, and with the types of YAML 1.2.

Recipes are untrusted, so a file of any size or depth is safe to read: aliases count with the size of their values.
PyYAML's own constructors are not used for recipes: they follow YAML 1.1, in which `no` is false, `1:30` is 90, `010`
is 8 and a date is not a text, and some tags raise a traceback.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import RecipeError
from pipeline.core.json_files import READ
from pipeline.core.text import escaped, shown, unprintable

# Of a file; the largest packaged one has 6 kB.
MOST_BYTES = 2**18
# Values of a file; each use of an alias counts its values again.
MOST_VALUES = 10_000
DEEPEST = 24
# Characters.
LONGEST_NUMBER = 100

_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast and checks escapes
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SPELLINGS = (("~ null Null NULL", None), ("true True TRUE", True), ("false False FALSE", False))
_WORDS = {"": None} | {word: value for words, value in _SPELLINGS for word in words.split()}


def read_file(path: Path, title: str, limit: int = MOST_BYTES) -> bytes:
    """Returns the bytes of a regular file of at most `limit` bytes. Raises RecipeError for anything else."""
    try:
        handle = os.open(path, READ)
    except OSError as error:
        where = escaped(str(path), 200)
        raise RecipeError(f"{title}: {where} cannot be read ({error.strerror}); name another") from None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise RecipeError(f"{title}: {escaped(str(path), 200)} is no regular file; name a YAML file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise RecipeError(f"{title}: is larger than {limit // 1024} KiB; this is no file of settings")
    return data


def read_trusted(path: Path) -> Any:
    """Returns the content of a YAML file that is part of this project, as PyYAML reads it."""
    return yaml.load(path.read_bytes(), _PARSER)


def parse_yaml(data: bytes, title: str, most_values: int = MOST_VALUES) -> dict[str, Any]:
    """Returns the mapping in a YAML file. Raises RecipeError with the line if it is not YAML, or not a mapping."""
    try:
        document = _document(yaml.parse(_decode(data), _PARSER), most_values)
    except _Refused as error:
        raise RecipeError(f"{title}: line {error.line} {error.text}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent by spaces, not by tabs" if re.match(rb" *\t", _line(data, line)) else ""
        raise RecipeError(f"{title}: line {line} is not valid YAML: {escaped(str(error.problem), 200)}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes that PyYAML does not check
        raise RecipeError(f"{title}: is not valid YAML: {escaped(str(error), 200)}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{title}: must be a mapping of sections, see the packaged recipes for examples")
    return document


def line_of(data: bytes, location: Sequence[str | int]) -> int | None:
    """Returns the line of a field in a file that `parse_yaml` accepts.

    If the file does not have the field, it is the line of the innermost part around it that the file has. Returns None
    for the file as a whole.
    """
    node, line = yaml.compose(_decode(data), _PARSER), None
    # Parts that the file does not have, such as the class that a tag chooses, are skipped.
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            pair = node.value[part], node.value[part]
        else:
            pair = None
        if pair is not None:
            node, line = pair[1], pair[0].start_mark.line + 1
    return line


def _line(data: bytes, number: int) -> bytes:
    lines = data.split(b"\n")
    return lines[number - 1] if number <= len(lines) else b""


class _Refused(Exception):
    """Input that this reader refuses, though it may be valid YAML."""

    def __init__(self, line: int, text: str) -> None:
        self.line, self.text = line, text


def _decode(data: bytes) -> str:
    """Returns the text, without a byte order mark."""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise _Refused(data.count(b"\n", 0, error.start) + 1, "is not UTF-8; save the file in UTF-8") from None
    if unprintable(text, lines=True):
        for number, line in enumerate(text.split("\n"), 1):
            _require_printable(line, number)
    return text


def _require_printable(text: str, line: int) -> None:
    if character := unprintable(text, lines=True):
        raise _Refused(line, f"holds the character U+{ord(character):04X}, which cannot be seen; remove it")


def _document(events: Iterator[Any], most_values: int) -> Any:
    """Returns the one document that the events of a parser describe; None if there is none."""
    value, has_begun = None, False
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            if has_begun:
                raise _Refused(line, "begins a second document; put each in its own file")
            value, has_begun = _value(next(events), events, 0, {}), True
    values = [value]
    for count, each in enumerate(values):
        if count == most_values:
            raise _Refused(1, f"begins more than {most_values} values, aliases counted as what they stand for; shorten")
        if isinstance(each, (dict, list)):
            values += each.values() if isinstance(each, dict) else each
    return value


def _value(event: Any, events: Iterator[Any], depth: int, anchors: dict[str, Any]) -> Any:
    """Returns the plain value that begins with an event, and notes it by its anchor."""
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent):
        # An anchor counts from the end of its value on: a value cannot hold itself.
        if event.anchor not in anchors:
            name = escaped(str(event.anchor), 40)
            raise _Refused(line, f"is not valid YAML: no anchor &{name} ends before its alias")
        return anchors[event.anchor]
    if event.tag not in (None, "!"):
        raise _Refused(line, f"has the tag {escaped(event.tag, 60)}; write plain values")
    value: Any
    if isinstance(event, yaml.ScalarEvent):
        value = _scalar(event, line)
    elif depth == DEEPEST:
        raise _Refused(line, f"lies more than {DEEPEST} levels deep; no field does")
    elif isinstance(event, yaml.SequenceStartEvent):
        value = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            value.append(_value(item, events, depth + 1, anchors))
    else:
        value = _mapping(events, depth, anchors)
    if event.anchor:
        anchors[event.anchor] = value
    return value


def _mapping(events: Iterator[Any], depth: int, anchors: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarEvent):
            raise _Refused(line, "is not valid YAML for a recipe: a field is called by a word")
        # A key is checked as a value is, and stays a text.
        _value(key, events, depth, anchors)
        value = _value(next(events), events, depth + 1, anchors)
        if key.value == "<<" and key.implicit[0]:
            for part in value if isinstance(value, list) else [value]:
                if not isinstance(part, dict):
                    raise _Refused(line, "is not valid YAML: << takes over mappings, and this is none")
                merged = part | merged  # of several, the first one takes precedence
        elif key.value in values:
            raise _Refused(line, f"is not valid YAML: {shown(key.value)} stands twice")
        else:
            values[key.value] = value
    return merged | values


def _scalar(event: Any, line: int) -> Any:
    text: str = event.value
    _require_printable(text, line)
    if not event.implicit[0]:  # in quotes, or a block of text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _NO_NUMBER.fullmatch(text):
        return float(text.replace(".", "", 1))
    integer = _INTEGER.fullmatch(text)
    if not integer and not _FLOAT.fullmatch(text):
        return text
    if len(text) > LONGEST_NUMBER:
        raise _Refused(line, f"holds a number of {len(text)} characters; no field takes one")
    return int(text.lstrip("+"), 0) if integer else float(text) + 0.0  # -0.0 + 0.0 is 0.0
