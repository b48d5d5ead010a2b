"""What our bookkeeping costs on Slurm: submitting a graph of 200 stages, going from a stage to the next, and asking how
1,000 jobs stand.

    make slurm-up && .venv/bin/python bench/orchestration.py            # some minutes
    .venv/bin/python bench/orchestration.py --quick                     # 20 stages

Each round submits a graph of atom-tiny's stages, repeated under other names, to a partition that starts nothing, by
what `atom submit` calls; then the scripts that were written are submitted again by `sbatch` alone, one after another
with their dependencies. From a stage to the next: in a chain of short stages of atom-smoke, from the end of the work of
one to the beginning of the next one's, beside a chain of jobs in which srun writes the time. Seconds are by the clock,
for most of them are spent in Slurm. The last line is one JSON object: the ratio is that of submitting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.core.events import EventTail
from pipeline.core.store import Store
from pipeline.graph import dag, recipe
from pipeline.launch import cluster_profile, slurm, slurm_client
from pipeline.tracking import status

TARGET = 0.5
PLACE = Path(os.environ.get("SLURM_TEST_DIR", Path(__file__).parent.parent / "build/slurm")).resolve()


def large_graph(store: Store, stages: int) -> dag.Graph:
    """atom-tiny's graph, again and again, each time under other names and keys."""
    composed = dag.compose(recipe.load("atom-tiny"), store)
    nodes: dict[str, dag.Node] = {}
    for turn in range(-(-stages // len(composed.nodes))):
        for name, node in composed.nodes.items():
            if len(nodes) < stages:
                inputs = {role: f"{other}.{turn}" for role, other in node.inputs.items()}
                key = f"{name}.{turn}-{node.key[-12:]}"
                nodes[f"{name}.{turn}"] = replace(node, name=f"{name}.{turn}", inputs=inputs, key=key)
    return replace(composed, nodes=nodes)


def resubmit(scripts: list[str]) -> None:
    """The same scripts by sbatch alone; an id that a script waits for is that of the job submitted in its stead."""
    new: dict[str, str] = {}
    for path in scripts:
        text = Path(path).read_text()
        old = Path(path).name.split("_")[0]
        dependency = re.search(r"--dependency=afterok:(\S+)", text)
        options = [f"--dependency=afterok:{':'.join(new[i] for i in dependency[1].split(':'))}"] if dependency else []
        process = subprocess.run(["sbatch", "--parsable", *options, path], capture_output=True, text=True, check=True)
        new[old] = process.stdout.strip()


def ours() -> list[float]:
    """Seconds from the end of a stage's work to the beginning of the next one's, on an empty cluster."""
    chain = ["dedup", "tokenizer", "tokenize"]
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place))
        composed = dag.compose(recipe.load("atom-smoke"), store)
        submission = slurm.submit(
            composed, store, composed.select("tokenize", None), cluster_profile.load("dev"), "dev"
        )
        while not store.sealed(composed.nodes["tokenize"].key):
            time.sleep(0.5)
        events = [EventTail(submission.run.node_folder(name) / "events.jsonl").read() for name in chain]
        while slurm_client.run_command("squeue", "-h", "--me", "-t", "running,completing").strip():
            time.sleep(0.2)
    when = [{event["event"]: event["time"] for event in each} for each in events]
    return [after["start"] - before["end"] for before, after in pairwise(when)]


def theirs() -> list[float]:
    """The same of jobs that do nothing but write the time, by srun."""
    with tempfile.TemporaryDirectory() as place:
        job = ""
        for number in range(3):
            options = [f"--dependency=afterok:{job}"] if job else []
            run = f"srun date +%s.%N > {place}/{number}"
            job = slurm_client.run_command(
                "sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={run}"
            ).strip()
        while not (Path(place) / "2").exists() or slurm_client.run_command(
            "squeue", "-h", "-j", job, "-t", "running,completing"
        ):
            time.sleep(0.2)
        when = [float((Path(place) / str(number)).read_text()) for number in range(3)]
    return [after - before for before, after in pairwise(when)]


def measure(quick: bool) -> dict[str, Any]:
    os.environ.setdefault("SLURM_CONF", str(PLACE / "etc/slurm.conf"))
    stages, rounds, many = (20, 3, 40) if quick else (200, 5, 1000)
    settings = cluster_profile.load("dev")
    names = ("atom submit", "sbatch", "atom status", f"atom status, {many} jobs", "stage to stage", "job to job")
    timings: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 if quick else rounds):
        timings["stage to stage"] += ours()
        timings["job to job"] += theirs()
    slurm_client.run_command("scontrol", "update", "partitionname=test", "state=down")
    try:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as place:
                store = Store(Path(place))
                composed = large_graph(store, stages)
                start = time.perf_counter()
                submission = slurm.submit(composed, store, list(composed.nodes), settings, "dev")
                timings["atom submit"].append(time.perf_counter() - start)
                start = time.perf_counter()
                statuses, problem = status.status(submission.run, store)
                timings["atom status"].append(time.perf_counter() - start)
                assert problem is None and all(stage.state == "pending" for stage in statuses), (problem, statuses[0])
                scripts = [
                    str(path)
                    for name, job in submission.submitted.items()
                    for path in (submission.run.node_folder(name) / "submitit").glob(f"{job}_submission.sh")
                ]
                assert len(scripts) == stages
                start = time.perf_counter()
                resubmit(scripts)
                timings["sbatch"].append(time.perf_counter() - start)
                slurm_client.run_command("scancel", "--me")
        with tempfile.TemporaryDirectory() as place:
            store = Store(Path(place))
            composed = large_graph(store, many)
            submission = slurm.submit(composed, store, list(composed.nodes), settings, "dev")
            for _ in range(rounds):
                start = time.perf_counter()
                statuses, problem = status.status(submission.run, store)
                timings[f"atom status, {many} jobs"].append(time.perf_counter() - start)
                assert problem is None and len(statuses) == many
    finally:
        slurm_client.run_command("scancel", "--me")
        slurm_client.run_command("scontrol", "update", "partitionname=test", "state=up")
    print(f"{stages} stages, {rounds} rounds{'seconds, median':>28}{'lowest':>9}{'highest':>9}")
    for name, each in timings.items():
        print(f"{name:24}{statistics.median(each):28.3f}{min(each):9.3f}{max(each):9.3f}")
    ratios = [raw / submit for submit, raw in zip(timings["atom submit"], timings["sbatch"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "name": "orchestration", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4),
        "target": TARGET,
        "unit": f"seconds of sbatch alone by ours, {stages} stages; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, virtual nodes on the same machine",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 stages")
    print(json.dumps(measure(parser.parse_args().quick)))
