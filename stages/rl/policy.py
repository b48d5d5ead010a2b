"""The policy that is trained, as rank 0 holds it: it draws answers, has them verified, and keeps them on disk.

What a step drew is on disk before anything is learnt from it, with the digest of the policy that drew it.
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
from stages.models.qwen3_moe import hf
from stages.rl.protocols import Completion, Parts, Row, Sampler
from stages.rl.rewards.reward_functions import verifiers_of
from stages.rl.rollout import generation, rollouts, tasks
from stages.rl.rollout.rollouts import Rollout
from stages.rl.samplers.generate import InProcess
from stages.rl.trainer import Trainer
from stages.train.engine import Engine


class Policy:
    """The engine's weights in a sampler's hands, with the chat template and the verifiers around it. Rank 0 alone calls
    all but `load`."""

    def __init__(self, config: Any, inputs: Inputs, engine: Engine, report: Report, work: Path) -> None:
        """work: the stage's, for what a sampler keeps on disk."""
        self.config, self.engine, self.report = config, engine, report
        self.chat = generation.Chat(inputs["tokenizer"])
        self.sampler: Sampler | None = None
        self.verifiers: generation.Verifiers | None = None
        if engine.ranks.first:
            self.sampler = sampler_of(config, self.chat, work)
            rows = [*tasks.read(inputs["tasks"]), *chat_rows(inputs["items"])]
            self._require_room(rows)
            made_verifiers = verifiers_of(rows, inputs, self.chat, config.phase.verifiers)
            self.verifiers = generation.Verifiers(made_verifiers, config.phase.retries, report)

    def _require_room(self, rows: Sequence[Row]) -> None:
        """Raises RecipeError for a question that leaves no room for an answer in the model's context."""
        length = self.config.model.context_length - self.config.phase.sampling.max_new_tokens
        for row in rows:
            if (tokens := len(self.chat.ask(row))) > length:
                raise RecipeError(
                    f"task {row['id']} has {tokens} tokens, and sampling.max_new_tokens = "
                    f"{self.config.phase.sampling.max_new_tokens} of model.context_length = "
                    f"{self.config.model.context_length} leave {length}; leave it out, or allow shorter answers"
                )

    def load(self) -> str:
        """Brings the sampler up to the engine's weights. Returns the policy's digest. Collective."""
        found = self.engine.weights()
        if not self.engine.ranks.first:
            return ""
        tensors = hf.to_hf(found, self.config.model, self.chat.vocab_size)
        self._sampler.load(tensors)
        return rollouts.digest(tensors)

    @property
    def _sampler(self) -> Sampler:
        assert self.sampler is not None, "rank 0 draws"
        return self.sampler

    def draw(self, asked: Sequence[tuple[Row, int]], greedy: bool = False) -> list[Completion]:
        return generation.draw(self._sampler, self.chat, asked, greedy)

    def score(self, asked: Sequence[Row], found: Sequence[Completion]) -> list[Parts]:
        assert self.verifiers is not None, "rank 0 scores"
        pairs = [(row, self.chat.response(each)) for row, each in zip(asked, found, strict=True)]
        return self.verifiers.score(pairs)

    def validate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Mean reward of greedy answers by kind of task."""
        found = self.draw([(row, 0) for row in rows], greedy=True)
        return generation.accuracy(list(zip(rows, self.score(rows, found), strict=True)))

    def close(self) -> None:
        for each in (self.sampler, self.verifiers):
            if each is not None:
                each.close()


def sampler_of(config: Any, chat: generation.Chat, work: Path) -> Sampler:
    """The sampler that the recipe asks for. vLLM computes as the trainer does: in fp32, or else in bf16."""
    sampling, in_process = config.phase.sampling, config.phase.sampling.kind == "in-process"
    dtype = "float32" if in_process or config.phase.precision == "fp32" else "bfloat16"
    made = hf.hf_config(config.model, chat.vocab_size, chat.end, chat.pad, dtype)
    common = (made, chat.stops, sampling.max_new_tokens, 1.0)
    if in_process:
        return InProcess(*common)
    from stages.rl.samplers.vllm_sampler import VllmServer

    return VllmServer(*common, work / "served", sampling.python, sampling.url, sampling.options)


def require_small_gap(name: str, step: int, gap: float, most: float) -> None:
    """Raises CheckFailed if sampler and trainer, of equal weights, give a token too different log-probabilities."""
    if not gap <= most:
        raise CheckFailed(
            f"{name}: sampler and trainer differ by {gap:.3g} in a token's log-probability at step {step}, more than "
            f"{name}.max_logprob_diff = {most:g}; their weights or their arithmetic are not the same"
        )


class Answers:
    """The files of drawn answers of one phase, a wave each: `<step>-<wave>.parquet`."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report

    def path(self, step: int, wave: int) -> Path:
        return self.folder / f"{step:06d}-{wave}.parquet"

    def all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.parquet") if re.fullmatch(r"\d+-\d+\.parquet", p.name))

    def once(
        self, step: int, wave: int, digest: str, asked: Sequence[tuple[Row, int]], policy: Policy
    ) -> list[Rollout]:
        """The wave's answers with their rewards: as they were found if an earlier attempt drew them with this very
        policy, or drawn now. They are written once when drawn and again when scored."""
        scored, drawn = self.path(step, wave), self.path(step, wave).with_suffix(".drawn")
        found = self._read(scored, digest, asked)
        if found is not None:
            return found
        found = self._read(drawn, digest, asked)
        if found is None:
            completions = policy.draw(asked)
            found = [
                Rollout(
                    step=step, wave=wave, group=0, sample=0, task=row["id"], kind=row["kind"], level=int(row["level"]),
                    policy=digest, seed=seed, prompt_ids=policy.chat.ask(row), ids=c.ids, logprobs=c.logprobs,
                    text=policy.chat.response(c).text, finished=c.finished, reward=0.0, parts={},
                    verifier=row["verifier"], verifier_version="", dropped="",
                )
                for (row, seed), c in zip(asked, completions, strict=True)
            ]  # fmt: skip
            rollouts.write(drawn, found)
        completions = [Completion(tuple(r.ids), tuple(r.logprobs), r.finished) for r in found]
        parts = policy.score([row for row, _ in asked], completions)
        versions = {} if policy.verifiers is None else {n: v.version for n, v in policy.verifiers.made.items()}
        found = [
            replace(r, reward=p["reward"], parts=p, verifier_version=versions[r.verifier])
            for r, p in zip(found, parts, strict=True)
        ]
        return found

    def keep(self, step: int, wave: int, found: Sequence[Rollout]) -> None:
        rollouts.write(self.path(step, wave), found)
        self.path(step, wave).with_suffix(".drawn").unlink(missing_ok=True)

    def forget(self, step: int, wave: int) -> None:
        """Removes the waves of a step from `wave` on: another attempt, whose arithmetic differed, needed more."""
        for path in self.folder.glob(f"{step:06d}-*"):
            if int(path.name.split("-")[1].split(".")[0]) >= wave:
                path.unlink()

    def _read(self, path: Path, digest: str, asked: Sequence[tuple[Row, int]]) -> list[Rollout] | None:
        if not path.exists():
            return None
        try:
            found = rollouts.read(path)
        except (AtomError, TypeError, ValueError) as error:
            self.report.note(f"{path.name} is damaged ({error}); its answers are drawn again")
            return None
        same = [(r.task, r.seed) for r in found] == [(row["id"], seed) for row, seed in asked]
        if not same or any(r.policy != digest for r in found):
            self.report.note(f"{path.name} was drawn by another policy or for other tasks; its answers are drawn again")
            return None
        return found


class PolicyTrainer(Trainer):
    """The loop of a phase whose policy is asked: its sampler and verifiers, the answers on disk, and the validation
    items of the kinds that it is trained on."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.policy = Policy(self.config, self.inputs, self.engine, self.report, self.work)
        self.files = Answers(self.work / "rollouts", self.report)
        self.rows = tasks.read(self.inputs["tasks"])
        kinds, items = {row["kind"] for row in self.rows}, chat_rows(self.inputs["items"])
        self.validation = [row for row in items if row["split"] == "validation" and row["kind"] in kinds]

    def measure(self, step: int) -> dict[str, Any] | None:
        if step % self.phase.validate_every and step != self.phase.steps:
            return None
        self.policy.load()
        found = self.policy.validate(self.validation) if self.first and self.validation else {}
        if self.first:
            self.report.metric(step, **{f"validation_{kind}": value for kind, value in found.items()})
        return {"validation": found} if found else None

    def close(self) -> None:
        self.policy.close()
