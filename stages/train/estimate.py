"""What a training phase will ask of a machine. No torch."""

from __future__ import annotations

from pipeline.stage import Estimate
from stages.train.config import TrainConfig

# Sustained training FLOP/s of one CPU thread in fp32 on matrices this small: 493,536 parameters, 24 x 48 tokens in
# 54 ms (docs/lab-log.md), that is 2.3e9 FLOPs a step.
CPU_FLOPS = 4.3e10
# Bytes per parameter while training: fp32 weight and gradient (4 + 4), Adam's two moments (4 + 4), and 2 of slack for
# communication buffers, the usual rule of 18.
BYTES_PER_PARAMETER = 18


def estimate(config: TrainConfig) -> Estimate:
    phase, model = config.phase, config.model
    parameters = model.parameters(config.padded_vocab_size)
    steps, tokens = phase.steps - phase.first_step + 1, phase.tokens(phase.first_step)
    flops = tokens * model.flops_per_token(config.padded_vocab_size, phase.sequence_length)
    checkpoints = 1 + steps // phase.release_checkpoint_every + phase.work_checkpoints_kept + 1
    return Estimate(
        cpu_seconds=flops / CPU_FLOPS,
        tokens=tokens,
        flops=flops,
        memory_bytes=BYTES_PER_PARAMETER * parameters["total"],
        disk_bytes=12 * parameters["total"] * checkpoints,
        parameters=parameters,
    )
