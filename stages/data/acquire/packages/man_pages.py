"""The text of a man page: man(7) and mdoc(7) without their requests, in the order of the source."""

from __future__ import annotations

import re
from collections.abc import Iterator

HEADINGS = frozenset(("SH", "SS", "Sh", "Ss"))
PARAGRAPHS = frozenset(["PP", "P", "LP", "HP", "Pp", "sp", "Bl", "Bd"])
LINE_BREAKS = frozenset(["br", "RS", "RE", "El", "Ed", "D1", "Dl"])
ALTERNATING = frozenset(["BR", "BI", "IB", "IR", "RB", "RI"])
FONTS = frozenset(["B", "I", "SM", "SB", "R", "UR", "MT", "ME", "UE"])
VERBATIM = {"nf": True, "EX": True, "fi": False, "EE": False}
_MDOC_INLINE = """
Ad An Ap Ar At Bx Cd Cm Dv Em Er Ev Fa Fd Fl Fn Ft Fx Ic In Lb Li Lk Ms Mt Nd Nm No Ns Nx Op Ox Pa Pf Sm Sx Sy Ta Tn
Ux Va Vt Xr Aq Bq Brq Dq Pq Ql Qq Sq Oo Oc Ao Ac Bo Bc Bro Brc Do Dc Po Pc Qo Qc So Sc Xo Xc It Fo Fc Rs Re
"""
MDOC_INLINE = frozenset(_MDOC_INLINE.split())
_ENCLOSED = 'Op[] Aq<> Bq[] Brq{} Dq“” Pq() Ql‘’ Qq"" Sq‘’'
MDOC_ENCLOSED = {macro[:-2]: macro[-2:] for macro in _ENCLOSED.split()}
MDOC_OPEN = {"Oo": "[", "Ao": "<", "Bo": "[", "Bro": "{", "Do": "“", "Po": "(", "Qo": '"', "So": "‘", "Fo": ""}
MDOC_CLOSE = {"Oc": "]", "Ac": ">", "Bc": "]", "Brc": "}", "Dc": "”", "Pc": ")", "Qc": '"', "Sc": "’", "Fc": ")"}
# Named characters of groff_char(7), and strings that pod2man defines.
_CHARACTERS = r"""
em— en– hy- lq“ rq” oq‘ cq’ aq' dq" bu• co© rg® tm™ mu× +-± ->→ <-← ha^ ti~ rs\ ga` at@ sh# ba| br| de° ssß :aä :oö
:uü 'eé `eè 'aá <=≤ >=≥ !=≠ Fo« Fc» ul_ lB[ rB] lC{ rC} mi- pl+ eq= sl/ Do$ Eu€ fm′ ua↑ da↓ Aq' L"“ R"” ~nñ ,cç /oø
oaå aa´ sc§ 12½ 14¼ 34¾ ci○ sq□
"""
CHARACTERS = {word[:-1]: word[-1] for word in _CHARACTERS.split()}
ESCAPE = re.compile(
    r"\\(?:"
    r"(?P<comment>[\"#].*)"
    r"|f(?:\([^\n]{2}|\[[^]\n]*\]|.)|[sM][-+]?(?:\([0-9]{2}|'[^'\n]*'|\[[^]\n]*\]|[0-9]{1,2})|[mFgkMnVY](?:\([^\n]{2}|\[[^]\n]*\]|.)"
    r"|[hvwNDLlXxboRZ]'[^'\n]*'"
    r"|\*?(?:\((?P<two>[^\n]{2})|\[(?P<named>[^]\n]*)\])|\*(?P<one>.)"
    r"|(?P<space>[ ~0t])|(?P<backslash>[e\\E])|(?P<dash>[-])|(?P<quote>['`])|(?P<dot>\.)|[&|^/,:%cpdurz)!?{}a])"
)


def man_text(source: str) -> str:
    """Returns headings and paragraphs as lines, a blank line before each.

    The text is empty for a page that only names another (`.so`).
    """
    pieces = "".join(_pieces(source.split("\n")))
    lines = (line.rstrip() for line in pieces.split("\n"))
    return f"{text}\n" if (text := re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")) else ""


def _pieces(lines: list[str]) -> Iterator[str]:
    verbatim, name, number = False, "", 0
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
            number = _after(lines, number, "..")
        elif macro in ("if", "ie", "el", "while"):
            number = _after_block(lines, number, rest)
        elif macro in VERBATIM:
            verbatim = VERBATIM[macro]
            yield "\n"
        elif macro in HEADINGS:
            # The text of a heading may stand in the next line.
            if not rest and number < len(lines):
                rest, number = lines[number], number + 1
            yield f"\n\n{unescaped(' '.join(arguments(rest)))}\n"
        elif macro in PARAGRAPHS:
            verbatim = verbatim or (macro == "Bd" and "-literal" in rest)
            yield "\n\n"
        elif macro in LINE_BREAKS:
            verbatim = verbatim and macro != "Ed"
            yield "\n" if macro != "D1" and macro != "Dl" else f"\n{_mdoc(arguments(rest), name)}\n"
        elif macro in ("TP", "TQ"):
            yield "\n\n"
        elif macro == "IP":
            yield f"\n\n{unescaped(' '.join(arguments(rest)[:1]))}\n"
        # Macros that alternate fonts join their arguments without spaces.
        elif macro in ALTERNATING:
            yield f"{unescaped(''.join(arguments(rest)))}\n"
        elif macro in FONTS:
            yield f"{unescaped(' '.join(arguments(rest)))}\n"
        # The lines up to one that ends with a point lay out a table; the rows after it are text.
        elif macro == "TS":
            number = _after(lines, number, r".*\.[ \t]*", pattern=True)
        elif macro in MDOC_INLINE:
            words = arguments(rest)
            # The first .Nm states the name; later ones without arguments stand for it.
            if macro == "Nm" and words and not name:
                name = words[0]
            text = _mdoc([macro, *words], name)
            yield f"\n\n{text}\n" if macro == "It" else f"{text}\n"


def _after(lines: list[str], number: int, end: str, pattern: bool = False) -> int:
    """Returns the number of the line after the one that ends a definition."""
    while number < len(lines):
        number += 1
        line = lines[number - 1]
        if re.fullmatch(end, line) if pattern else line.startswith(end):
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


def _mdoc(words: list[str], name: str) -> str:
    """Returns the text of a line of mdoc macros."""
    text, attached, closing = "", True, ""
    words = list(words)
    while words:
        word = words.pop(0)
        piece = unescaped(word)
        if word in MDOC_INLINE:
            piece = MDOC_OPEN.get(word, "")
            if word in MDOC_CLOSE:
                text += MDOC_CLOSE[word]
                continue
            if word in MDOC_ENCLOSED:
                piece, closing = MDOC_ENCLOSED[word][0], MDOC_ENCLOSED[word][1] + closing
            elif word == "Fl":
                piece = "-"
            elif word == "Xr" and len(words) > 1:
                piece = f"{words.pop(0)}({words.pop(0)})"
            elif word == "Nm" and (not words or words[0] in MDOC_INLINE):
                piece = name
            elif word in ("Ns", "Ap", "Pf"):
                attached, piece = True, "'" if word == "Ap" else ""
            if not piece:
                continue
            text += piece if attached else f" {piece}"
            attached = piece in tuple("[<{“(‘\"'-")
            continue
        text += piece if attached or re.fullmatch(r"[.,:;)\]?!]", word) else f" {piece}"
        attached = word in ("(", "[")
    return text + closing


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
