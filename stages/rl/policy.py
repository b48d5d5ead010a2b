"""The policy in training on rank 0: draws answers, verifies them, and stores them on disk.

The answers of a step are on disk before an update uses them, with the digest of the policy that drew them. A replay
draws and scores nothing: it reads the published answers, in the order in which the phase consumed them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.stage import Inputs, Report
from pipeline.core.store import Artifact, sha256_file
from stages.formats.seeds import seed_label, seed_of
from stages.formats.table import require_columns
from stages.generation import weights
from stages.generation.protocols import Completion, Sampler, SamplerContext
from stages.generation.samplers import SAMPLERS, make_sampler
from stages.mcore.hf_mapping import hf_config
from stages.rl.config import DpoTrainConfig, RlPhase, RlTrainConfig
from stages.rl.protocols import Parts, make_verifiers
from stages.rl.rollout import generation, rollouts, tasks
from stages.rl.rollout.generation import Chat
from stages.rl.rollout.rollouts import Rollout
from stages.tasks import Row
from stages.tasks.eval_set import chat_rows
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.engine import Engine
from stages.train.trainer import Trainer


class PostTrainer(Trainer):
    """The loop of post-training: each step returns its metrics, and the algorithm has a state of its own.

    The inputs are `init`, the previous phase, whose last weights are loaded, and `tokenizer`.
    """

    rng = "not used: every answer has a seed of its own, which follows from the recipe's"

    @staticmethod
    def vocab_size(inputs: Inputs) -> int:
        return Chat(inputs["tokenizer"]).vocab_size

    def last_checkpoint(self, role: str) -> Origin:
        """Returns the last checkpoint of an input, which must be of the same tokenizer.

        Raises:
            AtomError: It was trained on another tokenizer's tokens, which it states if its phase read text: neither
                a policy nor its reference or teacher could read this one's.
        """
        origin = super().last_checkpoint(role)
        saved = release_checkpoint.load_state(origin.artifact / origin.subfolder).get("tokenizer")
        if saved and saved != sha256_file(self.inputs["tokenizer"] / "tokenizer.json"):
            name = origin.artifact.key
            name = f"policy {name} and reference of the phase" if role == "init" else f"{role} {name}"
            raise AtomError(
                f"{self.name}: the {name} was trained on another tokenizer's tokens; begin with one of this recipe's "
                "tokenizer"
            )
        return origin

    @abstractmethod
    def train_step(self, step: int) -> dict[str, Any]:
        """Takes a step; returns its metrics for the log."""

    def algorithm_state(self) -> dict[str, Any]:
        """Returns the algorithm's part of a checkpoint, as JSON."""
        return {}

    def restore_algorithm(self, state: dict[str, Any]) -> None:
        """Restores the algorithm from `algorithm_state`."""

    def step(self, step: int) -> int:
        self.log_step(step, self.train_step(step))
        return step

    def state(self, step: int) -> dict[str, Any]:
        return {"rl": self.algorithm_state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.restore_algorithm(state["rl"])


class Policy:
    """A sampler with the engine's weights, its chat template and its verifiers.

    Only rank 0 calls methods other than `load`. With inputs["rollouts"] there are no sampler and no verifiers.
    """

    def __init__(
        self, config: RlTrainConfig | DpoTrainConfig, inputs: Inputs, engine: Engine, report: Report, work: Path
    ) -> None:
        """Makes the sampler and the verifiers on rank 0. The files of a sampler are in the work folder `work`."""
        self.config, self.engine, self.report = config, engine, report
        sampling, draws = config.phase.sampling, "rollouts" not in inputs
        self.broadcast: weights.Broadcast | None = None
        # The folder in which the weights go to a sampler that cannot read this process's tensors.
        self.folder: Path | None = None
        if draws and sampling.transfer == "broadcast":
            # Every rank has one, since its `load` is collective.
            self.broadcast = weights.Broadcast(self._tensors, engine.ranks)
        # A sampler in this process reads the tensors directly only if this rank holds all of them.
        elif draws and (SAMPLERS[sampling.kind].apart or engine.ranks.world > 1):
            self.folder = work / "served"

        tools = config.phase.tools if isinstance(config.phase, RlPhase) else None
        self.chat = generation.Chat(inputs["tokenizer"], tools)
        # Bounds of an answer in turns; None without tools.
        self.limits: generation.Limits | None = None
        if tools is not None:
            self.limits = generation.Limits(tools.max_turns, sampling.max_new_tokens, config.model.context_length)
        self.toolbox: generation.Toolbox | None = None
        self.sampler: Sampler | None = None
        self.verifiers: generation.Verifiers | None = None
        if engine.ranks.first and draws:
            dtype = "float32" if config.phase.precision == "fp32" else "bfloat16"
            model_config = hf_config(config.model, self.chat.vocab_size, self.chat.end, self.chat.pad, dtype)
            context = SamplerContext(model_config, self.chat.stops, work / "served", sampling, report.note)
            self.sampler = make_sampler(sampling.kind, context)
            # Validation items are answered too, so their questions must fit and their verifiers must work.
            rows = [*tasks.read(inputs["tasks"]), *chat_rows(inputs["items"])]
            self._require_context(rows)
            verifiers = make_verifiers(rows, inputs, self.chat, config.phase.verifiers)
            self.verifiers = generation.Verifiers(verifiers, report.note)
            if tools is not None:
                self.toolbox = generation.Toolbox(tools)

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
        """Hands the engine's weights to the sampler. Returns the policy's digest, on every rank. Collective."""
        if self.broadcast is not None:
            return self.broadcast.load(self.sampler)
        if self.folder is None:
            digest = weights.digest_of(self._tensors(), self.engine.ranks)
            if self.sampler is not None:
                self.sampler.load(weights.Weights(digest, dict(self._tensors())))
        else:
            digest, place = weights.write(self._tensors(), self.engine.ranks, self.folder)
            if self.sampler is not None:
                self.sampler.load(weights.Weights(digest, release_checkpoint.Tensors(place), place))
            if self.engine.ranks.first:
                # Only now: until it has loaded the new weights, a sampler may read the files of the earlier ones.
                weights.remove_earlier(place)
        return digest

    def _tensors(self, by_turns: bool = True) -> weights.Tensors:
        return weights.hf_tensors(self.engine.full_tensors(by_turns), self.config.model, self.chat.vocab_size)

    def draw(self, requests: Sequence[tuple[Row, int]], greedy: bool = False) -> list[Completion]:
        assert self.sampler is not None, "rank 0 draws"
        if self.limits is None or self.toolbox is None:
            return generation.draw(self.sampler, self.chat, requests, greedy)
        return generation.draw_turns(self.sampler, self.chat, self.toolbox, self.limits, requests, greedy)

    def score(self, rows: Sequence[Row], completions: Sequence[Completion]) -> list[Parts]:
        assert self.verifiers is not None, "rank 0 scores"
        pairs = [(row, self.chat.response(completion)) for row, completion in zip(rows, completions, strict=True)]
        return self.verifiers.score(pairs)

    def validate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns the mean reward of greedy answers by kind of task."""
        # Greedy answers depend on no seed.
        completions = self.draw([(row, 0) for row in rows], greedy=True)
        scores = zip(rows, self.score(rows, completions), strict=True)
        return rollouts.mean_rewards((row["kind"], parts["reward"]) for row, parts in scores)

    def close(self) -> None:
        # The broadcast first: servers that still wait for its ranks are then freed.
        for resource in (self.broadcast, self.sampler, self.verifiers, self.toolbox):
            if resource is not None:
                resource.close()


class RolloutFiles:
    """The files of drawn answers of one phase, one for each wave: `<step>-<wave>.parquet`."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report

    def path(self, step: int, wave: int) -> Path:
        return self.folder / f"{step:06d}-{wave}.parquet"

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def remove_after(self, step: int) -> None:
        """Removes the files of the steps after this one."""
        for path in self.all():
            if int(path.name.split("-")[0]) > step:
                path.unlink()

    def load_or_draw(
        self, step: int, wave: int, digest: str, requests: Sequence[tuple[Row, int]], policy: Policy
    ) -> list[Rollout]:
        """Returns the wave's answers with their rewards.

        They are read from disk if an earlier attempt drew them with this policy, else drawn and scored. The caller
        writes them, once it knows which are dropped.

        Args:
            step: Number of the step.
            wave: Number of the wave in its step.
            digest: Digest of the policy.
            requests: (task, seed) of each answer.
            policy: The policy, which draws and scores.
        """
        answers = self._read(self.path(step, wave), digest, requests)
        if answers is not None:
            return answers
        drawn = [
            unscored(step, wave, digest, row, seed, policy.chat, completion)
            for (row, seed), completion in zip(requests, policy.draw(requests), strict=True)
        ]
        return scored([row for row, _ in requests], drawn, policy)

    def write(self, step: int, wave: int, answers: Sequence[Rollout]) -> None:
        rollouts.write(self.path(step, wave), answers)

    def finish_step(self, step: int, waves: int) -> None:
        """Removes the waves of a step beyond this number: an earlier attempt, with other arithmetic, needed more."""
        for path in self.folder.glob(f"{step:06d}-*"):
            if int(path.name.split("-")[1].split(".")[0]) >= waves:
                path.unlink()

    def _read(self, path: Path, digest: str, requests: Sequence[tuple[Row, int]]) -> list[Rollout] | None:
        """Returns the answers; None if the file is missing, damaged or of others than the requests."""
        if not path.exists():
            return None
        try:
            answers = rollouts.read(path)
        except (AtomError, TypeError, ValueError) as error:
            self.report.note(f"{path.name} is damaged ({error}); its answers are drawn again")
            return None
        # A file of an earlier attempt counts only if this policy drew it for the same tasks: after a change of
        # arithmetic it may not have.
        requests_match = [(r.task, r.seed) for r in answers] == [(row["id"], seed) for row, seed in requests]
        if not requests_match or any(r.policy != digest for r in answers):
            self.report.note(f"{path.name} was drawn by another policy or for other tasks; its answers are drawn again")
            return None
        return answers


def unscored(
    step: int, wave: int, digest: str, row: Row, seed: int, chat: generation.Chat, completion: Completion
) -> Rollout:
    """Returns an answer of a policy as it is drawn: without group, sample, reward and reason to drop it."""
    return Rollout(
        step=step,
        wave=wave,
        group=0,
        sample=0,
        task=row["id"],
        kind=row["kind"],
        level=int(row["level"]),
        policy=digest,
        seed=seed,
        prompt_ids=list(chat.encode_prompt(row)),
        ids=list(completion.ids),
        logprobs=list(completion.logprobs),
        text=chat.response(completion).text,
        finished=completion.finished,
        reward=0.0,
        parts={},
        verifier=row["verifier"],
        verifier_version="",
        dropped="",
        turns=None if completion.turns is None else list(completion.turns),
    )


def scored(rows: Sequence[Row], answers: Sequence[Rollout], policy: Policy) -> list[Rollout]:
    """Returns the answers with their rewards.

    Args:
        rows: The task of each answer.
        answers: The answers, as they were drawn.
        policy: The policy, whose verifiers score.
    """
    parts = policy.score(rows, [completion_of(r) for r in answers])
    versions = {} if policy.verifiers is None else {n: v.version for n, v in policy.verifiers.by_name.items()}
    return [
        replace(r, reward=p["reward"], parts=p, verifier_version=versions[r.verifier])
        for r, p in zip(answers, parts, strict=True)
    ]


def completion_of(r: Rollout) -> Completion:
    """Returns the completion that an answer records."""
    turns_of_answer = None if r.turns is None else tuple(r.turns)
    return Completion(tuple(r.ids), tuple(r.logprobs), r.finished, turns=turns_of_answer)


class RecordedRollouts(RolloutFiles):
    """The rollouts.parquet of an earlier run, from which a replay reads the answers that a step consumed, in order.

    The file comes from others. An answer is used if the phase asked for it at this place (task and seed, which follow
    from the recipe and from all rewards before), and if its other columns follow from its task, tokens and rewards.
    """

    def __init__(
        self,
        artifact: Artifact,
        report: Report,
        asynchronous: bool = False,
        tools: bool = False,
    ) -> None:
        """Opens the file.

        Args:
            artifact: Artifact with rollouts.parquet.
            report: Report of the stage.
            asynchronous: True for an asynchronous phase.
            tools: True for a phase with tools.

        Raises:
            AtomError: The file is damaged, or has other columns than this version writes.
        """
        super().__init__(artifact.path, report)
        self.file, self.step = artifact / "rollouts.parquet", 0
        # The answers of `step`, the latest one that was asked for; step 0 has none.
        self.answers: list[Rollout] = []
        require_columns(self.file, rollouts.schema(asynchronous, tools))

    def load_or_draw(
        self, step: int, wave: int, digest: str, requests: Sequence[tuple[Row, int]], policy: Policy
    ) -> list[Rollout]:
        """Returns the wave's answers.

        Raises:
            CheckFailed: They are not those that the phase asks for, or another policy than this one drew those of the
                first step.
        """
        # Asked before `open`, which sets the step.
        is_first = not self.step
        self.open(step)
        recorded = self._wave(wave)
        self.check(wave, recorded, requests, policy)
        for number, answer in enumerate(recorded):
            # Only of the first step that is read: on another machine, later policies have other digests.
            if is_first and answer.policy != digest:
                raise self.altered(
                    wave, number, f"was drawn by the policy {answer.policy}, and the checkpoint is {digest}"
                )
        return self.restore(wave, recorded, requests, policy)

    def open(self, step: int) -> None:
        """Reads the answers of a step."""
        if step != self.step:
            self.step, self.answers = step, self._read_step(step)

    def check(
        self,
        wave: int,
        recorded: Sequence[Rollout],
        requests: Sequence[tuple[Row, int]],
        policy: Policy,
        start: int = 0,
    ) -> None:
        """Raises CheckFailed if the recorded answers are not those that the phase asks for.

        The first of them has the number `start` in its wave.
        """
        # To the end of the longer one: a missing answer and one too many are both findings.
        for number, (answer, request) in enumerate(zip_longest(recorded, requests), start):
            requested = "none" if request is None else f"one to {request[0]['id']} with seed {request[1]}"
            recorded_answer = "is missing" if answer is None else f"is one to {answer.task} with seed {answer.seed}"
            if recorded_answer != f"is {requested}":
                raise self.altered(wave, number, f"{recorded_answer}, and the phase asked for {requested}")
            if not is_answer(answer, policy.chat.vocab_size):
                raise self.altered(wave, number, "has tokens, log-probabilities or a reward that no answer has")
            if problem := generation.problem_of_turns(answer, policy.chat, request[0], policy.limits):
                raise self.altered(wave, number, problem)

    def restore(
        self, wave: int, recorded: Sequence[Rollout], requests: Sequence[tuple[Row, int]], policy: Policy
    ) -> list[Rollout]:
        """Returns the recorded answers, of whose columns those are computed anew that follow from others."""
        return [
            replace(
                unscored(self.step, wave, r.policy, row, seed, policy.chat, completion_of(r)),
                reward=r.reward,
                parts=r.parts,
                verifier_version=r.verifier_version,
            )
            for (row, seed), r in zip(requests, recorded, strict=True)
        ]

    def write(self, step: int, wave: int, answers: Sequence[Rollout]) -> None:
        """Compares the answers with the recorded ones. Raises CheckFailed with the first column that differs."""
        for number, (answer, recorded) in enumerate(zip(answers, self._wave(wave), strict=True)):
            for column in (name for name in vars(answer) if getattr(answer, name) != getattr(recorded, name)):
                raise self.altered(
                    wave, number, f"has another `{column}` than follows from its task, tokens and rewards"
                )

    def finish_step(self, step: int, waves: int) -> None:
        """Raises CheckFailed if more waves of the step are recorded than were consumed."""
        if unused := [r.wave for r in self.answers if r.wave not in range(waves)]:
            raise self.altered(unused[0], 0, "was used by no update and dropped for no reason")

    def _wave(self, wave: int) -> list[Rollout]:
        return [r for r in self.answers if r.wave == wave]

    def _read_step(self, step: int) -> list[Rollout]:
        try:
            return rollouts.read(self.file, step)
        except (TypeError, ValueError) as error:  # of `parts`
            raise CheckFailed(f"{self.file} has no answers of step {step} ({type(error).__name__}: {error})") from None

    def altered(self, wave: int, number: int, finding: str) -> CheckFailed:
        """Returns the error for an answer of `step` that is not what the phase asks for."""
        return CheckFailed(
            f"{self.file.name}: answer {number} in step {self.step}, wave {wave} {finding}; answers or the settings of "
            "the phase were changed"
        )


def is_answer(r: Rollout, vocab_size: int) -> bool:
    """Returns True if values from a file can be an answer.

    Its tokens are of the vocabulary, with a finite log-probability each, and its reward is the total of its parts.
    """
    try:
        numbers = math.isfinite(r.reward) and all(map(math.isfinite, r.logprobs)) and r.parts["reward"] == r.reward
        return numbers and len(r.logprobs) == len(r.ids) and all(0 <= token < vocab_size for token in r.ids)
    except (TypeError, KeyError):  # a value is missing
        return False


class PolicyTrainer(PostTrainer):
    """The loop of a phase that samples its policy.

    It has the sampler and verifiers, the answers on disk, and the validation items of the kinds in its tasks. With
    inputs["rollouts"], the answers of an earlier run, it samples nothing.
    """

    config: RlTrainConfig | DpoTrainConfig

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.policy = Policy(self.config, self.inputs, self.engine, self.report, self.work)
        self.rows = tasks.read(self.inputs["tasks"])
        kinds, items = {row["kind"] for row in self.rows}, []
        if "rollouts" in self.inputs:
            # A replay draws nothing, so it validates nothing and needs no items.
            self.files: RolloutFiles = RecordedRollouts(
                self.inputs["rollouts"],
                self.report,
                self.config.phase.is_asynchronous,
                self.policy.limits is not None,
            )
        else:
            self.files, items = RolloutFiles(self.work / "rollouts", self.report), chat_rows(self.inputs["items"])
        self.validation = [row for row in items if row["split"] == "validation" and row["kind"] in kinds]

    def requests(self, rows: Sequence[Row], samples: int, label: str) -> list[tuple[Row, int]]:
        """Returns (task, seed) of each answer to tasks, `samples` to each. The seeds follow from the label."""
        return [
            (row, seed_of(f"{seed_label(self.name)}/answer/{label}/{group}/{sample}", self.config.seed))
            for group, row in enumerate(rows)
            for sample in range(samples)
        ]

    def reward_summary(self) -> dict[str, Any]:
        """Returns the first and last mean reward of the log, and all validations."""
        lines = self.log.lines()
        rewards = [line["reward"] for line in lines if "reward" in line]
        validations = [{"step": line["step"], **line["validation"]} for line in lines if "validation" in line]
        return {"reward": {"first": rewards[0], "last": rewards[-1]}, "validation": validations}

    def measure(self, step: int) -> dict[str, Any] | None:
        phase = self.config.phase
        if not self.validation or (step % phase.validate_every and step != phase.steps):
            return None
        # On every rank, since loading is collective; rank 0 alone draws.
        self.policy.load()
        accuracy = self.policy.validate(self.validation) if self.first else {}
        if self.first:
            self.report.metric(step, **{f"validation_{kind}": value for kind, value in accuracy.items()})
        return {"validation": accuracy} if accuracy else None

    def require_small_gap(self, step: int, gap: float, digest: str, answers: Sequence[Rollout]) -> None:
        """Raises CheckFailed if sampler and trainer differ by more than the recipe allows for equal weights.

        Args:
            step: The step.
            gap: Mean difference of their log-probabilities.
            digest: Digest of the trainer's policy.
            answers: All answers of the step.
        """
        # On another machine, a replay does not keep the digest of the policy equal, and the gap says nothing then.
        limit = self.config.phase.max_logprob_diff
        drew = {span["policy"] for r in answers for span in r.versions or ()} | {r.policy for r in answers}
        # Not `gap > limit`, which is False for NaN.
        if not gap <= limit and drew == {digest}:
            raise CheckFailed(
                f"{self.name}: sampler and trainer differ by {gap:.3g} in a token's log-probability at step {step}, "
                f"more than {self.name}.max_logprob_diff = {limit:g}; their weights or their arithmetic are not the "
                "same"
            )

    def close(self) -> None:
        self.policy.close()
