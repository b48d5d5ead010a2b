"""The policy in training on rank 0: draws answers, verifies them, and stores them on disk.

The answers of a step are on disk before an update uses them, with the digest of the policy that drew them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.stage import Inputs, Report
from stages.evaluation.eval_set import chat_rows
from stages.models.hf import hf_config
from stages.rl.config import DpoTrainConfig, RlTrainConfig
from stages.rl.post_trainer import PostTrainer
from stages.rl.protocols import Completion, Parts, Row, Sampler, SamplerContext
from stages.rl.rewards.registry import make_verifiers
from stages.rl.rollout import generation, rollouts, tasks
from stages.rl.rollout.rollouts import Rollout
from stages.rl.samplers import registry as sampler_registry
from stages.train.engine import Engine


class Policy:
    """A sampler with the engine's weights, its chat template and its verifiers. Only rank 0 calls methods other than
    `load`."""

    def __init__(
        self, config: RlTrainConfig | DpoTrainConfig, inputs: Inputs, engine: Engine, report: Report, work: Path
    ) -> None:
        """work: the stage's work folder, for the files of a sampler."""
        self.config, self.engine, self.report = config, engine, report
        self.chat = generation.Chat(inputs["tokenizer"])
        self.sampler: Sampler | None = None
        self.verifiers: generation.Verifiers | None = None
        if engine.ranks.first:
            self.sampler = make_sampler(config, self.chat, work)
            rows = [*tasks.read(inputs["tasks"]), *chat_rows(inputs["items"])]
            self._require_context(rows)
            verifiers = make_verifiers(rows, inputs, self.chat, config.phase.verifiers)
            self.verifiers = generation.Verifiers(verifiers, config.phase.retries, report)

    def _require_context(self, rows: Sequence[Row]) -> None:
        """Raises RecipeError for a question that leaves no room for an answer in the model's context."""
        length = self.config.model.context_length - self.config.phase.sampling.max_new_tokens
        for row in rows:
            if (tokens := len(self.chat.encode_prompt(row))) > length:
                raise RecipeError(
                    f"task {row['id']} has {tokens} tokens, and sampling.max_new_tokens = "
                    f"{self.config.phase.sampling.max_new_tokens} of model.context_length = "
                    f"{self.config.model.context_length} leave {length}; leave it out, or allow shorter answers"
                )

    def load(self) -> str:
        """Copies the engine's weights to the sampler. Returns the policy's digest. Collective."""
        weights = self.engine.weights()
        if not self.engine.ranks.first:
            return ""
        tensors = dict(self.config.model.spec().to_hf(weights, self.config.model, self.chat.vocab_size))
        self._sampler.load(tensors)
        return rollouts.digest(tensors)

    @property
    def _sampler(self) -> Sampler:
        assert self.sampler is not None, "rank 0 draws"
        return self.sampler

    def draw(self, requests: Sequence[tuple[Row, int]], greedy: bool = False) -> list[Completion]:
        return generation.draw(self._sampler, self.chat, requests, greedy)

    def score(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Parts]:
        assert self.verifiers is not None, "rank 0 scores"
        pairs = [(row, self.chat.response(completion)) for row, completion in zip(rows, completions, strict=True)]
        return self.verifiers.score(pairs)

    def validate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Mean reward of greedy answers by kind of task."""
        completions = self.draw([(row, 0) for row in rows], greedy=True)
        return generation.mean_reward_by_kind(list(zip(rows, self.score(rows, completions), strict=True)))

    def close(self) -> None:
        for resource in (self.sampler, self.verifiers):
            if resource is not None:
                resource.close()


def make_sampler(config: RlTrainConfig | DpoTrainConfig, chat: generation.Chat, work: Path) -> Sampler:
    """The sampler that the recipe names."""
    dtype = "float32" if config.phase.precision == "fp32" else "bfloat16"
    model_config = hf_config(config.model, chat.vocab_size, chat.end, chat.pad, dtype)
    context = SamplerContext(model_config, chat.stops, work / "served", config.phase.sampling)
    return sampler_registry.make_sampler(config.phase.sampling.kind, context)


def require_small_gap(name: str, step: int, gap: float, limit: float) -> None:
    """Raises CheckFailed if the log-probabilities of sampler and trainer differ by more than `limit` for equal
    weights."""
    if not gap <= limit:
        raise CheckFailed(
            f"{name}: sampler and trainer differ by {gap:.3g} in a token's log-probability at step {step}, more than "
            f"{name}.max_logprob_diff = {limit:g}; their weights or their arithmetic are not the same"
        )


class RolloutFiles:
    """The files of drawn answers of one phase, one for each wave: `<step>-<wave>.parquet`."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report

    def path(self, step: int, wave: int) -> Path:
        return self.folder / f"{step:06d}-{wave}.parquet"

    def all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.parquet") if re.fullmatch(r"\d+-\d+\.parquet", p.name))

    def load_or_draw(
        self, step: int, wave: int, digest: str, requests: Sequence[tuple[Row, int]], policy: Policy
    ) -> list[Rollout]:
        """The wave's answers with their rewards: read from disk if an earlier attempt drew them with this policy, else
        drawn. They are written when drawn and again when scored. requests: (task, seed)."""
        scored_path, drawn_path = self.path(step, wave), self.path(step, wave).with_suffix(".drawn")
        answers = self._read(scored_path, digest, requests)
        if answers is not None:
            return answers
        answers = self._read(drawn_path, digest, requests)
        if answers is None:
            completions = policy.draw(requests)
            answers = [
                Rollout(
                    step=step, wave=wave, group=0, sample=0, task=row["id"], kind=row["kind"], level=int(row["level"]),
                    policy=digest, seed=seed, prompt_ids=policy.chat.encode_prompt(row), ids=c.ids, logprobs=c.logprobs,
                    text=policy.chat.response(c).text, finished=c.finished, reward=0.0, parts={},
                    verifier=row["verifier"], verifier_version="", dropped="",
                )
                for (row, seed), c in zip(requests, completions, strict=True)
            ]  # fmt: skip
            rollouts.write(drawn_path, answers)
        completions = [Completion(tuple(r.ids), tuple(r.logprobs), r.finished) for r in answers]
        parts = policy.score([row for row, _ in requests], completions)
        versions = {} if policy.verifiers is None else {n: v.version for n, v in policy.verifiers.by_name.items()}
        answers = [
            replace(r, reward=p["reward"], parts=p, verifier_version=versions[r.verifier])
            for r, p in zip(answers, parts, strict=True)
        ]
        return answers

    def write(self, step: int, wave: int, answers: Sequence[Rollout]) -> None:
        rollouts.write(self.path(step, wave), answers)
        self.path(step, wave).with_suffix(".drawn").unlink(missing_ok=True)

    def remove_waves(self, step: int, wave: int) -> None:
        """Removes the waves of a step from `wave` on: an earlier attempt, with other arithmetic, needed more."""
        for path in self.folder.glob(f"{step:06d}-*"):
            if int(path.name.split("-")[1].split(".")[0]) >= wave:
                path.unlink()

    def _read(self, path: Path, digest: str, requests: Sequence[tuple[Row, int]]) -> list[Rollout] | None:
        if not path.exists():
            return None
        try:
            answers = rollouts.read(path)
        except (AtomError, TypeError, ValueError) as error:
            self.report.note(f"{path.name} is damaged ({error}); its answers are drawn again")
            return None
        requests_match = [(r.task, r.seed) for r in answers] == [(row["id"], seed) for row, seed in requests]
        if not requests_match or any(r.policy != digest for r in answers):
            self.report.note(f"{path.name} was drawn by another policy or for other tasks; its answers are drawn again")
            return None
        return answers


class PolicyTrainer(PostTrainer):
    """The loop of a phase that samples its policy: the sampler and verifiers, the answers on disk, and the validation
    items of the kinds in its tasks."""

    config: RlTrainConfig | DpoTrainConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.policy = Policy(self.config, self.inputs, self.engine, self.report, self.work)
        self.files = RolloutFiles(self.work / "rollouts", self.report)
        self.rows = tasks.read(self.inputs["tasks"])
        kinds, items = {row["kind"] for row in self.rows}, chat_rows(self.inputs["items"])
        self.validation = [row for row in items if row["split"] == "validation" and row["kind"] in kinds]

    def measure(self, step: int) -> dict[str, Any] | None:
        phase = self.config.phase
        if step % phase.validate_every and step != phase.steps:
            return None
        self.policy.load()
        accuracy = self.policy.validate(self.validation) if self.first and self.validation else {}
        if self.first:
            self.report.metric(step, **{f"validation_{kind}": value for kind, value in accuracy.items()})
        return {"validation": accuracy} if accuracy else None

    def close(self) -> None:
        self.policy.close()
