"""License strings as they occur in public records, and notices in texts, each with its answer."""

from __future__ import annotations

import csv
import re
from typing import Any

import pytest

from pipeline.core.bounds import spdx
from stages.data.acquire.licenses.expressions import AllowedLicenses, LicenseMap, load_map
from stages.data.acquire.licenses.free_text import LONGEST, RESTRICTED, expression_of
from stages.data.acquire.licenses.notices import FOOTER, HEADER, in_footer, in_header
from stages.data.recipe import load
from tests.fixtures import ROOT

with open(ROOT / "tests/data/license_strings.csv", encoding="utf-8", newline="") as file:
    STRINGS = list(csv.DictReader(file))
"""`seen` in records of a kind, `license` decided by hand (empty: none), `string`."""
OPEN = AllowedLicenses(
    sorted({
        license
        for row in STRINGS
        for license in re.findall(r"[\w.+-]+", row["license"])
        if license not in ("AND", "OR") and not RESTRICTED.search(license)
    })
)  # fmt: skip
"""All licenses of the answers that forbid neither commercial use nor derived works."""


def test_there_are_many_strings_of_many_sources() -> None:
    assert len(STRINGS) > 700 and len({row["seen"] for row in STRINGS}) > 25
    assert all(spdx(row["license"]) == row["license"] for row in STRINGS if row["license"])


@pytest.mark.parametrize("seen", sorted({row["seen"] for row in STRINGS}))
def test_strings_of_public_records(seen: str) -> None:
    rows = [row for row in STRINGS if row["seen"] == seen]
    answers = {row["string"]: expression_of(row["string"]) or "" for row in rows}
    assert answers == {row["string"]: row["license"] for row in rows}


RESTRICTIONS = [
    "non-commercial", "NonCommercial use only", "NC", "-NC", "ND", "no derivatives", "not", "except the images",
    "all rights reserved", "for research only", "unless otherwise noted", "nicht kommerziell", "or CC BY-NC 4.0", "was",
    "<NC>", "<!-- NC -->", "<https://creativecommons.org/licenses/by-nc/4.0/>",
]  # fmt: skip


@pytest.mark.parametrize("restriction", RESTRICTIONS)
def test_a_word_that_restricts_is_never_lost(restriction: str) -> None:
    open_strings = [row["string"] for row in STRINGS if row["license"] and OPEN.allows(row["license"])]
    for string in open_strings[::3]:
        for changed in (f"{restriction} {string}", f"{string} {restriction}", f"{string}, {restriction}"):
            assert not OPEN.allows(expression_of(changed) or "none"), changed


def test_alternatives_with_a_restricted_license_are_a_choice_in_spdx_only() -> None:
    assert expression_of("CC-BY-4.0 OR CC-BY-NC-4.0") == "CC-BY-4.0 OR CC-BY-NC-4.0"
    assert expression_of("cc-by-4.0 or cc-by-nc-4.0") is None
    assert expression_of("CC-BY-4.0 OR CC-BY-SA-4.0") == "CC-BY-4.0 OR CC-BY-SA-4.0"
    for parts in ("cc-by-4.0 or cc-by-sa-4.0", "CC BY or CC BY-SA", "Public domain or CC BY-SA 4.0"):
        assert expression_of(parts) is None, parts


def test_signs_around_and_after_words_count() -> None:
    assert expression_of("<https://creativecommons.org/licenses/by-nc/4.0/>") == "CC-BY-NC-4.0"
    assert expression_of("CC BY 4.0 <https://creativecommons.org/licenses/by/4.0/>") == "CC-BY-4.0"
    # The license of role-playing games, versions below another one, and a link that contradicts the words.
    for string in ("OGL 1.0a", "Apache License (< 2.0)", "CC BY <https://creativecommons.org/licenses/by-sa/4.0/>"):
        assert expression_of(string) is None, string


BY = "https://creativecommons.org/licenses/by/4.0/"


@pytest.mark.parametrize(
    ("string", "license"),
    [
        (f'<a href="{BY}" title="CC BY-NC 4.0">CC BY 4.0</a>', None),
        (f'<a title="Non-commercial use only" href="{BY}">CC BY 4.0</a>', None),
        (f"<a href='{BY}' title='CC BY-NC'>license</a>", None),
        (f'<a href="{BY}"><img alt="CC BY-NC 4.0" src="https://licensebuttons.net/l/by/4.0/88x31.png"></a>', None),
        (f'<a href="{BY}"><img alt="CC BY" src="https://licensebuttons.net/l/by-nc/4.0/88x31.png"></a>', None),
        (f'<a href="{BY}"><img src="/pictures/unknown.png"></a>', None),
        ('<span aria-label="CC BY-NC 4.0">CC BY 4.0</span>', None),
        ('<span title="CC BY-NC 4.0" title="CC BY 4.0">CC BY 4.0</span>', None),
        ('<span data-terms=noncommercial>CC BY 4.0</span>', None),
        ('<p noncommercial>CC BY 4.0</p>', None),
        ('<img alt="CC BY-NC 4.0">', "CC-BY-NC-4.0"),
        ('<img alt="CC BY 4.0">', "CC-BY-4.0"),
        (f'<a href="{BY}" title="Creative Commons Attribution 4.0" rel="license noopener" target="_blank">CC BY</a>', "CC-BY-4.0"),
        (f'<a href="{BY}"><img alt="CC BY" src="https://i.creativecommons.org/l/by/4.0/80x15.png" width="80"/></a>', "CC-BY-4.0"),
        ("<https://creativecommons.org/licenses/by/4.0/ non-commercial>", None),
    ],
)  # fmt: skip
def test_what_the_attributes_of_an_element_say_counts(string: str, license: str | None) -> None:
    assert expression_of(string) == license


def test_a_license_without_its_version_is_allowed_by_the_recipe_or_not() -> None:
    (commons,) = (source for source in load("open").sources if source.name == "commons")
    allows, licenses = AllowedLicenses(commons.license_allow).allows, LicenseMap({}, "text")
    strings = ["Public Domain", "CC-By", "CC-By-SA", "CC-BY", "CC-By-SA 4.0", "CC-BY-NC", "Various open data"]
    allowed = [string for string in strings if allows(licenses.expression(string) or "none")]
    assert allowed == strings[:5]
    (wiki,) = (source for source in load("open").sources if source.name == "wiki")
    assert not AllowedLicenses(wiki.license_allow).allows(expression_of("CC-By") or "none")


@pytest.mark.parametrize("name", ["common-pile", "the-stack"])
def test_a_map_has_only_what_is_local_to_its_source(name: Any) -> None:
    assert [string for string in load_map(name).licenses if expression_of(string) is not None] == []


def test_a_long_string_and_odd_ones_take_no_time() -> None:
    assert expression_of("MIT " * LONGEST) is None
    for odd in ("(" * LONGEST, "a/" * 1000, "<a href=" * 250, "cc by nd sa " * 150, "or " * 600, "\0", "\ud800", ""):
        assert expression_of(odd) is None, odd[:20]


APACHE = """Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS."""
GPL = """This program is free software; you can redistribute it and/or modify
it under the terms of the GNU General Public License as published by
the Free Software Foundation; either version 2 of the License, or
(at your option) any later version."""
LGPL = """This library is free software; you can redistribute it and/or
modify it under the terms of the GNU Lesser General Public
License as published by the Free Software Foundation; version 2.1 of the License."""
EXPAT = """Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND."""
BSD = """Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:
1. Redistributions of source code must retain the above copyright notice."""
ENDORSE = "Neither the name of Example nor the names of its contributors may be used to endorse or promote products."
ADVERTISING = "3. All advertising materials mentioning features of this software must display an acknowledgement."
GRANT = "Permission to use, copy, modify, and distribute this software"
ISC = f"""{GRANT} for any
purpose with or without fee is hereby granted, provided that the above
copyright notice and this permission notice appear in all copies."""
HPND = f"""{GRANT} and
its documentation for any purpose and without fee is hereby granted,
provided that the above copyright notice appear in all copies and that both
that copyright notice and this permission notice appear in supporting
documentation."""
CMU = """By obtaining, using, and/or copying this software and/or its
associated documentation, you agree that you have read, understood,
and will comply with the following terms and conditions:"""
ZLIB = """Permission is granted to anyone to use this software for any purpose,
including commercial applications, and to alter it and redistribute it
freely, subject to the following restrictions:"""
UNLICENSE = """This is free and unencumbered software released into the public domain.
Anyone is free to copy it for any purpose, commercial or non-commercial."""
NOTICES: list[tuple[str, str | None]] = [
    (APACHE, "Apache-2.0"),
    (GPL, "GPL-2.0-or-later"),
    (LGPL, "LGPL-2.1-only"),
    (EXPAT, "MIT"),
    (f"{EXPAT}\nExcept as contained in this notice, the name of X shall not be used.", "X11"),
    (BSD, "BSD-2-Clause"),
    (f"{BSD}\n{ENDORSE}", "BSD-3-Clause"),
    (f"{BSD}\n{ADVERTISING}\n{ENDORSE}", "BSD-4-Clause"),
    (ISC, "ISC"),
    (HPND, "HPND"),
    (f"{CMU}\n\n{HPND}", "MIT-CMU"),
    (ZLIB, "Zlib"),
    (UNLICENSE, "Unlicense"),
    ("This file is in the public domain.", "LicenseRef-Public-Domain"),
    ("This Source Code Form is subject to the terms of the Mozilla Public\nLicense, v. 2.0.", "MPL-2.0"),
    ("Distributed under the Boost Software License, Version 1.0.\n(See accompanying file)", "BSL-1.0"),
    ("SPDX-License-Identifier: GPL-2.0", "GPL-2.0-only"),
    ("Copyright (c) Example. All rights reserved.\nLicensed under the MIT License. See License.txt.", "MIT"),
    ("@license MIT\n@author A. Author", "MIT"),
    ("Licensed under CC BY-NC 4.0", "CC-BY-NC-4.0"),
    (f'Licensed under <a href="{BY}" title="CC BY-NC 4.0">CC BY 4.0</a>', None),
    (f'Licensed under CC BY 4.0, see <a href="{BY}"><img alt="CC BY-NC"></a>', None),
    ("From an answer (https://creativecommons.org/licenses/by-sa/4.0/).", "CC-BY-SA-4.0"),
    (f"{EXPAT}\nPortions released under the terms of the MIT license.", "MIT"),
    (f"{EXPAT}\nPortions licensed under the Example License.", None),
    ("Released under the MIT License for non-commercial use only.", None),
    ("This file is not in the public domain.", None),
    ("This code was never released into the public domain.", None),
    ("Based on code that was placed in the public domain.", None),
    ("This file is in the public domain, except the tables.", None),
    ("The hash was put into the public domain.\nCopyright (c) Example. All rights reserved.", None),
    (f"{BSD}\nRedistributions must come with information on how to obtain complete source code.", None),
    ("Licensed under the Apache License, Version 2.0\nand the Commons Clause.", None),
    ("Use of this file is governed by the Business Source\nLicense in the LICENSE file.", None),
    ("Copyright (c) Example. All rights reserved.", None),
    ("PROPRIETARY AND CONFIDENTIAL. All rights reserved.", None),
    ("Redistribution of this file is forbidden.", None),
]


@pytest.mark.parametrize("marks", ["# ", " * ", "// ", ""])
def test_notices_in_headers(marks: str) -> None:
    found = {}
    for notice, _ in NOTICES:
        notices = in_header("#!/bin/sh\n" + "".join(f"{marks}{line}\n" for line in notice.split("\n")) + "code()\n")
        assert notices is not None and notices.stated, notice
        found[notice] = notices.license
    assert found == dict(NOTICES)


def test_a_header_without_terms_states_no_license() -> None:
    assert in_header("# Copyright 2011 A. Author\nimport os\n") is None
    assert in_header("x = 1\n" * HEADER + f"# {GPL}") is None
    assert in_header("# All rights reserved, licensed to Example", re.compile("to Example")) is None
    for reference in (
        "All rights reserved.\n# Use of this source code is governed by a BSD-style\n# license that can be found in the LICENSE file.",
        "This source code is licensed under the BSD-style license found in the\n# LICENSE file in the root directory.",
    ):
        assert in_header(f"# Copyright 2015 Example. {reference}\nf()\n") is None
        assert in_header(f"# Confidential. {reference}\nf()\n") is not None


FOOTERS = {
    f'Licensed under <a href="{BY}" title="CC BY-NC 4.0">CC BY 4.0</a>': (True, None),
    f'Licensed under <a href="{BY}">CC BY 4.0</a> <img alt="by-nc"/>': (True, None),
    f'Licensed under <a href="{BY}" title="CC BY 4.0">CC BY 4.0</a>': (True, "CC-BY-4.0"),
    "© 2014 Example Corp. All rights reserved.": (True, None),
    "This work is licensed under a Creative Commons Attribution 4.0 International License.": (True, "CC-BY-4.0"),
    "This work is licensed under a Creative Commons Attribution-NonCommercial 4.0 International License.": (
        True, "CC-BY-NC-4.0",
    ),
    "Licensed under terms for non-commercial use.": (True, None),
    "Icons are licensed under CC BY 4.0. © 2014 Example. All rights reserved.": (True, None),
    "Licensed under a Creative Commons Attribution License, https://creativecommons.org/licenses/by/3.0/.": (
        True, "CC-BY-3.0",
    ),
    "Shared by the author, see https://creativecommons.org/licenses/by-nc/4.0/.": (True, "CC-BY-NC-4.0"),
    "Available under a Creative Commons noncommercial license": (True, None),
    "The film was licensed under an exclusive contract in 1999.": (False, None),
    "The public domain is the subject of the next chapter.": (False, None),
}  # fmt: skip


@pytest.mark.parametrize("footer", FOOTERS)
def test_notices_in_footers(footer: str) -> None:
    notice = in_footer(f"{'A page. ' * FOOTER}\n{footer}")
    assert (notice is not None, notice and notice.license) == FOOTERS[footer]
    assert in_footer(f"{footer}\n{'A page. ' * FOOTER}") is None
