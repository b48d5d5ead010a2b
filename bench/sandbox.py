"""Verifications of code per second, on all cores that this process may use, against the aim of 100.

    .venv/bin/python bench/sandbox.py            # about a minute
    .venv/bin/python bench/sandbox.py --quick    # a few, to see that it works; its figures mean nothing

A verification is one answer that `CodeVerifier` scores: its code runs in fresh namespaces and is scored from outside.
`check` scores HumanEval's canonical solutions by HumanEval's own asserts, which takes two sandboxes and a message for
each call; `short` scores one short function by two asserts. The verifier stands warm. Every reward must be 1. Seconds
are by the clock, so other programs on the machine lower the figures; the processor seconds that they took elsewhere are
reported. The ratio is of `check`, the slower. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.humaneval import problems
from stages.rl.protocols import Response, make_verifier
from stages.tasks import Row

TARGET = 1.0
AIM = 100  # verifications per second on two cores

Answers = list[tuple[Row, Response]]


def answers(quick: bool) -> dict[str, Answers]:
    """By kind, one round's rows and right answers."""
    rows = problems()[:: 20 if quick else 1]
    canonical = [(r, Response.parse(f"```python\n{r['prompt']}{r['canonical_solution']}\n```", True)) for r in rows]
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate('a', 'b') == 'ab'\n"
    row = {"id": "add", "entry_point": "add", "check": check}
    short = [(row, Response.parse("def add(a, b):\n    return a + b\n", True))] * len(rows)
    return {"short": short, "check": canonical}


def busy() -> float:
    """Processor seconds that this machine has spent on anything since it started."""
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def measure(quick: bool) -> dict[str, Any]:
    """Runs the rounds and prints the table; gives the JSON object. Raises SystemExit if a right answer fails."""
    cores, rounds = len(os.sched_getaffinity(0)), 3 if quick else 15
    speeds: dict[str, list[float]] = {"short": [], "check": []}
    load: dict[str, list[float]] = {"short": [], "check": []}
    verifier = make_verifier("python-tests")
    try:
        for turn in range(-1, rounds):  # the first warms up
            for kind, items in answers(quick).items():
                start, before = time.perf_counter(), busy()
                parts = verifier.score(items)
                seconds = time.perf_counter() - start
                if any(p["reward"] != 1 for p in parts):
                    raise SystemExit(f"{kind}: a right answer was not rewarded: {parts}")
                if turn >= 0:
                    speeds[kind].append(len(items) / seconds)
                    load[kind].append((busy() - before) / seconds)
    finally:
        verifier.close()
    print(f"{'':8}{'median':>10}{'lowest':>10}{'highest':>10}{'cores busy, ours or not':>26}")
    for kind, speed in speeds.items():
        print(f"{kind:8}{statistics.median(speed):8.1f}/s{min(speed):8.1f}/s{max(speed):8.1f}/s"
              f"{statistics.median(load[kind]):19.2f} of {cores}")  # fmt: skip
    low, ratio, high = (x / AIM for x in statistics.quantiles(speeds["check"], n=4))
    return {
        "name": "sandbox", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": f"HumanEval verifications per second by {AIM}; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}, "
                   f"{statistics.median(load['check']):.2f} cores busy with this and all else",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few, for tests")
    print(json.dumps(measure(parser.parse_args().quick)))
