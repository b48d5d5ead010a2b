"""The loop of every stage that trains: one phase, from its first step or from its last work checkpoint.

A subclass defines a step. The loop makes a phase resumable: it has work checkpoints of all ranks, the log, release
checkpoints, stop signals, and a watchdog for hanging ranks. stages.train.checkpoint.work_checkpoint describes the files
in `work`. `out` is written at the end, so that it never contains a partial phase.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from pipeline.core.environment import device
from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.stage import Inputs, Report, identity
from stages.train import log, parallel
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.checkpoint.work_checkpoint import LOG, SEALED, Checkpoints
from stages.train.config import WORK_CHECKPOINTS, TrainerConfig
from stages.train.engine import Engine
from stages.train.log import Log, LogReplay, finite_or_none
from stages.train.outputs import State, Summary
from stages.train.step_times import measured_waits
from stages.train.watchdog import START_SECONDS, Watchdog

# By weight: all ranks act on the largest status of any.
RUNNING, STOP, FAILED = 0, 1, 2


class Trainer(ABC):
    """One run of the loop. Every method is collective unless its docstring says otherwise."""

    rng: ClassVar[str]
    """The entry of state.json about random numbers."""
    rewind_steps = 0
    """The maximum rewind of `step`, in steps."""

    def __init__(
        self,
        name: str,
        config: TrainerConfig,
        inputs: Inputs,
        work: Path,
        report: Report,
        engine: Engine,
        lease: int | None,
        watchdog: Watchdog,
    ) -> None:
        self.name, self.config, self.inputs, self.work, self.report = name, config, inputs, work, report
        self.engine, self.first, self.watchdog = engine, engine.ranks.first, watchdog
        self.checkpoints = Checkpoints(
            work, WORK_CHECKPOINTS, engine, report, lease, self.rewind_steps, watchdog.progress
        )
        self.log = Log(self.checkpoints.folder / LOG, self.first)
        self.tokens = 0  # targets seen
        self.progress_figures: dict[str, float] = {}  # shown beside the progress
        self.checkpoint_stall = 0.0  # seconds of training that work checkpoints took

    # -- methods that a phase defines ---------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def vocab_size(inputs: Inputs) -> int:
        """Tokens of the phase's tokenizer."""

    @abstractmethod
    def step(self, step: int) -> int:
        """Takes a step and logs it (`log_step`).

        Returns the last finished step: this one, or after a rewind an earlier one.
        """

    @abstractmethod
    def measure(self, step: int) -> dict[str, Any] | None:
        """The validation metrics after a step, for the log; None if the step is not measured."""

    def load_base(self) -> None:  # noqa: B027 - optional
        """Loads what no checkpoint of the phase has."""

    def initialize(self) -> int:
        """Sets the initial weights of the phase. Returns the step from which it continues."""
        self.load_previous_phase()
        return 0

    def begin(self, step: int) -> None:  # noqa: B027 - optional
        """Prepares for the steps after `step`."""

    def state(self, step: int) -> dict[str, Any]:
        """The phase's own entries of state.json."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 - optional
        """Restores the entries of `state`."""

    def write_outputs(self, out: Path) -> dict[str, Any]:
        """Writes the phase's own files into `out`; returns its entries of summary.json. Rank 0 only."""
        return {}

    def waits(self) -> dict[str, float]:
        """Seconds that training waited, by cause."""
        return {"work checkpoints": self.checkpoint_stall}

    def close(self) -> None:  # noqa: B027 - optional
        """Frees the resources of the phase beside the engine."""

    @property
    def first_step(self) -> int:
        """The first step that is trained."""
        return 1

    def is_release_step(self, step: int) -> bool:
        """Returns True if a step has a release checkpoint. Step 0 is the last step of another phase."""
        return step > 0 and self.config.phase.is_release_step(step)

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update of the weights, counted from 1."""
        return self.config.phase.optimizer.learning_rate(update, self.config.phase.all_updates)

    def last_learning_rate(self, step: int) -> float:
        """The learning rate of the last update up to a step; 0 before the first."""
        return self.learning_rate(self.engine.step_done) if self.engine.step_done else 0.0

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, stop: list[int], out: Path) -> None:
        """Trains to the end of the phase and fills `out`. stop: signals received so far."""
        phase, ranks, report = self.config.phase, self.engine.ranks, self.report
        # From a work checkpoint of an earlier attempt, if one is intact.
        begun_at = step = self._start()
        self.begin(step)
        self.watchdog.alive()
        started, tokens_before = time.monotonic(), self.tokens
        while step < phase.steps:
            step_began, step_tokens = time.monotonic(), self.tokens
            previous, step = step, self.step(step + 1)
            # That step was measured and saved when it was first reached.
            if step <= previous:  # rewound
                self.watchdog.alive()
                continue
            if self.first:
                speed = (self.tokens - tokens_before) / (time.monotonic() - started)
                seconds = time.monotonic() - step_began
                figures = {"step_seconds": seconds, "step_tokens_per_s": (self.tokens - step_tokens) / seconds}
                report.metric(step, tokens_per_s=speed, **figures, **peak_memory(ranks.device))
                report.progress(step, phase.steps, "steps", **self.progress_figures, tokens_per_s=speed)
            self.log_measurement(step, self.measure(step))
            is_last = step == phase.steps
            # Saving and stopping are collective, and signals and errors reach ranks at different times: all act on the
            # worst status of any rank, after the same step.
            status = STOP if stop else RUNNING
            if self.checkpoints.failed():
                status = FAILED
            status = ranks.max(status)
            if status == FAILED:
                self.checkpoints.wait()
            # A stop is saved too, so that the next attempt repeats no step.
            if is_last or self.is_release_step(step) or status == STOP or step % phase.checkpoint_interval == 0:
                self._save(step)
            self.watchdog.alive()
            if status == STOP and not is_last:
                self.checkpoints.wait()
                raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        # Without the last checkpoint, which training does not wait for.
        seconds = time.monotonic() - started
        self.checkpoints.wait()
        if self.first:
            waits = " and ".join(f"{duration:.2f} s for {cause}" for cause, duration in self.waits().items())
            report.note(f"{self.name}: {phase.steps - begun_at} steps in {seconds:.1f} s, of which it waited {waits}")
            self._write_outputs(out)
        # Rank 0 may still be writing. The others stay, so that no rank destroys its groups before all are done.
        ranks.barrier()

    def log_step(self, step: int, line: dict[str, Any]) -> None:
        """Writes a step's line of training.jsonl, and its numbers to the metrics."""
        # JSON has no NaN, and a log that other programs cannot read would be no evidence.
        finite = {name: finite_or_none(value) if isinstance(value, float) else value for name, value in line.items()}
        self.log.write({"step": step, "tokens": self.tokens, **finite})
        if self.first:
            scalars = {name: float(value) for name, value in line.items() if isinstance(value, (int, float))}
            self.report.metric(step, **scalars, tokens=float(self.tokens))
            self.progress_figures = {name: scalars[name] for name in ("reward", "loss") if name in scalars}

    def log_measurement(self, step: int, line: dict[str, Any] | None) -> None:
        if line:
            self.log.write({"step": step, **line})

    def log_lines(self) -> list[dict[str, Any]]:
        """The log so far, on every rank."""
        return self.engine.ranks.from_first(self.log.lines() if self.first else [])

    def load_previous_phase(self) -> None:
        """Loads the weights of the last checkpoint of the previous phase (inputs["init"])."""
        self.last_checkpoint("init").load_weights(self.engine)

    def last_checkpoint(self, role: str) -> Origin:
        """The last checkpoint of the phase that an input is, such as `init`, the previous phase."""
        phase = self.inputs[role]
        last = release_checkpoint.name_of(release_checkpoint.steps_of(phase.path)[-1])
        return Origin(phase, last, self.watchdog.progress)

    def update_check(self, step: int) -> Callable[[float, float | None], str | None]:
        """A check for `Engine.step` that stops the phase when a loss or gradient norm is not finite."""

        def check(loss: float, grad_norm: float | None) -> str | None:
            if finite_or_none(loss) is None or (grad_norm is not None and finite_or_none(grad_norm) is None):
                raise AtomError(
                    f"{self.name}: loss {loss} and gradient norm {grad_norm} at step {step} are no "
                    f"numbers; lower {self.name}.optimizer.lr"
                )
            return None

        return check

    def _start(self) -> int:
        """Restores engine, log and counts, or initializes them. Returns the last finished step."""
        # Before the checkpoint, which has only what training changes.
        self.load_base()
        # Collective: all ranks take the same checkpoint, or none.
        state = self.checkpoints.load(self.is_release_step)
        # Before the first step, so that a start that fails leaves a record too.
        self._record_start(None if state is None else int(state["step"]))
        if state is not None:
            self.log.check(state["step"], self.first_step)
            self.tokens = state["tokens"]
            self.restore(state)
            if state["step"]:
                self.report.note(f"{self.name}: going on after step {state['step']}")
            return int(state["step"])
        self.log.create()
        step = self.initialize()
        self.log_measurement(step, self.measure(step))
        self.save_beginning(step)
        return step

    def _record_start(self, restored_step: int | None) -> None:
        """Writes the record of this start, and again once the steps that are trained again were compared."""
        if not self.first:
            return
        path = log.start_path(self.work, self.report.lease)
        replay = LogReplay(self.checkpoints.lost_lines)

        def write() -> None:
            log.write_start(path, restored_step, device(), replay)

        def done() -> None:
            self.report.note(f"{self.name}: {replay.sentence()}")
            write()

        replay.done, self.log.replay = done, replay
        write()

    def save_beginning(self, step: int) -> None:
        """Saves the initial state of the phase."""
        self._save(step)

    def _save(self, step: int, seal: bool = True) -> None:
        state: State = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "optimizer_step": self.engine.step_done,
            "lr": self.last_learning_rate(step),
            "rng": self.rng,
            "config": identity(self.config),
            **self.engine.router_state(),  # type: ignore[typeddict-item]
            **self.state(step),
        }
        # The lines before a checkpoint have to be on the disk before the checkpoint states their size.
        self.log.flush()
        stall = self.checkpoints.save(step, state, seal=seal and self.is_release_step(step))
        self.checkpoint_stall += stall
        if self.first:
            self.report.metric(step, checkpoint_stall_seconds=stall)

    def _write_outputs(self, out: Path) -> None:
        """Writes the phase's artifact into `out`."""
        summary: Summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.config.phase.steps,
            "tokens": self.tokens,
            "precision": self.config.phase.precision,
            **self.write_outputs(out),  # type: ignore[typeddict-item]
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(self.log.path, out / LOG)
        folder = self.checkpoints.folder / SEALED
        for step in release_checkpoint.steps_of(folder):
            # Links, as release checkpoints never change and may have terabytes.
            shutil.copytree(
                folder / release_checkpoint.name_of(step), out / release_checkpoint.name_of(step), copy_function=os.link
            )


def train(
    trainer: type[Trainer], name: str, config: TrainerConfig, inputs: Inputs, work: Path, out: Path, report: Report
) -> None:
    """Runs a phase to its end and fills `out` with its sealed checkpoints and records.

    The records are training.jsonl, summary.json and the phase's own files.

    Raises AtomError if the loss is not finite, if data and recipe do not match, if no work checkpoint is intact, if
    memory is full, or if another rank is lost; Interrupted after a stop signal; and the errors of the trainer.
    """
    timeout = config.phase.watchdog_timeout_seconds
    # the watchdog acts before a collective times out, so that its stacks are in the log
    with (
        Watchdog(name, timeout, work, report) as watchdog,
        measured_waits(),
        parallel.session(config.seed, config.phase.parallelism, 2 * max(timeout, START_SECONDS) + 60) as ranks,
        stop_signals() as stop,
        full_memory(name, ranks),
    ):
        engine = Engine(config, ranks, trainer.vocab_size(inputs))
        running = trainer(name, config, inputs, work, report, engine, report.lease, watchdog)
        try:
            running.run(stop, out)
        finally:
            running.close()


def peak_memory(device: torch.device | str) -> dict[str, float]:
    """Bytes that this process has held at most: of the host, and of its GPU if it has one."""
    # Linux states the peak in KiB.
    peaks = {"peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}
    if torch.device(device).type == "cuda":
        peaks["peak_gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return peaks


@contextmanager
def full_memory(name: str, ranks: parallel.Ranks) -> Iterator[None]:
    """Raises AtomError in place of PyTorch's error that a tensor has no room on a GPU or on the host."""
    try:
        yield
    except RuntimeError as error:
        # PyTorch has no field for it: its message is the only source, on a GPU and on the host.
        size = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
        is_host = "DefaultCPUAllocator" in str(error)
        if size is None or not (is_host or isinstance(error, torch.OutOfMemoryError)):
            raise
        wanted = float(size[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[size[2]] / 2**30
        place = "CPU" if is_host else f"{ranks.device} of {torch.cuda.mem_get_info()[1] / 2**30:.1f} GiB"
        raise AtomError(
            f"{name}: rank {ranks.rank} has no memory left on {place} for {wanted:.3g} GiB more; `atom plan` says what "
            f"it needs: lower {name}.batch.micro_tokens, set parallelism.recompute = layer, or split the model over "
            f"more ranks"
        ) from error


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects stop signals in place of their default effect. Installs no handlers outside of the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    # Python allows handlers in the main thread only. A second signal is collected as well: the step ends in any case.
    previous_handlers = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
