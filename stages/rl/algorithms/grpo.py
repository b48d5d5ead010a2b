"""Group-relative policy optimization (GRPO): draws answers, verifies them, and makes one update per step, with the
policy loss that the recipe names.

Groups whose answers all have the same reward are dropped and replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.data.seeds import seed_of
from stages.rl.algorithms import losses
from stages.rl.algorithms.policy_losses import registry as policy_losses
from stages.rl.config import RlPhase, RlTrainConfig
from stages.rl.policy import PolicyTrainer
from stages.rl.rollout import rollouts
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import Rollout
from stages.seed_labels import seed_label
from stages.train.data import Batch, Order, Shards
from stages.train.engine import Objective


class GrpoTrainer(PolicyTrainer):
    """GRPO against verifiers."""

    config: RlTrainConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        phase = self.config.phase
        self.curriculum = Curriculum(phase.curriculum, self.rows, seed_label(self.name), self.config.seed)
        self.generated = 0  # tokens of all answers
        self.replay: tuple[Order, Shards] | None = None
        if phase.replay is not None:
            order = Order(self.inputs["order"], phase.replay_rows())
            self.replay = order, Shards(self.inputs["tokens"], "train")

    @property
    def phase(self) -> RlPhase:
        return self.config.phase

    def algorithm_state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.copy(), "generated": self.generated}

    def restore_algorithm(self, state: dict[str, Any]) -> None:
        self.curriculum.load(state["curriculum"])
        self.generated = state["generated"]

    def measure(self, step: int) -> dict[str, Any] | None:
        metrics = super().measure(step)
        return None if metrics is None else metrics | {"generated": self.generated}

    def train_step(self, step: int) -> dict[str, Any]:
        policy_digest = self.policy.load()
        wave_results = self.engine.ranks.from_first(self._draw(step, policy_digest) if self.first else ([], {}, {}))
        answers, metrics, state = wave_results
        self.restore_algorithm(state or self.algorithm_state())
        examples, targets = training_examples(answers)
        self.tokens += targets
        if not targets:
            return metrics | {"idle": True}
        examples += self._replay_examples(step, targets)
        lr = self.learning_rate(step)
        units = [[example] for example in sorted(examples, key=lambda example: len(example.ids))]
        rank_batch = build_rank_batch(units, self.phase.micro_batches, self.engine.ranks, self.policy.chat.pad, targets)
        figures = self.engine.step(rank_batch, lr, self.update_check(step), objective=objective(self.phase))
        extras = figures.extras
        gap = extras["sampler_gap"] / targets
        metrics |= figures.metrics(lr) | {
            "loss": (figures.loss * targets - extras.get("replay", 0.0)) / targets,
            "clip_fraction": extras["clip_fraction"] / targets,
            "importance_ratio": extras["importance_ratio"] / targets,
            "sampler_gap": gap,
            "max_sampler_gap": extras["max_sampler_gap"],
        }
        if "replay" in extras:
            assert self.phase.replay is not None
            metrics["replay_loss"] = extras["replay"] / targets / self.phase.replay.weight
        self.require_small_gap(step, gap, policy_digest, answers)
        return metrics

    def _draw(self, step: int, policy_digest: str) -> tuple[list[Rollout], dict[str, Any], dict[str, Any]]:
        """The answers of a step, their metrics for the log, and the trainer's state after them. Rank 0 only."""
        phase, groups, answers = self.phase, 0, []
        for wave in range(phase.max_resample_rounds + 1):
            if groups == phase.prompts_per_step:
                break
            tasks = self.curriculum.draw(phase.prompts_per_step - groups, step, wave)
            label = f"{seed_label(self.name)}/answer/{step}/{wave}"
            requests = [
                (row, seed_of(f"{label}/{group}/{sample}", self.config.seed))
                for group, row in enumerate(tasks)
                for sample in range(phase.num_generations)
            ]
            wave_answers = self.files.load_or_draw(step, wave, policy_digest, requests, self.policy)
            wave_answers, groups_kept = mark_dropped(wave_answers, phase.num_generations)
            self.files.write(step, wave, wave_answers)
            for group, row in enumerate(tasks):
                group_answers = wave_answers[group * phase.num_generations : (group + 1) * phase.num_generations]
                self.curriculum.update(
                    row, sum(min(max(r.reward, 0.0), 1.0) for r in group_answers) / len(group_answers)
                )
            groups += groups_kept
            answers += wave_answers
        self.files.finish_step(step, answers[-1].wave + 1)
        lengths = [len(r.ids) for r in answers]
        self.generated += sum(lengths)
        metrics = {
            "reward": sum(r.reward for r in answers) / len(answers),
            "rewards": rollouts.mean_rewards(answers),
            "answers": len(answers),
            "groups": groups,
            "completion_length": sum(lengths) / len(answers),
            "truncated": sum(not r.finished for r in answers) / len(answers),
            "thinking": sum("</think>" in r.text for r in answers) / len(answers),
            "generated": self.generated,
            "rates": {name: part["rate"] for name, part in self.curriculum.state.items()},
            "policy": policy_digest,
        }
        return answers, metrics, self.algorithm_state()

    def _replay_examples(self, step: int, targets: int) -> list[Example]:
        """Rows of earlier data, weighted so that their mean loss has the weight `replay.weight`."""
        if self.replay is None:
            return []
        assert self.phase.replay is not None
        order, shards = self.replay
        rows = order.rows(step)
        weight = self.phase.replay.weight * targets / sum(row.targets for row in rows)
        examples = []
        for row in rows:
            (segment,) = row.segments
            ids = shards.read(segment).tolist()
            targets_of_row = len(ids) - 1 - segment.loss_from
            tokens = {"sampler": [0.0] * targets_of_row, "replay": [weight] * targets_of_row}
            examples.append(Example(ids, segment.loss_from + 1, {"advantage": 0.0, "learnt": 0.0}, tokens))
        return examples

    def write_outputs(self, out: Path) -> dict[str, Any]:
        count = rollouts.merge(self.files.all(), out / "rollouts.parquet")
        lines = self.log.lines()
        validations = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
        rewards = [x["reward"] for x in lines if "reward" in x]
        return {
            "answers": count,
            "generated_tokens": self.generated,
            "reward": {"first": rewards[0], "last": rewards[-1]},
            "validation": validations,
            "largest_sampler_gap": max((x["max_sampler_gap"] for x in lines if "max_sampler_gap" in x), default=None),
            "curriculum": self.curriculum.state,
        }


def mark_dropped(answers: Sequence[Rollout], samples: int) -> tuple[list[Rollout], int]:
    """The answers with their group, sample and drop reason, and the number of groups that are kept."""
    rewards = torch.tensor([r.reward for r in answers], dtype=torch.float64).view(-1, samples)
    zero_variance = losses.zero_variance(rewards).tolist()
    marked = []
    for i, r in enumerate(answers):
        group, sample = divmod(i, samples)
        dropped = "variance" if zero_variance[group] else "" if r.finished else "truncated"
        marked.append(replace(r, group=group, sample=sample, dropped=dropped))
    return marked, zero_variance.count(False)


def training_examples(answers: Sequence[Rollout]) -> tuple[list[Example], int]:
    """The training rows of the answers that are not dropped, and their number of tokens."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for r in answers:
        groups.setdefault((r.wave, r.group), []).append(r)
    examples = []
    for group_answers in groups.values():
        advantages = losses.advantages(torch.tensor([[r.reward for r in group_answers]]))[0].tolist()
        for r, advantage in zip(group_answers, advantages, strict=True):
            if not r.dropped:
                tokens = {"sampler": r.logprobs, "replay": [0.0] * len(r.ids)}
                row = {"advantage": advantage, "learnt": 1.0}
                examples.append(Example([*r.prompt_ids, *r.ids], len(r.prompt_ids), row, tokens))
    return examples, sum(len(e.ids) - e.start for e in examples)


def objective(phase: RlPhase) -> Objective:
    """The policy loss of the answers' tokens plus the weighted loss of replayed tokens."""
    token_loss = policy_losses.load(phase.loss_type)

    def compute(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        extras: Mapping[str, torch.Tensor] = batch.extras
        loss, figures = losses.policy_loss(
            -cross_entropy,
            extras["sampler"],
            extras["advantage"],
            batch.loss_mask * extras["learnt"][:, None],
            token_loss=token_loss,
            clip_low=phase.clip_low,
            clip_high=phase.clip_high,
            tis_cap=phase.tis_cap,
        )
        if phase.replay is not None:
            replay_loss = (cross_entropy * extras["replay"]).sum()
            loss, figures = loss + replay_loss, figures | {"replay": replay_loss.detach()}
        return loss, figures

    return compute
