"""Readers `stdlib-docstrings` and `stdlib-source`: the running Python's standard library as documents.

Some files of the library carry license terms of their own, such as `turtle.py`. The license that a recipe declares for
the library does not cover them: their documents have the license of that notice, and none if no rule knows it. A
copyright notice without terms leaves a file under the library's license.
"""

from __future__ import annotations

import ast
import io
import os
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipeline.core.stage import added
from stages.data.acquire.licenses import notices
from stages.data.acquire.readers.base import Document, Files, SampledReader, Unmapped, Unreadable, is_unicode

# Address of a file of the library at the tag of a version of Python.
ADDRESS = "https://github.com/python/cpython/blob/v{version}/Lib/{path}"
# Words of a file whose rights the Python Software Foundation has or was granted: it licenses them as PSF-2.0.
FOUNDATION = re.compile(
    r"licensed[\s#]+to[\s#]+(?:the[\s#]+)?PSF|copyright.{,40}Python[\s#]+Software[\s#]+Foundation", re.IGNORECASE
)
# not library code (tests, the editor, installed packages), or generated at build time with paths of the build machine
_SKIPPED = "test tests idlelib turtledemo lib2to3 site-packages dist-packages lib-dynload __pycache__"
_SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
# The module or package below Lib, not the file: the codecs in `encodings` are nearly the same text.
WORK = r"^[^/]+/([^/:.]+)"
Found = Document | Unmapped | Unreadable
Unit = Literal["docstring", "function", "file"]


def library_files(top_level: bool = False) -> Files:
    """Returns (relative path, path) of the library's modules, sorted; `top_level` leaves packages out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = []
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        library_folders = [f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("config-")]
        folders[:] = [] if top_level else library_folders
        for name in names:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                modules.append(((relative / name).as_posix(), Path(folder, name)))
    return sorted(modules)


def read(files: Files, unit: Unit) -> Iterator[Found]:
    """Yields the docstrings in the files, or their functions, or the files themselves.

    Functions and files are without their docstrings. A file that does not parse is unreadable.
    """
    for relative, path in files:
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            source = data.decode(encoding)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # do not report invalid escapes in old modules
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            # Counted, not fatal: one file that Python cannot parse must not stop the source.
            yield Unreadable(relative)
            continue
        # not splitlines(): form feeds in the library's files are no line ends to the parser
        lines = re.split(r"\r\n|\r|\n", source)
        # In the whole file: words in a string of the program count too.
        notice = notices.in_header(source, FOUNDATION, len(source))
        url = ADDRESS.format(version=platform.python_version(), path=relative)
        for definition, text in _texts(tree, lines, unit):
            name = f"{relative}:{definition}" if definition else relative
            if text and is_unicode(text):
                yield Document(name, text, relative, url=url).under(notice)


def _texts(tree: ast.Module, lines: Sequence[str], unit: Unit) -> Iterator[tuple[str, str | None]]:
    """Yields (definition, text) of the documents of a file; "" is the whole module."""
    if unit == "file":
        yield "", _file_without_docstrings(tree, lines)
        return
    for name, node in _definitions(tree, ""):
        if unit == "docstring":
            yield name, ast.get_docstring(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, _source_without_docstring(node, lines)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(
    tree: ast.AST, prefix: str, name_counts: Counter[str] | None = None
) -> Iterator[tuple[str, Documented]]:
    """Yields the module, its classes, methods and functions with dotted names.

    A name that is used again becomes name#2, name#3, and so on. Functions inside functions belong to their outer
    function.
    """
    name_counts = Counter() if name_counts is None else name_counts
    if isinstance(tree, ast.Module):
        yield "", tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}{node.name}"
            name_counts[name] += 1
            yield (name if name_counts[name] == 1 else f"{name}#{name_counts[name]}"), node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{name}.", name_counts)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            yield from _definitions(node, prefix, name_counts)


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str | None:
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    line_numbers = list(range(first, (node.end_lineno or node.lineno) + 1))
    body = node.body[0]
    # Without its docstring a function may have nothing left, or the docstring shares its line with code.
    if ast.get_docstring(node, clean=False) is not None:
        if len(node.body) == 1 or body.lineno == node.lineno:
            return None
        line_numbers = [n for n in line_numbers if not body.lineno <= n <= (body.end_lineno or body.lineno)]
    return textwrap.dedent("\n".join(lines[n - 1] for n in line_numbers)).strip("\n")


def _file_without_docstrings(tree: ast.Module, lines: Sequence[str]) -> str:
    """Returns the file's text without the docstrings of `_definitions`, and of functions inside functions.

    A docstring that is the whole body, or shares a line with code, becomes `pass`, so that the rest still parses.
    """
    edited: list[str | None] = list(lines)
    for node in ast.walk(tree):
        if not isinstance(node, Documented) or ast.get_docstring(node, clean=False) is None:
            continue
        body = node.body[0]
        first, last = body.lineno - 1, (body.end_lineno or body.lineno) - 1
        # columns count bytes of UTF-8
        prefix = lines[first].encode()[: body.col_offset].decode()
        suffix = lines[last].encode()[body.end_col_offset :].decode()
        alone = not prefix.strip() and not suffix.strip() and (len(node.body) > 1 or isinstance(node, ast.Module))
        edited[first : last + 1] = [None if alone else f"{prefix}pass{suffix}", *[None] * (last - first)]
    return "\n".join(line for line in edited if line is not None).strip("\n")


class StdlibSource(SampledReader):
    """Functions and methods of the standard library, or its whole files.

    Docstrings are removed, so that no held-out docstring is trained on inside its function.
    """

    reader: Literal["stdlib-source"]
    """selects this reader"""
    unit: Literal["function", "file"] = added("function")
    """what one document is; use only one of them in a data recipe"""
    modules: Literal["all", "top-level"] = "all"
    """modules to read; top-level leaves packages out"""

    @property
    def work(self) -> str:
        return WORK

    def files(self, source: str) -> Files:
        return library_files(top_level=self.modules == "top-level")

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Found]:
        return read(files, self.unit)


class StdlibDocstrings(SampledReader):
    """Docstrings of modules, classes and functions of the running Python's standard library."""

    reader: Literal["stdlib-docstrings"]
    """selects this reader"""
    modules: Literal["all", "top-level"] = "all"
    """modules to read; top-level leaves packages out"""

    @property
    def work(self) -> str:
        return WORK

    def files(self, source: str) -> Files:
        return library_files(top_level=self.modules == "top-level")

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Found]:
        return read(files, "docstring")
