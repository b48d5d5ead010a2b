"""Checks the kinds of files in a release and the content of each: no programs and no pickles.

This is an allow list, because a list of all executable kinds is never complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.text import unprintable
from release import untrusted
from release.cards.plots import entries
from release.layout import LOSS, PAGE, PUBLIC_KEY, SECOND_VERIFIER, SIGNATURE, SUMS

PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
"""Names of files that hold pickles, or that loaders unpickle."""
TEXTS = frozenset({".bib", ".cff", ".csv", ".jinja", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml"})
TABLES = frozenset({".gguf", ".parquet", ".png", ".safetensors"})
"""Tables, weights and pictures, which are no texts."""
NAMES = frozenset({"LICENSE", "NOTICE", SUMS, SIGNATURE, PUBLIC_KEY, ".gitattributes"})
"""Names of further texts."""
SOURCES = frozenset({".py", ".pyi", ".toml", ".cfg", ".ini", ".lock", ".sh", ".sbatch", ".in", ".typed", ".css"})
"""Further kinds that are allowed in `code/` and for the second verifier, which only a release's evidence has."""
TEXT_BYTES = 64 << 20
"""The maximum size of a text; the size of logs (.jsonl) follows from the length of the training."""
GGUF = b"GGUF"
"""The first bytes of a file of that format."""
MAGIC = {
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\xfe\xed\xfa": "a program",
    b"\xce\xfa\xed\xfe": "a program",
    b"\xcf\xfa\xed\xfe": "a program",
    b"\xca\xfe\xba\xbe": "a program",
    b"\0asm": "a program",
    b"dex\n": "a program",
    b"!<arch>\n": "a library",
    b"#!": "a script",
    b"PK\3\4": "an archive",
    b"PK\5\6": "an archive",
    b"\x1f\x8b": "an archive",
    b"BZh": "an archive",
    b"\xfd7zXZ": "an archive",
    b"7z\xbc\xaf": "an archive",
    b"\x28\xb5\x2f\xfd": "an archive",
    b"Rar!": "an archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "an array that may hold pickles",
    b"SQLite format 3": "a database",
}
"""{first bytes: what a file that begins with them is}"""
STARTS = {".gguf": GGUF, ".parquet": b"PAR1", ".png": b"\x89PNG\r\n\x1a\n"}
"""{kind: the bytes with which its files must begin}"""
CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys of JSON that model loaders read as the name of code to run."""
RUNS = "which a loader might run; a release holds none"
"""The end of a sentence about code."""
SHOWN = frozenset({".md", ".cff", ".yaml", ".yml"})
"""Texts that people, or a Hub for them, read."""
ATTRIBUTES = re.compile(rb"(?:(?:#[^\n]*|[^\s#]+ filter=lfs diff=lfs merge=lfs -text)?\n)*")
"""The content of `.gitattributes`: comments, and patterns of files in LFS."""
CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1f\x7f]")
"""Control characters other than white space."""


def formats(folder: Path, files: Iterable[str], archive: bool) -> list[str]:
    """Returns the problems with the kinds of files in a folder.

    Args:
        folder: The folder.
        files: The paths of its files.
        archive: Whether `code/` is the source code of the release, which only a release and its evidence have.
    """
    problems = []
    for path in sorted(files):
        # The Hub's client writes there, and `release.untrusted` has refused all that it does not write.
        if path.startswith(".cache/"):
            continue
        source = archive and (path.startswith("code/") or path == SECOND_VERIFIER)
        page = archive and path == PAGE
        try:
            problems += [f"{path} {text}" for text in _file_problems(folder / path, source, page)]
        except CheckFailed as error:
            problems.append(f"{path}: {error}")
        except UnicodeDecodeError:
            problems.append(f"{path} is a text that is not UTF-8")
    return problems


def _file_problems(file: Path, source: bool, page: bool) -> Iterator[str]:
    """Yields the problems with one file. Raises CheckFailed if it cannot be read.

    Args:
        file: The file.
        source: Whether it is source code of the release.
        page: Whether it is the page of the release.
    """
    suffix, name = file.suffix.lower(), file.name
    with untrusted.open_regular(file, follow=True) as stream:
        start = stream.read(16)
    # Protocols 2 to 5 of pickle begin with this byte and their number; PyTorch wraps them in a zip archive.
    is_pickle = start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if suffix in PICKLES or is_pickle or start.startswith(b"PK\3\4"):
        yield "is, or may be, a pickle, which runs code when it is loaded; a release holds none"
        return
    # A name is enough for a loader to import it.
    if suffix in (".py", ".pyc", ".pyo", ".pyd", ".so", ".sh") and not (source and suffix in SOURCES):
        yield f"is compiled code, {RUNS}" if source else f"is code beside data or weights, {RUNS}"
        return
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if kind and not (source and kind == "a script"):
        yield f"is {kind} by its first bytes, {RUNS}"
        return
    if start.startswith(GGUF) and suffix != ".gguf":
        yield f"is weights of another format by its first bytes, {RUNS}"
        return

    allowed = suffix in TEXTS or suffix in TABLES or name in NAMES or page
    if not (allowed or (source and (suffix in SOURCES or not suffix))):
        yield "is of a kind that a release does not hold"
    elif suffix == ".gguf" and not (file.parent / LOSS).is_file():
        yield f"is weights of another format and no variant, whose {LOSS} is beside it"
    elif suffix in STARTS and not start.startswith(STARTS[suffix]):
        yield f"is no {suffix[1:]} file by its first bytes"
    elif suffix == ".safetensors":
        untrusted.tensor_header(file, follow=True)
    elif suffix == ".png" and entries(untrusted.read(file, TEXT_BYTES, follow=True)) is None:
        yield "is no picture whose parts are all there, and nothing else"
    elif suffix not in TABLES and suffix != ".jsonl":
        data = untrusted.read(file, TEXT_BYTES, follow=True)
        if suffix == ".json" and not source:
            yield from _json_problems(data, name)
        elif CONTROLS.search(data):
            yield "is a text with characters that no text has"
        elif name == ".gitattributes" and not ATTRIBUTES.fullmatch(data):
            yield "has other lines than those by which a Hub says which files are large"
        elif suffix in SHOWN and not source and (character := unprintable(data.decode(), lines=True)):
            yield f"has the character U+{ord(character):04X}, which cannot be seen or turns the text around it"


def _json_problems(data: bytes, name: str) -> Iterator[str]:
    """Yields the problems of a JSON file.

    It must be in a form in which this tool writes JSON, and must not name code to load a model with, at any depth.
    """
    value = untrusted.parse_json(data, name)
    if not any(data == text.encode(errors="surrogatepass") for text in _forms(value)):
        yield "is not in a form in which atom writes JSON"
    # Without recursion, since whoever made the file chose how deep it is nested.
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key in CODE_KEYS:
                if key in value:
                    yield f"names code to load a model with ({key}); a release needs none"
                    return
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _forms(value: Any) -> Iterator[str]:
    """Yields the texts of JSON that this tool and its libraries write for a value."""
    yield json.dumps(value, indent=1) + "\n"
    yield json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    yield json.dumps(value, ensure_ascii=False, separators=(",", ":"))
