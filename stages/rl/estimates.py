"""What a phase of post-training needs. No torch: `atom plan` imports this file."""

from __future__ import annotations

from pipeline.core.stage import Estimate
from stages.mcore.memory import MASTER, MOMENTS
from stages.models.costs import Rows
from stages.rl.config import DpoTrainConfig, RewardTrainConfig, RlTrainConfig
from stages.train.estimate import fullest, release_files

START_SECONDS = 10.0


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
    rows = Rows(-(-answers // phase.micro_batches), length)
    *_, owned, memory = fullest(config, rows)
    releases = phase.all_updates // phase.release_checkpoint_interval + 1
    checkpoint, work = (MASTER + MOMENTS) * parameters["total"], phase.work_checkpoints_kept + 1
    return Estimate(
        cpu_seconds=START_SECONDS + flops / rate,
        tokens=tokens,
        flops=flops,
        memory_bytes=memory,
        host_bytes=owned + MASTER * parameters["total"],
        disk_bytes=checkpoint * (releases + work),
        files=work * (2 * phase.parallelism.ranks + 1) + releases * release_files(parameters["total"]),
        published_bytes=checkpoint * releases,
        parameters=parameters,
    )
