"""Policy gradients from groups of answers.

A step draws answers, verifies them, and makes its updates by the algorithm that the recipe names
(stages/rl/algorithms/policy_gradient.py).

Groups whose answers all have the same reward are dropped and replaced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from stages.formats.seeds import seed_label
from stages.rl.algorithms import losses, policy_gradient
from stages.rl.algorithms.policy_gradient import Algorithm, zero_variance
from stages.rl.config import RlPhase, RlTrainConfig
from stages.rl.policy import PolicyTrainer, RecordedRollouts
from stages.rl.rollout import rollouts
from stages.rl.rollout.asynchronous import GroupSource, Intake, LiveGroups, RecordedGroups
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.pass_rates import FilteredBin, filter_tasks
from stages.rl.rollout.rollouts import Rollout, pass_rate
from stages.train.data import Batch, Order, RankBatch, Shards
from stages.train.engine import Engine, Objective

# What answers are whose share may raise an alarm.
ALARMS = {"truncated": "cut off by the length limit", "looping": "cut off in a loop of the same tokens"}


class GrpoTrainer(PolicyTrainer):
    """GRPO and its relatives against verifiers.

    The reference of the KL term is the policy with which the phase began: the artifact inputs["init"], which every
    attempt reads again, so that no checkpoint holds it. Each rank keeps its part of those weights on CPU.
    """

    config: RlTrainConfig
    # True if tasks are drawn from every bin equally, whatever its pass rate.
    uniform = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        phase = self.config.phase
        self.algorithm = policy_gradient.load(phase.algorithm)
        self.reference: list[torch.Tensor] | None = None
        if phase.kl_coef is not None:
            # Also after a resume, whose weights come later: the reference is the policy at the start of the phase.
            self.load_previous_phase()
            self.reference = self.engine.local_weights()
        # The tasks of each bin before and after the filter; none without one.
        self.filtered: dict[str, FilteredBin] = {}
        if phase.pass_rates is not None:
            self.rows, self.filtered = filter_tasks(self.rows, self.inputs["pass_rates"], phase.pass_rates)
        exponent = phase.size_exponent
        self.curriculum = Curriculum(self.rows, seed_label(self.name), self.config.seed, self.uniform, exponent)
        self.limits = {"truncated": phase.max_truncated, "looping": phase.max_looping}
        self.alarming = set[str]()
        self.generated = 0  # tokens of all answers
        self.intake: Intake | None = None
        self.live: LiveGroups | None = None
        if phase.asynchronous is not None:
            self.intake = Intake(phase, self.curriculum, seed_label(self.name), self.config.seed)
        self.replay: tuple[Order, Shards] | None = None
        if phase.replay is not None:
            order = Order(self.inputs["order"], phase.replay_rows())
            self.replay = order, Shards(self.inputs["tokens"], "train")

    @property
    def phase(self) -> RlPhase:
        return self.config.phase

    def algorithm_state(self) -> dict[str, Any]:
        state = {"curriculum": self.curriculum.copy(), "generated": self.generated}
        return state if self.intake is None else state | {"queue": self.intake.state()}

    def restore_algorithm(self, state: dict[str, Any]) -> None:
        self.curriculum.load(state["curriculum"])
        self.generated = state["generated"]
        if self.intake is not None:
            self.intake.load(state["queue"])

    def begin(self, step: int) -> None:
        if self.intake is None or not self.first:
            return
        if isinstance(self.files, RecordedRollouts):
            source: GroupSource = RecordedGroups(self.files, self.policy, self.phase.num_generations, step)
        else:
            source = self.live = LiveGroups(self.files, self.policy, self.phase, step)
        self.intake.begin(source, self.log.lines())

    def waits(self) -> dict[str, float]:
        return super().waits() | ({} if self.live is None else {"answers": self.live.all_waited})

    def close(self) -> None:
        if self.live is not None:
            self.live.close()
        super().close()
        if self.live is not None:
            # A thread that draws ends only once the sampler is closed.
            self.live.join()

    def measure(self, step: int) -> dict[str, Any] | None:
        metrics = super().measure(step)
        return None if metrics is None else metrics | {"generated": self.generated}

    def train_step(self, step: int) -> dict[str, Any]:
        policy_digest = self.policy.load()
        # Rank 0 draws and scores; the others learn from its answers, and follow the state of its curriculum.
        drawn = self._draw(step, policy_digest) if self.first else ([], {}, {})
        answers, metrics, state = self.engine.ranks.from_first(drawn)
        self.restore_algorithm(state or self.algorithm_state())
        phase = self.phase
        groups = training_groups(answers, self.algorithm)
        self.tokens += (targets := sum(x.targets for group in groups for x in group))
        # All answers were dropped: there is no update, and the log says so.
        if not targets:
            return metrics | {"idle": True}
        batches, figures, minimize = self._batches(step, groups), [], objective(phase)

        for number, batch in batches.items():
            # The schedule counts all updates, those without answers included.
            lr = self.learning_rate((step - 1) * phase.updates + number + 1)
            figures.append(self.engine.step(batch, lr, self.update_check(step), objective=minimize))

        # Figures are sums over the tokens of an update; those of the step are over all of its updates.
        results = [(f, f.extras, batch.targets) for f, batch in zip(figures, batches.values(), strict=True)]

        def mean_of(name: str) -> float:
            return sum(extras[name] for _, extras, _ in results) / targets

        gap = mean_of("sampler_gap")
        metrics |= figures[-1].metrics(lr) | {
            # Without replayed rows, whose loss is a metric of its own.
            "loss": fmean((f.loss * divisor - extras.get("replay", 0.0)) / divisor for f, extras, divisor in results),
            "clip_fraction": mean_of("clip_fraction"),
            "importance_ratio": mean_of("importance_ratio"),
            "sampler_gap": gap,
            "max_sampler_gap": max(extras["max_sampler_gap"] for _, extras, _ in results),
        }
        if phase.replay is not None:
            metrics["replay_loss"] = fmean(x["replay"] / divisor / phase.replay.weight for _, x, divisor in results)
        metrics |= {name: mean_of(name) for name in ("kl", "teacher_gap") if name in figures[0].extras}
        self.require_small_gap(step, gap, policy_digest, answers)
        return metrics

    def _batches(self, step: int, groups: Sequence[Sequence[Example]]) -> dict[int, RankBatch]:
        """Returns {number of an update of the step: its batch}, for those that have answers to learn from."""
        phase, batches = self.phase, {}
        for number in range(phase.updates):
            # Groups are dealt to the updates in turn, and none is divided.
            part = [example for group in groups[number :: phase.updates] for example in group]
            if part:
                lengths = [example.targets for example in part]
                divisor = self.algorithm.mean.divisor(lengths, phase.max_sampled_tokens)
                part += self._replay_examples(step, number, divisor)
                # Answers of a group need not stay together: each has its advantage by now.
                units = [[example] for example in part]
                batches[number] = build_rank_batch(
                    units, phase.micro_batches, self.engine.ranks, self.policy.chat.pad, divisor
                )
        # Before the first update, under one policy for all of them: the ratio and the KL term compare with these.
        if phase.updates > 1:
            batches = {number: with_logprobs(self.engine, batch, "old") for number, batch in batches.items()}
        if self.reference is not None:
            with self.engine.computing_with(self.reference):
                batches = {number: with_logprobs(self.engine, batch, "reference") for number, batch in batches.items()}
        return batches

    def _draw(self, step: int, policy_digest: str) -> tuple[list[Rollout], dict[str, Any], dict[str, Any]]:
        """Returns the answers of a step, their metrics for the log, and the trainer's state after them. Rank 0 only."""
        phase = self.phase
        if self.intake is None:
            answers = self._draw_waves(step, policy_digest)
        else:
            answers = self.intake.take(step, policy_digest, self._mark_group)
        lengths = [r.length for r in answers]
        self.generated += sum(lengths)
        metrics: dict[str, Any] = {
            "reward": sum(r.reward for r in answers) / len(answers),
            "rewards": rollouts.mean_rewards((r.kind, r.reward) for r in answers),
            "length_correlation": rollouts.length_correlation(answers),
            "answers": len(answers),
            "groups": len({(r.wave, r.group) for r in answers if r.dropped not in rollouts.WHOLE_GROUPS}),
            "completion_length": sum(lengths) / len(answers),
            **rollouts.termination_metrics(answers),
            "thinking": sum("</think>" in r.text for r in answers) / len(answers),
            "generated": self.generated,
            "rates": {name: part["rate"] for name, part in self.curriculum.state.items()},
            "policy": policy_digest,
        }
        metrics |= self._raise_alarms(step, metrics)
        if step == 1 and self.filtered:
            metrics["filtered"] = self.filtered
        if self.intake is not None:
            metrics |= asynchronous_metrics(step - 1, answers)
        if phase.tools is not None:
            metrics |= tool_metrics(answers)
        return answers, metrics, self.algorithm_state()

    def _raise_alarms(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the limits of the shares that are above them, for the log; nothing if none is.

        Notes each share that rises above its limit, once until it is below again.
        """
        above = {name: limit for name, limit in self.limits.items() if limit is not None and metrics[name] > limit}
        for name in above.keys() - self.alarming:
            self.report.note(
                f"alarm: {self.name}: {metrics[name]:.1%} of the answers of step {step} are {ALARMS[name]}, more than "
                f"max_{name} = {above[name]:g}; read some of them in rollouts.parquet: if they are on the way to a "
                "solution, allow longer answers, else stop the phase at an earlier checkpoint"
            )
        self.alarming = set(above)
        return {"alarms": above} if above else {}

    def _mark_group(self, answers: list[Rollout]) -> list[Rollout]:
        marked, _ = self.mark(answers)
        # `mark` counts groups from 0; here a group keeps the number in which it was issued.
        return [replace(r, group=answers[0].group) for r in marked]

    def mark(self, answers: Sequence[Rollout]) -> tuple[list[Rollout], int]:
        """Returns what `mark_dropped` does of the answers to some tasks, in groups."""
        return mark_dropped(answers, self.phase.num_generations, self.phase.truncated_answers == "scored")

    def _draw_waves(self, step: int, policy_digest: str) -> list[Rollout]:
        """Draws until `prompts_per_step` groups differ in reward, or no more may be drawn. Returns all answers."""
        phase, groups, answers = self.phase, 0, []
        for wave in range(phase.max_resample_rounds + 1):
            if groups == phase.prompts_per_step:
                break
            tasks = self.curriculum.draw(phase.prompts_per_step - groups, step, wave)
            requests = self.requests(tasks, phase.num_generations, f"{step}/{wave}")
            wave_answers = self.files.load_or_draw(step, wave, policy_digest, requests, self.policy)
            wave_answers, groups_kept = self.mark(wave_answers)
            self.files.write(step, wave, wave_answers)
            for group, row in enumerate(tasks):
                # Dropped groups count too: equal rewards tell that a task is too easy or too hard.
                start = group * phase.num_generations
                self.curriculum.update(row, pass_rate(wave_answers[start : start + phase.num_generations]))
            groups += groups_kept
            answers += wave_answers
        self.files.finish_step(step, answers[-1].wave + 1)
        return answers

    def _replay_examples(self, step: int, number: int, divisor: int) -> list[Example]:
        """Returns rows of earlier data for an update, weighted so that their mean loss has `replay.weight`."""
        if self.replay is None:
            return []
        assert self.phase.replay is not None
        order, shards = self.replay
        rows = order.rows(step)[number :: self.phase.updates]
        # The engine divides by the update's divisor, so the mean over replayed tokens is made here.
        weight = self.phase.replay.weight * divisor / sum(row.targets for row in rows)
        examples = []
        for row in rows:
            (segment,) = row.segments
            ids = shards.read(segment).tolist()
            targets_of_row = len(ids) - 1 - segment.loss_from
            # The weight 0 keeps these rows out of the policy loss.
            tokens = {"sampler": [0.0] * targets_of_row, "replay": [weight] * targets_of_row}
            examples.append(Example(ids, segment.loss_from + 1, {"advantage": 0.0, "weight": 0.0}, tokens))
        return examples

    def write_outputs(self, out: Path) -> dict[str, Any]:
        count = rollouts.merge(
            self.files.all(),
            out / "rollouts.parquet",
            rollouts.schema(self.phase.is_asynchronous, self.phase.tools is not None),
        )
        gaps = [line["max_sampler_gap"] for line in self.log.lines() if "max_sampler_gap" in line]
        return {
            "answers": count,
            "generated_tokens": self.generated,
            **self.reward_summary(),
            "largest_sampler_gap": max(gaps, default=None),
            "curriculum": self.curriculum.state,
        }


def asynchronous_metrics(version: int, answers: Sequence[Rollout]) -> dict[str, Any]:
    """Returns the metrics of an asynchronous step.

    `staleness` is the mean age of the tokens of kept answers, in steps. `dropped` counts answers by reason. `consumed`
    seals the answers in their order.

    Args:
        version: Version of the policy that is updated.
        answers: All answers that the step took.
    """
    spans = [span for r in answers if not r.dropped for span in r.versions or ()]
    ages = [(version - (span["version"] or 0), span["tokens"]) for span in spans]
    tokens = sum(count for _, count in ages)
    return {
        "staleness": sum(age * count for age, count in ages) / tokens if tokens else 0.0,
        "max_staleness": max((age for age, _ in ages), default=0),
        "dropped": dict(sorted(Counter(r.dropped for r in answers if r.dropped).items())),
        "consumed": rollouts.consumption_digest(answers),
    }


def tool_metrics(answers: Sequence[Rollout]) -> dict[str, Any]:
    """Returns the mean number of turns, and the number of calls by status."""
    turns = [turn for r in answers for turn in r.turns or ()]
    calls = Counter(call["status"] for turn in turns for call in turn["calls"])
    return {"turns": len(turns) / len(answers), "calls": dict(sorted(calls.items()))}


def mark_dropped(answers: Sequence[Rollout], samples: int, keep_truncated: bool = False) -> tuple[list[Rollout], int]:
    """Returns the answers with their group, sample and drop reason, and the number of groups that are kept.

    Args:
        answers: The answers, group by group.
        samples: Answers of a group.
        keep_truncated: Keeps answers that were cut off.
    """
    # In fp64, in which rewards are stored: rounding must not make two of them equal.
    rewards = torch.tensor([r.reward for r in answers], dtype=torch.float64).view(-1, samples)
    equal = zero_variance(rewards).tolist()
    marked = []
    for i, r in enumerate(answers):
        group, sample = divmod(i, samples)
        dropped = "" if r.finished or keep_truncated else "truncated"
        if equal[group]:
            dropped = "variance"
        marked.append(replace(r, group=group, sample=sample, dropped=dropped))
    return marked, equal.count(False)


def training_groups(answers: Sequence[Rollout], algorithm: Algorithm) -> list[list[Example]]:
    """Returns the training rows of the answers that are not dropped, by group.

    Advantages are of all answers of the groups that differ in reward, truncated ones among them.

    Args:
        answers: All answers of the step.
        algorithm: The algorithm, which gives advantages and weights.
    """
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for r in answers:
        if r.dropped not in rollouts.WHOLE_GROUPS:
            groups.setdefault((r.wave, r.group), []).append(r)
    if not groups:
        return []
    rewards = torch.tensor([[r.reward for r in group] for group in groups.values()])
    lengths = torch.tensor([[r.length for r in group] for group in groups.values()])
    gains = algorithm.advantages(rewards, lengths).tolist()
    return [
        [_example(r, gain, algorithm) for r, gain in zip(group, group_gains, strict=True) if not r.dropped]
        for group, group_gains in zip(groups.values(), gains, strict=True)
    ]


def _example(r: Rollout, advantage: float, algorithm: Algorithm) -> Example:
    tokens = {"sampler": r.logprobs, "replay": [0.0] * len(r.ids)}
    row = {"advantage": advantage, "weight": algorithm.mean.weight(r.length)}
    mask = None if r.turns is None else r.is_sampled
    return Example([*r.prompt_ids, *r.ids], len(r.prompt_ids), row, tokens, mask)


def with_logprobs(engine: Engine, rank_batch: RankBatch, name: str) -> RankBatch:
    """Returns the batch with the log-probabilities of its targets under the engine's present weights.

    They are `name` among the `extras` of its micro-batches, where this rank computes the loss. Collective.
    """
    recorded: list[torch.Tensor] = []

    def record(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        recorded.append(-cross_entropy.cpu())
        return cross_entropy.sum(), {}

    engine.figures(rank_batch, record)
    # Of a pipeline, the last rank alone computes log-probabilities.
    if not recorded:
        return rank_batch
    micro = [
        replace(batch, extras={**batch.extras, name: logprobs})
        for batch, logprobs in zip(rank_batch.micro, recorded, strict=True)
    ]
    return replace(rank_batch, micro=micro)


def objective(phase: RlPhase) -> Objective:
    """Returns the policy loss of the answers' tokens plus the weighted loss of replayed tokens."""
    algorithm = policy_gradient.load(phase.algorithm)

    def compute(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        extras: Mapping[str, torch.Tensor] = batch.extras
        advantages, mask = extras["advantage"], batch.loss_mask * extras["weight"][:, None]
        of_teacher: dict[str, torch.Tensor] = {}
        if "teacher" in extras:
            gaps = losses.teacher_gaps(extras.get("old", -cross_entropy), extras["teacher"], mask)
            advantages, of_teacher = advantages[:, None] - gaps, {"teacher_gap": gaps.sum()}
        loss, figures = losses.policy_loss(
            -cross_entropy,
            extras["sampler"],
            advantages,
            mask,
            token_loss=algorithm.token_loss,
            clip_low=math.inf if phase.clip_low is None else phase.clip_low,
            clip_high=math.inf if phase.clip_high is None else phase.clip_high,
            tis_cap=phase.tis_cap,
            old_logprobs=extras.get("old"),
            row_weights=extras["weight"],
            reference_logprobs=extras.get("reference"),
            kl_coef=phase.kl_coef or 0.0,
        )
        figures |= of_teacher
        if phase.replay is not None:
            replay_loss = (cross_entropy * extras["replay"]).sum()
            loss, figures = loss + replay_loss, figures | {"replay": replay_loss.detach()}
        return loss, figures

    return compute
