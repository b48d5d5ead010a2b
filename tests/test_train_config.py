"""Impossible sizes are told in one sentence that names the field, its value and the nearest possible ones."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import train_world as world
from pydantic import ValidationError

from stages.model.config import ModelConfig
from stages.train.config import Optimizer, PhaseConfig, TrainConfig
from stages.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": {"global_tokens": 3000, "micro_tokens": 512}, "sequence_length": 512},
         "batch.global_tokens = 3000 is not a multiple of sequence_length 512; nearest: 2560 or 3072"),
        ({"batch": {"global_tokens": 3072, "micro_tokens": 700}, "sequence_length": 512},
         "batch.micro_tokens = 700 is not a multiple of sequence_length 512; nearest: 512 or 1024"),
        ({"batch": {"global_tokens": 256, "micro_tokens": 96}},
         "batch.global_tokens = 256 is not a multiple of batch.micro_tokens 96; nearest: 192 or 288"),
        ({"batch": {"global_tokens": 8, "micro_tokens": 8}},
         "batch.global_tokens = 8 is not a multiple of sequence_length 32; nearest: 32"),
        ({"optimizer": {"lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 12}}, "optimizer.warmup_steps = 12 leaves"),
        ({"optimizer": {"lr": 1e-3, "final_lr": 1e-2, "warmup_steps": 1}}, "final_lr = 0.01 is above lr = 0.001"),
        ({"mix": {"text": 0.0}}, "mix.text = 0.0 is not a positive share"),
        ({"sequence_length": 128, "batch": {"global_tokens": 256, "micro_tokens": 128}},
         "sequence_length = 128 is longer than model.context_length = 64"),
        ({"warm": 3}, "Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_phase(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(world.config(**change))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 6, "kv_heads": 4}, "kv_heads = 4 does not divide heads = 6; nearest: 3 or 6"),
        ({"head_dim": 7}, "head_dim = 7 is odd, but rotary embedding turns pairs; nearest: 6 or 8"),
        ({"experts_per_token": 5}, "experts_per_token = 5 is more than experts = 4"),
        ({"layers": 0}, "greater than 0"),
    ],
)
def test_model(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate({**world.MODEL, **change})
    assert sentence in str(caught.value)


def test_work_checkpoints_are_not_identity() -> None:
    from pipeline.stage import identity

    one, other = (TrainConfig.model_validate(world.config(work_checkpoint_every=n)) for n in (1, 2))
    assert identity(one) == identity(other) and "work_checkpoint_every" not in identity(one)["phase"]
    assert identity(one) != identity(TrainConfig.model_validate(world.config(steps=13)))


def test_schedule() -> None:
    o = Optimizer(lr=1.0, final_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, o) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and math.isclose(rates[-1], 0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True) and math.isclose(learning_rate(12, 20, o), 0.55)
    assert learning_rate(1, 1, Optimizer(lr=1.0, final_lr=0.1, warmup_steps=0)) == pytest.approx(0.1)


def test_estimates_need_no_torch() -> None:
    """`atom plan` imports every stage's config and estimate, and must stay light."""
    code = (
        "import sys; from stages import pretrain, midtrain; from release import export\n"
        "import train_world as w; c = pretrain.TrainConfig.model_validate(w.config()); e = pretrain.estimate(c)\n"
        "assert e.tokens == 12 * 256 and e.flops > 6 * e.tokens * 1e4\n"
        "assert e.memory_bytes == 18 * e.parameters['total']\n"
        "x = export.ExportConfig.model_validate({'model': w.MODEL, 'padded_vocab_size': 64})\n"
        "assert export.estimate(x).disk_bytes == 4 * e.parameters['total']\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'megatron', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = str(world.__file__).rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n" + code],
                          capture_output=True, text=True, check=False, cwd=path + "/..")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_rows_of_a_phase() -> None:
    phase = PhaseConfig.model_validate(world.PHASE)
    assert (phase.rows, phase.micro_rows) == (8, 4)
