"""Whatever a parser of untrusted files raises, `atom verify` has a verdict."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from release.checks.check_runner import CheckRunner
from release.checks.verdict import CheckResult
from release.opened_release import Release
from release.untrusted import scan


class Panic(BaseException):
    """As bindings of libraries in Rust raise it."""


@pytest.fixture
def runner(tmp_path: Path) -> CheckRunner:
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    return CheckRunner(Release(tmp_path), scan(tmp_path, 1), deep=False)


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), Panic("a panic"), ValueError("no table")], ids=repr)
@pytest.mark.parametrize("place", ["footer", "row group", "status"])
def test_a_table_whose_parser_fails_is_bad(
    runner: CheckRunner, error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    if place == "status":
        monkeypatch.setattr("release.checks.check_runner.table_sizes", fail)
    footer = SimpleNamespace(num_row_groups=1, num_rows=1, row_group=fail)
    monkeypatch.setattr(pq, "read_metadata", fail if place == "footer" else lambda path: footer)
    (result,) = runner.check_tables()
    assert result.ok is False and "cannot be" in result.detail
    assert runner.spent, "no further check reads tables"


@pytest.mark.parametrize("error", [SystemExit(1), GeneratorExit(), Panic("a panic")], ids=repr)
def test_a_check_whose_parser_ends_the_process_is_bad(runner: CheckRunner, error: BaseException) -> None:
    def fail() -> CheckResult:
        raise error

    result = runner.run("weights", fail)
    assert result.ok is False and f"cannot be checked: {type(error).__name__}" in result.detail
