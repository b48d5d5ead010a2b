"""How planning, submitting and the status of a run grow with its stages and with the tasks of its arrays.

    .venv/bin/python bench/graph_scale.py            # some minutes: 10 to 1,000 stages, 100 to 10,000 tasks
    .venv/bin/python bench/graph_scale.py --quick    # 10 to 100 stages, 10 to 100 tasks

The graph is that of atom-tiny, again and again under other names. `sbatch` is a program that prints a number: seconds
are those of the processor, of this process and of the programs that it starts, and the requests to Slurm are counted.
What a real controller takes is measured by bench/orchestration.py. The last line is one JSON object: the ratio is the
time of a stage in the smallest graph over that in the largest, of submitting, and 1 if the time is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.orchestration import large_graph
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph.plan import plan
from pipeline.launch import bad_nodes, cluster_profile, slurm
from pipeline.launch.bad_nodes import BadNode
from pipeline.tracking import status

TARGET = 0.5
BAD_NODES = 10
PROGRAMS = {
    "sbatch": 'case "$*" in *--test-only*) cat > /dev/null ;; *) echo "Submitted batch job $(wc -l < $CALLS)" ;; esac',
    "squeue": "", "sacct": "", "srun": "", "scontrol": "",
}  # fmt: skip


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def of_stages(place: Path, stages: int) -> dict[str, float]:
    """Seconds of the processor for a graph with so many stages, and the requests of `atom submit` to Slurm."""
    store, profile = Store(place / "home"), cluster_profile.load("dev")
    store.home.mkdir()
    for n in range(BAD_NODES):
        bad_nodes.record(store, BadNode(int(time.time()) + 3600, f"n{n}", "its fan is bad", "r", "s", "1"))
    composed, seconds = large_graph(store, stages), {}
    names, calls = list(composed.nodes), place / "calls"
    begun = processor_seconds()
    plan(composed, dag.states(composed, store), names)
    seconds["plan"] = processor_seconds() - begun
    calls.write_text("")
    begun = processor_seconds()
    submission = slurm.submit(composed, store, names, profile, "dev")
    seconds["submit"] = processor_seconds() - begun
    pickled = sum(path.stat().st_size for path in store.logs.rglob("*.pkl"))
    assert submission.run is not None and len(submission.submitted) == stages
    requests = len(calls.read_text().splitlines())
    begun = processor_seconds()
    status.status(submission.run, store)
    seconds["status"] = processor_seconds() - begun
    shown = " ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{stages:>7,} stages: {shown}, {requests:,} requests, {pickled / 1e3:,.0f} kB of jobs", flush=True)
    return {**seconds, "requests": requests}


def of_tasks(place: Path, tasks: int) -> float:
    """Seconds of the processor for the submission of an array with so many tasks."""
    pickled = place / "7_submitted.pkl"
    pickled.write_bytes(b"")
    begun = processor_seconds()
    slurm._link_tasks("7", pickled, range(tasks))
    seconds = processor_seconds() - begun
    print(f"{tasks:>7,} tasks of an array: {seconds:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="how the bookkeeping of a run grows with its stages")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    quick = parser.parse_args().quick
    sizes = (10, 100) if quick else (10, 100, 1000)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder) / "bin"
        programs.mkdir()
        for name, line in PROGRAMS.items():
            (programs / name).write_text(f'#!/bin/bash\necho {name} >> "$CALLS"\n{line}\n')
            (programs / name).chmod(0o755)
        for stages in sizes:
            place = Path(folder) / str(stages)
            place.mkdir()
            with patch.dict(os.environ, PATH=f"{programs}:{os.environ['PATH']}", CALLS=str(place / "calls")):
                rows[stages] = of_stages(place, stages)
        for tasks in (10, 100) if quick else (100, 1000, 10_000):
            place = Path(folder) / f"tasks-{tasks}"
            place.mkdir()
            of_tasks(place, tasks)
    first, last = sizes[0], sizes[-1]
    ratio = rows[first]["submit"] / first / (rows[last]["submit"] / last)
    result = {
        "name": "graph_scale", "ratio": ratio, "low": ratio, "high": ratio, "target": TARGET,
        "unit": f"submitting, {first} over {last} stages",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
