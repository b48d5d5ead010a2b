"""From the death of a rank to the next finished step: launched again in the same allocation, against requeued.

    make slurm-up && .venv/bin/python bench/recovery.py                 # some minutes
    SLURM_TEST_CRED_EXPIRE=120 make slurm-up                            # as long as Slurm lets a requeue wait by itself
    .venv/bin/python bench/recovery.py --rounds 1

Each round pre-trains atom-smoke on two nodes of the test cluster, once with `restarts_in_allocation` and once without,
in alternating order, and kills the process of the last rank after step 12. Seconds are by the clock, from the kill to
the first step that the next launch finishes. A requeue waits for what Slurm's `cred_expire` says: 10 s on the test
cluster, 120 s by default; nothing else stands in the queue. The last line is one JSON object: the ratio is
requeue / restart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.fixtures import slurm_fixtures
from tests.fixtures.disturbance_fixtures import rank_killed, submit
from tests.fixtures.run_fixtures import atom

TARGET, PATIENCE = 3.0, 900.0
WAYS = {"restart": 3, "requeue": 0}
"""Launches in one allocation after the first, for each way."""


def recovery(home: Path, relaunches: int) -> float:
    """Seconds from the death of a rank to the next finished step. Raises AssertionError if it took the other way."""
    submit(home, restarts_in_allocation=relaunches)
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 12), "step 12", PATIENCE)
    killed = time.time()
    rank_killed(home)
    slurm_fixtures.until(lambda: slurm_fixtures.reached(home, "pretrain", 1, 2), "the next launch", PATIENCE)
    rows = slurm_fixtures.events(home, "pretrain")
    second = [n for n, row in enumerate(rows) if row["event"] == "attempt"][1]
    finished = next(row["time"] for row in rows[second:] if row["event"] == "progress")
    slurm_fixtures.slurm("scancel", slurm_fixtures.job_of(home, "pretrain"))
    launches = sorted(path.name.partition(".")[2] for path in home.glob("logs/*/pretrain/ranks/*/"))
    assert launches == (["0", "0.1"] if relaunches else ["0", "1"]), launches
    return float(finished - killed)


def measure(rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        upstream = Path(place, "upstream/home")
        upstream.parent.mkdir()
        atom(upstream, "run", slurm_fixtures.write_recipe(upstream.parent), "--until", "order-pretrain")
        for turn in range(rounds):
            for way in sorted(WAYS, reverse=bool(turn % 2)):
                home = Path(place, f"{way}-{turn}/home")
                shutil.copytree(upstream, home)
                seconds[way].append(recovery(home, WAYS[way]))
                slurm_fixtures.until(lambda: not slurm_fixtures.slurm("squeue", "-h").strip(), "an empty cluster")
    ratios = [requeue / restart for restart, requeue in zip(seconds["restart"], seconds["requeue"], strict=True)]
    print(f"{rounds} rounds{'seconds, median':>28}{'lowest':>9}{'highest':>9}")
    for name, each in {**seconds, "requeue / restart": ratios}.items():
        print(f"{name:20}{statistics.median(each):16.2f}{min(each):9.2f}{max(each):9.2f}")
    version = slurm_fixtures.slurm("sinfo", "--version").split()[-1]
    authentication = re.search(r"cred_expire=(\d+)", slurm_fixtures.slurm("scontrol", "show", "config"))
    return {
        "name": "recovery",
        "ratio": round(statistics.median(ratios), 2),
        "low": round(min(ratios), 2),
        "high": round(max(ratios), 2),
        "target": TARGET,
        "unit": "seconds to the next step, requeue / restart; low and high: of all rounds",
        "seconds": {way: [round(value, 2) for value in each] for way, each in seconds.items()},
        "cred_expire": int(authentication[1]) if authentication else None,
        "load": round(os.getloadavg()[0], 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Slurm {version}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["SLURM_CONF"] = str(slurm_fixtures.PLACE / "etc/slurm.conf")
    try:
        print(json.dumps(measure(arguments.rounds)))
    finally:
        subprocess.run(["scancel", "--me"], check=False)
