"""Fits the constants of the model of a step's time (stages/mcore/throughput.py) to published runs, and measures its
errors on runs that were left out.

    .venv/bin/python bench/throughput.py         # ten seconds; nothing is run

Fitted are the tuned runs of anchors.csv from release 26.06 on, each configuration once: software became faster with
each release. Older ones, runs on real data and others that were held out are shown apart. Rows with fully sharded data
parallelism are not described by the model. One tuned row is in NVFP4: its share of the peak follows from that row
alone, after all others, and two rows of another system and another model show the error.

The host's time follows from four rows of run "host", all on H100 without graphs, which are in no median: for a layer
from Qwen3 8B in rows of 2,048 on four tensor ranks, for experts from three models in a few small micro-batches with
mock data. None of the tuned rows waits for its host by the model. The column "no host" is the error without.

Least squares on the logarithm of throughput, with a prior on each constant's logarithm: what few runs determine stays
near what is known of it, so that leaving runs out does not let it go astray. `bench/planner.py` prints the tables.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.published import MODELS, anchors, systems
from pipeline.core.stage import Accelerator
from stages.mcore.throughput import CONSTANTS, Constants, Shape, StepSetup, step_time
from stages.models.base import Rows
from stages.models.parallel_layout import Layout

PRECISIONS = {"bf16": "bf16", "fp8": "fp8-tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
"""FP8 in the tables has one scale for a tensor."""
OLDER = ("25.", "26.04")
PRIOR = {
    "bf16": (0.7, 1.15),
    "fp8": (0.65, 1.15),
    "grouped": (0.7, 1.3),
    "attention": (0.5, 1.3),
    "passes": (7, 1.5),
    "link": (0.7, 1.3),
    "launch": (1e-6, 4),
}
"""The expected value of each constant, and the factor by which it may well be wrong."""
NOISE = 0.1
"""The expected relative error of a run."""


@dataclass(frozen=True)
class Anchor:
    """A published run."""

    row: dict[str, str]
    shape: Shape
    gpu: Accelerator
    run: StepSetup

    @property
    def fitted(self) -> bool:
        return self.tuned and self.row["precision"] != "nvfp4"

    @property
    def tuned(self) -> bool:
        return self.row["run"] == "tuned" and not self.row["release"].startswith(OLDER)

    def tokens_per_s(self, constants: Constants) -> float:
        """Of one GPU."""
        tokens = int(self.row["global_batch"]) * int(self.row["sequence_length"])
        return tokens / self.run.layout.ranks / step_time(self.shape, self.gpu, self.run, constants).total

    def error(self, constants: Constants) -> float:
        """Relative error of the throughput."""
        return self.tokens_per_s(constants) / float(self.row["tokens_per_s"]) - 1

    def label(self) -> str:
        row = self.row
        return f"{row['model'].split(' as counted')[0]:24}{row['system']:6}{row['gpus']:>5} {row['precision']:6}"


def runs() -> list[Anchor]:
    """The published runs that the model describes."""
    machines, published = systems(), []
    for row in anchors():
        if not row["tp"] or row["precision"] not in PRECISIONS:
            continue
        sizes: dict[str, Any] = {name: int(row[name]) for name in ("tp", "pp", "cp", "ep")}
        layout = Layout(
            ranks=int(row["gpus"]), vpp=int(row["vp"]), etp=1, dispatcher=row["dispatcher"] or "alltoall", **sizes
        )
        rows = Rows(int(row["micro_batch"]), int(row["sequence_length"]))
        micro_batches = int(row["global_batch"]) // rows.rows // layout.data
        run = StepSetup(layout, PRECISIONS[row["precision"]], rows, micro_batches, gradient=2, graphs=row["graphs"],
                  hides_experts=row["overlap"] == "yes", balanced=True)  # fmt: skip
        published.append(Anchor(row, MODELS[row["model"].split(" as counted")[0]], machines[row["system"]], run))
    return published


def fit(rows: Sequence[Anchor], steps: int = 40) -> Constants:
    """The constants of least squares (Levenberg, 1944; Marquardt, 1963), fitted as logarithms."""
    prior, spread = np.log(list(PRIOR.values())).T

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = replace(CONSTANTS, **dict(zip(PRIOR, map(float, np.exp(logs)), strict=True)))
        return np.array([math.log1p(row.error(constants)) / NOISE for row in rows] + list((logs - prior) / spread))

    logs, damping = prior, 1.0
    now = residuals(logs)
    for _ in range(steps):
        slopes = np.stack([(residuals(logs + d) - now) / 1e-6 for d in 1e-6 * np.eye(len(logs))], axis=1)
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(logs)), -slopes.T @ now)
        after = residuals(logs + step)
        gain = now @ now - after @ after
        if gain > 0:
            logs, now, damping = logs + step, after, damping / 4
            if gain < 1e-6 * (now @ now):
                break
        else:
            damping *= 4
    return replace(CONSTANTS, **dict(zip(PRIOR, map(float, np.exp(logs)), strict=True)))


def without_mean_error(name: str, rows: Sequence[Anchor], constants: Constants, values: Iterable[float]) -> Constants:
    """The constants with that value of the one of this name for which the mean error of the rows is nearest 0."""

    def total(candidate: Constants) -> float:
        return abs(math.fsum(math.log1p(row.error(candidate)) for row in rows))

    return min((replace(constants, **{name: value}) for value in values), key=total)


def of_few_runs(every: Sequence[Anchor], constants: Constants) -> Constants:
    """The constants with those that single runs give after the fit: the share of the peak in NVFP4, to 0.001, and the
    host's time for a dense layer and for experts, to 0.1 ms."""
    fp4 = [row for row in every if row.tuned and not row.fitted]
    constants = without_mean_error("fp4", fp4, constants, (number / 1000 for number in range(50, 1001)))
    bound = [row for row in every if row.row["run"] == "host"]
    for name, sparse in (("host", False), ("sparse_host", True)):
        rows = [row for row in bound if bool(row.shape.sparse) == sparse]
        constants = without_mean_error(name, rows, constants, (number / 1e4 for number in range(1, 201)))
    return constants


def left_out(rows: Sequence[Anchor], column: str) -> list[float]:
    """The error of each row, the constants being fitted without all rows of its model, or of its system."""
    values = dict.fromkeys(row.row[column] for row in rows)
    fits = {value: fit([row for row in rows if row.row[column] != value]) for value in values}
    return [row.error(fits[row.row[column]]) for row in rows]


def report() -> tuple[Constants, dict[str, tuple[float, float]]]:
    """Prints errors on published throughput; gives the fitted constants, and the median and the largest error on rows
    that were fitted, whose model was left out, and whose system was left out."""
    every = runs()
    rows = [row for row in every if row.fitted]
    constants = of_few_runs(every, fit(rows))
    columns = {
        "fitted": [row.error(constants) for row in rows],
        "model left out": left_out(rows, "model"),
        "system left out": left_out(rows, "system"),
    }
    print(f"\n{'tokens/s of a GPU: error':42}{'published':>10}" + "".join(f"{name:>17}" for name in columns))
    for row, *errors in zip(rows, *columns.values(), strict=True):
        print(f"{row.label():42}{float(row.row['tokens_per_s']):10,.0f}" + "".join(f"{e:17.0%}" for e in errors))
    summary = {}
    for name, values in columns.items():
        sizes = [abs(value) for value in values]
        summary[name] = statistics.median(sizes), max(sizes)
    for what, number in (("median", 0), ("largest", 1)):
        print(f"{what:52}" + "".join(f"{figures[number]:17.1%}" for figures in summary.values()))
    print(f"\n{'not in this fit':42}{'batches':>8}{'published':>10}{'error':>9}{'no host':>9}  of")
    kinds: dict[str, list[float]] = {}
    for row in every:
        if not row.fitted:
            error, free = row.error(constants), row.error(replace(constants, host=0, sparse_host=0))
            if not row.tuned and row.row["run"] != "host":
                kinds.setdefault("older" if row.row["run"] == "tuned" else row.row["run"], []).append(abs(error))
            print(f"{row.label():42}{row.run.micro_batches:8}{float(row.row['tokens_per_s']):10,.0f}{error:9.0%}{free:9.0%}"
                  f"  {row.row['release']}, {row.row['run']}")  # fmt: skip
    kinds["never fitted"] = [*map(abs, columns["model left out"]), *chain(*kinds.values())]
    for kind, sizes in kinds.items():
        print(f"{f'{kind}, {len(sizes)}:':18}median {statistics.median(sizes):.1%}, largest {max(sizes):.1%}")
    print("constants: " + ", ".join(f"{name} {value:.4g}" for name, value in asdict(constants).items()))
    return constants, summary


if __name__ == "__main__":
    report()
