"""Licenses: the maps from a source's strings to SPDX, the grammar of DEP-5, and the licenses that a source allows."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.core.bounds import spdx
from pipeline.core.stage import identity
from pipeline.core.store import sha256_bytes
from stages.data.acquire import acquire_stage
from stages.data.acquire.licenses.addresses import expression_of
from stages.data.acquire.licenses.expressions import AllowedLicenses, LicenseMap, MapName, load_map
from stages.data.acquire.readers.row_files import Jsonl, field_at
from stages.data.curate.filter_stage import FilteredSource
from stages.data.curate.source_filter import Removed, SourceFilter
from stages.data.recipe import SourceConfig, load
from stages.formats.table import content_hash
from tests.fixtures import ROOT

DIGESTS = {
    "common-pile": "6c46db900",
    "the-stack": "7d450f770",
    "tulu-3": "223821a0a",
    "dep5": "d54d098f1",
    "pep639": "1c2003c16",
    "free_text": "9b2470bcb",
    "notices": "6af64eeaf",
}
"""The first digits of the SHA-256 of each file of licenses, and the version of acquire that reads them."""
VERSION = 9


def test_a_map_that_changes_raises_the_version_of_acquire() -> None:
    """A map is named in a key, and not contained in it."""
    folder = ROOT / "stages/data/acquire/licenses"
    digests = {path.stem: sha256_bytes(path.read_bytes())[:9] for path in folder.glob("*.yaml")}
    message = "raise VERSION of stages/data/acquire/acquire_stage.py, then note both here"
    assert (digests, acquire_stage.VERSION) == (DIGESTS, VERSION), message


@pytest.mark.parametrize("name", get_args(MapName))
def test_every_string_of_a_map_has_an_spdx_expression_and_a_source(name: MapName) -> None:
    licenses = load_map(name)
    for string, expression in licenses.licenses.items():
        assert licenses.expression(string) == spdx(expression), string
    head = (ROOT / f"stages/data/acquire/licenses/{name}.yaml").read_text().split("\nsyntax:")[0]
    assert "Read from https://" in head.replace("# ", "")


def test_every_map_is_a_file_of_the_folder() -> None:
    files = {path.stem for path in (ROOT / "stages/data/acquire/licenses").glob("*.yaml")}
    assert files == {*get_args(MapName), "free_text", "notices"}


DEP5 = {
    "GPL-2+ or Artistic-2.0, and BSD-3-clause": "(GPL-2.0-or-later OR Artistic-2.0) AND BSD-3-Clause",
    "GPL-2+ and BSD-3-clause or Expat": "GPL-2.0-or-later AND BSD-3-Clause OR MIT",
    "MPL-1.1 or GPL-2 or LGPL-2.1": "MPL-1.1 OR GPL-2.0-only OR LGPL-2.1-only",
    "gpl-2.0.0+": "GPL-2.0-or-later",
    "GPL": "GPL-1.0-only",
    "Perl and Zlib": "(GPL-1.0-or-later OR Artistic-1.0-Perl) AND Zlib",
    "GPL-2+ with OpenSSL exception": "GPL-2.0-or-later",
    "GPL-3 with Font exception": "GPL-3.0-only WITH Font-exception-2.0",
    "GFDL-NIV-1.3+": "GFDL-1.3-no-invariants-or-later",
    "Apache-2.0+": "Apache-2.0+",
    "public-domain": "LicenseRef-Public-Domain",
    "MIT": None,
    "GFDL": None,
    "public-domain+": None,
    "Expat or": None,
    "Expat or house-license": None,
    "GPL-2+ with a promise": None,
    "GPL-2+, LGPL-2.1+": None,
    "": None,
}


@pytest.mark.parametrize("text", DEP5)
def test_the_license_field_of_debian_copyright_files(text: str) -> None:
    assert load_map("dep5").expression(text) == DEP5[text]


STRINGS: list[tuple[MapName, Any, str | None]] = [
    ("the-stack", ["MIT", "Apache-2.0"], "Apache-2.0 AND MIT"),
    ("the-stack", ["deprecated_LGPL-2.1+"], "LGPL-2.1-or-later"),
    ("the-stack", [], None),
    ("the-stack", None, None),
    ("the-stack", ["MIT", None], None),
    ("the-stack", ["MIT", "house license"], None),
    ("common-pile", "BSD-3-Clause,MIT", "BSD-3-Clause AND MIT"),
    ("common-pile", "MIT,,", "MIT"),
    ("common-pile", "MIT,house license", None),
    ("tulu-3", "ai2-adapt-dev/oasst1_converted", "Apache-2.0"),
    ("tulu-3", "ai2-adapt-dev/flan_v2_converted", None),
    ("tulu-3", "ai2-adapt-dev/evol_codealpaca_heval_decontaminated", "Apache-2.0 AND LicenseRef-model-terms"),
    ("common-pile", "public domain", "LicenseRef-Public-Domain"),
    ("pep639", "Apache-2.0 OR MIT", "Apache-2.0 OR MIT"),
    ("pep639", "License :: OSI Approved :: BSD License", None),
    ("pep639", ["License :: OSI Approved", "License :: OSI Approved :: MIT License"], "MIT"),
    ("pep639", ["License :: Public Domain", "License :: OSI Approved :: MIT License"], None),
    ("pep639", ["License :: OSI Approved"], None),
    ("pep639", "(" * 1999, None),
    ("pep639", "x" * 100_000, None),
]


@pytest.mark.parametrize(("name", "value", "expected"), STRINGS)
def test_strings_of_sources(name: MapName, value: Any, expected: str | None) -> None:
    assert load_map(name).expression(value) == expected


def test_the_strings_of_a_recipe_come_first() -> None:
    licenses = load_map("the-stack").extended({"House license": "MIT OR ISC", "MIT": "MIT-0"})
    assert licenses.expression(["house license", "Zlib"]) == "(MIT OR ISC) AND Zlib"
    assert licenses.expression("MIT") == "MIT-0" and load_map("the-stack").expression("MIT") == "MIT"
    assert LicenseMap({}).expression("mit") == "MIT"


@pytest.mark.parametrize("name", ["text", "common-pile", "the-stack", "dep5", "pep639"])
def test_a_license_ref_of_a_row_is_not_taken_at_its_word(name: Any) -> None:
    """A recipe allows LicenseRefs by the meaning that this project gives them, and a row may call anything by them."""
    licenses = LicenseMap({}, "text") if name == "text" else load_map(name)
    for stated in (
        "LicenseRef-CC-BY-unversioned", "licenseref-cc-by-unversioned", "LicenseRef-Public-Domain",
        "MIT AND LicenseRef-Public-Domain", "MIT OR LicenseRef-Public-Domain", "MIT, LicenseRef-Public-Domain",
        "https://spdx.org/licenses/LicenseRef-Public-Domain",
    ):  # fmt: skip
        assert licenses.expression(stated) is None and licenses.expression(["MIT", stated]) is None, stated
    declared = licenses.extended({"LicenseRef-House": "LicenseRef-House"})
    assert declared.expression("LicenseRef-House") == "LicenseRef-House"


ALLOWED = ["mit", "Apache-2.0", "GPL-2.0-only AND ISC", "GPL-3.0-only WITH GCC-exception-3.1"]
EXPRESSIONS = {
    "MIT": True,
    "Zlib": False,
    "MIT OR Zlib": True,
    "MIT AND Zlib": False,
    "MIT AND Apache-2.0": True,
    "(MIT OR Zlib) AND Apache-2.0 WITH LLVM-exception": True,
    "MIT OR Zlib AND ISC": True,
    "Zlib OR ISC AND MIT": False,
    "GPL-2.0-only AND ISC": True,
    "GPL-2.0-only": False,
    "GPL-3.0-only WITH GCC-exception-3.1": True,
    "GPL-3.0-only": False,
    "GPL-2.0-only OR (ISC AND (Zlib OR (MIT AND Apache-2.0)))": False,
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_allowed_licenses(expression: str) -> None:
    assert AllowedLicenses(ALLOWED).allows(expression) is EXPRESSIONS[expression]


def test_a_document_under_another_license_is_removed_before_the_steps() -> None:
    class Nothing:
        def find(self, text: str) -> None:
            return None

    row: Any = {
        "id": "a/1",
        "text": "x",
        "license": "Zlib",
        "source": "a",
        "origin": "",
        "content_hash": content_hash("x"),
    }
    steps = SourceFilter("a", "prose", (), Nothing(), ["MIT"])  # type: ignore[arg-type]
    assert steps.apply(row) == Removed("license/not-allowed", 0.0, 0.0)
    assert steps.apply({**row, "license": "MIT"})["text"] == "x"  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "license"),
    [
        ({"license": "CC-BY-NC-4.0"}, "CC-BY-NC-4.0"),
        ({"license": "ODC-By-1.0", "document_license": "LicenseRef-model-terms"}, "LicenseRef-model-terms"),
        ({"license": "MIT AND LicenseRef-model-terms"}, "MIT AND LicenseRef-model-terms"),
        ({"license": "MIT OR LicenseRef-model-terms"}, None),
        ({"license": "CC-BY-NC-4.0", "license_allow": []}, None),
        ({"license": "CC-BY-NC-4.0", "reader": {"license_field": "license"}}, None),
    ],
)
def test_a_source_whose_terms_forbid_training_is_refused(settings: dict[str, Any], license: str | None) -> None:
    """Where each document states its own, curation decides document by document."""
    reader = {"reader": "jsonl", "path": "x", **settings.pop("reader", {})}
    source = {"name": "forum", "kind": "prose", "license_evidence": "its terms", "origin": "by hand", "reader": reader,
              "license_allow": ["MIT"], **settings}  # fmt: skip
    if license is None:
        assert SourceConfig.model_validate(source).name == "forum"
        return
    words = (
        f"source forum: the license {license} of its documents is not in license_allow, so none of them may be trained"
    )
    with pytest.raises(ValidationError, match=words):
        SourceConfig.model_validate(source)


def test_settings_that_are_not_used_are_in_no_key() -> None:
    """Artifacts from before the settings keep their keys."""
    assert identity(Jsonl(reader="jsonl", path="x")) == {
        "limit": None,
        "reader": "jsonl",
        "text_field": "text",
        "id_field": None,
    }
    assert "license_allow" not in identity(FilteredSource(name="a", kind="prose"))
    assert identity(FilteredSource(name="a", kind="prose", license_allow=("mit",)))["license_allow"] == ["MIT"]


@pytest.mark.parametrize("setting", [{"license_map": "dep5"}, {"license_strings": {"x": "MIT"}}])
def test_a_map_without_a_field_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(setting))} is set, but no license_field"):
        Jsonl(reader="jsonl", path="x", **setting)


def test_fields_in_fields() -> None:
    row = {"a.b": 1, "a": {"b": 2, "c": {"d": [3]}}, "e": [{"f": 4}, {}, 5], "g": None}
    paths = {"a.b": 1, "a.c.d": [3], "e.f": [4, None, None], "g.h": None, "x": None, "a.c.d.x": [None]}
    assert {path: field_at(row, path) for path in paths} == paths


LINKS = {
    "https://creativecommons.org/licenses/by-nc-nd/3.0/igo/legalcode": "CC-BY-NC-ND-3.0-IGO",
    "http://www.creativecommons.org/licenses/by-nd-nc/1.0": "CC-BY-NC-ND-1.0",
    "//creativecommons.org/licenses/BY/4.0/deed.de": "CC-BY-4.0",
    "https://creativecommons.org/licenses/by-sa/2.5/ca/": "LicenseRef-CC-BY-SA-2.5-CA",
    "https://creativecommons.org/licenses/publicdomain/": "CC-PDDC",
    "https://creativecommons.org/publicdomain/zero/1.0/legalcode.de": "CC0-1.0",
    "https://creativecommons.org/licenses/by/5.0/": None,
    "https://creativecommons.org/licenses/by-odd/4.0/": None,
    "https://creativecommons.org/choose/": None,
    "https://creativecommons.org.evil.example/licenses/by/4.0/": None,
    "https://www.gnu.org/copyleft/fdl.html": "LicenseRef-GFDL",
    "https://www.nationalarchives.gov.uk/doc/open-government-licence/version/3/": "OGL-UK-3.0",
    "https://opensource.org/license/mit": None,
    "http://[broken": None,
    "": None,
}


@pytest.mark.parametrize("address", LINKS)
def test_addresses_of_licenses(address: str) -> None:
    assert expression_of(address) == LINKS[address]


def test_which_sets_of_tulu_the_data_recipe_takes() -> None:
    (source,) = (source for source in load("open").sources if source.name == "assistant")
    allows, licenses = AllowedLicenses(source.license_allow).allows, load_map("tulu-3")
    assert {name for name in licenses.licenses if allows(licenses.expression(name) or "")} == {
        "ai2-adapt-dev/oasst1_converted", "ai2-adapt-dev/tulu_v3.9_aya_100k", "ai2-adapt-dev/tulu_v3.9_table_gpt_5k",
    }  # fmt: skip
