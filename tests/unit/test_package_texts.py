"""Texts of packages: which files are read, in which encoding, without which markup."""

from __future__ import annotations

import gzip

import pytest

from stages.data.acquire.packages.texts import NotText, content_of, decoded, html_text, man_text, plain_text, spdx_tag


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("usr/share/doc/a/README", "documentation"),
        ("usr/share/doc/a/README.Debian", "documentation"),
        ("usr/share/doc/a/guide.txt", "documentation"),
        ("usr/share/doc/a/html/index.HTML", "documentation"),
        ("usr/share/man/man1/a.1", "documentation"),
        ("usr/share/man/de/man3/a.3pm", "documentation"),
        ("a-1.0/docs/index.rst", "documentation"),
        ("a-1.0/a/license.py", "code"),
        ("usr/include/a.h", "code"),
        ("usr/bin/a", None),
        ("usr/share/doc/a/copyright", None),
        ("a-1.0/LICENSE.txt", None),
        ("a-1.0/docs/COPYING.rst", None),
        ("a-1.0/a.egg-info/SOURCES.txt", None),
        ("a-1.0/CMakeLists.txt", None),
        ("a-1.0/requirements-dev.txt", None),
        ("a-1.0/static/a.min.js", None),
        ("usr/lib/a.1", None),
        ("", None),
    ],
)
def test_what_a_file_is(path: str, content: str | None) -> None:
    assert content_of(path) == content


def test_encodings() -> None:
    assert decoded("a.txt", "\ufeffGrün\r\nBlau\r".encode()) == "Grün\nBlau\n"
    assert decoded("a.txt.gz", gzip.compress("Grün".encode())) == "Grün"
    assert decoded("a.py", "# -*- coding: latin-1 -*-\n# Grün".encode("latin-1")).endswith("Grün")
    assert decoded("a.html", '<meta charset="koi8-r"><p>Да'.encode("koi8-r")).endswith("Да")
    assert decoded("a.el", "#!/bin/sh\n;; coding: iso-8859-2\nł".encode("iso-8859-2")).endswith("ł")
    for content, words in [
        ("Grün".encode("latin-1"), "not UTF-8"),
        (b"# coding: no-such-thing\n\xff", "not UTF-8"),
        (b'<meta charset="rot13">\xff', "not UTF-8"),
        (b'<meta charset="hex">\xff', "not UTF-8"),
        (b"# coding: punycode\n\xff", "not UTF-8"),
        (b"# coding: unicode_escape\n\xff", "not UTF-8"),
        (b"a\0b", "NUL"),
    ]:
        with pytest.raises(NotText, match=words):
            decoded("a.txt", content)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("# SPDX-License-Identifier: MIT\n", "MIT"),
        (
            "/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */\n",
            "GPL-2.0-only WITH Linux-syscall-note",
        ),
        ("<!-- SPDX-License-Identifier: (GPL-2.0 OR MIT) -->", "(GPL-2.0 OR MIT)"),
        (".. SPDX-License-Identifier: GPL-2.0\n\nText", "GPL-2.0"),
        ("// SPDX-License-Identifier:\n", None),
        ("No tag.", None),
        ("x" * 4000 + "SPDX-License-Identifier: MIT", None),
    ],
)
def test_spdx_tags(text: str, tag: str | None) -> None:
    assert spdx_tag(text) == tag


PAGE = """<?xml version="1.0" encoding="utf-8"?>
<html><head><title>Title</title><style>p {}</style></head><body>
<nav>Menu</nav><div class="related">Next</div>
<div role="main"><h1>Head<a class="headerlink" href="#a">¶</a></h1>
<p>One <b>bold</b>
  word<br/>and a line.</p><!-- hidden -->
<pre><span>def</span> f():
    return  1
</pre><ul><li>first</li><li>second</li></ul>
<table><tr><th>a</th><td>b</td></tr></table>after</div>
<script>code()</script><div class="big footer">Footer</div></body></html>"""


def test_a_page_without_its_navigation() -> None:
    lines = [line for line in html_text(PAGE).split("\n") if line]
    assert lines == [
        "Head", "One bold word", "and a line.", "def f():", "    return  1", "first", "second", "a b", "after",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["", " ", "<html></html>", "<!-- only -->", "<script>x</script>", "<nav>Menu</nav>"])
def test_a_page_without_text(page: str) -> None:
    assert html_text(page).strip() == ""


def test_a_page_of_deep_elements() -> None:
    assert "deep" in html_text("<div>" * 200 + "deep")
    html_text("<div>" * 100_000 + "deep")


MAN = r""".\" A comment
.TH GARDEN 1 "2020-01-01" "1.0"
.de Vb
.ft CW
..
.if n \{\
.  nh
.\}
.SH NAME
garden \- grow \fIplants\fR with \(lqcare\(rq
.SH "SEE ALSO"
.BR prune (1),
.B water " daily"
.TP
\fB\-q\fR, \fB\-\-quiet\fR
Say nothing\&.
.PP
A path: C:\\\e
.nf
  kept   spaces
.fi
.IP \(bu 2
item
"""


def test_a_man_page_without_its_requests() -> None:
    assert [line for line in man_text(MAN).split("\n") if line] == [
        "NAME", "garden - grow plants with “care”", "SEE ALSO", "prune(1),", "water  daily", "-q, --quiet", "Say nothing.",
        "A path: C:\\\\", "  kept   spaces", "•", "item",
    ]  # fmt: skip


def test_a_page_that_names_another_has_no_text() -> None:
    assert man_text(".so man1/other.1\n") == "" and man_text("") == ""
    assert man_text(".Dd May 1, 2020\n.Dt GARDEN 1\n.Sh NAME\n") == "", "mdoc(7) is not read"
    assert plain_text("usr/share/man/man1/a.1", ".SH A\nb\n") == "A\nb\n"
    assert plain_text("a/b.rst", ".SH A\n") == ".SH A\n"
