"""Points 6 and 7: a run that was killed goes on, on this device and on a CPU, and an export is the trained model."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.core.store import digest_of, rows_of
from stages.export import hf
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures import gpu_fixtures, train_fixtures
from tests.gpu.conftest import Report

pytestmark = pytest.mark.numeric


def run(corpus: Path, folder: Path, **options: object) -> str:
    """A run of the pretrain stage in a process of its own; its output."""
    return "".join(train_fixtures.fresh(corpus, folder, **options).communicate(timeout=400))  # type: ignore[arg-type]


@gpu_fixtures.at_length(25)
@pytest.mark.point(6)
def test_a_killed_run_goes_on_here_and_on_a_cpu(corpus: Path, tmp_path: Path, report: Report) -> None:
    run(corpus, tmp_path / "calm")
    run(corpus, tmp_path / "here", at=9, number=int(signal.SIGKILL))  # after the release checkpoint of step 6
    shutil.copytree(tmp_path / "here", tmp_path / "cpu")
    calm = train_fixtures.losses(tmp_path / "calm" / "out")
    for name, place, env, bound in (
        ("here", "here", {}, 1e-5),
        ("cpu", "on a CPU", {"CUDA_VISIBLE_DEVICES": ""}, 1e-4),
    ):
        folder = tmp_path / name
        (attempt,) = (folder / "work").glob("attempt-*")
        before = {path.name: digest_of(rows_of(path)) for path in (attempt / "sealed").iterdir()}
        output = run(corpus, folder, env=env)
        went_on = "going on after step" in output and "damaged" not in output
        report(f"a run killed after step 9, resumed {place}", "goes on" if went_on else output[-300:], "goes on, no checkpoint is damaged", went_on)  # fmt: skip
        losses = train_fixtures.losses(folder / "out")
        difference = max(abs(a - b) / b for a, b in zip(losses, calm, strict=True))
        report(f"its {len(losses)} losses", f"relative difference {difference:.1e} from an undisturbed run", f"< {bound:g}", difference < bound)  # fmt: skip
        after = {name: digest_of(rows_of(folder / "out" / name)) for name in before}
        report(f"digests of its release checkpoints {', '.join(sorted(before))}", "unchanged" if after == before else "changed", "unchanged", after == before and len(before) > 0)  # fmt: skip


@gpu_fixtures.at_length(7)
@pytest.mark.point(7)
def test_an_export_is_the_model(tmp_path: Path, report: Report) -> None:
    """Megatron's logits on this device against transformers' on the CPU, in fp32, by the stage's own gate."""
    model, vocabulary = Qwen3MoeConfig(**train_fixtures.MODEL), train_fixtures.VOCAB
    if gpu_fixtures.ON_GPU:
        model, vocabulary = gpu_fixtures.cut_recipe()
        model = model.model_copy(update={"context_length": 1024})
    tokenizer = train_fixtures.tokenizer(tmp_path / "tokenizer")
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=model, padded_vocab_size=vocabulary, seed=0, parity_tolerance=1.0)
    hf.run(config, {"tokenizer": tokenizer}, tmp_path, tmp_path / "out", train_fixtures.Reporter())
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    delta = parity["max_abs_logit_delta"]
    name = f"logits of an export, {parity['tokens_compared']} tokens, against Megatron's"
    report(name, f"largest difference {delta:.1e}", "< 1e-4", delta < 1e-4)
