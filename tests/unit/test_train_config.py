"""Impossible sizes are reported in one sentence that names the field, its value and the nearest possible ones."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from stages.mcore.optimizer import Adam
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.train.config import PhaseConfig, TrainConfig
from stages.train.estimate import release_checkpoints
from tests.fixtures import ROOT, train_fixtures


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
        ({"mix": {"text": 0.0}}, "Input should be greater than 0"),
        ({"sequence_length": 128, "batch": {"global_tokens": 256, "micro_tokens": 128}},
         "sequence_length = 128 is longer than model.context_length = 64"),
        ({"warm": 3}, "Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_phase(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(train_fixtures.config(**change))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 6, "kv_heads": 4}, "kv_heads = 4 does not divide heads = 6; nearest: 3 or 6"),
        ({"head_dim": 7}, "head_dim = 7 is odd, but rotary embedding turns pairs; nearest: 6 or 8"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is more than experts = 4"),
        ({"layers": 0}, "Input should be greater than or equal to 1"),
    ],
)
def test_model(change: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Qwen3MoeConfig.model_validate({**train_fixtures.MODEL, **change})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ({"ranks": 3, "tp": 3}, "parallelism.tp = 3 does not divide heads = 4; nearest: 2 or 4"),
        ({"ranks": 4, "tp": 4}, "parallelism.tp = 4 does not divide kv_heads = 2; nearest: 2"),
        ({"ranks": 3, "ep": 3}, "parallelism.ep = 3 does not divide experts = 4; nearest: 2 or 4"),
        ({"ranks": 4, "pp": 4}, "parallelism.pp = 4 with vpp = 1 leaves a chunk without any of layers = 2"),
        ({"ranks": 2, "pp": 2, "pp_layers": [1, 2]}, "pp_layers has 2 numbers and the sum 3, not one for each of pp x vpp = 2"),
        ({"ranks": 2, "pp_layers": [1, 1]}, "pp_layers has 2 numbers and the sum 2, not one for each of pp x vpp = 1 chunks"),
        ({"ranks": 3, "pp": 2}, "parallelism.ranks = 3 is not a multiple of tp x pp x cp = 2; nearest: 2 or 4"),
        ({"ranks": 3, "ep": 2}, "parallelism.ranks = 3 is not a multiple of etp x ep x pp = 2"),
        ({"ranks": 4}, "parallelism.ranks = 4 makes 4 data-parallel ranks, which cannot share the 2 micro-batches of a step"),
        ({"ranks": 2, "tp": 2, "etp": 1}, "parallelism.etp = 1 with tp = 2 and ep = 1 would train wrongly"),
        ({"ranks": 2, "etp": 2}, "parallelism.etp = 2 with tp = 1 and ep = 1 would train wrongly"),
        ({"recompute_modules": ["layernorm"]}, "parallelism.recompute_modules needs recompute = selective"),
        ({"recompute": "selective", "recompute_modules": ["mlp"]}, "recompute_modules = mlp names a part that no layer of"),
        ({"vpp": 2}, "parallelism.vpp = 2 interleaves pipeline ranks, and pp = 1 has none"),
        ({"ranks": 0}, "Input should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_work(layout: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(train_fixtures.config(parallelism=layout))
    assert sentence in str(caught.value)


def test_selective_recomputation_needs_tensors_of_16_bits() -> None:
    settings = train_fixtures.config(precision="fp8-blockwise", parallelism={"recompute": "selective"})
    with pytest.raises(ValidationError, match=r"recompute = selective is not possible with precision = fp8-blockwise"):
        TrainConfig.model_validate(settings)


def test_an_interleaved_pipeline_takes_micro_batches_by_groups() -> None:
    settings = train_fixtures.config(parallelism={"ranks": 2, "pp": 2, "vpp": 2},
                            batch={"global_tokens": 96, "micro_tokens": 32})  # fmt: skip
    settings["model"] = {**settings["model"], "layers": 4}
    with pytest.raises(ValidationError, match="needs a multiple of pp = 2 micro-batches on each .* not 3"):
        TrainConfig.model_validate(settings)


def test_plan_refuses_a_layout_and_keys_do_not_hold_one(tmp_path) -> None:
    text = (ROOT / "pipeline/recipes/atom-smoke.yaml").read_text()
    path = tmp_path / "smoke.yaml"

    def compose(layout: str) -> dag.Graph:
        path.write_text(re.sub(r"\n(pretrain:.*\n)", r"\n\1" + layout, text))
        return dag.compose(recipes.load(str(path)), Store(tmp_path / "home"), without_data=True)

    one, two = (compose(layout) for layout in ("", "  parallelism: {ranks: 2, tp: 2}\n"))
    assert {name: node.key for name, node in one.nodes.items()} == {name: node.key for name, node in two.nodes.items()}
    assert [g.nodes["pretrain"].stage.ranks(g.nodes["pretrain"].config) for g in (one, two)] == [1, 2]
    with pytest.raises(RecipeError) as refused:
        compose("  parallelism: {ranks: 2, tp: 2, etp: 1}\n")
    sentence = "recipe smoke, stage pretrain: parallelism.etp = 1 with tp = 2 and ep = 1 would train wrongly"
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_hang_takes_time(seconds: int) -> None:
    with pytest.raises(ValidationError, match="watchdog_timeout_seconds\n.*Input should be greater than 0"):
        PhaseConfig.model_validate(train_fixtures.config(watchdog_timeout_seconds=seconds)["phase"])


def test_a_wrong_number_of_processes_is_refused() -> None:
    from stages.train import parallel

    with pytest.raises(AtomError, match="1 processes were started for parallelism.ranks = 2; start that many"), \
         parallel.session(0, Layout(ranks=2)):  # fmt: skip
        pass


def test_listed_steps_have_release_checkpoints_too() -> None:
    phase = TrainConfig.model_validate(train_fixtures.config(release_checkpoint_steps=[1, 2, 4, 6, 11])).phase

    assert [step for step in range(1, 13) if phase.is_release_step(step)] == [1, 2, 4, 6, 11, 12]
    assert phase.last_release_steps(4) == [4, 6, 11, 12] and phase.last_release_steps(9)[:3] == [1, 2, 4]
    # With that of step 0.
    assert release_checkpoints(phase) == 7
    continued = phase.model_copy(update={"continue_from": "pretrain@4"})
    assert release_checkpoints(continued) == len(continued.last_release_steps(99)) == 3


def test_work_checkpoints_are_not_identity() -> None:
    from pipeline.core.stage import identity

    one, other = (TrainConfig.model_validate(train_fixtures.config(checkpoint_interval=n)) for n in (1, 2))
    assert identity(one) == identity(other) and "checkpoint_interval" not in identity(one)["phase"]
    assert identity(one) != identity(TrainConfig.model_validate(train_fixtures.config(steps=13)))


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        ({"batch": {"global_tokens": 256, "micro_tokens": 128, "ramp": [{"until_step": 3, "global_tokens": 100}]}},
         "batch.ramp.0.global_tokens = 100 is not a multiple of batch.micro_tokens 128; nearest: 128"),
        ({"batch": {"global_tokens": 256, "micro_tokens": 128, "ramp": [{"until_step": 3, "global_tokens": 256}]}},
         "ramp.0.global_tokens = 256 does not lie between the batch before it and batch.global_tokens = 256"),
        ({"batch": {"global_tokens": 256, "micro_tokens": 128, "ramp": [{"until_step": 12, "global_tokens": 128}]}},
         "batch.ramp.0.until_step = 12 leaves no step with the full batch; use less than steps = 12"),
        ({"optimizer": {"lr": 1e-3, "final_lr": 0, "warmup_steps": 2, "schedule": "wsd"}},
         "decay_steps = None with schedule = wsd: a wsd schedule needs it"),
        ({"optimizer": {"lr": 1e-3, "final_lr": 0, "warmup_steps": 2, "decay_steps": 4}},
         "decay_steps = 4 with schedule = cosine"),
        ({"optimizer": {"lr": 1e-3, "final_lr": 0, "warmup_steps": 2, "schedule": "wsd", "decay_steps": 11}},
         "optimizer.decay_steps = 11 and warmup_steps = 2 are more than steps = 12; use at most 10"),
        ({"long_documents": {"over": 8, "share": 0.5}}, "only packed rows do; set pack"),
        ({"long_documents": {"over": 32, "share": 0.5}, "pack": True}, "long_documents.over = 32 leaves no chunk of sequence_length = 32"),
        ({"excluded_steps": list(range(1, 13))}, "leaves no step to train; leave some in"),
        ({"excluded_steps": [3, 13]}, "excluded_steps = [3, 13] goes beyond steps = 12; leave later ones out"),
        ({"release_checkpoint_steps": [2, 1]}, "release_checkpoint_steps = [2, 1] must increase, up to steps = 12"),
        ({"release_checkpoint_steps": [2, 13]}, "must increase, up to steps = 12 at most"),
        ({"spikes": {"action": "skip", "window": 1}}, "Input should be greater than or equal to 4"),
        ({"gradient_precision": "bf16"}, "gradient_precision = bf16 is not possible with precision = fp32"),
        ({"precision": "fp8"}, "'fp32', 'bf16', 'fp8-tensorwise', 'fp8-blockwise', 'mxfp8' or 'nvfp4'"),
    ],
)  # fmt: skip
def test_phases_that_cannot_work(phase: dict, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(train_fixtures.config(**phase))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"yarn": {"factor": 2, "original_length": 8}},
         "rope.yarn.factor = 2 x original_length = 8 covers fewer tokens than sequence_length = 32; raise the factor to at least 4"),
        ({"yarn": {"factor": 8, "original_length": 16}},
         "rope.yarn.factor = 8 x original_length = 16 is not the context of 64 tokens, from which some readers of an exported config compute the factor; use the factor 4"),
        ({"dense_layers": 2, "intermediate_size": 8}, "dense_layers = 2 leaves no layer of 2 with experts; use at most 1"),
        ({"dense_layers": 1}, "dense_layers = 1 and intermediate_size = None go together"),
    ],
)  # fmt: skip
def test_models_that_contradict_themselves(model: dict, sentence: str) -> None:
    settings = train_fixtures.config()
    settings["model"] = {**settings["model"], **model}
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate(settings)
    assert sentence in str(caught.value)


def test_what_came_later_changes_no_key_while_it_is_not_used() -> None:
    """Sealed artifacts of earlier recipes stay valid: a field that was added counts only where it is set."""
    from pipeline.core.stage import identity

    config = TrainConfig.model_validate(train_fixtures.config())
    known = {"mix", "sequence_length", "batch", "steps", "optimizer", "validation", "release_checkpoint_interval"}
    assert set(identity(config)["phase"]) == known and set(identity(config)["phase"]["batch"]) == {
        "global_tokens",
        "micro_tokens",
    }
    assert "schedule" not in identity(config)["phase"]["optimizer"]
    sizes = {
        "layers",
        "hidden_size",
        "heads",
        "kv_heads",
        "head_dim",
        "experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    }
    rest = {"context_length", "rope_theta", "norm_eps", "tie_embeddings", "aux_loss", "init_std"}
    assert set(identity(config)["model"]) == sizes | rest
    assert "pack" in identity(TrainConfig.model_validate(train_fixtures.config(pack=True)))["phase"]


def test_a_batch_that_grows() -> None:
    ramp = [{"until_step": 3, "global_tokens": 64}, {"until_step": 5, "global_tokens": 128}]
    phase = PhaseConfig.model_validate(
        {**train_fixtures.PHASE, "batch": {"global_tokens": 256, "micro_tokens": 64, "ramp": ramp}}
    )
    assert [phase.rows_of(step) for step in range(1, 8)] == [2, 2, 2, 4, 4, 8, 8]
    assert phase.micro_batch_counts == [1, 2, 4] and phase.row_ramp == [(3, 2), (5, 4)]
    assert phase.tokens() == 3 * 64 + 2 * 128 + 7 * 256 and phase.tokens(5) == 128 + 7 * 256
    with pytest.raises(ValidationError, match="2 data-parallel ranks, which cannot share the 1 micro-batches"):
        TrainConfig.model_validate(
            {**train_fixtures.config(), "phase": {**phase.model_dump(), "parallelism": {"ranks": 2}}}
        )


def test_warm_up_stable_decay() -> None:
    o = Adam(lr=1.0, final_lr=0.1, warmup_steps=4, schedule="wsd", decay_steps=8)
    rates = [o.learning_rate(step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[3:12]) == {1.0} and math.isclose(rates[-1], 0.1)
    assert math.isclose(rates[13], 0.1 + 0.9 * (1 - math.sqrt(2 / 8)))  # 1 - sqrt (Hägele et al., 2024)
    assert rates[11:] == sorted(rates[11:], reverse=True)


def test_schedule() -> None:
    o = Adam(lr=1.0, final_lr=0.1, warmup_steps=4)
    rates = [o.learning_rate(step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and math.isclose(rates[-1], 0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True) and math.isclose(o.learning_rate(12, 20), 0.55)
    assert Adam(lr=1.0, final_lr=0.1, warmup_steps=0).learning_rate(1, 1) == pytest.approx(0.1)


def test_estimates_need_no_torch() -> None:
    """`atom plan` imports every stage's config and estimate, and must stay light."""
    code = (
        "import sys; from stages.train import pretrain; from stages.export import hf as export\n"
        "from tests.fixtures import train_fixtures as w; c = pretrain.TrainConfig.model_validate(w.config()); e = pretrain.estimate(c)\n"
        "assert e.tokens == 12 * 256 and e.flops > 6 * e.tokens * 1e4\n"
        "assert e.training.state_bytes == 16 * e.parameters['total'] < e.memory_bytes\n"
        "x = export.ExportConfig.model_validate({'model': w.MODEL, 'padded_vocab_size': 64})\n"
        "assert export.estimate(x).disk_bytes == 4 * e.parameters['total']\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'megatron', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    path = str(ROOT)
    process = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n" + code],
                          capture_output=True, text=True, check=False, cwd=path + "/..")  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_rows_of_a_phase() -> None:
    phase = PhaseConfig.model_validate(train_fixtures.PHASE)
    assert (phase.rows_of(1), phase.micro_rows) == (8, 4)
