"""The part of the soak on sixteen virtual nodes of Slurm: all stages of atom-smoke, disturbed, with the digests of a
quiet run.

    python -m tests.soak.slurm_seeds SEED        # one seed alone, without the report; as root

Two users of one group share a home folder, and Slurm shows neither the jobs of the other. On one node no Python starts.
Each kind of disturbance comes once, in random order, upon something that runs: a stage that has not been disturbed yet,
if one does. At random moments `atom status` is held to what Slurm says. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core import atomic_files
from tests.fixtures import ROOT
from tests.soak import processes
from tests.soak.layouts import Cells, Step

NODES, BAD_NODE, SEEDS, RESTARTS = 16, "n1", 3, 30
TASKS = 4
"""Of a job array, at most: each costs a start of Python on two cores."""
QUIET = ROOT / "runs/soak/quiet"
"""Folder of the digests of the quiet run, a file for each commit: the seeds share it."""
HEAD = ["seed", "disturbances", "stages disturbed", "starts of jobs", "starts on the bad node", "digests", "minutes"]
Report = dict[str, Any]


def steps() -> dict[str, Step]:
    return {f"seed {seed}": partial(run_apart, seed) for seed in range(SEEDS)}


def run_apart(seed: int, folder: Path) -> Cells:
    """Runs a seed in a process of its own, since the cluster has its own size and folder. Raises SystemExit if it
    fails."""
    command = [sys.executable, "-m", "tests.soak.slurm_seeds", str(seed)]
    environment = {**os.environ, "SLURM_TEST_NODES": str(NODES), "SLURM_TEST_DIR": str(ROOT / f"build/slurm-{NODES}")}
    cells = processes.result(command, environment)
    assert isinstance(cells, list)
    return cells


def quiet_digests() -> dict[str, str]:
    """The digest of each artifact of an undisturbed run on this machine; made once for a commit without changes."""
    from tests.fixtures.run_fixtures import atom, digests

    commit = processes.commit()
    path = QUIET / f"{commit}.json"
    if commit.endswith("-dirty") or not path.exists():
        print("the quiet run", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            atom(Path(folder, "home"), "run", recipe(Path(folder)), timeout=3600)
            text = json.dumps(digests(Path(folder, "home")))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, text + "\n")
    return dict(json.loads(path.read_text()))


def recipe(folder: Path) -> str:
    """The path of atom-smoke's recipe with a source of three parts, and pre-training that is long enough to disturb."""
    from tests.fixtures import slurm_fixtures

    return slurm_fixtures.with_parts(folder, 3, steps=400, watchdog_timeout_seconds=20.0)


def main(seed: int) -> None:
    from tests.fixtures import slurm_fixtures, user_fixtures

    began, quiet = time.monotonic(), quiet_digests()
    slurm_fixtures.cluster("up")
    os.environ["SLURM_CONF"] = str(slurm_fixtures.PLACE / "etc/slurm.conf")
    try:
        with user_fixtures.team() as team:
            disturbed = Disturbed(team, random.Random(seed))
            equal = disturbed.run(quiet)
            minutes = f"{(time.monotonic() - began) / 60:.0f}"
            print(json.dumps([*disturbed.cells(), f"{equal} equal", minutes]))
    finally:
        user_fixtures.cancel_all()
        slurm_fixtures.cluster("down")


@dataclass
class Disturbed:
    """One seed: a run by two users in turn. done: the kinds and stages so far."""

    team: Any
    rng: random.Random
    user: str = ""
    done: list[tuple[str, str]] = field(default_factory=list)

    def run(self, quiet: dict[str, str]) -> int:
        """Disturbs a run until all kinds have come and all is sealed. Returns the number of artifacts, whose digests are
        those of the quiet run. Raises AssertionError."""
        from tests.fixtures import slurm_fixtures
        from tests.fixtures.run_fixtures import digests
        from tests.fixtures.user_fixtures import FIRST

        self.user, self.recipe = FIRST, recipe(self.team.place)
        bad = self.team.place / "python-but-not-there"
        bad.write_text(f'#!/bin/sh\n[ "$SLURMD_NODENAME" != {BAD_NODE} ] || exit 127\nexec {self.team.python} "$@"\n')
        bad.chmod(0o755)
        self.cluster = self.team.profile(
            python=str(bad), cpu={"partition": "low"}, train={"partition": "low"}, restarts=RESTARTS, free_gb=0.0,
            array_size=TASKS,
        )  # fmt: skip
        self.team.atom(self.user, "submit", self.recipe, "--cluster", self.cluster)
        kinds = self.kinds()
        self.rng.shuffle(kinds)
        while True:
            stages = self.truthful_status()
            left = [stage for stage in stages if stage["state"] != "sealed"]
            if not left:
                break
            self.go_on(left)
            active = [stage["name"] for stage in left if self.runs(stage["name"])]
            if kinds and active and (self.hangs_now(kinds) or self.rng.random() < (len(kinds) + 1) / len(left)):
                self.disturb(kinds, active)
                slurm_fixtures.cluster("up")  # whatever was killed or drained
            elif active:
                time.sleep(self.rng.random() * 3)
            else:
                time.sleep(3)
                slurm_fixtures.cluster("up")  # a node may be drained since a start on it failed
        assert not kinds, f"all is sealed before {[kind.__name__ for kind in kinds]}"
        disturbed = digests(self.team.home)
        assert disturbed == quiet, {key: (disturbed.get(key), quiet.get(key)) for key in {*disturbed, *quiet}}
        assert (closed := self.team.closed_paths()) == [], closed[:10]
        assert self.bad_starts() > 0, f"no job came upon {BAD_NODE}"
        avoided = [row["node"] for row in json.loads(self.team.atom(self.user, "nodes", "--json"))["bad_nodes"]]
        assert BAD_NODE in avoided, avoided
        return len(disturbed)

    def kinds(self) -> list[Callable[[Path, str], None]]:
        from tests.fixtures import disturbance_fixtures as fixtures

        of_slurm = (fixtures.suspended, fixtures.requeued_and_held, fixtures.drained, fixtures.step_killed)
        return [*fixtures.RESTARTED, *fixtures.AT_LENGTH, *of_slurm, self.taken_over, self.taken_over]

    def disturb(self, kinds: list[Callable[[Path, str], None]], active: list[str]) -> None:
        """Takes the next kind that fits something that runs. One that comes too late, since that has just ended, is left
        for later."""
        from tests.fixtures.disturbance_fixtures import rank_hangs

        fresh = [name for name in active if name not in {stage for _, stage in self.done}] or active
        stage = self.rng.choice(fresh)
        fitting = [kind for kind in kinds if kind is not rank_hangs]
        if self.hangs_now(kinds):
            stage, fitting = "pretrain", [rank_hangs]
        if not fitting:
            return
        kind = fitting[0]
        print(f"{time.strftime('%H:%M:%S')} {kind.__name__}: {stage}, run by {self.user}", flush=True)
        try:
            kind(self.team.home, stage)
        except (AssertionError, IndexError, FileNotFoundError) as error:
            print(f"  too late: {str(error).strip().splitlines()[:1]}", flush=True)
            return
        kinds.remove(kind)
        self.done.append((kind.__name__, stage))

    def hangs_now(self, kinds: list[Callable[[Path, str], None]]) -> bool:
        """Whether a process may stop now: only a phase with a watchdog, once it trains, notices that."""
        from tests.fixtures import slurm_fixtures
        from tests.fixtures.disturbance_fixtures import rank_hangs

        training = self.runs("pretrain") and slurm_fixtures.reached(self.team.home, "pretrain", 3)
        return rank_hangs in kinds and training

    def taken_over(self, home: Path, stage: str) -> None:
        """The other user submits the recipe, too, and the first one cancels."""
        from tests.fixtures.user_fixtures import FIRST, SECOND

        first, second = self.user, SECOND if self.user == FIRST else FIRST
        run = self.latest()
        printed = self.team.atom(second, "submit", self.recipe, "--cluster", self.cluster)
        assert "submitted" in printed or "nothing to submit" in printed, printed
        self.user = second
        self.team.atom(first, "cancel", run)

    def latest(self) -> str:
        return str(json.loads(self.team.atom("root", "status", "--json"))["run"])

    def runs(self, stage: str) -> bool:
        from tests.fixtures import slurm_fixtures

        try:
            return bool(slurm_fixtures.running(self.team.home, stage).nodes)
        except (AssertionError, IndexError):
            return False

    def go_on(self, left: list[Report]) -> None:
        """Does what status advises where a job is lost or held: a controller that was killed while it started a job may
        take that for a fault of the node."""
        failed = [stage for stage in left if stage["state"] in ("failed", "damaged")]
        assert not failed, failed
        if any(s["state"] in ("lost", "cancelled") or "retry" in s.get("reason", "") for s in left):
            self.team.atom(self.user, "retry")

    def truthful_status(self) -> list[Report]:
        """What status says to root, after a comparison with what Slurm said just before and after."""
        before, stages, after = _job_states(), json.loads(self.team.atom("root", "status", "--json")), _job_states()
        for stage in stages["stages"]:
            job = stage.get("job", "")
            state = before.get(job)
            if state is None or state != after.get(job) or stage["state"] in ("lost", "sealed", "ending", "restarting"):
                continue  # it was changing; or Slurm has another job of that number; or the artifact says more
            expected = {"COMPLETED": "sealed", "NODE_FAIL": "failed", "TIMEOUT": "failed"}.get(state, state.lower())
            assert stage["state"] == expected, (stage, state)
        listed = stages["stages"]
        assert isinstance(listed, list)
        return listed

    def bad_starts(self) -> int:
        """How many starts of jobs came upon the bad node."""
        return sum(BAD_NODE in path.read_text().split() for path in self.team.home.glob("logs/**/ranks/*/unready"))

    def cells(self) -> list[str]:
        starts = len([path for path in self.team.home.glob("logs/**/ranks/*.*") if path.is_dir()])
        stages = {stage for _, stage in self.done}
        return [str(len(self.done)), f"{len(stages)}: {', '.join(sorted(stages))}", str(starts), str(self.bad_starts())]


def _job_states() -> dict[str, str]:
    from tests.fixtures import slurm_fixtures

    rows = slurm_fixtures.slurm("squeue", "-h", "-t", "all", "-o", "%i|%T").splitlines()
    return dict(row.split("|") for row in rows)


if __name__ == "__main__":
    main(int(sys.argv[1]))
