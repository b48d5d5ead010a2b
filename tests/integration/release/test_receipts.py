"""Receipts of opt-outs: one for each request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from release.audit.verify import verify
from release.checks.withheld import receipts
from release.opened_release import Release
from release.tracing.receipts import receipt_path
from tests.fixtures.opt_out_fixtures import hashed
from tests.fixtures.opt_out_release_fixtures import MATCHES


def receipt(release: Path, request: str) -> Any:
    return json.loads((release / receipt_path(hashed(request))).read_text())


def test_a_receipt_names_the_removed_documents(later_release: Path) -> None:
    url = receipt(later_release, "r-url")
    assert url["removed"] == {"near_duplicate": 1, "url": 1} and url["rule"] == "opt_out"
    assert [(row["id"], row["found"], row["duplicate_of"]) for row in url["documents"]] == [
        ("prose/003", "url", None), ("sums/003", "near_duplicate", "prose/003"),
    ]  # fmt: skip
    nothing = receipt(later_release, "r-none")
    assert (nothing["removed"], nothing["documents"], nothing["entries"]) == ({}, [], {"host": 1})
    for path in (later_release / "evidence/opt_out").iterdir():
        assert not {"r-url", "example.org", "nowhere"} & set(
            path.read_text().replace('"', " ").replace("/", " ").split()
        )


def test_receipts_are_verified_and_on_the_data_card(later_release: Path) -> None:
    verdict = verify(later_release)
    assert verdict.ok, verdict.to_json()
    details = {check.name: check.detail for check in verdict.checks}
    assert details["receipts"] == "3 requests, 3 documents removed for them"
    card = (later_release / "dataset/README.md").read_text()
    assert "## Opt-outs" in card
    assert f"| `{hashed('r-url')[:16]}` | 2026-11-03 | 1 | 0 | 1 | 0 |" in card
    assert f"| `{hashed('r-none')[:16]}` | 2026-11-03 | 0 | 0 | 0 | 0 |" in card
    assert not (later_release / "dataset/kept/prose/part-00000.parquet").read_bytes().count(b"prose/003")


def remove(path: Path) -> None:
    path.unlink()


def change(**values: Any) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return alter


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove, "is missing"),
        (change(removed={"url": 1}), "removed is not what the data says"),
        (change(date="2026-11-04"), "date is not what the data says"),
        (change(documents=[]), "documents are not those of the dispositions"),
        (lambda path: shutil.copy(path, path.with_name("0" * 64 + ".json")), "is a receipt of a request that"),
    ],
)
def test_a_receipt_that_says_something_else_is_found(
    later_release: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    problem: str,
) -> None:
    for place in ("evidence", "dataset"):
        shutil.copytree(later_release / place, tmp_path / place)
    assert not receipts(Release(tmp_path)).problems
    damage(tmp_path / receipt_path(hashed("r-url")))
    [text] = receipts(Release(tmp_path)).problems
    assert problem in text
    (tmp_path / "dataset/opt_out.json").write_text(json.dumps({"deny_list": "", "requests": []}))
    unnamed = [text for text in receipts(Release(tmp_path)).problems if text.startswith("dispositions:")]
    assert len(unnamed) == len(MATCHES) and "for a request that opt_out.json does not name" in unnamed[0]
