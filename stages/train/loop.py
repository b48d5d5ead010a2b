"""The training loop that every training stage runs: one phase, from its first step or from where it was killed.

What the loop keeps in `work`: checkpoints, the log of finished steps (`training.jsonl`), and the sealed checkpoints
that are due. `out` is filled at the end, so that it never holds half a phase.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import AtomError, Interrupted
from pipeline.stage import Inputs, Report
from stages.train import checkpoint, parallel, sealed
from stages.train.config import TrainConfig
from stages.train.data import Order, Row, Shards, heldout_rows
from stages.train.engine import Engine
from stages.train.schedule import learning_rate


def train(
    phase: str,
    config: TrainConfig,
    inputs: Inputs,
    work: Path,
    out: Path,
    report: Report,
    start: Callable[[Engine], None],
) -> None:
    """Runs a phase to its end and fills `out` with sealed checkpoints, training.jsonl and summary.json.

    start: sets the weights that the phase begins with.
    Raises AtomError when the loss is no longer a number, when data and recipe do not fit, or when no work checkpoint
    is intact; Interrupted when the machine asked to stop.
    """
    with parallel.session(config.seed) as ranks, _requests_to_stop() as stop:
        Phase(phase, config, inputs, work, report, Engine(config, ranks)).run(start, stop)
        if ranks.first:
            _fill(work, out)


class Phase:
    """The state of one run of the loop."""

    def __init__(
        self, name: str, config: TrainConfig, inputs: Inputs, work: Path, report: Report, engine: Engine
    ) -> None:
        self.name, self.config, self.work, self.report, self.engine = name, config, work, report, engine
        self.first = engine.ranks.first
        self.order = Order(inputs["order"], config.phase)
        self.shards = Shards(inputs["tokens"], "train", config.padded_vocab_size)
        self.heldout_shards = Shards(inputs["tokens"], "heldout", config.padded_vocab_size)
        self.heldout = heldout_rows(inputs["tokens"], config.phase)
        self.log = Log(work / "training.jsonl", self.first)
        self.tokens = 0  # targets seen

    def run(self, start: Callable[[Engine], None], stop: list[int]) -> None:
        phase, engine, report = self.config.phase, self.engine, self.report
        done = checkpoint.load(engine, self.work, report)
        if done:
            self.tokens = self.log.resume(done)
            report.note(f"{self.name}: going on after step {done}")
        else:
            start(engine)
            self.log.resume(0)
            self._measure(0)
            self._seal(0)
        began, seen = time.monotonic(), self.tokens
        for step in range(done + 1, phase.steps + 1):
            rows = self.order.rows(step)
            lr = learning_rate(step, phase.steps, phase.optimizer)
            check = partial(self._check, step, rows)
            figures = engine.step(rows, self.shards, lr, partial(check, "loss"))
            check("gradient norm", figures.grad_norm)
            self.tokens += sum(row.length - 1 for row in rows)
            line = {"loss": figures.loss, "aux_loss": figures.aux_loss, "grad_norm": figures.grad_norm, "lr": lr}
            self.log.write({"step": step, "tokens": self.tokens, **line})
            if self.first:
                speed = (self.tokens - seen) / (time.monotonic() - began)
                report.metric(step, **line, tokens=float(self.tokens), tokens_per_s=speed)
                report.progress(step, phase.steps, loss=figures.loss, tokens_per_s=speed)
            last = step == phase.steps
            if last or step % phase.heldout.every == 0:
                self._measure(step)
            if last or step % phase.release_checkpoint_every == 0:
                self._seal(step)
            stopping = engine.ranks.any(bool(stop))
            if last or stopping or step % phase.work_checkpoint_every == 0:
                self.log.flush()
                checkpoint.save(engine, self.work, step)
            if stopping and not last:
                raise Interrupted(f"{self.name}: stopped after step {step} on signal {stop[0] if stop else ''}; "
                                  f"run again to go on")  # fmt: skip
        if self.first:
            self._summarise()

    def _check(self, step: int, rows: list[Row], what: str, value: float) -> None:
        """Stops the phase at a value that is not a number: a loss before the weights move, a gradient norm before any
        checkpoint is written."""
        if not math.isfinite(value):
            documents = sorted({row.id for row in rows})
            named = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
            raise AtomError(f"{self.name}: the {what} is {value} at step {step}, on documents {named}; lower "
                            f"{self.name}.optimizer.lr, or look at these documents")  # fmt: skip

    def _measure(self, step: int) -> None:
        loss = self.engine.evaluate(self.heldout, self.heldout_shards)
        self.log.write({"step": step, "heldout_loss": loss})
        if self.first:
            self.report.metric(step, heldout_loss=loss)

    def _seal(self, step: int) -> None:
        """Writes the sealed checkpoint of a step into `work`; after a kill it is written again, byte for byte."""
        phase = self.config.phase
        state = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "data_position": {"next_step": step + 1, "steps": phase.steps},
            "optimizer_step": self.engine.step_done,
            "lr": learning_rate(step, phase.steps, phase.optimizer) if step else 0.0,
            "rng": "not used: no dropout, and the data order is an artifact",
        }
        moments = self.engine.moments() if step else {}
        weights = self.engine.weights()
        if self.first:
            sealed.write(self.work / "sealed" / sealed.name_of(step), weights, moments, state)

    def _summarise(self) -> None:
        """Writes summary.json into `work`."""
        lines = self.log.lines()
        measured = [(x["step"], x["heldout_loss"]) for x in lines if "heldout_loss" in x]
        losses = [x["loss"] for x in lines if "loss" in x]
        summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.config.phase.steps,
            "tokens": self.tokens,
            "loss": {"first": losses[0], "last": losses[-1]},
            "heldout_loss": {"first": measured[0][1], "last": measured[-1][1], "rows": len(self.heldout)},
        }
        (self.work / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")


class Log:
    """training.jsonl: one line for each step and each held-out measurement, in order, without any time in it."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes

    def resume(self, step: int) -> int:
        """Forgets lines after `step` (a killed run may have got further than its checkpoint). Returns the tokens seen.

        Raises AtomError if the log does not reach the step.
        """
        lines = [x for x in self.lines() if x["step"] <= step] if step else []
        steps = [x for x in lines if "tokens" in x]
        if len(steps) != step:
            raise AtomError(f"{self.path} holds {len(steps)} of {step} finished steps; "
                            f"remove {self.path.parent} to start this stage anew")  # fmt: skip
        if self.writes:
            kept = self.path.with_name(self.path.name + ".partial")
            kept.write_text("".join(_line(x) for x in lines))
            os.replace(kept, self.path)
        return steps[-1]["tokens"] if steps else 0

    def lines(self) -> list[dict[str, Any]]:
        """The finished lines; a line cut short by a kill is not one."""
        if not self.path.exists():
            return []
        return [json.loads(x) for x in self.path.read_text().splitlines(keepends=True) if x.endswith("\n")]

    def write(self, values: dict[str, Any]) -> None:
        if self.writes:
            with open(self.path, "a") as file:
                file.write(_line(values))

    def flush(self) -> None:
        """To the disk: a checkpoint counts on the lines before it."""
        if self.writes:
            with open(self.path, "a") as file:
                os.fsync(file.fileno())


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True) + "\n"


def _fill(work: Path, out: Path) -> None:
    """Copies the phase's product from `work` to `out`."""
    for step in sealed.steps_of(work / "sealed"):
        shutil.copytree(work / "sealed" / sealed.name_of(step), out / sealed.name_of(step), dirs_exist_ok=True)
    for name in ("training.jsonl", "summary.json"):
        shutil.copyfile(work / name, out / name)


@contextmanager
def _requests_to_stop() -> Iterator[list[int]]:
    """The signals received, instead of their usual effect. Handlers belong to the main thread; elsewhere: none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in watched}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
