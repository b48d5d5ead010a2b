"""Licenses of the files of a source distribution (PEP 639)."""

from __future__ import annotations

import pytest

from stages.data.acquire.licenses.expressions import load_map
from stages.data.acquire.packages.python_metadata import Metadata, is_metadata, parse

MIT = "License :: OSI Approved :: MIT License"
BSD = "License :: OSI Approved :: BSD License"


def metadata(*lines: str, **files: str) -> Metadata:
    pkg_info = (
        "Metadata-Version: 2.4\nName: garden\n" + "".join(f"{line}\n" for line in lines) + "\nAbout: License: none\n"
    )
    license_files = {name.replace("__", "/"): text for name, text in files.items()}
    return parse([("PKG-INFO", pkg_info), *license_files.items()], load_map("pep639"))


@pytest.mark.parametrize(
    ("lines", "expression"),
    [
        (["License-Expression: mit OR Apache-2.0"], "MIT OR Apache-2.0"),
        (["License-Expression: BSD-3-Clause AND (MIT OR ISC)"], "BSD-3-Clause AND (MIT OR ISC)"),
        (["License-Expression: LicenseRef-Garden"], None),
        (["License-Expression: as you like", f"Classifier: {MIT}"], None),
        ([f"Classifier: {MIT}"], "MIT"),
        ([f"Classifier: {BSD}"], None),
        ([f"Classifier: {BSD}", "License: BSD-3-Clause"], "BSD-3-Clause"),
        ([f"Classifier: {MIT}", "License: MIT"], "MIT"),
        ([f"Classifier: {MIT}", "License: ISC"], None),
        (["License: The text of a license\n        of several lines."], None),
        (["License: UNKNOWN"], None),
        ([], None),
    ],
)
def test_license_of_a_distribution(lines: list[str], expression: str | None) -> None:
    assert metadata(*lines).license_of("garden/plot.py").expression == expression


def test_a_folder_with_a_license_file_of_its_own_is_of_others() -> None:
    distribution = metadata(
        "License-Expression: MIT", LICENSE="MIT text\n", docs__LICENSE="MIT  Text", src__vendor__x__LICENSE="Other text",
        licenses__COPYING="Third text", also__LICENSE="third text",
    )  # fmt: skip
    paths = ("a.py", "docs/a.rst", "src/a.py", "src/vendor/x/deep/a.py", "src/vendor/y.py", "also/a.py")
    licenses = [distribution.license_of(path).expression for path in paths]
    assert licenses == ["MIT", "MIT", "MIT", None, "MIT", "MIT"]
    assert "src/vendor/x/LICENSE" in distribution.license_of("src/vendor/x/a.py").name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("garden-1.0/PKG-INFO", True),
        ("garden-1.0/garden.egg-info/PKG-INFO", False),
        ("garden-1.0/src/LICENSE.txt", True),
        ("garden-1.0/LICENSES/MIT.txt", False),
        ("garden-1.0/COPYING", True),
        ("garden-1.0/garden/license.py", False),
        ("garden-1.0/docs/license.rst", False),
        ("garden-1.0/vendor/LICENSE.rst", True),
        ("garden-1.0/vendor/license", True),
        ("PKG-INFO", False),
        ("", False),
    ],
)
def test_files_with_metadata(path: str, expected: bool) -> None:
    assert is_metadata(path) == expected
