"""Training on text: the phases whose rows an order artifact lists, with held-out evaluation and loss spikes.

The detector of spikes decides before the update, only from the log of the accepted steps before it, so that a resumed
or repeated phase decides in the same way. The record of a spike is a line of training.jsonl: the reason, the documents
of the batch and the experts of its tokens.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.stage import Inputs, identity
from stages.data.order.order_stage import position
from stages.mcore.megatron_imports import parallel_state
from stages.mcore.routers import DEAD_SHARE
from stages.train import step_times
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.checkpoint.work_checkpoint import PENDING
from stages.train.config import PhaseConfig, Spikes, TrainConfig
from stages.train.data import Order, Prefetcher, RankBatch, Row, Shards, heldout_rows
from stages.train.engine import RouterFigures, StepFigures
from stages.train.log import finite_or_none
from stages.train.outputs import TextSummary
from stages.train.trainer import Trainer

Record = dict[str, Any]


class SpikeDetector:
    """Detects spikes by the losses and gradient norms of the last accepted steps."""

    def __init__(self, policy: Spikes | None, lines: Iterable[Record]) -> None:
        """A detector that begins with the steps in `lines` of training.jsonl."""
        self.policy = policy
        window = policy.window if policy else 1
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        for line in lines:
            # Accepted steps only: evaluations have no norm, and a skipped step is no measure of usual ones.
            if "grad_norm" in line and "skipped" not in line:
                self.accept(line["loss"], line["grad_norm"])

    def accept(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def reason(self, loss: float, norm: float | None) -> str | None:
        """The reason why a step is a spike, or None. norm: None before it is known."""
        # NaN and infinity are spikes under every policy, and without one.
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if self.policy is None or len(self.losses) < self.policy.window:
            return None
        # Robust statistics, as the spikes that were accepted must not widen the limit.
        median, limit = spike_limit(self.losses, self.policy.loss_sigmas)
        if loss > limit:
            return f"the loss is {loss:.4g}, above {limit:.4g} (median {median:.4g} of {len(self.losses)} steps)"
        median_norm = statistics.median(self.norms)
        if norm is not None and norm > self.policy.norm_factor * median_norm:
            return (
                f"the gradient norm is {norm:.4g}, above {self.policy.norm_factor:g} times its median {median_norm:.4g}"
            )
        return None


def spike_record(action: str, excluded: Sequence[int], rows: Sequence[Row], figures: StepFigures) -> Record:
    """The record of a spike in training.jsonl; excluded: the steps that are skipped because of it."""
    return {
        "reason": figures.refused,
        "action": action,
        "excluded": list(excluded),
        "loss": finite_or_none(figures.loss),
        "grad_norm": finite_or_none(figures.grad_norm),
        "documents": sorted({segment.id for row in rows for segment in row.segments}),
        **({"experts": figures.router.experts.json()} if figures.router else {}),
    }


class TextTrainer(Trainer):
    """A trainer on tokens of text.

    inputs["tokens"] are Megatron shards; inputs["order"] holds the tokens that each step reads. inputs["init"] is the
    previous phase, whose last weights are loaded, if any. inputs["continue"] is the checkpoint that it continues from.
    """

    config: TrainConfig
    rng = "not used: no dropout, and the data order is an artifact"

    def __init__(self, name: str, config: TrainConfig, inputs: Inputs, *args: Any) -> None:
        phase = config.phase
        self.rewind_steps = phase.spikes.rewind_steps if phase.spikes and phase.spikes.action == "rewind" else 0
        super().__init__(name, config, inputs, *args)
        self.origin = Origin(inputs["continue"], "", self.watchdog.progress) if "continue" in inputs else None
        self.order = Order(inputs["order"], phase)
        self.shards = Shards(inputs["tokens"], "train")
        self.tokenizer = str(inputs["tokens"].json("meta.json").get("tokenizer", ""))
        rows, shards, ranks = (
            heldout_rows(inputs["tokens"], phase),
            Shards(inputs["tokens"], "heldout"),
            self.engine.ranks,
        )
        self.heldout = RankBatch.read(
            rows, shards, micro_rows=phase.micro_rows, ranks=ranks, quantized=phase.quantized, slots=phase.least_slots
        )
        self.heldout_rows = len(rows)
        self.prefetcher = Prefetcher(self.order, self.shards, phase, ranks)
        self.data_wait: float | None = None  # seconds that training waited for rows, except those of its first step
        self.pending: list[Record] = []  # spikes before which training was rewound, until their steps are passed again
        self.spikes = 0
        # Ranks of one stage do the same work, so only these are compared with each other.
        position = parallel_state.get_pipeline_model_parallel_rank()
        self.step_times = step_times.StepTimes(step_times.WAITS, ranks.rank, position, ranks.gather)
        self.slow_rank: int | None = None  # that was reported last

    @property
    def phase(self) -> PhaseConfig:
        return self.config.phase

    @staticmethod
    def vocab_size(inputs: Inputs) -> int:
        return int(inputs["tokens"].json("meta.json")["vocab_size"])

    @property
    def first_step(self) -> int:
        return self.order.first

    def is_release_step(self, step: int) -> bool:
        if step < self.order.first:  # step 0 belongs to a phase without an earlier origin
            # A continued phase publishes nothing at its beginning: the earlier run has that checkpoint.
            return step == 0 and self.origin is None
        return super().is_release_step(step)

    def last_learning_rate(self, step: int) -> float:
        return self.learning_rate(step) if step else 0.0

    def load_base(self) -> None:
        if self.phase.adapter is not None:
            # An adapter's checkpoints lack the base, so each start loads it.
            self.last_checkpoint("init").load_frozen(self.engine)

    def initialize(self) -> int:
        if self.origin is not None:
            self.tokens = self.origin.load(self.engine, self.config, self.tokenizer)
            self.report.note(f"{self.name}: continues from {self.origin.artifact.key}")
            return self.origin.step
        if self.phase.optimizer_state == "carried":
            self.last_checkpoint("init").load_with_states(self.engine)
        elif "init" in self.inputs and self.phase.adapter is None:
            self.load_previous_phase()
        else:
            self.engine.initialize()
        return 0

    def save_beginning(self, step: int) -> None:
        if self.origin is None:
            super().save_beginning(step)
        elif self.phase.spikes is not None:
            self._save(step, seal=False)  # a rewind needs a checkpoint

    def begin(self, step: int) -> None:
        self.spike_detector = SpikeDetector(self.phase.spikes, self.log_lines())

    def state(self, step: int) -> dict[str, Any]:
        rows_read = self.order.consumed(step) if step else {}
        state = {"data_position": position(self.order.meta, rows_read, step), "tokenizer": self.tokenizer}
        return state | ({PENDING: self.pending} if self.pending else {})

    def restore(self, state: dict[str, Any]) -> None:
        self.pending = state.get(PENDING, [])
        # Pending spikes have no line yet: theirs are written when their steps are passed.
        self.spikes = len(self.pending) + sum("spike" in line for line in self.log_lines())

    def measure(self, step: int) -> dict[str, Any] | None:
        # A continued phase measures the model that it begins with, so that its curve joins the earlier run's.
        begins = self.origin is not None and step == self.origin.step
        if not begins and step != self.phase.steps and step % self.phase.validation.every:
            return None
        loss = self.engine.evaluate(self.heldout)
        if self.first:
            self.report.metric(step, heldout_loss=loss)
        return {"heldout_loss": loss}

    def step(self, step: int) -> int:
        with self.step_times.step(lambda: self.prefetcher.waited):
            finished = self._train_on(step)
        if self.engine.ranks.world > 1:
            self._compare_ranks(step)
        return finished

    def _compare_ranks(self, step: int) -> None:
        """Reports the times of all ranks at intervals, and which of them becomes slow or is no longer."""
        times = self.step_times.exchange()
        if times is None or not self.first:
            return
        slow = step_times.slow_rank(times)
        rank = None if slow is None else slow.time.rank
        if rank != self.slow_rank:
            self.slow_rank = rank
            self.report.slow_rank(None if slow is None else slow.sentence(step - step_times.INTERVAL + 1))

    def _train_on(self, step: int) -> int:
        """Trains on a step's rows, unless they are excluded. Returns the last finished step."""
        # All rows of the step, for documents in the log, and this rank's share of them.
        rows, rank_batch = self.prefetcher.take(step)
        # the first read cannot overlap with computation
        self.data_wait = 0.0 if self.data_wait is None else self.data_wait + self.prefetcher.waited
        if self.first:
            self.report.metric(step, data_wait_seconds=self.prefetcher.waited)
        lr, self.progress_figures = self.learning_rate(step), {}
        # The step counts, and the learning rate moves on, but no weight changes: so the rows of later steps stay the
        # same.
        if step in self.phase.excluded_steps or any(step in spike["excluded"] for spike in self.pending):
            self.log.write({"step": step, "tokens": self.tokens, "lr": lr, "excluded": True})
            for spike in [x for x in self.pending if x["excluded"][-1] == step]:
                self.log.write({"step": step, "spike": spike})
                self.pending.remove(spike)
            return step
        # With a policy the norm is known before the update, at the cost of one more collective.
        figures = self.engine.step(
            rank_batch, lr, partial(self._check_spike, step, rows), norm_first=self.phase.spikes is not None
        )
        metrics = figures.metrics(lr)
        if figures.refused:
            return self._handle_spike(step, rows, figures, metrics)
        self.tokens += sum(row.slots for row in rows)
        self.spike_detector.accept(figures.loss, figures.grad_norm)
        self.log_step(step, metrics)
        if figures.router and (step == self.phase.steps or step % self.phase.validation.every == 0):
            self._log_experts(step, figures.router)
        return step

    def write_outputs(self, out: Path) -> dict[str, Any]:
        log_lines = self.log.lines()
        measurements = [(x["step"], x["heldout_loss"]) for x in log_lines if "heldout_loss" in x]
        losses = [x["loss"] for x in log_lines if "loss" in x and "skipped" not in x]
        spikes = [{"step": x["step"], **x["spike"]} for x in log_lines if "spike" in x]
        experts = [x["experts"] for x in log_lines if "experts" in x]
        summary: TextSummary = {
            "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
            "heldout_loss": {"first": measurements[0][1], "last": measurements[-1][1], "rows": self.heldout_rows},
            "spikes": [{k: x[k] for k in ("step", "reason", "action", "excluded", "documents")} for x in spikes],
            "excluded_steps": [x["step"] for x in log_lines if "excluded" in x],
            "dead_experts": experts[-1]["dead"] if experts else [],
            "dropped_tokens": sum(x["dropped"] for x in experts),
            **self._adapter(),  # type: ignore[typeddict-item]
        }
        return dict(summary)

    def _adapter(self) -> dict[str, Any]:
        """The entries of summary.json about an adapter: its settings, its parameters and its frozen base."""
        if (lora := self.phase.adapter) is None:
            return {}
        base = self.inputs["init"]
        parameters = sum(math.prod(shape) for shape in self.engine.shapes.values())
        settings = {**identity(lora), "parameters": parameters}
        return {"lora": settings, "base": {"artifact": base.key, "digest": base.digest}}

    def waits(self) -> dict[str, float]:
        return {"data": self.data_wait or 0.0, **super().waits()}

    def close(self) -> None:
        self.prefetcher.close()

    def _check_spike(self, step: int, rows: list[Row], loss: float, norm: float | None) -> str | None:
        """The reason why a step is a spike, or None.

        Raises AtomError if the recipe stops at spikes, or has no policy.
        """
        reason = self.spike_detector.reason(loss, norm)
        if reason and (self.spike_detector.policy is None or self.spike_detector.policy.action == "stop"):
            documents = sorted({segment.id for row in rows for segment in row.segments})
            names = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
            raise AtomError(
                f"{self.name}: {reason} at step {step}, on documents {names}; lower "
                f"{self.name}.optimizer.lr, look at these documents, or say in {self.name}.spikes to skip "
                f"such steps"
            )
        return reason

    def _handle_spike(self, step: int, rows: list[Row], figures: StepFigures, metrics: dict[str, float]) -> int:
        """Records a spike, whose update is skipped, or rewinds to an earlier checkpoint.

        Returns the step after which to continue.
        """
        policy = self.phase.spikes
        assert policy is not None
        self.spikes += 1
        if self.first:
            self.report.metric(step, spike=1.0)
            self.report.note(f"{self.name}: step {step} moved no weight: {figures.refused}")
        if self.spikes > policy.max_spikes:
            raise AtomError(
                f"{self.name}: {self.spikes} spikes, more than {self.name}.spikes.max_spikes = "
                f"{policy.max_spikes}; the last at step {step}: {figures.refused}; lower the learning "
                f"rate or look at the documents that {self.log.path} names"
            )
        if policy.action == "skip":
            finite_metrics = {name: finite_or_none(value) for name, value in metrics.items()}
            self.log.write({"step": step, "tokens": self.tokens, **finite_metrics, "skipped": True})
            self.log.write({"step": step, "spike": spike_record("skip", [step], rows, figures)})
            return step
        # published checkpoints stay
        last_release = max(n for n in range(step) if self.is_release_step(n) or n < self.order.first)
        rewind_step = max(step - policy.rewind_steps, last_release)
        dropped_spikes = [x["spike"] for x in self.log_lines() if "spike" in x]
        # Collective, and truncates the log: lines that were dropped were read above.
        state = self.checkpoints.rewind(rewind_step)
        # The steps to come are repeated with other rows left out, so no earlier line is their control.
        self.log.replay.stop()
        self.tokens = state["tokens"]
        # Spikes after the checkpoint are recorded again when their steps are passed.
        self.pending = [x for x in dropped_spikes if x["excluded"][-1] > state["step"]] + self.pending
        self.pending.append(spike_record("rewind", range(rewind_step + 1, step + 1), rows, figures))
        # From the shortened log, as a phase that is resumed here would begin.
        self.spike_detector = SpikeDetector(policy, self.log_lines())
        if self.first:
            self.report.note(
                f"{self.name}: back to step {state['step']}; steps {rewind_step + 1} to {step} are left out"
            )
        return int(state["step"])

    def _log_experts(self, step: int, router: RouterFigures) -> None:
        """Logs a step's distribution over experts, and reports dead experts."""
        experts = router.experts
        self.log.write({"step": step, "experts": experts.json()})
        dead = experts.dead()
        if self.first:
            self.report.metric(step, dead_experts=float(len(dead)), dropped_tokens=float(experts.dropped))
            if dead:
                names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:5])
                suffix = f" and {len(dead) - 5} more" if len(dead) > 5 else ""
                self.report.note(
                    f"{self.name}: experts starve at step {step}: {names}{suffix} get less than "
                    f"{DEAD_SHARE:.0%} of a fair share"
                )


# Standard deviation of a normal distribution by its median absolute deviation.
SIGMA = 1.4826
# Lower bound of the standard deviation, as a share of the median: small changes of a flat loss are no spikes.
MIN_SIGMA = 0.01


def spike_limit(losses: Sequence[float], sigmas: float) -> tuple[float, float]:
    """Returns (the median, the limit) of the latest losses."""
    median = statistics.median(losses)
    spread = SIGMA * statistics.median(abs(x - median) for x in losses)
    return median, median + sigmas * max(spread, MIN_SIGMA * median)
