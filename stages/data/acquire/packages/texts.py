"""The text of a file of a package: plain text as it is, HTML and man pages without their markup."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, Literal

from stages.data.acquire.packages.archives import gunzip

Content = Literal["documentation", "code"]
_PLAIN = """
.adoc .asciidoc .markdown .md .mdown .org .pod .rst .texi .texinfo .text .txt .txi
"""
PLAIN = frozenset(_PLAIN.split())
HTML = frozenset([".htm", ".html", ".xhtml"])
_CODE = """
.ada .adb .ads .agda .bash .bat .c .cc .clj .cljs .cmake .cpp .cr .cs .cu .cxx .d .dart .el .elm .erl .ex .exs .f .f03
.f08 .f77 .f90 .f95 .fs .go .groovy .h .hh .hpp .hrl .hs .hxx .inc .inl .ipp .java .jl .js .jsx .kt .lhs .lisp .lua .m
.m4 .mjs .ml .mli .nim .pas .php .pl .pm .proto .ps1 .pxd .py .pyi .pyx .r .rake .rb .rkt .rktl .rs .s .scala .scm .sh
.sql .ss .sv .swift .t .tcl .ts .tsx .v .vala .vhd .vim .zig
"""
CODE = frozenset(_CODE.split())
# Documentation without a suffix.
NAMES = re.compile(r"(README|FAQ|HOWTO|HACKING|INSTALL|CONTRIBUTING|TUTORIAL|GUIDE|MANUAL|NOTES)\b[^/]*")
MAN_PAGE = re.compile(r"(.*/)?man[1-9][a-z]*/[^/]+\.[1-9][a-z]*")
# Texts of licenses, which are the same in thousands of packages.
LEGAL = re.compile(r"(copyright|copying|licen[cs]es?|notice|unlicense)([-._].*)?", re.IGNORECASE)
# Files for programs, and indexes.
LISTS = re.compile(
    r"(CMakeLists|SOURCES|top_level|entry_points|requires|dependency_links|requirements[^/]*|constraints[^/]*)\.txt"
    r"|changelog.*|.*\.min\.js|search\.html|genindex.*\.html|py-modindex\.html",
    re.IGNORECASE,
)
# Declarations of an encoding: of HTML, XML, and in the first two lines (PEP 263, Emacs).
CODINGS = (
    re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE),
    re.compile(rb"<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]{1,40})", re.IGNORECASE),
    re.compile(rb"^[^\n]{0,200}?coding[:=][ \t]*([\w.-]{1,40})"),
    re.compile(rb"^[^\n]*\n[^\n]{0,200}?coding[:=][ \t]*([\w.-]{1,40})"),
)
# Encodings of texts, by the names of Python's codecs.
CHARSETS = re.compile(r"iso8859|iso2022|cp\d|koi8|euc_|shift_jis|gb|big5|hz|utf-(?:8|16|32)|mac-|tis-620")
SPDX_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n]{1,500})")
# Characters at the beginning of a file in which the tag is about the file.
TAG_WITHIN = 3000
_REMOVED = "head script style nav noscript template form button select svg iframe"
# Elements that are no text of a page.
REMOVED = frozenset(_REMOVED.split())
# Classes of navigation: of Sphinx, DocBook and Doxygen.
REMOVED_CLASS = re.compile(
    r"(?:^|\s)(?:headerlink|sphinxsidebar|related|navigation|navheader|navfooter|footer|sidebar)(?:\s|$)"
)
REMOVED_ROLES = ("navigation", "search")
# Where the text is: the first of these that occurs once.
MAIN = ("//main", "//*[@role='main']", "//*[@id='content']", "//body")
_PARAGRAPHS = """
blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul
"""
PARAGRAPHS = frozenset(_PARAGRAPHS.split())
_LINES = """
address article aside body br caption center dd details div dt fieldset figcaption footer header hr li main summary
tbody tfoot thead tr
"""
LINES = frozenset(_LINES.split())
LINE_BREAKS = dict.fromkeys(PARAGRAPHS, "\n\n") | dict.fromkeys(LINES, "\n") | {"td": " ", "th": " "}
SPACES = re.compile(r"\s+")
# Marks preformatted text: HTML cannot hold it.
KEPT = "\0"


class NotText(Exception):
    """A file that is no text, or in an encoding that nobody knows."""


def content_of(path: str) -> Content | None:
    """Returns the kind of a file, by its path without .gz; None if it is no text for a corpus."""
    name = PurePosixPath(path).name
    suffix = PurePosixPath(name).suffix.lower()
    # Lists are checked first: some have suffixes of code or of documentation.
    if LISTS.fullmatch(name):
        return None
    if suffix in CODE:
        return "code"
    # A module `license.py` is code, so this comes after the suffixes of code.
    if LEGAL.fullmatch(name):
        return None
    if suffix in PLAIN | HTML or NAMES.fullmatch(name) or MAN_PAGE.fullmatch(path):
        return "documentation"
    return None


def decoded(path: str, content: bytes) -> str:
    """Returns the characters of a file.

    Raises NotText in words if it has none, ArchiveError if its compression is damaged.
    """
    if path.endswith(".gz"):
        content = gunzip(content)
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise NotText("it holds the character NUL")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        text = _decoded_as_declared(content, error)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded_as_declared(content: bytes, error: UnicodeDecodeError) -> str:
    for coding in CODINGS:
        if match := coding.search(content[:4000]):
            try:
                if CHARSETS.match(codecs.lookup(match[1].decode()).name):
                    return content.decode(match[1].decode())
            except (LookupError, UnicodeError):
                pass
            break
    raise NotText(f"it is not UTF-8, and declares no other encoding that it is in ({error.reason})")


def spdx_tag(text: str) -> str | None:
    """Returns the text after `SPDX-License-Identifier:` in a file, which may be no expression; None without a tag."""
    match = SPDX_TAG.search(text[:TAG_WITHIN])
    if match is None:
        return None
    value = re.split(r"\*/|-->|\*\)|\"|'", match[1])[0]
    return value.strip().rstrip("#*;").strip()


def plain_text(path: str, text: str) -> str:
    """Returns the text without markup, by the suffix of the path without .gz."""
    if PurePosixPath(path).suffix.lower() in HTML:
        return html_text(text)
    return man_text(text) if MAN_PAGE.fullmatch(path) else text


def html_text(html: str) -> str:
    """Returns one line for each block, a blank line between paragraphs."""
    import lxml.etree
    import lxml.html

    parser = lxml.html.HTMLParser(encoding="utf-8")
    try:
        # KEPT marks the lines that keep their blanks, so a page must not bring any.
        page = lxml.html.document_fromstring(html.replace(KEPT, "").encode(), parser=parser)
    except lxml.etree.ParserError:  # nothing in it
        return ""
    # The first kind of main element that occurs exactly once; otherwise the whole page.
    root = next((elements[0] for elements in map(page.xpath, MAIN) if len(elements) == 1), page)
    lines = (_line(line) for line in "".join(_pieces(root)).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def _line(line: str) -> str:
    return line.replace(KEPT, "").rstrip() if KEPT in line else SPACES.sub(" ", line).strip()


def _pieces(root: Any) -> list[str]:
    """Returns the texts of an element in their order, and the line breaks of blocks."""
    import lxml.etree

    pieces, preformatted = [], 0
    walk = lxml.etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, element in walk:
        is_element = event in ("start", "end")
        name = element.tag if is_element else ""
        if is_element and _is_removed(element):
            if event == "start":
                walk.skip_subtree()
        elif event == "start":
            preformatted += name == "pre"
            pieces += [LINE_BREAKS.get(name, ""), _characters(element.text, preformatted)]
        elif event == "end":
            preformatted -= name == "pre"
            pieces.append(LINE_BREAKS.get(name, "") if name != "br" else "")
        # The text after an element belongs to the one around it, and stays where the element is removed.
        if event != "start" and element is not root:
            pieces.append(_characters(element.tail, preformatted))
    return pieces


def _is_removed(element: Any) -> bool:
    classes = element.get("class")
    if element.tag in REMOVED or (classes and REMOVED_CLASS.search(classes)):
        return True
    return element.get("role") in REMOVED_ROLES


def _characters(text: str | None, preformatted: int) -> str:
    if not text:
        return ""
    return KEPT + text.replace("\n", f"\n{KEPT}") if preformatted else SPACES.sub(" ", text)


HEADINGS = frozenset(("SH", "SS"))
BREAKS = {
    **dict.fromkeys(("PP", "P", "LP", "HP", "sp", "TP", "TQ"), "\n\n"),
    **dict.fromkeys(("br", "RS", "RE", "nf", "EX", "fi", "EE"), "\n"),
}
ALTERNATING = frozenset(["BR", "BI", "IB", "IR", "RB", "RI"])
FONTS = frozenset(["B", "I", "SM", "SB", "R", "UR", "MT", "ME", "UE"])
# Named characters of groff_char(7), and strings that pod2man defines.
_CHARACTERS = r"""
em— en– hy- lq“ rq” oq‘ cq’ aq' dq" bu• co© rg® tm™ mu× +-± ->→ <-← ha^ ti~ rs\ ga` at@ sh# ba| br| de° ssß :aä :oö
:uü 'eé `eè 'aá <=≤ >=≥ !=≠ Fo« Fc» ul_ lB[ rB] lC{ rC} mi- pl+ eq= sl/ Do$ Eu€ fm′ ua↑ da↓ Aq' L"“ R"” ~nñ ,cç /oø
oaå aa´ sc§ 12½ 14¼ 34¾ ci○ sq□
"""
CHARACTERS = {word[:-1]: word[-1] for word in _CHARACTERS.split()}
# The first request of a page in mdoc(7).
MDOC = re.compile(r"^\.Dd ", re.MULTILINE)
ESCAPE = re.compile(
    r"\\(?:"
    r"(?P<comment>[\"#].*)"
    r"|f(?:\([^\n]{2}|\[[^]\n]*\]|.)|[sM][-+]?(?:\([0-9]{2}|'[^'\n]*'|\[[^]\n]*\]|[0-9]{1,2})|[mFgkMnVY](?:\([^\n]{2}|\[[^]\n]*\]|.)"
    r"|[hvwNDLlXxboRZ]'[^'\n]*'"
    r"|\*?(?:\((?P<two>[^\n]{2})|\[(?P<named>[^]\n]*)\])|\*(?P<one>.)"
    r"|(?P<space>[ ~0t])|(?P<backslash>[e\\E])|(?P<dash>[-])|(?P<quote>['`])|(?P<dot>\.)|[&|^/,:%cpdurz)!?{}a])"
)


def man_text(source: str) -> str:
    """Returns the text of a page in man(7) without its requests: headings and paragraphs, a blank line before each.

    The text is empty for a page that only names another (`.so`), and for one in mdoc(7), whose macros are text.
    """
    if MDOC.search(source):
        return ""
    pieces = "".join(_man_pieces(source.split("\n")))
    lines = (line.rstrip() for line in pieces.split("\n"))
    return f"{text}\n" if (text := re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")) else ""


def _man_pieces(lines: list[str]) -> Iterator[str]:
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        request = re.match(r"[.'][ \t]*([^\s\\]*)[ \t]*(.*)", line)
        if request is None:
            yield f"{unescaped(line)}\n"
            continue
        macro, rest = request[1], request[2]
        # Definitions of macros, and text that is ignored, are no text of the page.
        if macro in ("de", "de1", "am", "ig"):
            number = _after(lines, number, r"\.\..*")
        elif macro in ("if", "ie", "el", "while"):
            number = _after_block(lines, number, rest)
        elif macro in HEADINGS:
            # The text of a heading may stand in the next line.
            if not rest and number < len(lines):
                rest, number = lines[number], number + 1
            yield f"\n\n{unescaped(' '.join(arguments(rest)))}\n"
        elif macro in BREAKS:
            yield BREAKS[macro]
        elif macro == "IP":
            yield f"\n\n{unescaped(' '.join(arguments(rest)[:1]))}\n"
        # Macros that alternate fonts join their arguments without spaces.
        elif macro in ALTERNATING:
            yield f"{unescaped(''.join(arguments(rest)))}\n"
        elif macro in FONTS:
            yield f"{unescaped(' '.join(arguments(rest)))}\n"
        # The lines up to one that ends with a point lay out a table; the rows after it are text.
        elif macro == "TS":
            number = _after(lines, number, r".*\.[ \t]*")


def _after(lines: list[str], number: int, end: str) -> int:
    """Returns the number of the line after the one that ends a definition, which matches `end`."""
    while number < len(lines):
        number += 1
        if re.fullmatch(end, lines[number - 1]):
            return number
    return number


def _after_block(lines: list[str], number: int, rest: str) -> int:
    """Returns the number of the line after a conditional request, whose block may have several lines."""
    depth = rest.count("\\{") - rest.count("\\}")
    while depth > 0 and number < len(lines):
        depth += lines[number].count("\\{") - lines[number].count("\\}")
        number += 1
    return number


def arguments(rest: str) -> list[str]:
    """Returns the arguments of a macro; those with spaces are in double quotes."""
    rest = re.sub(r"\\\".*", "", rest)
    pairs = re.findall(r'"((?:[^"]|"")*)"?|((?:[^\s"\\]|\\.)(?:[^\s\\]|\\.)*|\\$)', rest)
    return [quoted.replace('""', '"') or plain for quoted, plain in pairs if quoted or plain]


def unescaped(text: str) -> str:
    """Returns the text with its escape sequences replaced (groff(7))."""
    return ESCAPE.sub(_character, text)


def _character(match: re.Match[str]) -> str:
    if match["space"]:
        return "\t" if match["space"] == "t" else " "
    if match["backslash"]:
        return "\\"
    if match["dash"] or match["quote"] or match["dot"]:
        return match["dash"] or match["dot"] or {"'": "´", "`": "`"}[match["quote"]]
    named = match["two"] or match["named"] or match["one"]
    if named and re.fullmatch(r"u[0-9A-F]{4,6}", named):
        code = int(named[1:], 16)
        return chr(code) if code < 0xD800 or 0xE000 <= code <= 0x10FFFF else ""
    return CHARACTERS.get(named or "", "")
