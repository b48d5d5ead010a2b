"""Control groups: where they are, what they limit, and that closing a group kills what is in it."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from stages.rl.sandbox import Program, limits
from stages.rl.sandbox.cell import OWN_PROCESSES, Cell
from stages.rl.sandbox.limits import Cgroup, Home, homes
from tests.fixtures.sandbox_fixtures import LIMITS, NEEDS_BUBBLEWRAP, until

pytestmark = NEEDS_BUBBLEWRAP


def test_where_control_groups_lie() -> None:
    one = "31 24 0:28 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids\n30 24 0:27 /job /mnt/mem rw - cgroup cgroup rw,memory"
    places = homes(one, "8:pids:/\n4:memory:/job/step\n0::/")
    assert places == {
        "pids": Home(1, Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup/pids")),
        "memory": Home(1, Path("/mnt/mem"), Path("/mnt/mem/step")),
    }
    two = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    unified = Home(2, Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/user.slice/session-3.scope"))
    assert homes(two, "0::/user.slice/session-3.scope") == {"pids": unified, "memory": unified}
    both = homes(two.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified") + "\n" + one, "8:pids:/\n4:memory:/job\n0::/")
    assert {h.version for h in both.values()} == {1}
    assert homes("22 1 8:1 / / rw - ext4 /dev/root rw", "0::/") == {}


def test_version_two_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that gives a new group the files of version 2, as its kernel does where the parent has no processes."""
    make = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.parent != tmp_path / "slice" / "scope":
            for name in ("pids.max", "memory.max", "memory.swap.max"):
                (self / name).write_text("max")

    (tmp_path / "slice" / "scope").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    home = Home(2, tmp_path, tmp_path / "slice" / "scope")
    group = Cgroup("box", 21, 1 << 20, {"pids": home, "memory": home})
    assert group.folders == [tmp_path / "slice" / "box"], "one for both controllers, beside the group that is occupied"
    (folder,) = group.folders
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        "pids.max": "21", "memory.max": str(1 << 20), "memory.swap.max": "0",
    }  # fmt: skip
    (folder / "memory.events").write_text("max 9\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert group.out_of_memory() == 3


@pytest.mark.parametrize("version", [1, 2])
def test_closing_kills_what_is_in_a_group(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real hierarchies. Where version 2 has no pids here, with two limits that each of its groups has."""
    mounts = Path("/proc/self/mountinfo").read_text()
    if version == 2:
        mounts = "\n".join(line for line in mounts.splitlines() if " - cgroup2 " in line)
        names = {"pids": ("", "cgroup.max.depth"), "memory": ("", "cgroup.max.descendants")}
        monkeypatch.setattr(limits, "FILES", names)
    at = homes(mounts, Path("/proc/self/cgroup").read_text())
    if os.geteuid() or {home.version for home in at.values()} != {version}:
        pytest.skip(f"it takes root and control groups of version {version}")
    group = Cgroup(f"atom-test-{uuid.uuid4()}", 9, 1 << 24, at)
    folders = list(group.folders)
    if version == 2:
        assert [(folders[0] / f).read_text() for _, f in names.values()] == ["9\n", f"{1 << 24}\n"]
    # A loop, so that the shell does not end by itself if its `sleep` is killed first.
    script = "trap '' TERM HUP; (trap '' TERM; sleep 99) & while :; do sleep 99; done"
    process = subprocess.Popen(group.wrapped(["sh", "-c", script]))
    assert until(lambda: len(group.processes()) >= 3)
    group.close()
    assert process.wait(10) == -9 and not any(folder.exists() for folder in folders)


def test_control_groups_of_the_cell_hold_it_and_go_with_it() -> None:
    if os.geteuid():
        pytest.skip("an ordinary user has none")
    cell = Cell(LIMITS)
    cell.run(Program("pass"))
    group = cell._cgroup
    assert group and cell.pid in group.processes() and len(group.processes()) <= OWN_PROCESSES
    cell.close()
    assert not any(folder.exists() for folder in group.folders) and not group.folders
