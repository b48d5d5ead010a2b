"""A home folder that a group shares: permissions for the group, owners of files, another user's run."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import process
from pipeline.core.store import Store
from pipeline.graph import run as runs
from tests.fixtures.home_fixtures import graphs
from tests.fixtures.run_fixtures import atom


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("mode, expected", [(0o2770, 0o660), (0o770, 0o640), (0o2750, 0o640)], ids=oct)
def test_the_group_may_write_what_is_made_in_a_home_of_a_group(
    tmp_path: Path, umask: None, mode: int, expected: int
) -> None:
    tmp_path.chmod(mode)
    process.share_home(tmp_path)
    (tmp_path / "file").touch()
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected


def test_a_home_that_is_not_there_yet_is_shared_with_nobody(tmp_path: Path, umask: None) -> None:
    process.share_home(tmp_path / "none")
    assert os.umask(0o027) == 0o027


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")
def test_another_users_run_is_cancelled_only_with_yes(tmp_path: Path) -> None:
    store, graph = Store(tmp_path / "home"), graphs(tmp_path)[0]
    run = runs.start(graph, store, ["pretrain"], "local", {"launcher": "local"})
    assert run.owner == process.current_user()
    os.chown(run.folder / "run.json", pwd.getpwnam("nobody").pw_uid, -1)
    assert run.owner == "nobody"
    refused = atom(store.home, "cancel", code=2).stderr
    assert refused == f"atom: run {run.id} is nobody's; add --yes to cancel all the same\n"
    assert "no stage was running" in atom(store.home, "cancel", "--yes").stdout
    assert "nobody" in atom(store.home, "runs").stdout
    os.chown(run.folder / "run.json", 123456, -1)
    assert run.owner == "123456"
