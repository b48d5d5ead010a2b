"""The loop of every post-training stage: from the first step or from where it was killed, one step after another.

A subclass defines a step. This loop holds the parts that make a run resumable: work checkpoints of all ranks, the log,
release checkpoints, requests to stop, and a watchdog for hanging ranks (stages/train).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, Interrupted
from pipeline.core.stage import Inputs, Report, identity
from stages.rl.rollout.generation import Chat
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.checkpoint.work_checkpoint import Checkpoints
from stages.train.engine import Engine, StepFigures
from stages.train.log import Log
from stages.train.loop import FAILED, STOP, stop_signals
from stages.train.schedule import learning_rate
from stages.train.spikes import finite_or_none
from stages.train.watchdog import START_SECONDS, Watchdog


class Trainer:
    """One run of the loop. Every method is collective unless its docstring says otherwise."""

    def __init__(
        self, name: str, config: Any, inputs: Inputs, work: Path, report: Report, engine: Engine, lease: int | None
    ) -> None:
        self.name, self.config, self.inputs, self.work, self.report = name, config, inputs, work, report
        self.engine, self.phase, self.first = engine, config.phase, engine.ranks.first
        self.checkpoints = Checkpoints(work, self.phase.work_checkpoints_kept, engine, report, lease)
        self.log = Log(self.checkpoints.folder / "training.jsonl", self.first)
        self.tokens = 0  # of answers that were learnt from

    def step(self, step: int) -> dict[str, Any]:
        """Takes a step; returns its metrics for the log."""
        raise NotImplementedError

    def measure(self, step: int) -> dict[str, Any] | None:
        """The validation metrics after a step, for the log; None if the step is not measured."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """The trainer's part of a checkpoint, beyond the engine's state, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the trainer from `state`."""

    def write_outputs(self, out: Path) -> dict[str, Any]:
        """Writes the stage's own files into `out`; returns their part of the summary. Rank 0 only."""
        return {}

    def close(self) -> None:
        """Frees the resources that the stage holds beside the engine."""

    def run(self, stop: list[int], watchdog: Watchdog, out: Path) -> None:
        phase, ranks, report = self.phase, self.engine.ranks, self.report
        steps_done = self._start()
        watchdog.alive()
        started = time.monotonic()
        for step in range(steps_done + 1, phase.steps + 1):
            line = self.step(step)
            self.log.write(
                {
                    "step": step,
                    "tokens": self.tokens,
                    **{k: finite_or_none(v) if isinstance(v, float) else v for k, v in line.items()},
                }
            )
            if self.first:
                scalars = {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}
                report.metric(step, **scalars, tokens=float(self.tokens))
                report.progress(
                    step, phase.steps, "steps", **{k: scalars[k] for k in ("reward", "loss") if k in scalars}
                )
            self._measure(step)
            is_last = step == phase.steps
            state = ranks.max(FAILED if self.checkpoints.failed() else STOP if stop else 0)
            if state == FAILED:
                self.checkpoints.wait()
            if is_last or self._is_release_step(step) or state == STOP or step % phase.checkpoint_interval == 0:
                self._save(step)
            watchdog.alive()
            if state == STOP and not is_last:
                self.checkpoints.wait()
                raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        self.checkpoints.wait()
        if self.first:
            report.note(f"{self.name}: {phase.steps - steps_done} steps in {time.monotonic() - started:.1f} s")
            self._write_outputs(out)
        ranks.barrier()

    def update_check(self, step: int) -> Callable[[float, float | None], str | None]:
        """A check for `Engine.step` that stops the phase when a loss or gradient norm is not finite."""

        def check(loss: float, grad_norm: float | None) -> str | None:
            if finite_or_none(loss) is None or (grad_norm is not None and finite_or_none(grad_norm) is None):
                raise AtomError(f"{self.name}: loss {loss} and gradient norm {grad_norm} at step {step} are no "
                                f"numbers; lower {self.name}.optimizer.lr")  # fmt: skip
            return None

        return check

    def learning_rate(self, step: int) -> float:
        """The learning rate of an update."""
        return learning_rate(step, self.phase.all_updates, self.phase.optimizer)

    @staticmethod
    def update_metrics(figures: StepFigures, lr: float) -> dict[str, Any]:
        """The metrics of an update for the log."""
        return {
            "loss": figures.loss,
            "grad_norm": figures.grad_norm,
            "aux_loss": figures.aux_loss,
            "lr": lr,
            "expert_max_violation": figures.experts.max_violation,
            "router_entropy": float(figures.experts.entropy.mean()),
        }

    def _start(self) -> int:
        state = self.checkpoints.load(self._is_release_step)
        if state is not None:
            self.log.check(state["step"], 1)
            self.tokens = state["tokens"]
            self.restore(state["rl"])
            if state["step"]:
                self.report.note(f"{self.name}: going on after step {state['step']}")
            return int(state["step"])
        self.log.create()
        init = self.inputs["init"]
        Origin(init, release_checkpoint.name_of(release_checkpoint.steps_of(init.path)[-1])).load_weights(self.engine)
        self._measure(0)
        self._save(0)
        return 0

    def _measure(self, step: int) -> None:
        if line := self.measure(step):
            self.log.write({"step": step, **line})

    def _is_release_step(self, step: int) -> bool:
        """Whether a step has a release checkpoint. Step 0 is the last step of another phase."""
        return step > 0 and (step == self.phase.steps or step % self.phase.release_checkpoint_interval == 0)

    def _save(self, step: int) -> None:
        state = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "optimizer_step": self.engine.step_done,
            "lr": self.learning_rate(self.engine.step_done) if self.engine.step_done else 0.0,
            "rng": "not used: every answer has a seed of its own, which follows from the recipe's",
            "config": identity(self.config),
            "rl": self.state(),
        }
        self.log.flush()
        stall = self.checkpoints.save(step, state, seal=self._is_release_step(step))
        if self.first:
            self.report.metric(step, checkpoint_stall_seconds=stall)

    def _write_outputs(self, out: Path) -> None:
        summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.phase.steps,
            "tokens": self.tokens,
            "precision": self.phase.precision,
            **self.write_outputs(out),
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(self.log.path, out / "training.jsonl")
        folder = self.checkpoints.folder / "sealed"
        for step in release_checkpoint.steps_of(folder):
            shutil.copytree(
                folder / release_checkpoint.name_of(step), out / release_checkpoint.name_of(step), copy_function=os.link
            )


def train(
    trainer_class: type[Trainer], name: str, config: Any, inputs: Inputs, work: Path, out: Path, report: Report
) -> None:
    """Runs a phase of post-training to its end and fills `out`.

    Raises AtomError as stages.train.loop.train does, the errors of the stage's verifiers, and Interrupted when the
    machine asks to stop.
    """
    timeout = config.phase.watchdog_timeout_seconds
    with (
        Watchdog(name, timeout, work, report) as watchdog,
        parallel.session(config.seed, config.phase.parallelism, 2 * max(timeout, START_SECONDS) + 60) as ranks,
        stop_signals() as stop,
    ):
        engine = Engine(config, ranks, Chat(inputs["tokenizer"]).vocab_size)
        trainer = trainer_class(name, config, inputs, work, report, engine, report.lease)
        try:
            trainer.run(stop, watchdog, out)
        finally:
            trainer.close()
