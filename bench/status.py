"""What the status of a run costs, by the length of its logs and the number of its jobs.

    .venv/bin/python bench/status.py            # some minutes: 10^4 to 10^6 events, 10^2 to 10^4 tasks of an array
    .venv/bin/python bench/status.py --quick    # 10^2 to 10^4 events, 10 to 100 tasks

Each round makes a home with one run: stages with events and curves as a training stage writes them, whose summaries are
10 seconds behind, and a stage whose shards are tasks of a job array. `squeue` is a program that prints as many lines as
there are tasks; what the controller takes is measured by bench/orchestration.py. Seconds are of the processor, those of
`atom status` and its children without the start of Python, the median of the repetitions. The last line is one JSON
object: the ratio is the time with the fewest events over the time with the most, and 1 if the length of the log does
not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.cli.tables import status_table
from pipeline.core.log_summary import Curves, EventSummary
from pipeline.core.store import Store
from pipeline.graph import budget
from pipeline.graph import run as runs
from pipeline.tracking import status

TARGET = 0.5
BEHIND = 20
"""Events that the summary lacks: two a second for ten seconds."""
SAVED_EVERY = 100_000


def write_logs(folder: Path, events: int) -> None:
    """The logs of a stage that trains, with so many reports of progress and half as many steps."""
    folder.mkdir(parents=True)
    begun = time.time() - events / 2
    with open(folder / "events.jsonl", "a") as log, open(folder / "metrics.jsonl", "a") as metrics:
        log.write(json.dumps({"time": begun, "event": "attempt", "job": "7"}) + "\n")
        log.write(json.dumps({"time": begun, "event": "start", "pid": 1, "ranks": 512, "gpus": 512}) + "\n")
        for n in range(events):
            row = {"time": begun + n / 2, "event": "progress", "done": n, "total": events, "unit": "steps"}
            log.write(json.dumps({**row, "loss": 2.0 + 1 / (n + 1), "tokens_per_s": 4e6}) + "\n")
            if n % 2:
                point = {"time": begun + n / 2, "step": n // 2, "loss": 2.0 + 1 / (n + 1), "grad_norm": 0.5, "lr": 1e-4}
                metrics.write(json.dumps(point) + "\n")
            if n % SAVED_EVERY == SAVED_EVERY - 1 or n == events - BEHIND:
                log.flush(), metrics.flush()
                for summary in (EventSummary(folder), Curves(folder)):
                    summary.save()


RUN = "large-20260101-000000-0000"


def make_home(home: Path, stages: int, events: int) -> None:
    """A home with one run, whose first stage has so many events."""
    store, names = Store(home), [f"stage{n}" for n in range(stages)]
    for n, name in enumerate(names):
        write_logs(store.logs / RUN / name, events if n == 0 else 100)
        store.work(f"{name}-key").mkdir(parents=True)
    nodes = [{"name": name, "stage": "acquire", "key": f"{name}-key", "inputs": {}} for name in names]
    body = {"id": RUN, "recipe": "large", "version": "1.0.0", "recipe_path": "/large.yaml", "profile": "dev"}
    body["launcher"] = "slurm"
    (store.logs / RUN / "run.json").write_text(json.dumps({**body, "nodes": nodes}))
    (home / "bin").mkdir()
    for program, output in (("squeue", home / "squeue.txt"), ("sacct", "/dev/null")):
        (home / "bin" / program).write_text(f"#!/bin/sh\ncat {output}\n")
        (home / "bin" / program).chmod(0o755)


def set_tasks(home: Path, stages: int, tasks: int) -> None:
    """Gives the last stage an array of so many tasks, which have all done their shards and still run by Slurm."""
    run, names = runs.find(Store(home), None), [f"stage{n}" for n in range(stages)]
    for n in range(tasks):
        launch = run.node_folder(names[-1]) / "shards" / "ranks" / f"{100_000 + n}.0"
        launch.mkdir(parents=True, exist_ok=True)
        (launch / "shards.json").write_text('{"done": 3}')
        (launch / "decision").write_text("sealed\n\n3 shards are done\n")
    for n, name in enumerate(names):
        run.note_job(name, str(n + 1), False, *(("99999", 3 * tasks) if name == names[-1] and tasks else ()))
    scripts = [f"{home}/logs/{RUN}/{name}/submitit/.submission_file_0.sh" for name in names]
    lines = [
        f"{n + 1}|PENDING||0:00|Priority|root|test|N/A|(null)|{script}|(null)|" for n, script in enumerate(scripts)
    ]
    script = f"{home}/logs/{RUN}/{names[-1]}/shards/submitit/.submission_file_0.sh"
    lines += [f"99999_{n}|RUNNING|n{n}|1:00|None|root|test|N/A|(null)|{script}|(null)|" for n in range(tasks)]
    (home / "squeue.txt").write_text("\n".join(lines) + "\n")


def show(store: Store) -> None:
    """What `atom status` does."""
    run = runs.find(store, None)
    nodes, problem = status.status(run, store)
    assert problem is None and {node.state for node in nodes} == {"pending"}, problem
    used = budget.used(store, (stage.key for stage in nodes))
    status_table(run.id, run.owner, nodes, budget.describe(used, None))


def processor_seconds() -> float:
    """Of this process and its children, in microseconds: os.times counts hundredths, and a status takes less."""
    usages = [resource.getrusage(scope) for scope in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def seconds(home: Path, repetitions: int, stages: int, events: int, tasks: int, summary: str = "yes") -> list[float]:
    set_tasks(home, stages, tasks)
    times = []
    with patch.dict(os.environ, PATH=f"{home / 'bin'}:{os.environ['PATH']}"):
        for _ in range(repetitions + 1):
            begun = processor_seconds()
            show(Store(home))
            times.append(processor_seconds() - begun)
    del times[0]  # imports and caches
    print(f"{stages:>7,} {events:>10,} {tasks:>10,} {summary:>8} {statistics.median(times):>9.3f}", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="what the status of a run costs")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    quick = parser.parse_args().quick
    repetitions, lengths, tasks = (3, (100, 1000, 10_000), (10, 100)) if quick else (
        9, (10_000, 100_000, 1_000_000), (100, 1000, 10_000)
    )  # fmt: skip
    print(" stages     events      tasks  summary   seconds")
    with tempfile.TemporaryDirectory() as place:
        times = []
        for length in lengths:
            home = Path(place, str(length))
            make_home(home, 20, length)
            times.append(seconds(home, repetitions, 20, length, tasks[0]))
        for number in tasks[1:]:
            seconds(home, repetitions, 20, lengths[-1], number)
        for stages in (100,) if quick else (100, 1000):
            make_home(Path(place, f"stages-{stages}"), stages, lengths[0])
            seconds(Path(place, f"stages-{stages}"), 3, stages, lengths[0], 0)
        for saved in (Path(place) / str(lengths[1])).rglob("*.summary.json"):
            saved.unlink()
        seconds(Path(place) / str(lengths[1]), 1, 20, lengths[1], tasks[0], "no")
    few, many = sorted(times[0]), sorted(times[-1])
    result = {
        "name": "status", "ratio": statistics.median(few) / statistics.median(many), "low": few[0] / many[-1],
        "high": few[-1] / many[0], "target": TARGET, "unit": f"{lengths[0]} over {lengths[-1]} events",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
