"""The training loop of every training stage: one phase, from its first step or from its last work checkpoint.

stages.train.checkpoint.work_checkpoint describes the files in `work`. `out` is written at the end, so that it never
holds half a phase.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.stage import Inputs, Report, identity
from stages.data.order import position
from stages.mcore.moe_metrics import DEAD_SHARE, Experts
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.checkpoint.work_checkpoint import PENDING, Checkpoints
from stages.train.config import TrainConfig
from stages.train.data import Order, Prefetcher, RankBatch, Row, Shards, heldout_rows
from stages.train.engine import Engine, StepFigures
from stages.train.log import Log
from stages.train.schedule import learning_rate
from stages.train.spikes import Record, SpikeDetector, finite_or_none, spike_record
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
    timeout = config.phase.watchdog_timeout_seconds
    # the watchdog speaks before a collective gives up, so that its dumps are in the log
    with (
        Watchdog(phase, timeout, work, report) as watchdog,
        parallel.session(config.seed, config.phase.parallelism, 2 * max(timeout, START_SECONDS) + 60) as ranks,
        stop_signals() as stop,
    ):
        engine = Engine(config, ranks, inputs["tokens"].json("meta.json")["vocab_size"])
        Phase(phase, config, inputs, work, report, engine, report.lease).run(start, stop, watchdog, out)


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
        self.shards = Shards(inputs["tokens"], "train")
        self.tokenizer = str(inputs["tokens"].json("meta.json").get("tokenizer", ""))
        heldout_data = heldout_rows(inputs["tokens"], phase)
        shards = Shards(inputs["tokens"], "heldout")
        read_rows = partial(
            RankBatch.read, shards=shards, micro_rows=phase.micro_rows, ranks=engine.ranks, fp8=phase.fp8
        )
        self.heldout, self.heldout_rows = read_rows(heldout_data), len(heldout_data)
        rewind_steps = phase.spikes.rewind_steps if phase.spikes and phase.spikes.action == "rewind" else 0
        self.checkpoints = Checkpoints(work, phase.work_checkpoints_kept, engine, report, lease, rewind_steps)
        self.log = Log(self.checkpoints.folder / "training.jsonl", self.first)
        self.tokens = 0  # targets seen
        self.pending: list[Record] = []  # spikes behind which training went back, until their steps are passed again
        self.spikes = 0
        self.progress_figures: dict[str, float] = {}
        self.checkpoint_stall = 0.0  # seconds that work checkpoints took of training

    def run(self, start: Callable[[Engine], None], stop: list[int], watchdog: Watchdog, out: Path) -> None:
        phase, engine, report = self.config.phase, self.engine, self.report
        steps_done = self._start(start)
        self.spike_detector = SpikeDetector(phase.spikes, self._log_lines())
        watchdog.alive()
        with closing(Prefetcher(self.order, self.shards, phase, engine.ranks)) as prefetcher:
            started, tokens_before, data_wait, step = time.monotonic(), self.tokens, 0.0, steps_done
            while step < phase.steps:
                step += 1
                rows, rank_batch = prefetcher.take(step)
                if step > steps_done + 1:  # the first one has nothing to hide its reading behind
                    data_wait += prefetcher.waited
                resumed = self._step(step, rows, rank_batch)
                if resumed is not None:
                    step = resumed
                    watchdog.alive()
                    continue
                if self.first:
                    speed = (self.tokens - tokens_before) / (time.monotonic() - started)
                    report.metric(step, tokens_per_s=speed, data_wait_seconds=prefetcher.waited)
                    report.progress(step, phase.steps, "steps", **self.progress_figures, tokens_per_s=speed)
                is_last, is_release = step == phase.steps, self._is_release_step(step)
                if is_last or step % phase.validation.every == 0:
                    self._measure(step)
                status = engine.ranks.max(FAILED if self.checkpoints.failed() else STOP if stop else 0)
                if status == FAILED:
                    self.checkpoints.wait()
                if is_last or is_release or status == STOP or step % phase.checkpoint_interval == 0:
                    self._save(step)
                watchdog.alive()
                if status == STOP and not is_last:
                    self.checkpoints.wait()
                    raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        seconds = time.monotonic() - started
        self.checkpoints.wait()
        if self.first:
            waits = f"{data_wait:.2f} s for data and {self.checkpoint_stall:.2f} s for work checkpoints"
            report.note(f"{self.name}: {phase.steps - steps_done} steps in {seconds:.1f} s, of which it waited {waits}")
            self._write_outputs(out)
        engine.ranks.barrier()

    def _step(self, step: int, rows: list[Row], rank_batch: RankBatch) -> int | None:
        """Trains on a step's rows, unless they are excluded. Returns the step after which to continue, if a rewind."""
        phase, lr = self.config.phase, learning_rate(step, self.config.phase.steps, self.config.phase.optimizer)
        if step in phase.excluded_steps or any(step in spike["excluded"] for spike in self.pending):
            self.log.write({"step": step, "tokens": self.tokens, "lr": lr, "excluded": True})
            for spike in [x for x in self.pending if x["excluded"][-1] == step]:
                self.log.write({"step": step, "spike": spike})
                self.pending.remove(spike)
            self.progress_figures = {}
            return None
        figures = self.engine.step(
            rank_batch, lr, partial(self._check_spike, step, rows), norm_first=phase.spikes is not None
        )
        metrics = {"loss": figures.loss, "aux_loss": figures.aux_loss, "grad_norm": figures.grad_norm, "lr": lr}
        if self.config.model.z_loss:
            metrics["z_loss"] = figures.z_loss
        metrics |= {"expert_max_violation": figures.experts.max_violation}
        metrics |= {"router_entropy": float(figures.experts.entropy.mean())}
        finite_metrics = {name: finite_or_none(value) for name, value in metrics.items()}
        if figures.refused:
            return self._handle_spike(step, rows, figures, finite_metrics)
        self.tokens += sum(row.slots for row in rows)
        self.spike_detector.accept(figures.loss, figures.grad_norm)
        self.log.write({"step": step, "tokens": self.tokens, **metrics})
        self.progress_figures = {"loss": figures.loss}
        if self.first:
            self.report.metric(step, **metrics, tokens=float(self.tokens))
        if step == phase.steps or step % phase.validation.every == 0:
            self._log_experts(step, figures.experts)
        return None

    def _check_spike(self, step: int, rows: list[Row], loss: float, norm: float | None) -> str | None:
        """The reason why a step is a spike, or None. Raises AtomError if the recipe stops at spikes, or has no
        policy."""
        reason = self.spike_detector.reason(loss, norm)
        if reason and (self.spike_detector.policy is None or self.spike_detector.policy.action == "stop"):
            documents = sorted({segment.id for row in rows for segment in row.segments})
            names = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
            raise AtomError(f"{self.name}: {reason} at step {step}, on documents {names}; lower "
                            f"{self.name}.optimizer.lr, look at these documents, or say in {self.name}.spikes to skip "
                            f"such steps")  # fmt: skip
        return reason

    def _handle_spike(
        self, step: int, rows: list[Row], figures: StepFigures, metrics: dict[str, float | None]
    ) -> int | None:
        """Records a spike, whose update is skipped, or rewinds to an earlier checkpoint."""
        policy = self.config.phase.spikes
        assert policy is not None
        self.spikes += 1
        if self.first:
            self.report.note(f"{self.name}: step {step} moved no weight: {figures.refused}")
        if self.spikes > policy.max_spikes:
            raise AtomError(f"{self.name}: {self.spikes} spikes, more than {self.name}.spikes.max_spikes = "
                            f"{policy.max_spikes}; the last at step {step}: {figures.refused}; lower the learning "
                            f"rate or look at the documents that {self.log.path} names")  # fmt: skip
        if policy.action == "skip":
            spike = spike_record(step, "skip", [step], rows, figures)
            self.log.write({"step": step, "tokens": self.tokens, **metrics, "skipped": True})
            self.log.write({"step": step, "spike": spike})
            self.progress_figures = {}
            return None
        # published checkpoints stay
        last_release = max(n for n in range(step) if self._is_release_step(n) or n < self.order.first)
        rewind_step = max(step - policy.rewind_steps, last_release)
        dropped_spikes = [x["spike"] for x in self._log_lines() if "spike" in x]
        state = self.checkpoints.rewind(rewind_step)
        self.tokens = state["tokens"]
        self.pending = [x for x in dropped_spikes if x["excluded"][-1] > state["step"]] + self.pending
        self.pending.append(spike_record(step, "rewind", range(rewind_step + 1, step + 1), rows, figures))
        self.spike_detector = SpikeDetector(policy, self._log_lines())
        if self.first:
            self.report.note(
                f"{self.name}: back to step {state['step']}; steps {rewind_step + 1} to {step} are left out"
            )
        return int(state["step"])

    def _log_experts(self, step: int, experts: Experts) -> None:
        """Logs a step's distribution over experts, and reports dead experts."""
        self.log.write({"step": step, "experts": experts.json()})
        dead = experts.dead()
        if self.first:
            self.report.metric(step, dead_experts=float(len(dead)), dropped_tokens=float(experts.dropped))
            if dead:
                names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:5])
                suffix = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
                self.report.note(f"{self.name}: experts starve at step {step}: {names}{suffix} get less than "
                                 f"{DEAD_SHARE:.0%} of a fair share")  # fmt: skip

    def _start(self, start: Callable[[Engine], None]) -> int:
        """Restores engine, log and counts, or initializes them. Returns the last finished step."""
        state = self.checkpoints.load(self._is_release_step)
        if state is not None:
            self.log.check(state["step"], self.order.first)
            self.tokens, self.pending = state["tokens"], state.get(PENDING, [])
            self.spikes = len(self.pending) + sum("spike" in line for line in self._log_lines())
            if state["step"]:
                self.report.note(f"{self.name}: going on after step {state['step']}")
            return int(state["step"])
        self.log.create()
        if self.origin is not None:
            self.tokens = self.origin.load(self.engine, self.config, self.tokenizer)
            self.report.note(f"{self.name}: continues from {self.origin.artifact.key}")
            self._measure(self.origin.step)
            if self.config.phase.spikes is not None:
                self._save(self.origin.step, seal=False)  # a rewind needs somewhere to go
            return self.origin.step
        start(self.engine)
        self._measure(0)
        self._save(0)
        return 0

    def _log_lines(self) -> list[dict[str, Any]]:
        """The log so far, on every rank."""
        return self.engine.ranks.from_first(self.log.lines() if self.first else [])

    def _is_release_step(self, step: int) -> bool:
        """Whether a step has a release checkpoint."""
        phase = self.config.phase
        if step < self.order.first:  # the beginning belongs to a phase that has no other origin
            return step == 0 and self.origin is None
        return step == phase.steps or step % phase.release_checkpoint_interval == 0

    def _measure(self, step: int) -> None:
        loss = self.engine.evaluate(self.heldout)
        self.log.write({"step": step, "heldout_loss": loss})
        if self.first:
            self.report.metric(step, heldout_loss=loss)

    def _save(self, step: int, seal: bool = True) -> None:
        phase = self.config.phase
        rows_read = self.order.consumed(step) if step else {}
        state = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "data_position": position(self.order.meta, rows_read, step),
            "optimizer_step": self.engine.step_done,
            "lr": learning_rate(step, phase.steps, phase.optimizer) if step else 0.0,
            "rng": "not used: no dropout, and the data order is an artifact",
            "config": identity(self.config),
            "tokenizer": self.tokenizer,
        }
        if self.pending:
            state[PENDING] = self.pending
        self.log.flush()
        stall = self.checkpoints.save(step, state, seal=seal and self._is_release_step(step))
        self.checkpoint_stall += stall
        if self.first:
            self.report.metric(step, checkpoint_stall_seconds=stall)

    def _write_outputs(self, out: Path) -> None:
        """Writes the phase's artifact into `out`."""
        log_lines = self.log.lines()
        measurements = [(x["step"], x["heldout_loss"]) for x in log_lines if "heldout_loss" in x]
        losses = [x["loss"] for x in log_lines if "loss" in x and "skipped" not in x]
        spikes = [{"step": x["step"], **x["spike"]} for x in log_lines if "spike" in x]
        experts = [x["experts"] for x in log_lines if "experts" in x]
        summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.config.phase.steps,
            "tokens": self.tokens,
            "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
            "heldout_loss": {"first": measurements[0][1], "last": measurements[-1][1], "rows": self.heldout_rows},
            "precision": self.config.phase.precision,
            "spikes": [{k: x[k] for k in ("step", "reason", "action", "excluded", "documents")} for x in spikes],
            "excluded_steps": [x["step"] for x in log_lines if "excluded" in x],
            "dead_experts": experts[-1]["dead"] if experts else [],
            "dropped_tokens": sum(x["dropped"] for x in experts),
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(self.log.path, out / "training.jsonl")
        folder = self.checkpoints.folder / "sealed"
        for step in release_checkpoint.steps_of(folder):
            shutil.copytree(
                folder / release_checkpoint.name_of(step), out / release_checkpoint.name_of(step), copy_function=os.link
            )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects stop signals instead of their default effect. In other threads than the main one: no handlers."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    previous_handlers = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
