"""The resources of a phase of post-training. No torch: `atom plan` imports this file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from pipeline.core.stage import (
    Accelerator,
    Estimate,
    Published,
    ServedWork,
    TrainingEstimate,
    TrainingTime,
)
from stages.generation import vllm_server
from stages.mcore.memory import MASTER, Activations, memory_share
from stages.mcore.throughput import UNFITTED_ERRORS, StepSetup, shape_of, step_time
from stages.models.base import Rows, layers_in_bf16
from stages.models.parallel_layout import Layout
from stages.rl.config import (
    DistillationConfig,
    DpoPhase,
    DpoTrainConfig,
    RewardTrainConfig,
    RlPhase,
    RlTrainConfig,
    Sampling,
)
from stages.rl.protocols import TRAINED
from stages.train.config import WORK_CHECKPOINTS
from stages.train.estimate import checkpoint_size, fullest, layout_label, recomputed_flops

AnyConfig = RlTrainConfig | DpoTrainConfig | RewardTrainConfig
# Assumed core-seconds before the first step.
START_SECONDS = 10.0
# FLOP/s of a core that draws and trains in fp32.
CPU_FLOPS = 2e10
# FLOP/s of a GPU that draws answers by vLLM. Derived from 925 tokens/s for each of 32 H100 that trained Qwen3-30B-A3B
# by GRPO and drew for it in turn (NeMo RL v0.4, docs/about/performance-summary.md at c31fb937), less the time of the
# update (6 FLOPs a parameter and token) and of one reading (2) at 0.19 of 989 TFLOP/s. The same gives 33e12 for Llama
# 3.1 8B and 55e12 for Qwen3-32B (at 0.4), which are dense, and 2e12 for Qwen3-235B-A22B.
DRAWING_FLOPS = 7e12
ASSUMED = (
    f"answers of full length, drawn at {DRAWING_FLOPS / 1e12:.0f} TFLOP/s a GPU, as of a published run of "
    "Qwen3-30B-A3B; dense models of 8 to 32 billion parameters drew 5 to 8 times faster, Qwen3-235B-A22B 3 times slower"
)
# Assumed tokens of a question, which only the data tells.
QUESTION_TOKENS = 64
# Assumed tokens of one side of a pair with its question, likewise.
PAIR_TOKENS = 64
# Bytes of a file in which weights go to servers, unless one tensor is larger (stages/generation/weights.py).
FILE_BYTES = 250_000_000
# Bytes of a drawn token on disk: its id, its log-probability in fp32, which does not compress, and its text. They were
# 6.8 on answers of a thousand ids by Zipf's law with prose of four characters a token.
ANSWER_BYTES = 8


@dataclass(frozen=True)
class Examples:
    """Equal examples of an update at their full length.

    Attributes:
        count: Number of examples.
        question: Tokens of a question, which `shared` examples have in common and which are computed once.
        answer: Tokens of an answer.
        shared: Examples of one question.
        unit: A micro-batch has a multiple of so many examples.
    """

    count: int
    question: int
    answer: int
    shared: int = 1
    unit: int = 1

    def in_micro_batch(self, size: float) -> int:
        """Returns the number of examples that fill a micro-batch of so many tokens, with a question for each."""
        # Rounded up to whole units, which micro-batches never divide.
        examples = -(-size // (self.question + self.answer))
        return min(self.count, int(-(-examples // self.unit)) * self.unit)

    def row(self, examples: int) -> Rows:
        """Returns the packed row of so many: the last token of an answer is no input, its first one is a target."""
        questions = -(-examples // self.shared)
        tokens = questions * self.question + examples * (self.answer - 1)
        prefixed = examples * self.question if self.answer > 1 else 0
        return Rows(1, tokens, packed=True, targets=examples * self.answer, prefixed=prefixed)


def fullest_row(config: AnyConfig) -> tuple[Examples, int]:
    """Returns the examples of the fullest micro-batch of an update, and their number.

    Those of one kind stand together, so a micro-batch is of one kind, or lies between them.
    """
    kinds = _examples(config)
    size = sum(kind.count * (kind.question + kind.answer) for kind in kinds) / config.phase.micro_batches
    rows = [(kind, kind.in_micro_batch(size)) for kind in kinds]
    return max(rows, key=lambda row: row[0].row(row[1]).length)


def _examples(config: AnyConfig) -> list[Examples]:
    """Returns the examples of an update, at most."""
    if isinstance(config, RewardTrainConfig):
        length = min(config.phase.max_tokens or PAIR_TOKENS, config.model.context_length)
        # A pair is two rows, whose only target is the last token: its log-probability is the score.
        return [Examples(2 * config.phase.pairs, length - 1, 1, unit=2)]
    phase = config.phase
    answer = phase.sampling.max_new_tokens
    question = min(QUESTION_TOKENS, config.model.context_length - answer)
    if isinstance(phase, RlPhase):
        answer = answer_tokens(phase, config.model.context_length - question)
        prompts = -(-phase.prompts_per_step // phase.updates)
        kinds = [Examples(prompts * phase.num_generations, question, answer, shared=phase.num_generations)]
        if phase.replay is not None:
            # A replayed row is a question of one token and an answer of all others, each of which is a target.
            kinds.append(Examples(-(-phase.replay.rows // phase.updates), 1, phase.replay.sequence_length))
        return kinds
    kinds = [Examples(2 * -(-phase.preferences.count // phase.updates), question, answer, shared=2, unit=2)]
    if (stored := phase.stored_pairs) is not None:
        length = min(stored.max_tokens, config.model.context_length)
        asked = min(QUESTION_TOKENS, length - 1)
        kinds.append(Examples(2 * -(-stored.count // phase.updates), asked, length - asked, shared=2, unit=2))
    if (tasks := phase.sft_tasks) is not None:
        kinds.append(Examples(-(-tasks.count * tasks.num_generations // phase.updates), question, answer))
    return kinds


def answer_tokens(phase: RlPhase, room: int) -> int:
    """Returns the maximum number of tokens of an answer, with the results of tools.

    A result has at most one token for each character of ordinary text.

    Args:
        phase: Settings of the phase.
        room: What the question leaves in the context.
    """
    results = 0 if phase.tools is None else (phase.tools.max_turns - 1) * phase.tools.max_result_characters
    return min(phase.max_sampled_tokens + results, room)


def reference_bytes(config: AnyConfig) -> int:
    """Returns the bytes on the host of the fullest rank's weights, twice.

    They are the reference of the KL term, and the rank's own weights while the model computes with the reference.
    """
    if not isinstance(config, RlTrainConfig) or config.phase.kl_coef is None:
        return 0
    layout, width = config.phase.parallelism, 4 if config.phase.precision == "fp32" else 2
    # The stages of a pipeline hold different layers.
    shares = [memory_share(config.model, config.padded_vocab_size, layout, rank) for rank in range(layout.pp)]
    return 2 * width * max(share.all for share in shares)


def update_time(config: AnyConfig, gpu: Accelerator) -> TrainingTime:
    """Returns the time of all updates (stages/mcore/throughput.py), with answers of full length in equal rows."""
    phase, layout = config.phase, config.phase.parallelism
    length = math.ceil(_update_tokens(config) / phase.micro_batches)
    micro_batches, bf16_layers = (
        phase.micro_batches // layout.data,
        layers_in_bf16(phase.precision, config.model.layers),
    )
    rule = phase.optimizer.matrices
    run = StepSetup(
        layout,
        phase.precision,
        Rows(1, length),
        micro_batches,
        phase.gradient_bytes,
        rule.bytes,
        rule.iterations,
        bf16_layers=bf16_layers,
    )
    seconds = phase.all_updates * step_time(shape_of(config.model, config.padded_vocab_size), gpu, run).total
    # A forward pass is a third of an update, whose backward pass costs two of them.
    return TrainingTime(seconds * (1 + readings(config) / 3), *UNFITTED_ERRORS)


def _update_tokens(config: AnyConfig) -> int:
    """Returns the tokens of the packed rows of one update, at most."""
    return sum(kind.row(kind.count).length for kind in _examples(config))


def readings(config: AnyConfig) -> float:
    """Returns the forward passes before an update, beside its own: of the old and the reference policy, of the teacher.

    A pass of the teacher counts as its active parameters over those of the student.
    """
    phase = config.phase
    if not isinstance(phase, RlPhase):
        # The reference of stored pairs is the policy before the updates of a round.
        return int(isinstance(phase, DpoPhase) and phase.stored_pairs is not None)
    passes = [phase.updates > 1, phase.kl_coef is not None].count(True)
    if not isinstance(config, DistillationConfig):
        return passes
    teacher, student = (m.parameters(config.padded_vocab_size)["active"] for m in (config.teacher, config.model))
    return passes + teacher / student


def teacher_bytes(config: AnyConfig) -> int:
    """Returns the bytes on its device of the fullest rank's part of the teacher's weights."""
    if not isinstance(config, DistillationConfig):
        return 0
    layout, width = config.phase.parallelism, 4 if config.phase.precision == "fp32" else 2
    shares = (memory_share(config.teacher, config.padded_vocab_size, layout, rank) for rank in range(layout.pp))
    return width * max(share.all for share in shares)


def teacher_activations(config: AnyConfig, row: Rows) -> int:
    """Returns the bytes of a teacher's pass: without gradients, no more than one layer and the logits are kept."""
    if not isinstance(config, DistillationConfig):
        return 0
    tp, one_layer = config.phase.parallelism.tp, config.teacher.model_copy(update={"layers": 1})
    layout, precision = Layout(ranks=tp, tp=tp), config.phase.precision
    return round(Activations(one_layer, config.padded_vocab_size, layout, precision, row, 1, 0, frozen=True).peak())


def _server_memory(config: AnyConfig, gpus: int) -> tuple[int, int]:
    """Returns the bytes of a vLLM server of the policy, as `ServedWork.memory` has them."""
    width = 4 if config.phase.precision == "fp32" else 2
    # A server of the reward model, which has the policy's architecture, computes in bf16 on GPUs: it holds no more.
    weights = width * config.model.parameters(config.padded_vocab_size)["total"]
    beside = vllm_server.memory_beside_weights(config.model, config.padded_vocab_size, width, gpus)
    # On cores, all memory of a server is the host's.
    if not gpus:
        return 0, vllm_server.memory_on_cores(weights, beside)
    return weights // gpus + beside, vllm_server.host_memory(gpus)


def sampler_bytes(config: AnyConfig) -> int:
    """Returns the bytes on rank 0's host of the weights on their way to the sampler.

    They are all weights, or a file and a tensor for vLLM servers, which get them from each rank.
    """
    if isinstance(config, RewardTrainConfig):
        return 0
    if config.phase.sampling.kind != "vllm":
        return MASTER * config.model.parameters(config.padded_vocab_size)["total"]
    largest = max(math.prod(shape) for shape in config.model.shapes(config.padded_vocab_size).values())
    return 2 * max(FILE_BYTES, MASTER * largest)


def scorer_bytes(config: AnyConfig) -> int:
    """Returns the bytes of the reward model, in fp32 on the device of rank 0, if it scores answers there."""
    if not isinstance(config, RlTrainConfig) or config.phase.scoring_servers:
        return 0
    scores = any(task.verifier == TRAINED for task in config.phase.tasks)
    return MASTER * config.model.parameters(config.padded_vocab_size)["total"] if scores else 0


def rollouts(phase: str, tokens: int) -> tuple[Published, ...]:
    """Returns the published answers of a phase, of at most so many tokens together."""
    remedy = "the answers of a phase are one file: lower its steps, its answers of a step, or sampling.max_new_tokens"
    return (Published("dataset", f"rl/{phase}", 1, ANSWER_BYTES * tokens, remedy),)


def estimate(
    config: AnyConfig,
    tokens: int,
    passes: float,
    rate: float = CPU_FLOPS,
    sampling: Sampling | None = None,
    rollouts: tuple[Published, ...] = (),
) -> Estimate:
    """Returns the resources of a phase.

    Rank 0 holds the weights that go to the sampler, and a reward model, beside its own state.

    Args:
        config: Settings of the stage.
        tokens: Tokens of the phase.
        passes: Passes over them, in units of a forward pass.
        rate: FLOP/s of a core.
        sampling: How these tokens are drawn, in one of the passes.
        rollouts: The published answers.
    """
    parameters, phase = config.model.parameters(config.padded_vocab_size), config.phase
    layout, forward = phase.parallelism, 2.0 * parameters["active"]
    flops = passes * forward * tokens
    examples, number = fullest_row(config)
    row = examples.row(number)
    states, activations, owned, memory = fullest(config, row)
    releases = phase.steps // phase.release_checkpoint_interval + 1
    checkpoint, work = checkpoint_size(config), WORK_CHECKPOINTS + 1
    return Estimate(
        cpu_seconds=START_SECONDS + flops / rate,
        tokens=tokens,
        flops=flops,
        memory_bytes=max(memory, states + teacher_activations(config, row))
        + teacher_bytes(config)
        + scorer_bytes(config),
        host_bytes=owned + sampler_bytes(config) + reference_bytes(config),
        disk_bytes=checkpoint.all * (releases + work),
        files=work * (2 * layout.ranks + 1 + checkpoint.files) + releases * checkpoint.files,
        published=(*checkpoint.published(releases), *rollouts),
        parameters=parameters,
        training=TrainingEstimate(
            steps=phase.steps,
            batch_tokens=(_update_tokens(config) * phase.all_updates // phase.steps,),
            sequence_length=row.length,
            precision=phase.precision,
            layout=layout_label(layout),
            gflop_per_token=config.model.flops_per_token(config.padded_vocab_size, row.length) / 1e9,
            state_bytes=states,
            activation_bytes=activations,
            recomputed=recomputed_flops(config, row.length),
            checkpoint_bytes=checkpoint.all,
            release_checkpoints=releases,
            work_checkpoints=work - 1,
            checkpoint_interval=phase.checkpoint_interval,
            order_rows=0,
            data_bytes=0,
        ),
        served=ServedWork(
            flops=forward * tokens,
            gpu_flops=DRAWING_FLOPS,
            cpu_flops=rate,
            overlaps=phase.is_asynchronous,
            memory=partial(_server_memory, config),
            assumed=ASSUMED,
            places=max(1, len(sampling.url)),
            scorers=phase.scoring_servers if isinstance(phase, RlPhase) else 0,
        )
        if sampling is not None
        else None,
    )
