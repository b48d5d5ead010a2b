"""Learning from pairs of answers: rounds of DPO on what the policy itself answers, and a reward model of the pairs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.data.seeds import seed_of
from stages.data.table import read_table, write_rows
from stages.evaluation.confidence import wilson
from stages.rl.algorithms import losses
from stages.rl.config import Asking, DpoPhase, RewardPhase
from stages.rl.policy import PolicyTrainer, require_small_gap
from stages.rl.protocols import Row, question
from stages.rl.rewards.reward_functions import judged
from stages.rl.rollout import generation, rollouts, tasks
from stages.rl.rollout.batches import Example, share
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import Rollout
from stages.rl.trainer import Trainer
from stages.train.data import Batch, Share
from stages.train.engine import Objective

PAIRS = {
    "round": "int32",
    "task": "string",
    "question": "string",
    "chosen": "string",
    "rejected": "string",
    "chosen_finished": "bool",
    "rejected_finished": "bool",
    "chosen_sample": "int32",
    "rejected_sample": "int32",
    "chosen_reward": "double",
    "rejected_reward": "double",
    "judge": "string",
    "judge_version": "string",
    "policy": "string",
    "learnt": "bool",
}


class Dpo(PolicyTrainer):
    """Rounds: answers are drawn and judged, pairs made, and learnt from in a few updates."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        phase: DpoPhase = self.phase
        self.by_id = {row["id"]: row for row in self.rows}
        seed = self.config.seed
        liked = set(tasks.kinds_of(phase.preferences.tasks))
        self.asked = Curriculum(None, [r for r in self.rows if r["kind"] in liked], f"{self.name}/ask", seed)
        self.skills = None
        if phase.sft_tasks is not None:
            own = [row for row in self.rows if row["kind"] not in liked]
            self.skills = Curriculum(None, own, f"{self.name}/skills", seed)

    def state(self) -> dict[str, Any]:
        return {"asked": self.asked.copy(), "skills": self.skills.copy() if self.skills else None}

    def restore(self, state: dict[str, Any]) -> None:
        self.asked.load(state["asked"])
        if self.skills:
            self.skills.load(state["skills"])

    def step(self, step: int) -> dict[str, Any]:
        digest = self.policy.load()
        found, state = self.engine.ranks.from_first(self._draw(step, digest) if self.first else ([], None))
        self.restore(state or self.state())
        groups = grouped([r for r in found if r.wave == 0])
        pairs = [pair for own in groups if (pair := best_and_worst(own, self.phase.min_margin))]
        right = [r for r in found if r.wave == 1 and not r.dropped]
        judged_ = [r for r in found if r.wave == 0]
        told: dict[str, Any] = {
            "reward": sum(r.reward for r in judged_) / len(judged_),
            "rewards": rollouts.rewards(judged_),
            "pairs": len(pairs),
            "anchors": len(right),
            "answers": len(found),
            "policy": digest,
        }
        if len(pairs) < self.phase.updates:
            return told | {"idle": True}
        rng = random.Random(seed_of(f"{self.name}/round/{step}", self.config.seed))
        rng.shuffle(pairs)
        rng.shuffle(right)
        for number in range(self.phase.updates):
            some = pairs[number :: self.phase.updates]
            figures, gap = self._update(step, number, some, right[number :: self.phase.updates])
            told |= figures
            if number == 0:  # no weight has moved since the answers were drawn
                require_small_gap(self.name, step, gap["sampler_gap"], self.phase.max_logprob_diff)
                told |= gap
        return told

    def _update(
        self, step: int, number: int, pairs: Sequence[tuple[Rollout, Rollout]], right: Sequence[Rollout]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """One update; answers' log-probabilities when they were drawn are those of the reference. Returns what the log
        says of it, and how far the policy was from the reference before it."""
        tokens = sum(len(r.ids) for r in right)
        weight = self.phase.nll_coef * len(pairs) / tokens if tokens else 0.0
        units = [[_example(r, pair=1.0, anchor=0.0) for r in pair] for pair in pairs]
        units += [[_example(r, pair=0.0, anchor=weight)] for r in right]
        units.sort(key=lambda unit: max(len(example.ids) for example in unit))
        self.tokens += sum(len(example.ids) - example.start for unit in units for example in unit)
        each = share(units, self.phase.micro_batches, self.engine.ranks, self.policy.chat.pad, len(pairs))
        lr = self.rate((step - 1) * self.phase.updates + number + 1)
        figures = self.engine.step(each, lr, self.judge(step), objective=dpo(self.phase.beta))
        more = figures.more
        gap = {"sampler_gap": more["gap"] / more["tokens"], "max_sampler_gap": more["max_gap"]}
        told = {
            "pair_loss": (figures.loss * len(pairs) - more["anchor"]) / len(pairs),
            "pair_accuracy": more["accuracy"] / len(pairs),
            "pair_margin": more["margin"] / len(pairs),
            "anchor_loss": more["anchor"] / len(pairs),
        }
        return self.told(figures, lr) | told, gap

    def _draw(self, step: int, digest: str) -> tuple[list[Rollout], dict[str, Any]]:
        """The answers of a round and the state after them. Of rank 0."""
        found = self._ask(step, 0, digest, self.asked, self.phase.preferences)
        pairs = [best_and_worst(own, self.phase.min_margin) for own in grouped(found)]
        learnt = "" if sum(pair is not None for pair in pairs) >= self.phase.updates else "idle"
        chosen = {(r.group, r.sample) for pair in pairs for r in pair or ()}
        found = [replace(r, dropped=learnt if (r.group, r.sample) in chosen else "between") for r in found]
        self.files.keep(step, 0, found)
        if self.skills is not None:
            right = self._ask(step, 1, digest, self.skills, self.phase.sft_tasks)
            right = [replace(r, dropped="" if r.reward == 1 and r.finished else "wrong") for r in right]
            self.files.keep(step, 1, right)
            found += right
        return found, self.state()

    def _ask(self, step: int, wave: int, digest: str, source: Curriculum, asking: Asking) -> list[Rollout]:
        rows = source.draw(asking.count, step, wave)
        label = f"{self.name}/answer/{step}/{wave}"
        asked = [
            (row, seed_of(f"{label}/{group}/{sample}", self.config.seed))
            for group, row in enumerate(rows)
            for sample in range(asking.num_generations)
        ]
        found = self.files.once(step, wave, digest, asked, self.policy)
        return [
            replace(r, group=i // asking.num_generations, sample=i % asking.num_generations)
            for i, r in enumerate(found)
        ]

    def fill(self, out: Path) -> dict[str, Any]:
        count = rollouts.join(self.files.all(), out / "rollouts.parquet")
        rows = []
        for path in self.files.all():
            found = [r for r in rollouts.read(path) if r.wave == 0]
            for own in grouped(found):
                for pair in all_pairs(own, self.phase.min_margin):
                    rows.append(pair_row(self.by_id[own[0].task], *pair))
        write_rows(out / "pairs.parquet", PAIRS, rows)
        lines = self.log.lines()
        validated = [{"step": x["step"], **x["validation"]} for x in lines if "validation" in x]
        rewards = [x["reward"] for x in lines if "reward" in x]
        told = {"reward": {"first": rewards[0], "last": rewards[-1]}, "validation": validated}
        return {"answers": count, "pairs": sum(row["learnt"] for row in rows), "pairs_in_all": len(rows), **told}


def grouped(found: Sequence[Rollout]) -> list[list[Rollout]]:
    """The answers to each task of a round."""
    groups: dict[int, list[Rollout]] = {}
    for r in found:
        groups.setdefault(r.group, []).append(r)
    return list(groups.values())


def best_and_worst(own: Sequence[Rollout], least: float) -> tuple[Rollout, Rollout] | None:
    """The best answer, which must have ended, and the worst, if their rewards differ enough. Of equals the first."""
    ended = [r for r in own if r.finished]
    if not ended:
        return None
    best, worst = max(ended, key=lambda r: r.reward), min(own, key=lambda r: r.reward)
    return (best, worst) if best.reward - worst.reward > least else None


def all_pairs(own: Sequence[Rollout], least: float) -> list[tuple[Rollout, Rollout]]:
    """Every two answers to a task whose rewards differ enough, the better first. DPO learns from the best and the worst
    alone; a reward model needs the others too, lest it know only the extremes."""
    return [(a, b) for a in own for b in own if a.finished and a.reward - b.reward > least]


def pair_row(row: Row, chosen: Rollout, rejected: Rollout) -> dict[str, Any]:
    """A row of pairs.parquet: two answers, where they and their order come from, and whether DPO learnt from them."""
    out: dict[str, Any] = {
        "round": chosen.step,
        "task": chosen.task,
        "question": question(row),
        "judge": chosen.verifier,
        "judge_version": chosen.verifier_version,
        "policy": chosen.policy,
        "learnt": not chosen.dropped and not rejected.dropped,
    }
    for which, r in (("chosen", chosen), ("rejected", rejected)):
        named = {"": r.text, "_finished": r.finished, "_sample": r.sample, "_reward": r.reward}
        out |= {which + name: value for name, value in named.items()}
    return out


def _example(r: Rollout, pair: float, anchor: float) -> Example:
    tokens = {"reference": r.logprobs, "anchor": [anchor] * len(r.ids)}
    return Example([*r.prompt_ids, *r.ids], len(r.prompt_ids), {"pair": pair}, tokens)


def dpo(beta: float) -> Objective:
    """The loss of the pairs and, weighted as they say, of the right answers. Figures: also how far the pairs' tokens
    are from the sampler's log-probabilities, the reference."""

    def compute(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        own = batch.more["pair"] > 0
        total, figures = losses.dpo_loss(-cross_entropy[own], batch.more["reference"][own], batch.loss_mask[own], beta)
        anchored = (cross_entropy * batch.more["anchor"]).sum()
        mask = batch.loss_mask[own].bool()
        away = (-cross_entropy[own] - batch.more["reference"][own]).detach().abs().masked_fill(~mask, 0.0)
        gaps = {"gap": away.sum(), "max_gap": away.amax() if away.numel() else away.sum(), "tokens": mask.sum()}
        return total + anchored, figures | {"anchor": anchored.detach()} | gaps

    return compute


class Reward(Trainer):
    """A reward model: the pairs of a round-based phase, learnt by the Bradley-Terry loss."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        phase: RewardPhase = self.phase
        self.chat = generation.Chat(self.inputs["tokenizer"])
        rows = read_pairs(self.inputs["pairs"])
        held = [row for row in rows if _lot(row["question"]) < phase.heldout_fraction]
        self.heldout = sorted(held, key=lambda row: _lot(row["chosen"] + row["rejected"]))[: phase.heldout_pairs]
        self.pairs = [row for row in rows if _lot(row["question"]) >= phase.heldout_fraction]
        if not self.pairs or not self.heldout:
            raise AtomError(
                f"{self.name}: {len(self.pairs)} pairs to learn from and {len(self.heldout)} held out are too few; "
                "draw more in rlhf.dpo"
            )

    def step(self, step: int) -> dict[str, Any]:
        count = self.phase.pairs
        some = []
        for number in range((step - 1) * count, step * count):
            epoch, place = divmod(number, len(self.pairs))
            order = list(range(len(self.pairs)))
            random.Random(seed_of(f"{self.name}/epoch {epoch}", self.config.seed)).shuffle(order)
            some.append(self.pairs[order[place]])
        units = self._units(some)
        self.tokens += sum(len(example.ids) for unit in units for example in unit)
        lr = self.rate(step)
        figures = self.engine.step(self._share(units), lr, self.judge(step), objective=bradley_terry)
        return self.told(figures, lr) | {"pair_accuracy": figures.more["accuracy"] / count}

    def measure(self, step: int) -> dict[str, Any] | None:
        if step % self.phase.validate_every and step != self.phase.steps:
            return None
        loss, figures = self.engine.figures(self._share(self._units(self.heldout)), bradley_terry)
        n = len(self.heldout)
        centre = (figures["chosen"] + figures["rejected"]) / 2 / n
        found = {"heldout_accuracy": figures["accuracy"] / n, "heldout_loss": loss, "centre": centre}
        if self.first:
            self.report.metric(step, **found)
        return found

    def fill(self, out: Path) -> dict[str, Any]:
        measured = [x for x in self.log.lines() if "heldout_accuracy" in x]
        last, n = measured[-1]["heldout_accuracy"], len(self.heldout)
        questions = len({row["question"] for row in self.heldout})
        interval = list(wilson(last * questions, questions))  # as if the pairs of a question were one
        return {
            "pairs": len(self.pairs),
            "heldout_pairs": n,
            "heldout_questions": questions,
            "centre": measured[-1]["centre"],
            "heldout_accuracy": {"first": measured[0]["heldout_accuracy"], "last": last, "interval": interval},
        }

    def _units(self, pairs: Sequence[dict[str, Any]]) -> list[list[Example]]:
        found = []
        for row in pairs:
            both = [judged(self.chat, row["question"], row[w], row[f"{w}_finished"]) for w in ("chosen", "rejected")]
            found.append([Example(ids, len(ids) - 1) for ids in both])
        return sorted(found, key=lambda unit: max(len(example.ids) for example in unit))

    def _share(self, units: list[list[Example]]) -> Share:
        return share(units, self.phase.micro_batches, self.engine.ranks, self.chat.pad, len(units))


def bradley_terry(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of pairs whose score is the log-probability of one token after the answer."""
    own = batch.loss_mask.any(1)
    return losses.dpo_loss(-cross_entropy[own], None, batch.loss_mask[own], 1.0)


def read_pairs(artifact: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(artifact / "pairs.parquet").to_pylist()
    return rows


def _lot(question: str) -> float:
    """A number in [0, 1) that follows from the question alone."""
    return int(hashlib.sha256(question.encode()).hexdigest()[:8], 16) / 2**32
