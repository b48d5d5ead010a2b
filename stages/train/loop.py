"""The training loop that every training stage runs: one phase, from its first step or from where it was killed.

What the loop keeps in `work` is told in stages.train.checkpoint. `out` is filled at the end, so that it never holds
half a phase.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import AtomError, Interrupted
from pipeline.stage import Inputs, Report, identity
from stages.data.order import position
from stages.train import parallel, sealed
from stages.train.checkpoint import SUCCEEDED, Checkpoints
from stages.train.config import TrainConfig
from stages.train.data import Feed, Order, Row, Shards, Share, heldout_rows
from stages.train.engine import Engine
from stages.train.origin import Origin
from stages.train.schedule import learning_rate
from stages.train.watchdog import START_SECONDS, Watchdog

STOP, FAILED = 1, 2


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

    start: sets the weights that the phase begins with, unless it continues from a checkpoint (inputs["continue"]).
    Raises AtomError when the loss is no longer a number, when data and recipe do not fit, when no work checkpoint
    is intact, or when another rank is lost; Interrupted when the machine asked to stop.
    """
    patience = config.phase.hang_seconds
    # the watchdog speaks before a collective gives up, so that its dumps are in the log
    with (
        Watchdog(phase, patience, work, report) as watchdog,
        parallel.session(config.seed, config.phase.cluster, 2 * max(patience, START_SECONDS) + 60) as ranks,
        _requests_to_stop() as stop,
    ):
        held = re.fullmatch(r"out\.(\d+)", out.name)  # the worker names it by its lease, whose numbers only grow
        lease = int(held[1]) if held else None
        Phase(phase, config, inputs, work, report, Engine(config, ranks), lease).run(start, stop, watchdog, out)


class Phase:
    """The state of one run of the loop."""

    def __init__(
        self, name: str, config: TrainConfig, inputs: Inputs, work: Path, report: Report, engine: Engine,
        lease: int | None,
    ) -> None:  # fmt: skip
        self.name, self.config, self.report, self.engine = name, config, report, engine
        self.first, phase = engine.ranks.first, config.phase
        self.origin = Origin(inputs["continue"]) if "continue" in inputs else None
        self.order = Order(inputs["order"], phase)
        self.shards = Shards(inputs["tokens"], "train", config.padded_vocab_size)
        self.tokenizer = str(inputs["tokens"].json("meta.json").get("tokenizer", ""))
        heldout = heldout_rows(inputs["tokens"], phase)
        shards = Shards(inputs["tokens"], "heldout", config.padded_vocab_size)
        self.heldout, self.heldout_rows = Share.read(heldout, shards, phase.micro_rows, engine.ranks), len(heldout)
        self.checkpoints = Checkpoints(work, phase.work_checkpoints_kept, engine, report, lease)
        self.log = Log(self.checkpoints.folder / "training.jsonl", self.first)
        self.tokens = 0  # targets seen
        self.stalled = 0.0  # seconds that work checkpoints took of training

    def run(self, start: Callable[[Engine], None], stop: list[int], watchdog: Watchdog, out: Path) -> None:
        phase, engine, report = self.config.phase, self.engine, self.report
        done = self._begin(start)
        watchdog.alive()
        with closing(Feed(self.order, self.shards, phase.micro_rows, engine.ranks)) as feed:
            began, seen, waited = time.monotonic(), self.tokens, 0.0
            for step in range(done + 1, phase.steps + 1):
                rows, share = feed.take(step)
                if step > done + 1:  # the first one has nothing to hide its reading behind
                    waited += feed.waited
                lr = learning_rate(step, phase.steps, phase.optimizer)
                check = partial(self._check, step, rows)
                figures = engine.step(share, lr, partial(check, "loss"))
                check("gradient norm", figures.grad_norm)
                self.tokens += sum(row.length - 1 for row in rows)
                line = {"loss": figures.loss, "aux_loss": figures.aux_loss, "grad_norm": figures.grad_norm, "lr": lr}
                self.log.write({"step": step, "tokens": self.tokens, **line})
                if self.first:
                    speed = (self.tokens - seen) / (time.monotonic() - began)
                    timed = {"tokens_per_s": speed, "data_wait_seconds": feed.waited}
                    report.metric(step, **line, tokens=float(self.tokens), **timed)
                    report.progress(step, phase.steps, loss=figures.loss, tokens_per_s=speed)
                last, due = step == phase.steps, self._due(step)
                if last or step % phase.heldout.every == 0:
                    self._measure(step)
                state = engine.ranks.max(FAILED if self.checkpoints.failed() else STOP if stop else 0)
                if state == FAILED:
                    self.checkpoints.wait()
                if last or due or state == STOP or step % phase.work_checkpoint_every == 0:
                    self._save(step)
                watchdog.alive()
                if state == STOP and not last:
                    self.checkpoints.wait()
                    raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        seconds = time.monotonic() - began
        self.checkpoints.wait()
        if self.first:
            waits = f"{waited:.2f} s for data and {self.stalled:.2f} s for work checkpoints"
            report.note(f"{self.name}: {phase.steps - done} steps in {seconds:.1f} s, of which it waited {waits}")
            self._fill(out)
        engine.ranks.barrier()

    def _begin(self, start: Callable[[Engine], None]) -> int:
        """Brings engine, log and counts to where this attempt goes on. Returns the last finished step."""
        state = self.checkpoints.load(self._due)
        if state is not None:
            self.log.check(state["step"], self.order.first)
            self.tokens = state["tokens"]
            if state["step"]:
                self.report.note(f"{self.name}: going on after step {state['step']}")
            return int(state["step"])
        self.log.begin()
        if self.origin is not None:
            self.tokens = self.origin.load(self.engine, self.config, self.tokenizer)
            self.report.note(f"{self.name}: continues from {self.origin.artifact.key}")
            self._measure(self.origin.step)
            return self.origin.step
        start(self.engine)
        self._measure(0)
        self._save(0)
        return 0

    def _due(self, step: int) -> bool:
        """Whether a release checkpoint belongs to a step."""
        phase = self.config.phase
        return step in (0, phase.steps) or step % phase.release_checkpoint_every == 0

    def _check(self, step: int, rows: list[Row], what: str, value: float) -> None:
        """Stops the phase at a value that is not a number: a loss before the weights move, a gradient norm before any
        checkpoint is written."""
        if not math.isfinite(value):
            documents = sorted({row.id for row in rows})
            named = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
            raise AtomError(f"{self.name}: the {what} is {value} at step {step}, on documents {named}; lower "
                            f"{self.name}.optimizer.lr, or look at these documents")  # fmt: skip

    def _measure(self, step: int) -> None:
        loss = self.engine.evaluate(self.heldout)
        self.log.write({"step": step, "heldout_loss": loss})
        if self.first:
            self.report.metric(step, heldout_loss=loss)

    def _save(self, step: int) -> None:
        phase = self.config.phase
        read = self.order.consumed(step) if step else {}
        state = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "data_position": position(self.order.meta, read, step),
            "optimizer_step": self.engine.step_done,
            "lr": learning_rate(step, phase.steps, phase.optimizer) if step else 0.0,
            "rng": "not used: no dropout, and the data order is an artifact",
            "config": identity(self.config),
            "tokenizer": self.tokenizer,
        }
        self.log.flush()
        stall = self.checkpoints.save(step, state, seal=self._due(step))
        self.stalled += stall
        if self.first:
            self.report.metric(step, checkpoint_stall_seconds=stall)

    def _fill(self, out: Path) -> None:
        """Puts the phase's product into `out`."""
        lines = self.log.lines()
        measured = [(x["step"], x["heldout_loss"]) for x in lines if "heldout_loss" in x]
        losses = [x["loss"] for x in lines if "loss" in x]
        summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.config.phase.steps,
            "tokens": self.tokens,
            "loss": {"first": losses[0], "last": losses[-1]},
            "heldout_loss": {"first": measured[0][1], "last": measured[-1][1], "rows": self.heldout_rows},
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(self.log.path, out / "training.jsonl")
        folder = self.checkpoints.folder / "sealed"
        for step in sealed.steps_of(folder):
            shutil.copytree(folder / sealed.name_of(step), out / sealed.name_of(step), copy_function=os.link)


class Log:
    """training.jsonl: one line for each step and each held-out measurement, in order, without any time in it."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes

    def begin(self) -> None:
        """An empty log."""
        if self.writes:
            self.path.write_bytes(b"")

    def check(self, step: int, first: int) -> None:
        """Raises AtomError if the log that came with a checkpoint does not hold every step from `first` to `step`."""
        if self.writes:
            steps = [x["step"] for x in self.lines() if "tokens" in x]
            if steps != list(range(first, step + 1)):
                raise AtomError(f"{self.path} does not hold the steps {first} to {step} one by one; "
                                f"remove {self.path.parent.parent} to start this stage anew")  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in self.path.read_text().splitlines()]

    def write(self, values: dict[str, Any]) -> None:
        if self.writes:
            with self._open() as file:
                file.write(json.dumps(values, sort_keys=True) + "\n")

    def flush(self) -> None:
        """To the disk: a checkpoint counts on the lines before it."""
        if self.writes:
            with self._open() as file:
                os.fsync(file.fileno())

    def _open(self) -> TextIO:
        """Raises AtomError if the folder is gone, which only a later attempt removes."""
        try:
            return open(self.path, "a")
        except FileNotFoundError:
            raise AtomError(SUCCEEDED) from None


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
