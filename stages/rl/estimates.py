"""What a phase of post-training needs. No torch: `atom plan` imports this file."""

from __future__ import annotations

from pipeline.core.stage import Estimate, Published
from stages.mcore.memory import MASTER, MOMENTS, memory_share
from stages.models.costs import Rows
from stages.rl.config import DpoTrainConfig, RewardTrainConfig, RlTrainConfig
from stages.train.estimate import checkpoints, fullest, release_files

START_SECONDS = 10.0
ANSWER_BYTES = 8
"""Of a drawn token on disk: its id, its log-probability in fp32, which does not compress, and its text. 6.8 on answers
of a thousand ids by Zipf's law with prose of four characters a token."""


def reference_bytes(config: RlTrainConfig | DpoTrainConfig | RewardTrainConfig) -> int:
    """Bytes on the host of the fullest rank's weights, twice: the reference of the KL term, and the rank's own weights
    while the model computes with those of the reference."""
    if not isinstance(config, RlTrainConfig) or config.phase.kl_coef is None:
        return 0
    layout, width = config.phase.parallelism, 4 if config.phase.precision == "fp32" else 2
    shares = [memory_share(config.model, config.padded_vocab_size, layout, rank) for rank in range(layout.pp)]
    return 2 * width * max(share.all for share in shares)


def rollouts(phase: str, tokens: int) -> tuple[Published, ...]:
    """The published answers of a phase, of at most so many tokens together."""
    remedy = "the answers of a phase are one file: lower its steps, its answers of a step, or sampling.max_new_tokens"
    return (Published("dataset", f"rl/{phase}", 1, ANSWER_BYTES * tokens, remedy),)


def estimate(
    config: RlTrainConfig | DpoTrainConfig | RewardTrainConfig,
    answers: int,
    length: int,
    tokens: int,
    flops: float,
    rate: float,
    rollouts: tuple[Published, ...] = (),
) -> Estimate:
    """answers: trained on in one update; length: tokens of the longest one; tokens, flops: of the phase; rate: FLOP/s
    of a core; rollouts: the published answers. Rank 0 holds the weights that go to the sampler beside its own state."""
    parameters, phase = config.model.parameters(config.padded_vocab_size), config.phase
    rows = Rows(-(-answers // phase.micro_batches), length, phase.packed)
    *_, owned, memory = fullest(config, rows)
    releases = phase.steps // phase.release_checkpoint_interval + 1
    checkpoint, work = (MASTER + MOMENTS) * parameters["total"], phase.work_checkpoints_kept + 1
    return Estimate(
        cpu_seconds=START_SECONDS + flops / rate,
        tokens=tokens,
        flops=flops,
        memory_bytes=memory,
        host_bytes=owned + MASTER * parameters["total"] + reference_bytes(config),
        disk_bytes=checkpoint * (releases + work),
        files=work * (2 * phase.parallelism.ranks + 1) + releases * release_files(parameters["total"]),
        published=(*checkpoints(parameters["total"], releases), *rollouts),
        parameters=parameters,
    )
