"""The commit of the code, as a snapshot states it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core import environment
from pipeline.core.json_files import DamagedFile


@pytest.mark.parametrize("text", ["x", "[1]", "{}", ""])
def test_a_damaged_statement_of_the_commit_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / environment.COMMIT).write_text(text)
    with pytest.warns(DamagedFile, match="is damaged .*; the commit of the code is not recorded"):
        assert environment.git_commit(tmp_path) == (None, False)


@pytest.mark.filterwarnings("error")
def test_code_without_a_statement_has_no_commit(tmp_path: Path) -> None:
    assert environment.git_commit(tmp_path) == (None, False)
