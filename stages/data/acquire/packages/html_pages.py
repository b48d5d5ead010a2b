"""The text of an HTML page of a manual: without its navigation, with its preformatted text as it is."""

from __future__ import annotations

import re
from typing import Any

_REMOVED = "head script style nav noscript template form button select svg iframe"
REMOVED = frozenset(_REMOVED.split())
"""Elements that are no text of a page."""
REMOVED_CLASS = re.compile(
    r"(?:^|\s)(?:headerlink|sphinxsidebar|related|navigation|navheader|navfooter|footer|sidebar)(?:\s|$)"
)
"""Classes of navigation: of Sphinx, DocBook and Doxygen."""
REMOVED_ROLES = ("navigation", "search")
MAIN = ("//main", "//*[@role='main']", "//*[@id='content']", "//body")
"""Where the text is: the first of these that occurs once."""
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
KEPT = "\0"
"""Marks preformatted text: HTML cannot hold it."""


def html_text(html: str) -> str:
    """One line for each block, a blank line between paragraphs."""
    import lxml.etree
    import lxml.html

    parser = lxml.html.HTMLParser(encoding="utf-8")
    try:
        page = lxml.html.document_fromstring(html.replace(KEPT, "").encode(), parser=parser)
    except lxml.etree.ParserError:  # nothing in it
        return ""
    root = next((elements[0] for elements in map(page.xpath, MAIN) if len(elements) == 1), page)
    lines = (_line(line) for line in "".join(_pieces(root)).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def _line(line: str) -> str:
    return line.replace(KEPT, "").rstrip() if KEPT in line else SPACES.sub(" ", line).strip()


def _pieces(root: Any) -> list[str]:
    """The texts of an element in their order, and the line breaks of blocks."""
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
