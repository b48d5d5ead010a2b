"""The loop of every post-training stage: from the first step or from where it was killed, one step after another.

What a step is, a subclass says. What is common is what makes a run come back: work checkpoints of all ranks, the log,
sealed checkpoints, requests to stop, and a watch over ranks that hang (stages/train).
"""

from __future__ import annotations

import json
import os
import re
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
from stages.train.loop import FAILED, STOP, requests_to_stop
from stages.train.schedule import learning_rate
from stages.train.spikes import finite
from stages.train.watchdog import START_SECONDS, Watchdog


class Trainer:
    """One run of the loop. Every method is collective but where it says so."""

    def __init__(
        self, name: str, config: Any, inputs: Inputs, work: Path, report: Report, engine: Engine, lease: int | None
    ) -> None:
        self.name, self.config, self.inputs, self.work, self.report = name, config, inputs, work, report
        self.engine, self.phase, self.first = engine, config.phase, engine.ranks.first
        self.checkpoints = Checkpoints(work, self.phase.work_checkpoints_kept, engine, report, lease)
        self.log = Log(self.checkpoints.folder / "training.jsonl", self.first)
        self.tokens = 0  # of answers that were learnt from

    def step(self, step: int) -> dict[str, Any]:
        """Takes a step; returns what the log says of it."""
        raise NotImplementedError

    def measure(self, step: int) -> dict[str, Any] | None:
        """What the log says of the policy after a step, if this is a step to measure it."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond the engine's state, as JSON."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes `state` over."""

    def fill(self, out: Path) -> dict[str, Any]:
        """Puts the stage's own files into `out`; returns what the summary says. Of rank 0 alone."""
        return {}

    def close(self) -> None:
        """Frees what the stage holds beside the engine."""

    def run(self, stop: list[int], watchdog: Watchdog, out: Path) -> None:
        phase, ranks, report = self.phase, self.engine.ranks, self.report
        done = self._begin()
        watchdog.alive()
        began = time.monotonic()
        for step in range(done + 1, phase.steps + 1):
            line = self.step(step)
            self.log.write(
                {
                    "step": step,
                    "tokens": self.tokens,
                    **{k: finite(v) if isinstance(v, float) else v for k, v in line.items()},
                }
            )
            if self.first:
                plain = {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}
                report.metric(step, **plain, tokens=float(self.tokens))
                report.progress(step, phase.steps, "steps", **{k: plain[k] for k in ("reward", "loss") if k in plain})
            self._measure(step)
            last = step == phase.steps
            state = ranks.max(FAILED if self.checkpoints.failed() else STOP if stop else 0)
            if state == FAILED:
                self.checkpoints.wait()
            if last or self._due(step) or state == STOP or step % phase.checkpoint_interval == 0:
                self._save(step)
            watchdog.alive()
            if state == STOP and not last:
                self.checkpoints.wait()
                raise Interrupted(f"{self.name}: stopped after step {step} as asked; run again to go on")
        self.checkpoints.wait()
        if self.first:
            report.note(f"{self.name}: {phase.steps - done} steps in {time.monotonic() - began:.1f} s")
            self._fill(out)
        ranks.barrier()

    def judge(self, step: int) -> Callable[[float, float | None], str | None]:
        """Stops the phase where a number is none."""

        def look(loss: float, norm: float | None) -> str | None:
            if finite(loss) is None or (norm is not None and finite(norm) is None):
                raise AtomError(f"{self.name}: loss {loss} and gradient norm {norm} at step {step} are no numbers; "
                                f"lower {self.name}.optimizer.lr")  # fmt: skip
            return None

        return look

    def rate(self, step: int) -> float:
        """The learning rate of an update."""
        return learning_rate(step, self.phase.all_updates, self.phase.optimizer)

    @staticmethod
    def told(figures: StepFigures, lr: float) -> dict[str, Any]:
        """What the log says of an update."""
        return {
            "loss": figures.loss,
            "grad_norm": figures.grad_norm,
            "aux_loss": figures.aux_loss,
            "lr": lr,
            "expert_max_violation": figures.experts.max_violation,
            "router_entropy": float(figures.experts.entropy.mean()),
        }

    def _begin(self) -> int:
        state = self.checkpoints.load(self._due)
        if state is not None:
            self.log.check(state["step"], 1)
            self.tokens = state["tokens"]
            self.restore(state["rl"])
            if state["step"]:
                self.report.note(f"{self.name}: going on after step {state['step']}")
            return int(state["step"])
        self.log.begin()
        init = self.inputs["init"]
        Origin(init, release_checkpoint.name_of(release_checkpoint.steps_of(init.path)[-1])).load_weights(self.engine)
        self._measure(0)
        self._save(0)
        return 0

    def _measure(self, step: int) -> None:
        if line := self.measure(step):
            self.log.write({"step": step, **line})

    def _due(self, step: int) -> bool:
        """Whether a release checkpoint belongs to a step. Step 0 is another phase's last."""
        return step > 0 and (step == self.phase.steps or step % self.phase.release_checkpoint_interval == 0)

    def _save(self, step: int) -> None:
        state = {
            "phase": self.name,
            "step": step,
            "tokens": self.tokens,
            "seed": self.config.seed,
            "optimizer_step": self.engine.step_done,
            "lr": self.rate(self.engine.step_done) if self.engine.step_done else 0.0,
            "rng": "not used: every answer has a seed of its own, which follows from the recipe's",
            "config": identity(self.config),
            "rl": self.state(),
        }
        self.log.flush()
        stall = self.checkpoints.save(step, state, seal=self._due(step))
        if self.first:
            self.report.metric(step, checkpoint_stall_seconds=stall)

    def _fill(self, out: Path) -> None:
        summary = {
            "phase": self.name,
            "parameters": self.config.model.parameters(self.config.padded_vocab_size),
            "steps": self.phase.steps,
            "tokens": self.tokens,
            "precision": self.phase.precision,
            **self.fill(out),
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        shutil.copyfile(self.log.path, out / "training.jsonl")
        folder = self.checkpoints.folder / "sealed"
        for step in release_checkpoint.steps_of(folder):
            shutil.copytree(
                folder / release_checkpoint.name_of(step), out / release_checkpoint.name_of(step), copy_function=os.link
            )


def train(kind: type[Trainer], name: str, config: Any, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Runs a phase of post-training to its end and fills `out`.

    Raises AtomError as stages.train.loop.train does, and what the stage's verifiers raise; Interrupted when the machine
    asked to stop.
    """
    patience = config.phase.watchdog_timeout_seconds
    with (
        Watchdog(name, patience, work, report) as watchdog,
        parallel.session(config.seed, config.phase.parallelism, 2 * max(patience, START_SECONDS) + 60) as ranks,
        requests_to_stop() as stop,
    ):
        held = re.fullmatch(r"out\.(\d+)", out.name)
        lease = int(held[1]) if held else None
        engine = Engine(config, ranks, Chat(inputs["tokenizer"]).vocab_size)
        trainer = kind(name, config, inputs, work, report, engine, lease)
        try:
            trainer.run(stop, watchdog, out)
        finally:
            trainer.close()
