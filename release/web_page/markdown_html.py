"""HTML from the lines of the cards: tables, lists, paragraphs, code and bold text. Everything else stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from markupsafe import Markup, escape

from release.standards.standard_facts import segment

CELL = re.compile(r"(?<!\\)\|")
INLINE = re.compile(r"`([^`]*)`|\*\*([^*]+)\*\*")
NUMBER = re.compile(r"[-+±0-9., %→()kMB/:]+|not measured|")


def file_link(path: str, text: str = "") -> Markup:
    """Returns a link to a file or a folder of the release."""
    return Markup('<a class="file" href="../{}">{}</a>').format(segment(path, "/"), text or path)


def inline(text: str) -> Markup:
    """Returns a line with code and bold text as HTML."""
    parts, end = [], 0
    for match in INLINE.finditer(text):
        parts.append(escape(text[end : match.start()]))
        tag = "code" if match[1] is not None else "b"
        parts.append(Markup(f"<{tag}>{{}}</{tag}>").format(match[1] if match[1] is not None else match[2]))
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def blocks(lines: Iterable[str], links: Mapping[str, str] | None = None) -> Markup:
    """Returns lines of Markdown as HTML; an empty line ends a table or a list.

    Args:
        lines: Lines of a card.
        links: {text of a head of a column or a row: path of its file}.
    """
    groups: list[list[str]] = []
    before = ""
    for line in lines:
        # Lines of one table or list follow each other; any other line is a paragraph.
        if line.startswith(("|", "-")) and line[:1] == before[:1]:
            groups[-1].append(line)
        elif line:
            groups.append([line])
        before = line
    return Markup("").join(_block(group, links or {}) for group in groups)


def _block(group: Sequence[str], links: Mapping[str, str]) -> Markup:
    if group[0].startswith("|"):
        return table(list(_rows(group)), links)
    if group[0].startswith("- "):
        return Markup("<ul>{}</ul>").format(
            Markup("").join(Markup("<li>{}</li>").format(inline(line[2:])) for line in group)
        )
    return Markup("<p>{}</p>").format(inline(" ".join(group)))


def _rows(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yields the cells of the rows of a Markdown table, the head first."""
    for number, line in enumerate(lines):
        if number != 1:  # the line below the head
            # A bar after a backslash is a bar of the text.
            cells = CELL.split(line.strip().removeprefix("|").removesuffix("|"))
            yield [cell.strip().replace("\\|", "|") for cell in cells]


def table(rows: Sequence[Sequence[str]], links: Mapping[str, str] | None = None) -> Markup:
    """Returns a table in a frame that scrolls by itself.

    Args:
        rows: Cells of Markdown of one line, or Markup. The first row is the head, the first column the row heads.
        links: {text of a head of a column or a row: path of its file}.
    """
    links = links or {}
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(_cell(cell, links)) for cell in rows[0])
    body = Markup("")
    for first, *others in rows[1:]:
        cells = [Markup('<th scope="row">{}</th>').format(_cell(first, links))]
        cells += [Markup("<td{}>{}</td>").format(_class(cell), _cell(cell, {})) for cell in others]
        body += Markup("<tr>{}</tr>").format(Markup("").join(cells))
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>"
    ).format(head, body)


def _class(cell: str) -> Markup:
    number = not isinstance(cell, Markup) and NUMBER.fullmatch(cell)
    return Markup(' class="number"') if number else Markup()


def _cell(cell: str, links: Mapping[str, str]) -> Markup:
    text = cell if isinstance(cell, Markup) else inline(cell)
    return file_link(links[cell], cell) if cell in links else text
