"""On-policy distillation of the recipe's final model into a smaller model of `sizes`.

    atom run my-recipe --until distillation

The student answers, and learns from the teacher's log-probabilities of its own tokens. docs/post-training.md describes
each setting.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.core.stage import Inputs, Report, Stage
from stages.rl import rlvr
from stages.rl.config import DistillationConfig

VERSION = 1


def run(config: DistillationConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Trains the student. Raises what stages.train.trainer.train raises.

    The inputs are those of stages.rl.rlvr, of which `init` is the student, and `teacher`, the phase whose last
    checkpoint's weights are the teacher's.

    Fills `out` as stages.rl.rlvr does.
    """
    # Imported here, since a plan reads this module without torch.
    from stages.rl.algorithms.distillation import DistillationTrainer
    from stages.train.trainer import train

    train(DistillationTrainer, config.name, config, inputs, work, out, report)


STAGE = Stage("distillation", VERSION, DistillationConfig, run, estimate=rlvr.estimate, **rlvr.sampling_functions())
