"""Learning from pairs of answers: rounds of DPO on the policy's own answers, and a reward model of the pairs."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.confidence import wilson
from stages.formats.seeds import seed_label, seed_of
from stages.formats.table import arrow_schema, read_table, require_columns, write_rows
from stages.rl import preference_pairs
from stages.rl.algorithms import losses
from stages.rl.algorithms.grpo import with_logprobs
from stages.rl.config import DpoPhase, DpoTrainConfig, PromptPool, RewardPhase, RewardTrainConfig
from stages.rl.policy import PolicyTrainer, PostTrainer
from stages.rl.rewards.reward_model import RewardModel, reward_input
from stages.rl.rollout import generation, rollouts, tasks
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.rl.rollout.curriculum import Curriculum
from stages.rl.rollout.rollouts import PAIRS, PairOrder, Rollout, hash_fraction
from stages.tasks import Row, question
from stages.train.data import Batch, RankBatch
from stages.train.engine import Objective

if TYPE_CHECKING:
    import pyarrow as pa

# The most held-out pairs that a reward model is evaluated on: of dpo, and of files, whose domains are many.
HELDOUT_PAIRS, HELDOUT_STORED_PAIRS = 400, 2000


class Dpo(PolicyTrainer):
    """DPO in rounds: draw and score answers, form pairs, and train on them in a few updates."""

    config: DpoTrainConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        phase = self.config.phase
        self.by_id = {row["id"]: row for row in self.rows}
        seed = self.config.seed
        # One artifact holds the tasks of both pools, and their kinds tell them apart.
        preference_kinds = set(tasks.kinds_of(phase.preferences.tasks))
        preference_tasks = [row for row in self.rows if row["kind"] in preference_kinds]
        self.prompts = Curriculum(preference_tasks, f"{seed_label(self.name)}/ask", seed, uniform=True)
        # Pairs of the section preferences, all of which are read once before any is read again.
        self.stored: StoredPairs | None = None
        if stored := phase.stored_pairs:
            self.stored = StoredPairs(preference_pairs.read(self.inputs["preferences"], False, stored.max_tokens))
            self.stored_order = PairOrder(len(self.stored), stored.count, f"{seed_label(self.name)}/stored", seed)
        self.skills = None
        if phase.sft_tasks is not None:
            skill_tasks = [row for row in self.rows if row["kind"] not in preference_kinds]
            self.skills = Curriculum(skill_tasks, f"{seed_label(self.name)}/skills", seed, uniform=True)

    @property
    def phase(self) -> DpoPhase:
        return self.config.phase

    def algorithm_state(self) -> dict[str, Any]:
        return {"asked": self.prompts.copy(), "skills": self.skills.copy() if self.skills else None}

    def restore_algorithm(self, state: dict[str, Any]) -> None:
        self.prompts.load(state["asked"])
        if self.skills:
            self.skills.load(state["skills"])

    def train_step(self, step: int) -> dict[str, Any]:
        digest = self.policy.load()
        answers, state = self.engine.ranks.from_first(self._draw(step, digest) if self.first else ([], None))
        self.restore_algorithm(state or self.algorithm_state())
        groups = group_by_task([r for r in answers if r.wave == 0])
        pairs = [pair for group_answers in groups if (pair := best_and_worst(group_answers, self.phase.min_margin))]
        correct = [r for r in answers if r.wave == 1 and not r.dropped]
        scored = [r for r in answers if r.wave == 0]
        metrics: dict[str, Any] = {
            "reward": sum(r.reward for r in scored) / len(scored),
            "rewards": rollouts.mean_rewards((r.kind, r.reward) for r in scored),
            "length_correlation": rollouts.length_correlation(scored),
            "pairs": len(pairs),
            "anchors": len(correct),
            "answers": len(answers),
            "policy": digest,
        }
        stored = [] if self.stored is None else [self.stored[n] for n in self.stored_order.of_step(step)]
        if self.stored is not None:
            metrics["stored_pairs"] = len(stored)
        # Every update needs a pair; a round with fewer learns nothing, and is sealed with that reason.
        if len(pairs) < self._pairs_needed:
            return metrics | {"idle": True}
        rng = random.Random(seed_of(f"{seed_label(self.name)}/round/{step}", self.config.seed))
        # The order is drawn anew for each round, since pairs come by task; all ranks draw the same.
        rng.shuffle(pairs)
        rng.shuffle(correct)
        updates = self.phase.updates
        parts = [(pairs[n::updates], stored[n::updates], correct[n::updates]) for n in range(updates)]
        batches = [self._batch(*part) for part in parts]
        if self.stored is not None:
            # Before the first update, since the policy of now is the reference of pairs that it did not draw.
            batches = [with_logprobs(self.engine, batch, "start") for batch in batches]
        for number, (batch, (update_pairs, update_stored, _)) in enumerate(zip(batches, parts, strict=True)):
            figures, gap = self._update(step, number, batch, len(update_pairs) + len(update_stored))
            metrics |= figures
            if number == 0:  # no update since the answers were drawn
                self.require_small_gap(step, gap["sampler_gap"], digest, answers)
                metrics |= gap
        return metrics

    @property
    def _pairs_needed(self) -> int:
        """The pairs of its own answers without which a round is idle."""
        stored = self.phase.stored_pairs.count if self.phase.stored_pairs else 0
        # Pairs of both kinds are dealt from the first update on, so one kind has to reach the last one.
        return 0 if stored >= self.phase.updates else self.phase.updates

    def _batch(
        self, pairs: Sequence[tuple[Rollout, Rollout]], stored: Sequence[Pair], correct: Sequence[Rollout]
    ) -> RankBatch:
        """Returns this rank's part of an update.

        The reference log-probabilities of drawn answers are those with which they were drawn.
        """
        tokens, count = sum(len(r.ids) for r in correct), len(pairs) + len(stored)
        # The engine divides by the number of pairs, so the mean over the tokens of correct answers is made here.
        weight = self.phase.nll_coef * count / tokens if tokens else 0.0
        # The two answers of a pair stay in one micro-batch, since the loss compares them.
        units = [[_example(r, pair=1.0, anchor=0.0) for r in pair] for pair in pairs]
        units += [_stored_examples(self.policy.chat, pair) for pair in stored]
        units += [[_example(r, pair=0.0, anchor=weight)] for r in correct]
        self.tokens += sum(len(example.ids) - example.start for unit in units for example in unit)
        return build_rank_batch(units, self.phase.micro_batches, self.engine.ranks, self.policy.chat.pad, count)

    def _update(
        self, step: int, number: int, rank_batch: RankBatch, count: int
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Makes one update of so many pairs. Returns metrics for the log, and the gap of policy and sampler before."""
        lr = self.learning_rate((step - 1) * self.phase.updates + number + 1)
        figures = self.engine.step(rank_batch, lr, self.update_check(step), objective=dpo(self.phase.beta))
        extras = figures.extras
        gap = {"sampler_gap": extras["gap"] / max(extras["tokens"], 1), "max_sampler_gap": extras["max_gap"]}
        metrics = {
            "pair_loss": (figures.loss * count - extras["anchor"]) / count,
            "pair_accuracy": extras["accuracy"] / count,
            "pair_margin": extras["margin"] / count,
            "anchor_loss": extras["anchor"] / count,
        }
        return figures.metrics(lr) | metrics, gap

    def _draw(self, step: int, digest: str) -> tuple[list[Rollout], dict[str, Any]]:
        """Returns the answers of a round and the trainer's state after them. Rank 0 only."""
        answers = self._draw_wave(step, 0, digest, self.prompts, self.phase.preferences)
        pairs = [best_and_worst(group_answers, self.phase.min_margin) for group_answers in group_by_task(answers)]
        # The condition is that of `train_step`: a round with too few pairs is idle.
        drop_reason = "" if sum(pair is not None for pair in pairs) >= self._pairs_needed else "idle"
        paired = {(r.group, r.sample) for pair in pairs for r in pair or ()}
        answers = [replace(r, dropped=drop_reason if (r.group, r.sample) in paired else "between") for r in answers]
        self.files.write(step, 0, answers)
        if self.skills is not None and self.phase.sft_tasks is not None:
            correct = self._draw_wave(step, 1, digest, self.skills, self.phase.sft_tasks)
            correct = [replace(r, dropped="" if r.reward == 1 and r.finished else "wrong") for r in correct]
            self.files.write(step, 1, correct)
            answers += correct
        self.files.finish_step(step, answers[-1].wave + 1)
        return answers, self.algorithm_state()

    def _draw_wave(self, step: int, wave: int, digest: str, curriculum: Curriculum, pool: PromptPool) -> list[Rollout]:
        rows = curriculum.draw(pool.count, step, wave)
        requests = self.requests(rows, pool.num_generations, f"{step}/{wave}")
        answers = self.files.load_or_draw(step, wave, digest, requests, self.policy)
        return [
            replace(r, group=i // pool.num_generations, sample=i % pool.num_generations) for i, r in enumerate(answers)
        ]

    def write_outputs(self, out: Path) -> dict[str, Any]:
        count = rollouts.merge(self.files.all(), out / "rollouts.parquet", rollouts.schema())
        margin = self.phase.min_margin
        rows = [row for path in self.files.all() for row in pair_rows(rollouts.read(path), self.by_id, margin)]
        write_rows(out / "pairs.parquet", PAIRS, rows)
        learnt = sum(row["learnt"] for row in rows)
        return {"answers": count, "pairs": learnt, "pairs_in_all": len(rows), **self.reward_summary()}


def group_by_task(answers: Sequence[Rollout]) -> list[list[Rollout]]:
    """Returns the answers of a round by task."""
    groups: dict[int, list[Rollout]] = {}
    for r in answers:
        groups.setdefault(r.group, []).append(r)
    return list(groups.values())


def best_and_worst(group_answers: Sequence[Rollout], min_margin: float) -> tuple[Rollout, Rollout] | None:
    """Returns the best finished answer and the worst answer, if their rewards differ by more than `min_margin`.

    Among equal rewards, the first answer counts.
    """
    finished = [r for r in group_answers if r.finished]
    if not finished:
        return None
    best, worst = max(finished, key=lambda r: r.reward), min(group_answers, key=lambda r: r.reward)
    return (best, worst) if best.reward - worst.reward > min_margin else None


def all_pairs(group_answers: Sequence[Rollout], min_margin: float) -> list[tuple[Rollout, Rollout]]:
    """Returns all pairs of answers to a task whose rewards differ by more than `min_margin`, the better first.

    DPO uses only the best and the worst; a reward model also needs the pairs between the extremes.
    """
    return [(a, b) for a in group_answers for b in group_answers if a.finished and a.reward - b.reward > min_margin]


def pair_rows(answers: Sequence[Rollout], tasks: Mapping[str, Row], min_margin: float) -> list[dict[str, Any]]:
    """Returns the rows of pairs.parquet of the answers of a round.

    Args:
        answers: All answers of the round.
        tasks: Tasks by id.
        min_margin: Reward difference that a pair must exceed.
    """
    groups = group_by_task([r for r in answers if r.wave == 0])
    return [pair_row(tasks[better.task], better, r) for group in groups for better, r in all_pairs(group, min_margin)]


def pair_row(row: Row, chosen: Rollout, rejected: Rollout) -> dict[str, Any]:
    """Returns a row of pairs.parquet: two answers, the source of both and of their order, and whether DPO used them."""
    columns: dict[str, Any] = {
        "round": chosen.step,
        "task": chosen.task,
        "question": question(row),
        "judge": chosen.verifier,
        "judge_version": chosen.verifier_version,
        "policy": chosen.policy,
        "learnt": not chosen.dropped and not rejected.dropped,
    }
    for side, r in (("chosen", chosen), ("rejected", rejected)):
        values = {"": r.text, "_finished": r.finished, "_sample": r.sample, "_reward": r.reward}
        columns |= {side + name: value for name, value in values.items()}
    return columns


def _example(r: Rollout, pair: float, anchor: float) -> Example:
    tokens = {"reference": r.logprobs, "anchor": [anchor] * len(r.ids)}
    return Example([*r.prompt_ids, *r.ids], len(r.prompt_ids), {"pair": pair, "stored": 0.0}, tokens)


def _stored_examples(chat: generation.Chat, pair: Pair) -> list[Example]:
    """Returns both answers of a pair from files, as the policy would have drawn them."""
    prompt_ids, examples = chat.encode_question(pair.messages), []
    for text in (pair.chosen, pair.rejected):
        ids = [*chat.encode_text(text), chat.turn_end]
        tokens = {"reference": [0.0] * len(ids), "anchor": [0.0] * len(ids)}
        examples.append(Example([*prompt_ids, *ids], len(prompt_ids), {"pair": 1.0, "stored": 1.0}, tokens))
    return examples


def dpo(beta: float) -> Objective:
    """Returns the DPO loss of the pairs plus the weighted loss of correct answers.

    Figures include the gap between the pairs' log-probabilities and the sampler's, which are the reference.
    """

    def compute(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pair_rows, drawn_rows = batch.extras["pair"] > 0, (batch.extras["pair"] > 0) & (batch.extras["stored"] == 0)
        reference = batch.extras["reference"]
        if "start" in batch.extras:
            reference = torch.where(batch.extras["stored"][:, None] > 0, batch.extras["start"], reference)
        loss, figures = losses.dpo_loss(
            -cross_entropy[pair_rows], reference[pair_rows], batch.loss_mask[pair_rows], beta
        )
        # The weight of each token is in the extras: nll_coef, by the pairs of the update and the tokens of its anchors.
        anchor_loss = (cross_entropy * batch.extras["anchor"]).sum()
        mask = batch.loss_mask[drawn_rows].bool()
        gap = (-cross_entropy[drawn_rows] - reference[drawn_rows]).detach().abs().masked_fill(~mask, 0.0)
        gaps = {"gap": gap.sum(), "max_gap": gap.amax() if gap.numel() else gap.sum(), "tokens": mask.sum()}
        return loss + anchor_loss, figures | {"anchor": anchor_loss.detach()} | gaps

    return compute


class Reward(PostTrainer):
    """A reward model, trained on pairs from files or of a DPO phase by the Bradley-Terry loss."""

    config: RewardTrainConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        phase = self.config.phase
        self.chat = generation.Chat(self.inputs["tokenizer"])
        self.pairs: Sequence[Pair]
        if "preferences" in self.inputs:
            longest = min(phase.max_tokens or self.config.model.context_length, self.config.model.context_length)
            self.pairs = StoredPairs(preference_pairs.read(self.inputs["preferences"], False, longest))
            heldout = list(StoredPairs(preference_pairs.read(self.inputs["preferences"], True, longest)))
            most = HELDOUT_STORED_PAIRS
        else:
            pairs = [Pair.of_dpo(row) for row in read_pairs(self.inputs["pairs"])]
            # By question, so that no question is in both parts.
            heldout = [pair for pair in pairs if hash_fraction(pair.prompt) < phase.heldout_fraction]
            self.pairs = [pair for pair in pairs if hash_fraction(pair.prompt) >= phase.heldout_fraction]
            most = HELDOUT_PAIRS
        # By another hash, so that the sample has pairs of many questions.
        self.heldout = sorted(heldout, key=lambda pair: hash_fraction(pair.chosen + pair.rejected))[:most]
        self.order = PairOrder(len(self.pairs), phase.pairs, seed_label(self.name), self.config.seed)
        if not self.pairs or not self.heldout:
            raise AtomError(
                f"{self.name}: {len(self.pairs)} pairs to learn from and {len(self.heldout)} held out are too few; "
                "draw more in dpo"
            )

    @property
    def phase(self) -> RewardPhase:
        return self.config.phase

    def train_step(self, step: int) -> dict[str, Any]:
        count = self.phase.pairs
        units = self._units([self.pairs[number] for number in self.order.of_step(step)])
        self.tokens += sum(len(example.ids) for unit in units for example in unit)
        lr = self.learning_rate(step)
        figures = self.engine.step(self._rank_batch(units), lr, self.update_check(step), objective=bradley_terry)
        return figures.metrics(lr) | {"pair_accuracy": figures.extras["accuracy"] / count}

    def measure(self, step: int) -> dict[str, Any] | None:
        if step % self.phase.validate_every and step != self.phase.steps:
            return None
        n, sums, correct = len(self.heldout), Counter[str](), {}
        for domain, pairs in self._by_domain().items():
            correct[domain] = 0.0
            # As many at once as in training, for which the memory is planned.
            for start in range(0, len(pairs), self.phase.pairs):
                part = pairs[start : start + self.phase.pairs]
                loss, figures = self.engine.figures(self._rank_batch(self._units(part)), bradley_terry)
                sums.update({**figures, "loss": loss * len(part)})
                correct[domain] += figures["accuracy"]
        # The mean score, with which the verifier reward-model compares an answer.
        center = (sums["chosen"] + sums["rejected"]) / 2 / n
        metrics = {
            "heldout_accuracy": sums["accuracy"] / n,
            "heldout_loss": sums["loss"] / n,
            "centre": center,
            "prefers_longer": sums["prefers_longer"] / n,
        }
        if self.first:
            self.report.metric(step, **metrics)
        return metrics | {"correct": correct}

    def write_outputs(self, out: Path) -> dict[str, Any]:
        measurements = [x for x in self.log.lines() if "heldout_accuracy" in x]
        last, n = measurements[-1], len(self.heldout)
        accuracy = accuracy_of(self.heldout, last["heldout_accuracy"] * n)
        return {
            "pairs": len(self.pairs),
            "heldout_pairs": n,
            "heldout_questions": accuracy["questions"],
            "preferred_by": dict(sorted(Counter(pair.preferred_by for pair in self.heldout).items())),
            "centre": last["centre"],
            "heldout_accuracy": {
                "first": measurements[0]["heldout_accuracy"],
                "last": last["heldout_accuracy"],
                "interval": accuracy["interval"],
            },
            "longer_is_better": accuracy["longer_is_better"],
            "prefers_longer": last["prefers_longer"],
            "domains": {
                domain: accuracy_of(pairs, last["correct"][domain]) for domain, pairs in self._by_domain().items()
            },
        }

    def _by_domain(self) -> dict[str, list[Pair]]:
        """Returns the held-out pairs by domain, in the order of the names."""
        domains: dict[str, list[Pair]] = {}
        for pair in self.heldout:
            domains.setdefault(pair.domain, []).append(pair)
        return dict(sorted(domains.items()))

    def _units(self, pairs: Sequence[Pair]) -> list[list[Example]]:
        units = []
        for pair in pairs:
            answers = (pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)
            input_ids = [reward_input(self.chat, pair.messages, *answer) for answer in answers]
            # The last token alone is a target: its log-probability is the score.
            units.append([Example(ids, len(ids) - 1, {"longer": pair.longer}) for ids in input_ids])
        return units

    def _rank_batch(self, units: list[list[Example]]) -> RankBatch:
        return build_rank_batch(units, self.phase.micro_batches, self.engine.ranks, self.chat.pad, len(units))


def bradley_terry(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the Bradley-Terry loss of pairs; a score is the log-probability of one token after the answer.

    The figure `prefers_longer` counts pairs whose longer answer scores higher; where they are as long, half of them.
    """
    # An empty micro-batch has a masked row, which is half of no pair.
    pair_rows = batch.loss_mask.any(1)
    loss, figures = losses.dpo_loss(-cross_entropy[pair_rows], None, batch.loss_mask[pair_rows], 1.0)
    longer, margin = batch.extras["longer"][pair_rows][::2], -cross_entropy.detach()[pair_rows]
    margin = margin.sum(1)[::2] - margin.sum(1)[1::2]
    return loss, figures | {"prefers_longer": ((torch.sign(margin) * longer + 1) / 2).sum()}


def accuracy_of(pairs: Sequence[Pair], correct: float) -> dict[str, Any]:
    """Returns the accuracy on pairs with its interval, beside that of the rule that prefers the longer answer.

    The intervals count prompts, as if the pairs of one were one.

    Args:
        pairs: The pairs.
        correct: Number of them that are ordered correctly.
    """
    n, questions = len(pairs), len({pair.prompt for pair in pairs})
    longer = sum((pair.longer + 1) / 2 for pair in pairs) / n
    return {
        "pairs": n,
        "questions": questions,
        "accuracy": correct / n,
        "interval": list(wilson(correct / n * questions, questions)),
        "longer_is_better": {"value": longer, "interval": list(wilson(longer * questions, questions))},
    }


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better first.

    Attributes:
        messages: The messages up to the answers.
        chosen: The better answer.
        rejected: The other answer.
        chosen_finished: Whether it ended by itself.
        rejected_finished: Whether it ended by itself.
        domain: The domain by which accuracy is measured.
        preferred_by: Who ordered them: humans, AI or rules.
    """

    messages: Sequence[Mapping[str, Any]]
    chosen: str
    rejected: str
    chosen_finished: bool
    rejected_finished: bool
    domain: str
    preferred_by: str

    @classmethod
    def of_dpo(cls, row: Mapping[str, Any]) -> Pair:
        """Returns the pair of a row of a dpo phase, whose verifier orders the policy's answers by rules."""
        messages = [{"role": "user", "content": row["question"]}]
        texts = {name: row[name] for name in ("chosen", "rejected", "chosen_finished", "rejected_finished")}
        preferred_by = "AI" if row["judge"] == RewardModel.name else "rules"
        return cls(messages, **texts, domain=row["judge"], preferred_by=preferred_by)

    @property
    def prompt(self) -> str:
        """The text whose hash says on which side the pair is."""
        return str(self.messages[-1]["content"]) if len(self.messages) == 1 else json.dumps(list(self.messages))

    @property
    def longer(self) -> float:
        """1 if the better answer has more characters, -1 if it has fewer, and 0 if both have as many."""
        gap = len(self.chosen) - len(self.rejected)
        return float((gap > 0) - (gap < 0))


class StoredPairs(Sequence[Pair]):
    """The pairs of preferences.parquet, of which one at a time is a Python object.

    Args:
        table: Rows that `preference_pairs.read` returns.
    """

    def __init__(self, table: pa.Table) -> None:
        columns = ["messages", "chosen", "rejected", "domain", "preferred_by"]
        self.table = table.select(columns).combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = {name: self.table[name][index].as_py() for name in self.table.column_names}
        # Answers of files are whole.
        return Pair(**{**row, "messages": json.loads(row["messages"])}, chosen_finished=True, rejected_finished=True)


def read_pairs(artifact: Artifact) -> list[dict[str, Any]]:
    """Returns the rows of pairs.parquet.

    Raises:
        AtomError: A column or a value is missing.
    """
    path = artifact / "pairs.parquet"
    require_columns(path, arrow_schema(PAIRS))
    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    if any(None in row.values() for row in rows):
        raise AtomError(f"{path} has a pair without one of its values; restore it from a copy")
    return rows
