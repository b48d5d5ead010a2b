"""The kit for a GPU: sixteen points, each with a figure and a criterion, in sections of at most eight minutes.

    make test-gpu
    python -m tests.gpu [--section NAME] [--out FOLDER]

A section that passed on this kind of machine with these sources is not run again: its result is in the folder, which
may be carried from one machine to the next. On a CPU the points run that can, on tiny models, and each other says why
it needs a GPU. The report goes to FOLDER/report.md. Exits with 1 if a point does not hold or a section takes too long.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.environment import git_commit
from stages.mcore import gpu_environment
from tests.fixtures import ROOT, gpu_fixtures, layout_fixtures

SECTIONS = ("device", "training", "fp8", "resume_export", "profile_memory", "sampler_failures", "variants")
LIMIT = 8 * 60
"""Seconds of a section."""
CELL = 115
"""Characters of a cell of the report."""
POINTS = {
    1: "imports, versions and groups of ranks",
    2: "attention's kernels",
    3: "where the model is",
    4: "fp32 against the CPU",
    5: "bf16 against the CPU",
    6: "killed, resumed, resumed on a CPU",
    7: "export",
    8: "waits, and attention's share of a step",
    9: "memory against the plan",
    10: "checkpoints",
    11: "sampler",
    12: "ranks that stop, memory that is full",
    13: "FP8 products",
    14: "CUDA graphs",
    15: "variants in vLLM",
    16: "the device test before training",
}
ON_CPU = "**No GPU has run this kit.** These figures are a CPU's, on tiny models: they show that it works."
Section = Mapping[str, Any]


def sources() -> str:
    """A digest of the files that the kit runs. (The report itself changes the checkout.)"""
    digest = hashlib.sha256()
    for folder in ("pipeline", "stages", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def run_section(
    name: str, command: Sequence[str], out: Path, where: Mapping[str, Any], limit: float = LIMIT
) -> Section:
    """The result of a section, which is also left in `out`: that of an earlier run, if it passed where this one is.

    where: the machine and the sources. The command appends its lines to the file that gpu_fixtures.RESULTS names.
    """
    path, lines = out / f"{name}.json", out / f"{name}.jsonl"
    if path.exists():
        earlier: Section = json.loads(path.read_text())
        if earlier["passed"] and {key: earlier[key] for key in where} == where:
            print(f"section {name}: passed already", flush=True)
            return earlier
    print(f"section {name}", flush=True)
    lines.write_text("")
    env = {**os.environ, **gpu_environment.missing(layout_fixtures.ANY)}  # before its Python starts
    env |= {"ATOM_SOAK": "1", gpu_fixtures.RESULTS: str(lines.absolute())}
    began, code = time.monotonic(), None
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"section {name}: it took more than {limit:g} s and was ended", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    result = {
        **where, "passed": code == 0, "ended": code is None, "seconds": round(time.monotonic() - began),
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "lines": records,
    }  # fmt: skip
    path.write_text(json.dumps(result, indent=1) + "\n")
    lines.unlink()
    return result


def read_sections(out: Path, where: Mapping[str, Any]) -> dict[str, Section]:
    """The results in a folder of this machine and these sources, by section."""
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    return {
        name: results[name] for name in SECTIONS if name in results and {k: results[name][k] for k in where} == where
    }


def page(results: Mapping[str, Section], where: Mapping[str, Any], on_gpu: bool) -> str:
    """The report: where and when, and each figure of each point."""
    ends = {name: "passed" if r["passed"] else "ended" if r["ended"] else "failed" for name, r in results.items()}
    ran = [f"{name}: {ends[name]}, {r['date']}, {r['seconds']} s" for name, r in results.items()]
    records = sorted((line for r in results.values() for line in r["lines"]), key=lambda line: line["point"])
    rows = [
        [str(line["point"]), line["name"], line["skipped"], "", "not run"] if "skipped" in line
        else [str(line["point"]), line["name"], line["figure"], line["criterion"], "yes" if line["holds"] else "**no**"]
        for line in records
    ]  # fmt: skip
    rows += [[str(p), POINTS[p], "", "", "not run"] for p in POINTS if p not in {line["point"] for line in records}]
    table = [
        f"| {' | '.join(shortened(cell.replace('|', '/')) for cell in row)} |"
        for row in sorted(rows, key=lambda row: int(row[0]))
    ]
    head = ["# GPU report", "", "`make test-gpu` writes this report; `docs/gpu.md` explains the kit.", ""]
    head += [] if on_gpu else [ON_CPU, ""]
    head += [f"- {name}: {value}" for name, value in where["machine"].items()]
    commit = git_commit(ROOT)[0]
    head += [
        f"- code: {f'commit {commit[:12]}, ' if commit else ''}sources {where['sources']}",
        *(f"- section {text}" for text in ran),
        "",
    ]
    return "\n".join([*head, "| point | what | figure | criterion | holds |", "|---|---|---|---|---|", *table, ""])


def shortened(cell: str) -> str:
    return cell if len(cell) <= CELL else f"{cell[: CELL - 1]}…"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--section", choices=SECTIONS, help="this one only")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="results of sections, and the report")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    where = {"machine": gpu_fixtures.machine(), "sources": sources()}
    failed = []
    for name in SECTIONS if options.section is None else (options.section,):
        command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--confcutdir=tests/gpu"]
        result = run_section(name, [*command, f"tests/gpu/test_{name}.py"], options.out, where)
        failed += [] if result["passed"] else [name]
        report = page(read_sections(options.out, where), where, gpu_fixtures.ON_GPU)
        (options.out / "report.md").write_text(report)
    print(f"the report is {options.out / 'report.md'}; " + (f"failed: {', '.join(failed)}" if failed else "all holds"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
