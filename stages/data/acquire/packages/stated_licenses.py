"""Machine-readable debian/copyright files (DEP-5): the license of each file of a package.

https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/. The patterns of `Files` are paths in the source
package; a path of a binary package is compared without the folders that it is installed in. The last paragraph that
matches wins. Where only an end of a pattern matches an end of a path (`src/a/b.py` and `a/b.py`), or a pattern is about
a folder of documents and the path is documentation, the paragraph may be about this file or about another: then both
licenses are taken to apply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stages.data.acquire.licenses import free_text, notices
from stages.data.acquire.licenses.expressions import LicenseMap

FORMAT_FIELDS = ("format", "format-specification")
# Files that debhelper installs from the folder debian/ of a source package.
OF_DEBIAN = re.compile(r"usr/share/doc/[^/]+/((?:README|NEWS|TODO)\.Debian(?:\.[^/]*)?|changelog\.Debian)$")
# Where a binary package has its files: nothing of it is a path in the source package.
INSTALL_FOLDERS = re.compile(
    r"^(?:usr/share/doc/[^/]+|usr/share/man(?:/[^/]+)?/man[^/]*|usr/lib/python3/dist-packages|usr/share/[^/]+|usr/include"
    r"|usr/lib/[^/]+|usr/src|etc|s?bin|usr/s?bin)/"
)
WILDCARD = re.compile(r"(?<!\\)[*?]")
INSTALLED_DOCUMENTS = re.compile(r"usr/share/(?:doc|gtk-doc|help|info|man)/")
# Of a source package: a pattern, and its end in such a folder.
DOCUMENT_FOLDERS = re.compile(r"(?:.*/)?(?:docs?|documentation|man|manual)/(.*)", re.IGNORECASE)
# Of a file; libboost1.88-doc has 4,800. A file of more gives no license.
MAX_PATTERNS = 50_000
# Names that packages use for that text and for others.
EXPAT_NAMES = {"MIT": "MIT", "X11": "MIT", "MIT-1": "MIT"}


def is_copyright_file(path: str) -> bool:
    """Returns True for the path of a binary package's copyright file."""
    return bool(re.fullmatch(r"usr/share/doc/[^/]+/copyright(\.gz)?", path))


@dataclass(frozen=True, slots=True)
class License:
    """A stated license.

    Attributes:
        name: The first line of the license field.
        expression: SPDX; None if it has none.
    """

    name: str
    expression: str | None


@dataclass(frozen=True, slots=True)
class _Wildcards:
    """A pattern with wildcards.

    Attributes:
        paragraph: The number of its paragraph.
        pattern: Matches a whole path.
        end: Matches the end of a path that may be meant; None without one.
        documents: Matches documentation that may be meant; None without one.
    """

    paragraph: int
    pattern: re.Pattern[str]
    end: re.Pattern[str] | None
    documents: re.Pattern[str] | None


class Copyright:
    """A parsed file; `paragraphs` holds the patterns and the license of each paragraph with `Files`."""

    def __init__(self, paragraphs: Sequence[tuple[Sequence[str], License]]) -> None:
        self._licenses = [license for _, license in paragraphs]
        self._by_path: dict[str, int] = {}
        self._by_name: dict[str, list[int]] = {}
        self._wildcards: list[_Wildcards] = []
        for number, (patterns, _) in enumerate(paragraphs):
            for pattern in patterns:
                if WILDCARD.search(pattern):
                    self._wildcards.append(_wildcards(number, pattern))
                else:
                    path = re.sub(r"\\([*?\\])", r"\1", pattern)
                    self._by_path[path] = number
                    self._by_name.setdefault(path.rpartition("/")[2], []).append(number)

    def license_of(self, path: str) -> License:
        """Returns the license of a file by its path.

        The path is that in the source package, or in a binary package without the suffix .gz.
        """
        source_path = INSTALL_FOLDERS.sub("", path)
        if installed := OF_DEBIAN.match(path):
            source_path = f"debian/{installed[1]}"
        covering = max(self._by_path.get(name, -1) for name in (path, source_path))
        # The last matching paragraph wins, so the search goes backwards and stops at one that a path without
        # wildcards beat.
        for wildcards in reversed(self._wildcards):
            if wildcards.paragraph <= covering:
                break
            if wildcards.pattern.fullmatch(source_path) or _covers_installed(wildcards.pattern, path):
                covering = wildcards.paragraph
        # A later paragraph whose pattern only ends like the path may be about this file as well.
        doubtful = {number for number in self._by_name.get(source_path.rpartition("/")[2], ()) if number > covering}
        is_document = INSTALLED_DOCUMENTS.match(path)
        for wildcards in reversed(self._wildcards):
            if wildcards.paragraph <= covering:
                break
            ends = (wildcards.end, wildcards.documents if is_document else None)
            if any(end and end.fullmatch(source_path) for end in ends):
                doubtful.add(wildcards.paragraph)
        numbers = ([covering] if covering >= 0 else []) + sorted(doubtful)
        return _all_of([self._licenses[number] for number in numbers]) if numbers else License("", None)


def _wildcards(number: int, pattern: str) -> _Wildcards:
    end, in_documents = _end_of(pattern), DOCUMENT_FOLDERS.match(pattern)
    return _Wildcards(
        number,
        re.compile(_regex(pattern), re.DOTALL),
        re.compile(f"(?:.*/)?{_regex(end)}", re.DOTALL) if end else None,
        re.compile(f"(?:.*/)?{_regex(in_documents[1])}", re.DOTALL) if in_documents else None,
    )


def _covers_installed(pattern: re.Pattern[str], path: str) -> bool:
    """Returns True if a pattern names the path in the binary package, as some packages write it."""
    return pattern.pattern.startswith(("usr/", "etc/")) and bool(pattern.fullmatch(path))


def parse(text: str, names: LicenseMap) -> Copyright | None:
    """Returns the paragraphs of a copyright file, with SPDX by `names`; None if the file is not machine-readable."""
    paragraphs = list(_paragraphs(text))
    if not paragraphs or not any(paragraphs[0].get(name) for name in FORMAT_FIELDS):
        return None
    # Paragraphs of a license alone hold the texts that other paragraphs name.
    alone = [paragraph for paragraph in paragraphs if paragraph.get("license") and not paragraph.get("files")]
    texts = {_name(paragraph): paragraph["license"] for paragraph in alone}
    of_files = [paragraph for paragraph in paragraphs if paragraph.get("files")]
    # The header's license holds for the package as a whole if no paragraph names files.
    if not of_files and paragraphs[0].get("license"):
        of_files = [{**paragraphs[0], "files": "*"}]
    if sum(len(fields["files"].split()) for fields in of_files) > MAX_PATTERNS:
        return None
    return Copyright([(_patterns(fields["files"]), _license(fields, texts, names)) for fields in of_files])


def _patterns(field: str) -> list[str]:
    """Returns the patterns of a field; commas between them are of drafts of the specification."""
    return [pattern.rstrip(",").removeprefix("./").lstrip("/") for pattern in field.split()]


def _name(paragraph: Mapping[str, str]) -> str:
    return " ".join(paragraph.get("license", "").partition("\n")[0].split())


def _license(paragraph: Mapping[str, str], texts: Mapping[str, str], names: LicenseMap) -> License:
    """Returns the license of a paragraph.

    A name that `names` lacks may be an SPDX identifier, MIT if its text says so.
    """
    name = _name(paragraph)
    expression = names.expression(name)
    if expression is not None:
        return License(name, expression)
    text = paragraph["license"] if "\n" in paragraph.get("license", "") else texts.get(name)
    identifiers = {}
    for word in set(re.findall(r"[A-Za-z0-9.-]+", name)):
        stands_for = EXPAT_NAMES.get(word, word)
        # Several licenses are called MIT; only the text tells which one is meant.
        if word in EXPAT_NAMES and not notices.is_expat(text or texts.get(word, "")):
            continue
        if identifier := free_text.stated_spdx(stands_for):
            identifiers[word] = identifier
    return License(name, names.extended(identifiers).expression(name) if identifiers else None)


def _all_of(licenses: list[License]) -> License:
    """Returns the license of a file to which all of these apply."""
    distinct = list(dict.fromkeys(licenses))
    if len(distinct) == 1:
        return distinct[0]
    name = " and ".join(f"({license.name})" for license in distinct)
    return License(name, free_text.all_of({license.expression for license in distinct}))


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Yields the fields of each paragraph, by their names in lower case; of a field that is repeated, the first."""
    fields: dict[str, str] = {}
    name = ""
    # The empty line at the end closes the last paragraph.
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            if name:
                fields[name] += "\n" if line.strip() == "." else f"\n{line.strip()}"
        elif match := re.match(r"([!-9;-~]+):(.*)", line):
            name = match[1].casefold()
            # Without a name, the further lines of a repeated field are left out as well.
            if name in fields:
                name = ""
            else:
                fields[name] = match[2].strip()


def _regex(pattern: str) -> str:
    r"""Returns the regular expression of a pattern of file names.

    `*` stands for any text, slashes too, and `?` for any character; a backslash escapes. The text after `*` is sought
    once, so that no pattern takes long.
    """
    tokens = re.findall(r"\\[*?\\]|\*+|.", pattern, re.DOTALL)
    pieces = [""]
    for token in tokens:
        if token.startswith("*"):
            pieces.append("")
        else:
            pieces[-1] += "." if token == "?" else re.escape(token[1:] or token)
    first, *middle = pieces
    if not middle:
        return first
    # An atomic group is never tried again, so the time of a match stays linear in the pattern.
    return f"{first}{''.join(f'(?>.*?{piece})' for piece in middle[:-1])}.*{middle[-1]}"


def _end_of(pattern: str) -> str | None:
    """Returns the shortest end of a pattern that has a name without wildcards; None if it has no such name."""
    names = pattern.split("/")
    for start in reversed(range(len(names))):
        if names[start] and not WILDCARD.search(names[start]):
            return "/".join(names[start:])
    return None
