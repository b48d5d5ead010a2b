"""The post-training sections of a recipe: `rlvr`, `dpo`, `reward_model` and `online_rlhf`. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Key, LongLine, Mix, PositiveShare, Range, Settings, Steps, Words
from pipeline.core.stage import Config, Promise, added, operational
from stages.generation.samplers import SAMPLERS
from stages.mcore.layout_check import problem
from stages.mcore.optimizer import Optimizer
from stages.models.registry import Model
from stages.rl import protocols as reward_registry
from stages.rl.algorithms import policy_gradient
from stages.rl.rollout.pass_rates import PassRateFilter
from stages.rl.rollout.tasks import Tasks, kinds_of
from stages.rl.tools.settings import Tools
from stages.train.config import BatchSizes, PhaseBase, PhaseConfig, TrainerConfig, Validation

# Prompts of one step.
Prompts = Annotated[int, Range(1, 1e6)]
# Answers to one prompt.
Answers = Annotated[int, Range(1, 4096, "DeepSeek-R1: 16")]
Gap = Annotated[float, Range(0, 1, "nats; usual: 0.001 in one process, 0.05 with vLLM in bf16", above=True)]
Coefficient = Annotated[float, Range(0, 1000)]
Updates = Annotated[int, Range(1, 1e6)]
ClipLow = Annotated[float, Range(0, 1, "PPO and DAPO: 0.2, GSPO: 3e-4", above=True, below=True)]
ClipHigh = Annotated[float, Range(0, 100, "PPO: 0.2, DAPO: 0.28, GSPO: 4e-4", above=True)]
KlCoefficient = Annotated[float, Range(0, 1000, "DeepSeekMath: 0.04, DeepSeek-R1: 0.001", above=True)]
Retries = Annotated[int, Range(0, 1000)]
Staleness = Annotated[int, Range(1, 1000, "usual: 1 to 8")]
SizeExponent = Annotated[float, Range(0, 1, "1: in proportion to size; XLM-R and mT5, for languages: 0.3")]
Url = Annotated[str, Words(2000, "address; write it as in http://node1:8000", r"https?://[^\s/]+(/\S*)?")]
Verifiers = Annotated[dict[Key, Settings], Field(max_length=100)]

if TYPE_CHECKING:
    # A type checker cannot read a Literal that is made at run time.
    SamplerName = str
    AlgorithmName = str
else:
    SamplerName, AlgorithmName = Literal[tuple(SAMPLERS)], Literal[tuple(policy_gradient.ALGORITHMS)]


class Replay(Config):
    """Replay of earlier training data in every step, against forgetting: its mean loss is added with a weight."""

    mix: Mix
    """share of rows by source"""
    rows: Annotated[int, Range(1, 1e6)]
    """replayed rows in each step"""
    sequence_length: Context
    """tokens predicted in one row"""
    weight: Annotated[float, Range(0, 1000, above=True)]
    """weight of the mean loss of the rows; the policy loss has weight 1"""


class Asynchronous(Config):
    """Generation of answers while the policy is updated.

    Groups of answers wait in a bounded queue, and a step takes the finished ones.
    """

    max_staleness: Staleness = 1
    """maximum age, in steps, of the policy that generated a token when a step takes it"""
    queue_groups: Prompts | None = None
    """maximum number of groups, finished or in flight; null: max_staleness times prompts_per_step"""


# Settings that only vLLM servers read; other samplers refuse them.
_OF_VLLM = ("url", "secret", "options", "transfer")


class Sampling(Config):
    """Sampling of answers at temperature 1 without top-k or top-p: from the distribution that is trained."""

    kind: SamplerName = "in-process"
    """sampler of stages/generation; vllm alone is not bitwise reproducible"""
    max_new_tokens: Context
    """maximum number of tokens of an answer"""
    url: tuple[Url, ...] = operational((), max_length=1000)
    """URLs of vLLM servers on other nodes; empty: those of slurm.servers, else one that the stage starts"""
    secret: LongLine | None = operational(None)
    """file with the secret of the servers of url, the same that they were started with"""
    transfer: Literal["folder", "broadcast"] = operational("folder")
    """how vLLM servers get the weights: by files in the work folder, or by NCCL (on CPU gloo)"""
    options: tuple[LongLine, ...] = operational((), max_length=100)
    """additional command-line options of the vLLM server that the stage starts"""

    @model_validator(mode="after")
    def _effective(self) -> Sampling:
        defaults = {name: type(self).model_fields[name].default for name in _OF_VLLM}
        unused = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.kind != "vllm" and unused:
            raise ValueError(
                f"{unused[0]} has no effect with kind = {self.kind}, which starts no server; leave it "
                "out, or set kind = vllm"
            )
        if bool(self.url) != bool(self.secret):
            raise ValueError(
                "url and secret go together: the servers of url answer only requests that are signed with "
                "the secret that they were started with"
            )
        return self

    @property
    def promise(self) -> Promise:
        """The promise of a stage with this sampling."""
        return SAMPLERS[self.kind].promise


class PostTrainingPhase(PhaseBase):
    """Common settings of all phases of post-training."""

    steps: Steps
    """rounds of generated answers, each with its updates; rounds in dpo; updates in reward_model"""
    micro_batches: Annotated[int, Range(1, 1e6)]
    """micro-batches of one update, over all data-parallel ranks"""
    checkpoint_interval: Steps = operational(20)
    """steps between checkpoints from which an interrupted run resumes"""

    @property
    def packed(self) -> bool:
        # Answers have many lengths, and packed rows need no padding between them.
        return True

    @property
    def is_asynchronous(self) -> bool:
        """True if answers are drawn while the policy is updated."""
        return False

    @property
    def micro_batch_counts(self) -> list[int]:
        return [self.micro_batches]

    @model_validator(mode="after")
    def _updates_and_layout_fit(self) -> PostTrainingPhase:
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


class SampledPhase(PostTrainingPhase):
    """Common settings of the phases that draw answers from their policy."""

    if TYPE_CHECKING:
        updates: int
    sampling: Sampling
    """sampling of answers"""
    max_logprob_diff: Gap = 1e-3
    """maximum mean difference in token log-probability between sampler and trainer, in nats"""
    validate_every: Steps
    """steps between evaluations on the validation items; rounds in dpo"""
    verifiers: Verifiers = operational({})
    """settings of verifiers by name, such as the URL of a server"""

    @property
    def promise(self) -> Promise:
        """The promise of the stage."""
        return self.sampling.promise

    @property
    def scoring_servers(self) -> int:
        """The number of servers in jobs of their own that score answers with the reward model."""
        servers = self.verifiers.get(reward_registry.TRAINED, {}).get("servers", 0)
        # Settings of a verifier are checked when it is made; what is no number is refused then.
        return servers if isinstance(servers, int) else 0

    @property
    def all_updates(self) -> int:
        return self.steps * self.updates


class RlPhase(SampledPhase):
    """Policy gradients from groups of answers (GRPO and its relatives) with rewards from verifiers.

    The defaults are the advantages of Dr. GRPO without division, the token-level loss and asymmetric clip of DAPO, and
    no KL term.
    """

    tasks: Tasks
    """sources of prompts, each with the verifier that scores the answers"""
    prompts_per_step: Prompts
    """prompts of one step, counting only those whose answers differ in reward"""
    num_generations: Annotated[int, Range(2, 4096, "DeepSeek-R1: 16")]
    """answers per prompt (the group size of GRPO)"""
    algorithm: AlgorithmName = added(policy_gradient.DEFAULT)
    """advantages and loss, by name (docs/post-training.md)"""
    updates: Updates = added(1)
    """optimizer updates per step, among which its prompts are divided; the clip acts from the second on"""
    clip_low: ClipLow | None = None
    """lower range of the clip; null: the algorithm's, if it has one"""
    clip_high: ClipHigh | None = None
    """upper range of the clip; null: the algorithm's, if it has one"""
    kl_coef: KlCoefficient | None = added(None)
    """weight of the KL divergence from the policy at the start of the phase (k3 estimator); null: none"""
    tis_cap: Annotated[float, Range(0, 1000, "usual: 2", above=True)] = 2.0
    """cap of a token's importance weight, trainer over sampler"""
    max_resample_rounds: Retries = 2
    """extra sampling rounds to replace groups of equal rewards (DAPO's dynamic sampling)"""
    size_exponent: SizeExponent = added(1.0)
    """exponent of a bin's number of tasks in its weight: 1 draws in proportion to size, 0 draws all bins alike"""
    truncated_answers: Literal["masked", "scored"] = added("masked")
    """answers cut off by the length limit: masked counts their reward in the mean of the group and gives them no loss;
    scored trains on them as on the others"""
    max_truncated: PositiveShare | None = added(None)
    """share of answers of a step that may be cut off; more is an alarm in the log and on the card; null: no alarm"""
    max_looping: PositiveShare | None = added(None)
    """share of answers of a step that may loop, which repeat an n-gram up to where they are cut off; more is an alarm
    in the log and on the card; null: no alarm"""
    asynchronous: Asynchronous | None = added(None)
    """generation of answers while the policy is updated; null: each step generates, then updates"""
    tools: Tools | None = added(None)
    """tools that the model may call while it answers, in turns; null: none"""
    replay: Replay | None = None
    """replay of earlier training data; null: none"""
    pass_rates: PassRateFilter | None = added(None)
    """filter of the tasks by their pass rates before the phase, which a stage measures; null: all tasks are used"""

    @model_validator(mode="before")
    @classmethod
    def _clip_of_the_algorithm(cls, data: Any) -> Any:
        # Before the fields are read, so that the ranges in effect are part of the key.
        name = data.get("algorithm", policy_gradient.DEFAULT) if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in policy_gradient.ALGORITHMS:
            return data  # refused as a field
        algorithm = policy_gradient.load(name)
        ranges = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
        return {**data, **{side: default for side, default in ranges.items() if data.get(side) is None}}

    @model_validator(mode="after")
    def _clip_has_an_effect(self) -> RlPhase:
        algorithm = policy_gradient.load(self.algorithm)
        defaults = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
        for side, default in defaults.items():
            value = getattr(self, side)
            if value == default:
                continue
            if default is None:
                raise ValueError(
                    f"{side} = {value} has no effect, as algorithm {self.algorithm} has no such clip; leave it out"
                )
            if self.updates == 1:
                raise ValueError(
                    f"{side} = {value} has no effect with updates = 1, since the policy that drew the answers is the "
                    "one that is updated; leave it out, or use more updates"
                )
        return self

    @model_validator(mode="after")
    def _queue_is_not_too_long(self) -> RlPhase:
        if self.asynchronous is None:
            return self
        # A step takes prompts_per_step groups, so the last group of a longer queue is too old when its turn comes.
        most = self.prompts_per_step * (self.asynchronous.max_staleness + 1)
        if self.queue_groups > most:
            raise ValueError(
                f"asynchronous.queue_groups = {self.queue_groups} keeps answers in the queue for more than "
                f"max_staleness = {self.asynchronous.max_staleness} steps of {self.prompts_per_step} prompts, so that "
                f"they are dropped; use at most {most}"
            )
        return self

    @model_validator(mode="after")
    def _tools_fit_the_phase(self) -> RlPhase:
        if self.tools is None:
            return self
        if self.asynchronous is not None:
            raise ValueError(
                "tools are not possible in an asynchronous phase, which draws an answer in one go; leave one of them "
                "out"
            )
        if self.pass_rates is not None:
            raise ValueError(
                "pass_rates measures answers without tools, which are others than those of the phase; leave out tools, "
                "or pass_rates"
            )
        kinds = kinds_of(self.tasks)
        if unknown := sorted(set(self.tools.kinds) - kinds):
            raise ValueError(
                f"tools.kinds names {unknown[0]}, of which the phase has no tasks; it has {', '.join(sorted(kinds))}"
            )
        return self

    @model_validator(mode="after")
    def _every_update_has_prompts_and_rows(self) -> RlPhase:
        if self.updates > self.prompts_per_step:
            raise ValueError(
                f"updates = {self.updates} is more than prompts_per_step = {self.prompts_per_step}, which are divided "
                f"among them; use at most {self.prompts_per_step}"
            )
        if self.replay is not None and self.updates > self.replay.rows:
            raise ValueError(
                f"updates = {self.updates} is more than replay.rows = {self.replay.rows}, which are divided among "
                f"them; use at least {self.updates} rows"
            )
        return self

    @property
    def promise(self) -> Promise:
        """The promise of the stage."""
        # An asynchronous phase draws other answers in another time, and a tool may answer otherwise: a program can
        # print the time. So only training from the recorded ones repeats bit for bit.
        return self.sampling.promise if self.asynchronous is None and self.tools is None else "numeric"

    @property
    def is_asynchronous(self) -> bool:
        return self.asynchronous is not None

    @property
    def queue_groups(self) -> int:
        """The maximum number of groups that are finished or in flight, of an asynchronous phase."""
        assert self.asynchronous is not None
        # By default, the queue holds the prompts of as many steps as an answer may be old.
        return self.asynchronous.queue_groups or self.asynchronous.max_staleness * self.prompts_per_step

    @property
    def max_sampled_tokens(self) -> int:
        """The maximum number of tokens of an answer that the policy draws."""
        return self.sampling.max_new_tokens * (1 if self.tools is None else self.tools.max_turns)

    def replay_rows(self) -> PhaseConfig:
        """Returns the replayed rows in the form of a training phase, in which their order is made and read."""
        assert self.replay is not None
        r = self.replay
        batch = BatchSizes(global_tokens=r.rows * r.sequence_length, micro_tokens=r.sequence_length)
        return PhaseConfig(
            mix=r.mix,
            sequence_length=r.sequence_length,
            batch=batch,
            steps=self.steps,
            optimizer=self.optimizer,
            # A training phase requires the rest; replay reads only the order of its rows.
            validation=Validation(every=self.steps, rows=1),
            release_checkpoint_interval=self.steps,
        )


class Distillation(RlPhase):
    """On-policy distillation: a smaller model answers, and the final model of the recipe corrects each of its tokens.

    The student is a smaller model of `sizes` after supervised fine-tuning on the rows of `sft`. The advantage of a
    token is the teacher's log-probability less the student's, so the loss is the reverse KL divergence of each token.
    The rewards of verifiers are recorded, and train nothing. `algorithm` gives the loss of a token and the mean.
    """

    size: Annotated[int, Range(1, 16)] = 1
    """number of the student in sizes, from 1"""
    sft_optimizer: Optimizer | None = None
    """optimizer and schedule of the student's supervised fine-tuning; null: as in sft"""
    prompts_per_step: Prompts
    """prompts of one step"""
    num_generations: Answers
    """answers per prompt"""
    max_resample_rounds: Annotated[int, Range(0, 0)] = 0
    """always 0: every answer is learnt from, and none is drawn again"""
    size_exponent: Annotated[float, Range(0, 0)] = 0.0
    """always 0: kinds of tasks are drawn equally"""
    truncated_answers: Literal["scored"] = "scored"
    """always scored: the teacher corrects the tokens of every answer"""

    @model_validator(mode="after")
    def _weighs_each_token(self) -> Distillation:
        if policy_gradient.load(self.algorithm).token_loss is policy_gradient.by_answer:
            raise ValueError(
                f"algorithm = {self.algorithm} has one ratio for an answer, and the teacher corrects each token by "
                "itself; use another, such as dapo-centered or cispo"
            )
        return self


class PromptPool(Config):
    """Tasks from which the prompts of every round are drawn."""

    tasks: Tasks
    """sources of prompts, each with the verifier that scores the answers"""
    count: Prompts
    """prompts per round"""
    num_generations: Answers
    """answers per prompt"""


class StoredPairs(Config):
    """Pairs of the section `preferences` that a round of DPO learns from beside those of its own answers."""

    count: Prompts
    """pairs per round; all of them are read once before any is read again"""
    max_tokens: Context
    """maximum number of tokens of a prompt and an answer; longer pairs are left out"""


class DpoPhase(SampledPhase):
    """Rounds of length-normalized DPO (Tulu 3, arXiv 2411.15124) on the best and the worst answer to each prompt.

    In each round the policy answers and a reward function scores. The reference is the policy that gave the answers,
    and also for stored pairs the policy at the start of the round.
    `steps` counts rounds; the steps of the optimizer are updates, `updates` per round.
    """

    preferences: PromptPool
    """prompts of the preference pairs"""
    sft_tasks: PromptPool | None = None
    """verified tasks whose correct answers are trained on with an NLL loss; null: none"""
    stored_pairs: StoredPairs | None = added(None)
    """pairs of the section preferences that a round also learns from; null: none"""
    updates: Updates
    """optimizer updates per round, among which its pairs are divided"""
    beta: Annotated[float, Range(0, 1000, "DPO: 0.1, normalized by length as in Tulu 3: 5", above=True)]
    """beta of DPO: scale of the log-probability margin of a pair"""
    min_margin: Coefficient = 0.05
    """reward difference that a pair must exceed"""
    nll_coef: Coefficient = 1.0
    """weight of the mean NLL loss of correct answers; the loss of pairs has weight 1"""

    @model_validator(mode="after")
    def _effective(self) -> DpoPhase:
        if self.sft_tasks is None and self.nll_coef != type(self).model_fields["nll_coef"].default:
            raise ValueError(
                f"nll_coef = {self.nll_coef} has no effect without sft_tasks, whose answers it weighs; "
                "leave it out, or name tasks"
            )
        return self


class RewardPhase(PostTrainingPhase):
    """A reward model, trained on the pairs of preferences, or else of dpo, with the Bradley-Terry loss.

    The reward of an answer is the probability that `<|endoftext|>` follows it, so the model keeps the architecture
    of the policy.
    """

    pairs: Prompts
    """pairs per update"""
    heldout_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.2
    """share of prompts, by hash, whose pairs of dpo are held out from training; pairs of preferences have a share of
    their own"""
    max_tokens: Context | None = added(None)
    """maximum number of tokens of a prompt and an answer of preferences, longer pairs are left out; null: the model's
    context"""
    validate_every: Steps
    """updates between evaluations on the held-out pairs"""


def lack(phase: RlPhase | DpoPhase) -> str | None:
    """Returns the reason why the recipe's answers cannot be drawn or scored here; None if they can."""
    sources = phase.tasks if isinstance(phase, RlPhase) else phase.preferences.tasks
    if isinstance(phase, DpoPhase) and phase.sft_tasks is not None:
        sources += phase.sft_tasks.tasks
    scoring = reward_registry.obstacle((source.verifier for source in sources), phase.verifiers)
    offered = phase.tools.offered if isinstance(phase, RlPhase) and phase.tools is not None else ()
    answering = next((reason for tool in offered if (reason := tool.missing())), None)
    return scoring or answering or SAMPLERS[phase.sampling.kind].obstacle(phase.sampling)


class SampledConfig(TrainerConfig):
    """Config of a phase that draws answers from its policy."""

    phase: SampledPhase
    """section of the phase"""

    @model_validator(mode="after")
    def _answers_fit_the_context(self) -> SampledConfig:
        most, context = self.phase.sampling.max_new_tokens, self.model.context_length
        if most >= context:
            raise ValueError(
                f"sampling.max_new_tokens = {most} leaves no room for a question in model.context_length = {context}"
            )
        return self


class RlTrainConfig(SampledConfig):
    """Config of a phase of reinforcement learning."""

    name: Literal["rlvr", "online-rlhf", "distillation"] = "rlvr"
    """name of the phase"""
    phase: RlPhase
    """section of the phase"""


class DistillationConfig(RlTrainConfig):
    """Config of on-policy distillation."""

    name: Literal["distillation"] = "distillation"
    """name of the phase"""
    phase: Distillation
    """section of the phase"""
    teacher: Model
    """model section of the teacher, with the rotary embedding of its last phase"""

    @model_validator(mode="after")
    def _teacher_fits(self) -> DistillationConfig:
        if self.teacher.context_length < self.model.context_length:
            raise ValueError(
                f"the teacher reads {self.teacher.context_length} tokens, and its student answers in a context of "
                f"{self.model.context_length}; shorten that of the student"
            )
        phase = self.phase
        counts, precision = phase.micro_batch_counts, phase.precision
        if wrong := problem(phase.parallelism, self.teacher, self.padded_vocab_size, counts, phase.packed, precision):
            raise ValueError(f"{wrong}, as the teacher has the layout of its student")
        return self


class DpoTrainConfig(SampledConfig):
    """Config of a phase of preference optimization."""

    phase: DpoPhase
    """section of the phase"""


class RewardTrainConfig(TrainerConfig):
    """Config of the training of a reward model."""

    phase: RewardPhase
    """section of the phase"""
