"""The post-training sections of a recipe: `rlvr`, `dpo`, `reward_model` and `online_rlhf`. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Key, LongLine, Mix, Range, Seed, Settings, Steps, Words
from pipeline.core.stage import Config, Promise, Renamed, operational
from stages.mcore.parallel_layout import Layout, problem
from stages.models.qwen3_moe.config import ModelConfig, PositiveInt, Precision
from stages.rl.rollout.curriculum import CurriculumConfig
from stages.rl.rollout.tasks import CODE, Tasks
from stages.train.config import BatchSizes, Kept, Optimizer, Patience, PhaseConfig, Validation

Prompts = Annotated[int, Range(1, 1e6)]
"""Of one step."""
Answers = Annotated[int, Range(1, 4096, "DeepSeek-R1: 16")]
"""To one prompt."""
Gap = Annotated[float, Range(0, 100, "nats; usual: 0.001 in one process, 0.05 with vLLM in bf16", above=True)]
Coefficient = Annotated[float, Range(0, 1000)]
Retries = Annotated[int, Range(0, 1000)]
Url = Annotated[str, Words(2000, "address; write it as in http://node1:8000", r"https?://[^\s/]+(/\S*)?")]
Verifiers = Annotated[dict[Key, Settings], Field(max_length=100)]


class Replay(Config):
    """Rows of earlier data in every step, so that it is not forgotten: their mean loss is added with a weight."""

    mix: Mix = Field(description="share of rows by source")
    rows: Annotated[int, Range(1, 1e6)] = Field(description="rows of one step")
    sequence_length: Context
    weight: Annotated[float, Range(0, 1000, above=True)] = Field(
        description="of their mean loss, beside a policy loss of weight 1"
    )


class Sampling(Config):
    """How answers are drawn: at temperature 1 and with nothing cut off, from the distribution that is learnt."""

    kind: Literal["in-process", "vllm"] = Field("in-process", description="who draws them")
    max_new_tokens: Context
    python: LongLine | None = operational(None, "the interpreter of vLLM's environment; null: ATOM_VLLM_PYTHON says it")
    url: tuple[Url, ...] = operational(
        (), "vLLM servers on nodes of their own; empty: the stage starts one", max_length=1000
    )
    options: tuple[LongLine, ...] = operational(
        (), "further options of the server that the stage starts, as vLLM has them", max_length=100
    )

    @property
    def promise(self) -> Promise:
        """Of a stage that draws so: vLLM adds in an order of its own."""
        return "bitwise" if self.kind == "in-process" else "numeric"


class PhaseBase(Config):
    """What every phase of post-training has in common."""

    steps: Steps = Field(description="updates of the policy")
    optimizer: Optimizer
    micro_batches: Annotated[int, Range(1, 1e6)] = Field(
        description="pieces of an update, dealt to data-parallel ranks"
    )
    precision: Precision = "fp32"
    release_checkpoint_interval: Annotated[Steps, Renamed("release_checkpoint_every")] = Field(
        description="steps between checkpoints that are sealed"
    )
    checkpoint_interval: Annotated[Steps, Renamed("work_checkpoint_every")] = operational(
        20, "steps between checkpoints that a killed run resumes from"
    )
    work_checkpoints_kept: Kept = operational(2, "work checkpoints that are kept, the newest ones")
    watchdog_timeout_seconds: Annotated[Patience, Renamed("hang_seconds")] = operational(
        1800.0, "a rank that finishes no step for this long is taken to hang"
    )
    parallelism: Annotated[Layout, Renamed("cluster")] = operational(
        Layout(), "how the phase is spread over processes; never part of the key"
    )

    @property
    def pack(self) -> bool:
        return False

    @property
    def fp8(self) -> bool:
        return self.precision not in ("fp32", "bf16")

    @property
    def all_updates(self) -> int:
        """Updates of the weights, which the optimizer's schedule counts."""
        return self.steps

    @model_validator(mode="after")
    def _short(self) -> PhaseBase:
        if self.optimizer.warmup_steps >= self.all_updates:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} leaves nothing of {self.all_updates} updates; "
                f"use at most {self.all_updates - 1}"
            )
        if self.parallelism.cp > 1:
            raise ValueError(
                f"parallelism.cp = {self.parallelism.cp} would cut answers apart, whose parts are weighed together; "
                "use 1"
            )
        return self


class RlPhase(PhaseBase):
    """Group-relative policy optimization (GRPO) against verifiers: DAPO's token-level loss and asymmetric clip, Dr.
    GRPO's advantages without division, no KL."""

    tasks: Tasks = Field(description="what is asked, and who judges the answers")
    prompts_per_step: Annotated[Prompts, Renamed("groups")] = Field(
        description="prompts of one step, whose answers differ in reward"
    )
    num_generations: Annotated[int, Range(2, 4096, "DeepSeek-R1: 16"), Renamed("samples")] = Field(
        description="answers to one prompt, GRPO's group size"
    )
    sampling: Sampling
    clip_low: Annotated[float, Range(0, 1, "PPO and DAPO: 0.2", above=True, below=True)] = Field(
        0.2, description="PPO's clip below 1; one update a step never reaches it"
    )
    clip_high: Annotated[float, Range(0, 100, "PPO: 0.2, DAPO: 0.28", above=True)] = Field(
        0.28, description="and above 1, where DAPO's is wider"
    )
    tis_cap: Annotated[float, Range(0, 1000, "usual: 2", above=True)] = Field(
        2.0, description="largest weight of a token by trainer and sampler"
    )
    max_resample_rounds: Annotated[Retries, Renamed("refills")] = Field(
        2, description="waves of further tasks in place of groups without signal (DAPO's dynamic sampling)"
    )
    curriculum: CurriculumConfig = CurriculumConfig()
    replay: Replay | None = None
    validate_every: Steps = Field(description="steps between measurements on the validation items")
    max_logprob_diff: Annotated[Gap, Renamed("logprob_gap")] = Field(
        1e-3, description="largest mean difference of a token's log-probability between sampler and trainer"
    )
    verifiers: Verifiers = operational({}, "settings of verifiers by name, such as a server's url")
    retries: Retries = operational(2, "times that a verifier that failed is retried before the phase stops")

    def replay_rows(self) -> PhaseConfig:
        """The replayed rows as those of a training phase, which is how their order is made and read."""
        assert self.replay is not None
        r = self.replay
        batch = BatchSizes(global_tokens=r.rows * r.sequence_length, micro_tokens=r.sequence_length)
        return PhaseConfig(
            mix=r.mix, sequence_length=r.sequence_length, batch=batch, steps=self.steps, optimizer=self.optimizer,
            validation=Validation(every=self.steps, rows=1), release_checkpoint_interval=self.steps,
        )  # fmt: skip


class PromptPool(Config):
    """Tasks of which some are asked in every round."""

    tasks: Tasks
    count: Prompts = Field(description="tasks of one round")
    num_generations: Annotated[Answers, Renamed("samples")] = Field(description="answers to each")


class DpoPhase(PhaseBase):
    """Rounds of learning from pairs: the policy answers, a judge scores, and of each question's answers the best is
    preferred to the worst by length-normalized DPO (Tulu 3, arXiv 2411.15124), whose reference is the policy that drew
    them. `steps` are the rounds; the optimizer's steps are updates, `updates` to a round."""

    preferences: PromptPool = Field(description="what is asked, and who judges the answers")
    sft_tasks: Annotated[PromptPool | None, Renamed("skills")] = Field(
        None, description="verified tasks, whose right answers are an anchor"
    )
    sampling: Sampling
    updates: Annotated[int, Range(1, 1e6)] = Field(description="updates of one round; its pairs are spread over them")
    beta: Annotated[float, Range(0, 1000, "DPO: 0.1, normalized by length as in Tulu 3: 5", above=True)] = Field(
        description="how strongly a pair's margin is pulled apart"
    )
    max_logprob_diff: Annotated[Gap, Renamed("logprob_gap")] = Field(
        1e-3, description="largest mean difference of a token's log-probability between sampler and trainer"
    )
    min_margin: Annotated[Coefficient, Renamed("least_margin")] = Field(
        0.05, description="difference of the judge's scores below which there is no pair"
    )
    nll_coef: Annotated[Coefficient, Renamed("anchor")] = Field(
        1.0, description="NLL coefficient: weight of the mean loss of right answers, beside a pair's loss of 1"
    )
    validate_every: Steps = Field(description="rounds between measurements on the validation items")
    verifiers: Verifiers = operational({}, "settings of verifiers by name, such as a server's url")
    retries: Retries = operational(2, "times that a verifier that failed is retried before the phase stops")

    @property
    def all_updates(self) -> int:
        return self.steps * self.updates


class RewardPhase(PhaseBase):
    """A reward model from the pairs: the probability that `<|endoftext|>` follows an answer is its reward, trained by
    the Bradley-Terry loss. It keeps the policy's architecture, so every runtime that loads the model loads it too."""

    pairs: Prompts = Field(description="pairs of one update")
    heldout_fraction: Annotated[float, Range(0, 1, above=True, below=True), Renamed("heldout")] = Field(
        0.2, description="share of questions, by hash, whose pairs are not learnt from"
    )
    heldout_pairs: Prompts = Field(400, description="of these at most so many are measured on")
    validate_every: Steps = Field(description="updates between measurements on the held-out pairs")


class PostConfig(Config):
    """What a stage of post-training is given: the recipe's sections, resolved."""

    model: ModelConfig
    phase: Any
    padded_vocab_size: PositiveInt
    seed: Seed

    @model_validator(mode="after")
    def _possible(self) -> PostConfig:
        wrong = problem(self.phase.parallelism, self.model, self.padded_vocab_size, [self.phase.micro_batches])
        if wrong:
            raise ValueError(wrong)
        sampling = getattr(self.phase, "sampling", None)
        if sampling and sampling.max_new_tokens >= self.model.context_length:
            raise ValueError(
                f"sampling.max_new_tokens = {sampling.max_new_tokens} leaves no room for a question in "
                f"model.context_length = {self.model.context_length}"
            )
        return self


def obstacle(phase: RlPhase | DpoPhase) -> str | None:
    """Why answers cannot be drawn here as the recipe says, or what would run code of the model's has no sandbox."""
    from stages.rl import sandbox
    from stages.rl.samplers import vllm_server

    sources = phase.tasks if isinstance(phase, RlPhase) else phase.preferences.tasks
    if isinstance(phase, DpoPhase) and phase.sft_tasks is not None:
        sources += phase.sft_tasks.tasks
    if any(getattr(source, "verifier", "") == CODE for source in sources) and (lack := sandbox.missing()):
        return f"tasks of the verifier {CODE} run what the model writes: {lack}"
    return vllm_server.obstacle(phase.sampling)


class RlTrainConfig(PostConfig):
    name: Literal["rlvr", "online-rlhf"] = "rlvr"
    phase: RlPhase


class DpoTrainConfig(PostConfig):
    phase: DpoPhase


class RewardTrainConfig(PostConfig):
    phase: RewardPhase
