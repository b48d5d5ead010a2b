"""What a phase of post-training needs. No torch: `atom plan` imports this file."""

from __future__ import annotations

from pipeline.core.stage import Estimate
from stages.mcore.memory import MASTER, MOMENTS, memory_share
from stages.models.costs import Rows
from stages.rl.config import DpoTrainConfig, RewardTrainConfig, RlTrainConfig
from stages.train.estimate import fullest, release_files

START_SECONDS = 10.0


def reference_bytes(config: RlTrainConfig | DpoTrainConfig | RewardTrainConfig) -> int:
    """Bytes on the host of the fullest rank's weights, twice: the reference of the KL term, and the rank's own weights
    while the model computes with those of the reference."""
    if not isinstance(config, RlTrainConfig) or config.phase.kl_coef is None:
        return 0
    layout, width = config.phase.parallelism, 4 if config.phase.precision == "fp32" else 2
    shares = [memory_share(config.model, config.padded_vocab_size, layout, rank) for rank in range(layout.pp)]
    return 2 * width * max(share.all for share in shares)


def estimate(
    config: RlTrainConfig | DpoTrainConfig | RewardTrainConfig,
    answers: int,
    length: int,
    tokens: int,
    flops: float,
    rate: float,
) -> Estimate:
    """answers: trained on in one update; length: tokens of the longest one; tokens, flops: of the phase; rate: FLOP/s
    of a core. Rank 0 holds the weights that go to the sampler beside its own state."""
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
        published_bytes=checkpoint * releases,
        parameters=parameters,
    )
