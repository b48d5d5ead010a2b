"""Group-relative policy optimisation: answers are drawn, verified, and learnt from, one update a step.

Groups whose answers all earn the same are dropped and others drawn in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stages.data.seeds import seed_of
from stages.rl.algorithms import losses
from stages.rl.config import RlPhase
from stages.rl.policy import PolicyTrainer, require_small_gap
from stages.rl.rollout import rollouts
from stages.rl.rollout.batches import Example, share
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import Rollout
from stages.train.data import Batch, Order, Shards
from stages.train.engine import Objective


class Rlvr(PolicyTrainer):
    """The loop against verifiers."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        phase: RlPhase = self.phase
        self.curriculum = Curriculum(phase.curriculum, self.rows, self.name, self.config.seed)
        self.generated = 0  # tokens of all answers
        self.replay: tuple[Order, Shards] | None = None
        if phase.replay is not None:
            order = Order(self.inputs["order"], phase.replay_rows())
            self.replay = order, Shards(self.inputs["tokens"], "train")

    def state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.copy(), "generated": self.generated}

    def restore(self, state: dict[str, Any]) -> None:
        self.curriculum.load(state["curriculum"])
        self.generated = state["generated"]

    def measure(self, step: int) -> dict[str, Any] | None:
        found = super().measure(step)
        return None if found is None else found | {"generated": self.generated}

    def step(self, step: int) -> dict[str, Any]:
        policy = self.policy.load()
        drawn = self.engine.ranks.from_first(self._draw(step, policy) if self.first else ([], {}, {}))
        found, told, state = drawn
        self.restore(state or self.state())
        examples, targets = learnt(found)
        self.tokens += targets
        if not targets:
            return told | {"idle": True}
        examples += self._replayed(step, targets)
        lr = self.rate(step)
        units = [[example] for example in sorted(examples, key=lambda example: len(example.ids))]
        each = share(units, self.phase.micro_batches, self.engine.ranks, self.policy.chat.pad, targets)
        figures = self.engine.step(each, lr, self.judge(step), objective=objective(self.phase))
        more = figures.more
        gap = more["sampler_gap"] / targets
        told |= self.told(figures, lr) | {
            "loss": (figures.loss * targets - more.get("replay", 0.0)) / targets,
            "clip_fraction": more["clip_fraction"] / targets,
            "importance_ratio": more["importance_ratio"] / targets,
            "sampler_gap": gap,
            "max_sampler_gap": more["max_sampler_gap"],
        }
        if "replay" in more:
            told["replay_loss"] = more["replay"] / targets / self.phase.replay.weight
        require_small_gap(self.name, step, gap, self.phase.max_logprob_diff)
        return told

    def _draw(self, step: int, policy: str) -> tuple[list[Rollout], dict[str, Any], dict[str, Any]]:
        """The answers of a step, what the log says of them, and the state after them. Of rank 0."""
        phase, groups, every = self.phase, 0, []
        for wave in range(phase.max_resample_rounds + 1):
            if groups == phase.prompts_per_step:
                break
            chosen = self.curriculum.draw(phase.prompts_per_step - groups, step, wave)
            label = f"{self.name}/answer/{step}/{wave}"
            asked = [
                (row, seed_of(f"{label}/{group}/{sample}", self.config.seed))
                for group, row in enumerate(chosen)
                for sample in range(phase.num_generations)
            ]
            found = self.files.once(step, wave, policy, asked, self.policy)
            found, kept = sorted_out(found, phase.num_generations)
            self.files.keep(step, wave, found)
            for group, row in enumerate(chosen):
                own = found[group * phase.num_generations : (group + 1) * phase.num_generations]
                self.curriculum.learn(row, sum(min(max(r.reward, 0.0), 1.0) for r in own) / len(own))
            groups += kept
            every += found
        self.files.forget(step, every[-1].wave + 1)
        lengths = [len(r.ids) for r in every]
        self.generated += sum(lengths)
        told = {
            "reward": sum(r.reward for r in every) / len(every),
            "rewards": rollouts.rewards(every),
            "answers": len(every),
            "groups": groups,
            "completion_length": sum(lengths) / len(every),
            "truncated": sum(not r.finished for r in every) / len(every),
            "thinking": sum("</think>" in r.text for r in every) / len(every),
            "generated": self.generated,
            "rates": {name: part["rate"] for name, part in self.curriculum.state.items()},
            "policy": policy,
        }
        return every, told, self.state()

    def _replayed(self, step: int, targets: int) -> list[Example]:
        """Rows of earlier data, weighted so that their mean loss counts `replay.weight` beside the policy's."""
        if self.replay is None:
            return []
        order, shards = self.replay
        rows = order.rows(step)
        weight = self.phase.replay.weight * targets / sum(row.targets for row in rows)
        found = []
        for row in rows:
            (segment,) = row.segments
            ids = shards.read(segment).tolist()
            n = len(ids) - 1 - segment.loss_from
            tokens = {"sampler": [0.0] * n, "replay": [weight] * n}
            found.append(Example(ids, segment.loss_from + 1, {"advantage": 0.0, "learnt": 0.0}, tokens))
        return found

    def fill(self, out: Path) -> dict[str, Any]:
        count = rollouts.join(self.files.all(), out / "rollouts.parquet")
        lines = self.log.lines()
        validated = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
        rewards = [x["reward"] for x in lines if "reward" in x]
        return {
            "answers": count,
            "generated_tokens": self.generated,
            "reward": {"first": rewards[0], "last": rewards[-1]},
            "validation": validated,
            "largest_sampler_gap": max((x["max_sampler_gap"] for x in lines if "max_sampler_gap" in x), default=None),
            "curriculum": self.curriculum.state,
        }


def sorted_out(found: Sequence[Rollout], samples: int) -> tuple[list[Rollout], int]:
    """The answers with group, sample and why each is not learnt from, and how many groups are."""
    rewards = torch.tensor([r.reward for r in found], dtype=torch.float64).view(-1, samples)
    dull = losses.zero_variance(rewards).tolist()
    out = []
    for i, r in enumerate(found):
        group, sample = divmod(i, samples)
        dropped = "variance" if dull[group] else "" if r.finished else "truncated"
        out.append(replace(r, group=group, sample=sample, dropped=dropped))
    return out, dull.count(False)


def learnt(found: Sequence[Rollout]) -> tuple[list[Example], int]:
    """The rows of the answers that are learnt from, and their number of tokens."""
    groups: dict[tuple[int, int], list[Rollout]] = {}
    for r in found:
        groups.setdefault((r.wave, r.group), []).append(r)
    examples = []
    for own in groups.values():
        gains = losses.advantages(torch.tensor([[r.reward for r in own]]))[0].tolist()
        for r, gain in zip(own, gains, strict=True):
            if not r.dropped:
                tokens = {"sampler": r.logprobs, "replay": [0.0] * len(r.ids)}
                row = {"advantage": gain, "learnt": 1.0}
                examples.append(Example([*r.prompt_ids, *r.ids], len(r.prompt_ids), row, tokens))
    return examples, sum(len(e.ids) - e.start for e in examples)


def objective(phase: RlPhase) -> Objective:
    """The policy loss of the answers' tokens and, weighted as they say, the loss of the replayed ones."""

    def compute(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        more: Mapping[str, torch.Tensor] = batch.more
        total, figures = losses.policy_loss(
            -cross_entropy,
            more["sampler"],
            more["advantage"],
            batch.loss_mask * more["learnt"][:, None],
            clip_low=phase.clip_low,
            clip_high=phase.clip_high,
            tis_cap=phase.tis_cap,
        )
        if phase.replay is not None:
            replayed = (cross_entropy * more["replay"]).sum()
            total, figures = total + replayed, figures | {"replay": replayed.detach()}
        return total, figures

    return compute
