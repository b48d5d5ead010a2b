"""Licenses of the files of a Debian package: known answers of DEP-5, and of what packages write beside it."""

from __future__ import annotations

import time

import pytest

from stages.data.acquire.licenses.expressions import load_map
from stages.data.acquire.packages import stated_licenses
from stages.data.acquire.packages.stated_licenses import Copyright
from tests.fixtures.package_fixtures import COPYRIGHT

HEADER = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
EXPAT_TEXT = """
 Permission is hereby granted, free of charge, to any person obtaining a copy
 of this software and associated documentation files (the "Software"), to deal
 in the Software without restriction, including without limitation the rights
 to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
 copies of the Software, and to permit persons to whom the Software is
 furnished to do so, subject to the following conditions:
 .
 The above copyright notice and this permission notice shall be included in
 all copies or substantial portions of the Software.
 .
 THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND."""


def parse(text: str) -> Copyright:
    copyright = stated_licenses.parse(text, load_map("dep5"))
    assert copyright is not None
    return copyright


def of_patterns(*paragraphs: tuple[str, str]) -> Copyright:
    return parse(HEADER + "".join(f"\nFiles: {files}\nCopyright: A\nLicense: {name}\n" for files, name in paragraphs))


@pytest.mark.parametrize(
    ("field", "expression"),
    [
        ("GPL-2+", "GPL-2.0-or-later"),
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-2 or later", "GPL-2.0-or-later"),
        ("GPL-2+ or later", "GPL-2.0-or-later"),
        ("LGPL-2.1 or any later version", "LGPL-2.1-or-later"),
        ("GPL-2.0-or-later", "GPL-2.0-or-later"),
        ("GPL-3 or (at your option) any later version", "GPL-3.0-or-later"),
        ("Expat", "MIT"),
        ("GPL-1+ or Artistic", "GPL-1.0-or-later OR Artistic-1.0-Perl"),
        ("GPL-2+ and/or Expat", "GPL-2.0-or-later OR MIT"),
        ("GPL-2+ and BSD-3-clause or Expat", "GPL-2.0-or-later AND BSD-3-Clause OR MIT"),
        ("GPL-2+ or Expat, and BSD-3-clause", "(GPL-2.0-or-later OR MIT) AND BSD-3-Clause"),
        ("public-domain", "LicenseRef-Public-Domain"),
        ("PostgreSQL", "PostgreSQL"),
        ("Unicode-DFS-2016 and Expat", "Unicode-DFS-2016 AND MIT"),
        ("MIT", None),
        (f"MIT{EXPAT_TEXT}", "MIT"),
        ("LicenseRef-Public-Domain", None),
        ("as-you-like", None),
        ("GPL-2+ and as-you-like", None),
        ("", None),
    ],
)
def test_license_fields(field: str, expression: str | None) -> None:
    assert of_patterns(("*", field)).license_of("usr/bin/a").expression == expression


def test_a_name_takes_its_text_from_a_paragraph_of_its_own() -> None:
    fields = "\nFiles: *\nCopyright: A\nLicense: MIT\n\nLicense: MIT"
    assert parse(f"{HEADER}{fields}{EXPAT_TEXT}\n").license_of("a").expression == "MIT"
    assert parse(f"{HEADER}{fields}\n Do what you like with it, and name us.\n").license_of("a").expression is None


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*", "a/b/.c", True),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("a?c", "a/c", True),
        ("a*c", "a/b/c", True),
        ("./src/*.c", "src/x/y.c", True),
        ("src/*.c", "src/x.cc", False),
        (r"a\*", "a*", True),
        (r"a\*", "ab", False),
        (r"a\?b*", "a?bc", True),
        ("a[bc]", "ab", False),
        ("a[bc]", "a[bc]", True),
        ("a.c", "abc", False),
        ("*a*b*c", "1a2b3c", True),
        ("*a*b*c", "1a2c3b", False),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool) -> None:
    expected = "MIT" if matches else "ISC"
    assert of_patterns(("*", "ISC"), (pattern, "Expat")).license_of(path).expression == expected


def test_the_last_matching_paragraph_wins() -> None:
    licenses = of_patterns(("*", "GPL-2+"), ("lib/*\n lib2/*", "ISC"), ("lib/b.c", "Expat"), ("lib/b*", "Zlib"))
    paths = ("c.c", "lib/a.c", "lib2/deep/a.c", "lib/b.c")
    assert [licenses.license_of(path).expression for path in paths] == ["GPL-2.0-or-later", "ISC", "ISC", "Zlib"]


def test_paths_of_a_binary_package() -> None:
    copyright = parse(COPYRIGHT)
    expected = {
        "usr/share/doc/garden/README": "GPL-2.0-or-later",
        "usr/share/doc/garden/examples/a.txt": "MIT",
        "usr/lib/python3/dist-packages/examples/a.py": "MIT",
        "usr/share/garden/tools/prune.c": "MIT",
        "usr/share/garden/deep/tools/prune.c": "GPL-2.0-or-later AND MIT",  # one of both: the source's folder is unknown
        "usr/share/doc/garden/vendor/x.txt": None,
    }
    assert {path: copyright.license_of(path).expression for path in expected} == expected


def test_documentation_may_come_from_a_folder_of_documents() -> None:
    copyright = of_patterns(("*", "GPL-2+"), ("doc/*", "Expat"), ("debian/*", "ISC"), ("src/deep/one.py", "Zlib"))
    expected = {
        "usr/share/doc/garden/guide.txt": "GPL-2.0-or-later AND MIT",
        "usr/share/man/man1/garden.1": "GPL-2.0-or-later AND MIT",
        "usr/share/garden/guide.py": "GPL-2.0-or-later",
        "usr/share/doc/garden/README.Debian": "ISC",
        "usr/lib/python3/dist-packages/deep/one.py": "GPL-2.0-or-later AND Zlib",
    }
    assert {path: copyright.license_of(path).expression for path in expected} == expected


def test_a_pattern_of_an_installed_path() -> None:
    copyright = of_patterns(("*", "GPL-2+"), ("usr/share/doc/garden/art/*", "Expat"))
    assert copyright.license_of("usr/share/doc/garden/art/x.txt").expression == "MIT"
    assert copyright.license_of("usr/share/doc/garden/x.txt").expression == "GPL-2.0-or-later"


@pytest.mark.parametrize(
    "text", ["", "This package was debianized by A.\n\nLicense: GPL\n", "Files: *\nLicense: Expat\n", "\0\n\n:\n"]
)
def test_other_files_are_not_machine_readable(text: str) -> None:
    assert stated_licenses.parse(text, load_map("dep5")) is None


def test_a_file_of_too_many_patterns_gives_no_license() -> None:
    patterns = " ".join(f"a{n}*" for n in range(stated_licenses.MAX_PATTERNS + 1))
    text = f"{HEADER}\nFiles: {patterns}\nLicense: Expat\n"
    assert stated_licenses.parse(text, load_map("dep5")) is None


def test_the_header_may_have_the_license_of_everything() -> None:
    assert parse(f"{HEADER}License: Expat\nCopyright: A\n").license_of("a").expression == "MIT"
    assert parse(HEADER).license_of("a").expression is None


def test_comments_repeated_fields_and_carriage_returns() -> None:
    text = f"{HEADER}\n# a comment\nFiles: a, b\n# another\n c\nLicense: Expat\nLicense: GPL-2\n".replace("\n", "\r\n")
    copyright = parse(text)
    assert [copyright.license_of(path).expression for path in "abcd"] == ["MIT", "MIT", "MIT", None]


def test_no_pattern_takes_long() -> None:
    copyright = of_patterns(("*", "ISC"), ("*a" * 60 + "*b", "Expat"))
    began = time.process_time()
    assert copyright.license_of("a" * 4000).expression == "ISC"
    assert time.process_time() - began < 1
