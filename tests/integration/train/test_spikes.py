"""A batch after which loss or gradients leap moves no weight, is recorded, and stays out when the phase is repeated."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from stages.train.config import Spikes
from stages.train.text_trainer import SpikeDetector
from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.run_fixtures import at_length

AT = 17
PHASE: dict[str, Any] = {
    "steps": 24,
    "release_checkpoint_interval": 12,
    "checkpoint_interval": 5,
    "optimizer": {"lr": 1e-2, "final_lr": 5e-3, "warmup_steps": 3, "weight_decay": 0.05},
}
POLICY = {"window": 8, "loss_sigmas": 4.0, "norm_factor": 50.0}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("poisoned"), AT)


def plant(folder: Path, *steps: int) -> Path:
    """A corpus in whose order some steps read noise alone."""
    from stages.mcore.megatron_imports import IndexedDatasetBuilder

    train_fixtures.make(folder, PHASE)
    rng, prefix = random.Random(1), str(folder / "tokens/train/noise/part-00000")
    (folder / "tokens/train/noise").mkdir()
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    for _ in range(8):
        builder.add_document(torch.tensor([rng.randrange(2, 64) for _ in range(33)]), [33])
    builder.finalize(prefix + ".idx")
    rows = pq.read_table(folder / "order/part-00000.parquet").to_pylist()
    for row in rows:
        if row["step"] in steps:
            row |= {"source": "noise", "ordinal": row["row"], "id": f"noise/{row['row']}", "offset": 0, "length": 33}
            row["loss_from"] = 0
    pq.write_table(pa.Table.from_pylist(rows), folder / "order/part-00000.parquet")
    for name in ("tokens", "order"):
        (folder / name / "manifest.json").unlink()
        write_manifest(folder / name, f"{name}-test")
    return folder


def run(corpus: Path, folder: Path, report: train_fixtures.Reporter | None = None, **phase: Any) -> Path:
    """Trains; gives the product's folder."""
    settings = train_fixtures.config(**{**PHASE, **phase})
    # A refused step must not count, and a rewind must take the load of experts back with the weights.
    settings["model"] = {**settings["model"], "balance": "global"}
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", settings, report)
    return folder / "out"


def lines(out: Path, key: str) -> list[dict[str, Any]]:
    records = [json.loads(x) for x in (out / "training.jsonl").read_text().splitlines()]
    return [x for x in records if key in x]


def weights(out: Path, step: int = 24) -> dict[str, torch.Tensor]:
    return load_file(out / f"step-{step:06d}/model.safetensors")


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def skipped(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(poisoned, tmp_path_factory.mktemp("skipped"), spikes={"action": "skip", **POLICY})


def test_a_poisoned_batch_is_skipped_and_recorded(poisoned: Path, skipped: Path, tmp_path: Path) -> None:
    (record,) = lines(skipped, "spike")
    spike = record["spike"]
    assert record["step"] == AT and spike["excluded"] == [AT] and spike["action"] == "skip"
    assert "the loss is" in spike["reason"] and "median" in spike["reason"]
    assert spike["documents"] == [f"noise/{n}" for n in range(8)]
    shares = torch.tensor(spike["experts"]["share"])
    assert shares.shape == (2, 4) and torch.allclose(shares.sum(1), torch.ones(2), atol=1e-5)
    (line,) = [x for x in lines(skipped, "loss") if x["step"] == AT]
    assert line["skipped"] is True and line["tokens"] == next(
        x["tokens"] for x in lines(skipped, "loss") if x["step"] == AT - 1
    )
    summary = json.loads((skipped / "summary.json").read_text())
    assert [x["step"] for x in summary["spikes"]] == [AT] and summary["spikes"][0]["documents"] == spike["documents"]
    state = json.loads((skipped / "step-000024/state.json").read_text())
    assert state["optimizer_step"] == 23 and state["step"] == 24

    trained_on_it = run(poisoned, tmp_path / "all")
    assert not lines(trained_on_it, "spike") and not equal_tensors(weights(trained_on_it), weights(skipped))
    assert equal_tensors(weights(trained_on_it, 12), weights(skipped, 12))


def test_what_was_found_is_excluded_on_replay(poisoned: Path, skipped: Path, tmp_path: Path) -> None:
    """The recorded steps, given to a fresh run as `excluded_steps`, make the same weights without a policy; and the
    batch is not even looked at."""
    excluded = [step for x in lines(skipped, "spike") for step in x["spike"]["excluded"]]
    replay = run(poisoned, tmp_path / "replay", excluded_steps=excluded)
    assert [x["step"] for x in lines(replay, "excluded")] == [AT] and not lines(replay, "spike")
    assert equal_tensors(weights(replay), weights(skipped))
    assert AT not in [x["step"] for x in lines(replay, "loss")]
    replayed = run(poisoned, tmp_path / "again", spikes={"action": "skip", **POLICY})
    assert train_fixtures.digest(replayed) == train_fixtures.digest(skipped)


@pytest.mark.parametrize("every", [5, 7])
def test_a_rewind_leaves_out_the_batches_before_as_well(poisoned: Path, tmp_path: Path, every: int) -> None:
    rewind = {"action": "rewind", "rewind_steps": 4, **POLICY}
    out = run(poisoned, tmp_path / "rewind", spikes=rewind, checkpoint_interval=every)
    (record,) = lines(out, "spike")
    assert record["spike"]["excluded"] == [14, 15, 16, 17] and record["step"] == AT
    assert [x["step"] for x in lines(out, "excluded")] == [14, 15, 16, 17]
    assert [x["step"] for x in lines(out, "tokens")] == list(range(1, 25))
    replay = run(poisoned, tmp_path / "replay", excluded_steps=[14, 15, 16, 17])
    assert equal_tensors(weights(replay), weights(out))
    state = json.loads((out / "step-000024/state.json").read_text())
    assert "spikes_pending" not in state and state["optimizer_step"] == 20


@at_length("training", 15)
def test_a_rewind_is_the_same_whatever_is_saved_and_killed_on_the_way(poisoned: Path, tmp_path: Path) -> None:
    rewind = {"action": "rewind", "rewind_steps": 4, **POLICY}
    undisturbed = run(poisoned, tmp_path / "whole", spikes=rewind)
    often = run(poisoned, tmp_path / "often", spikes=rewind, checkpoint_interval=1)
    assert train_fixtures.digest(undisturbed) == train_fixtures.digest(often)
    for at in (14, 16, 18):  # the second time that 14 and 16 are passed: on the way back to the spike
        folder, report = tmp_path / f"killed-{at}", SecondTime(at)
        with pytest.raises(KeyboardInterrupt):
            run(poisoned, folder, report, spikes=rewind, checkpoint_interval=1)
        assert train_fixtures.digest(
            run(poisoned, folder, spikes=rewind, checkpoint_interval=1)
        ) == train_fixtures.digest(undisturbed)


def test_a_rewind_stops_at_a_release_checkpoint(poisoned: Path, tmp_path: Path) -> None:
    """What was published stays true: steps up to it are not trained in another way."""
    rewind = {"action": "rewind", "rewind_steps": 10, **POLICY}
    out = run(poisoned, tmp_path / "rewind", spikes=rewind, release_checkpoint_interval=8)
    (record,) = lines(out, "spike")
    assert record["spike"]["excluded"] == [AT] and AT - 1 == 16


def test_without_a_policy_or_with_stop_the_phase_ends(poisoned: Path, tmp_path: Path) -> None:
    with pytest.raises(AtomError, match="the loss is .* at step 17, on documents noise/0, noise/1") as raised:
        run(poisoned, tmp_path / "stop", spikes={"action": "stop", **POLICY})
    assert "pretrain.spikes" in str(raised.value)
    with pytest.raises(AtomError, match="2 spikes, more than pretrain.spikes.max_spikes = 1"):
        run(plant(tmp_path / "two", AT, 20), tmp_path / "many", spikes={"action": "skip", **POLICY, "max_spikes": 1})


def test_what_is_no_number_is_skipped_from_the_first_step(poisoned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from stages.train.engine import Engine

    run_ = Engine._run

    def broken(self: Engine, share: Any, forward_only: bool, objective: Any) -> tuple[float, dict[str, float]]:
        loss, figures = run_(self, share, forward_only, objective)
        if not forward_only and self.step_done == 1 and not getattr(self, "once", False):
            self.once = True
            next(self.chunks[0].parameters()).main_grad.fill_(math.nan)
            return math.nan, figures
        return loss, figures

    monkeypatch.setattr(Engine, "_run", broken)
    out = run(poisoned, tmp_path / "nan", spikes={"action": "skip", **POLICY})
    first = lines(out, "spike")[0]
    assert first["step"] == 2 and first["spike"]["reason"] == "the loss is nan" and first["spike"]["loss"] is None
    assert all(bool(torch.isfinite(t).all()) for t in weights(out).values())


def test_broken_activations_are_rewound(poisoned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A step whose routers see no numbers at all: its record goes through work checkpoints, and no file holds a NaN."""
    from stages.mcore.megatron_imports import TopKRouter

    gate, passes = TopKRouter.gating, [0]

    def broken(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = gate(self, hidden)
        passes[0] += self.training
        return logits * math.nan if passes[0] in range(37, 41) else logits  # ten steps of two micro-batches, two layers

    monkeypatch.setattr(TopKRouter, "gating", broken)
    rewind = {"action": "rewind", "rewind_steps": 2, **POLICY}
    out = run(poisoned, tmp_path, excluded_steps=[AT], spikes=rewind, checkpoint_interval=1)
    (record,) = lines(out, "spike")
    assert record["step"] == 10 and record["spike"]["excluded"] == [9, 10] and record["spike"]["loss"] is None
    assert None in record["spike"]["experts"]["entropy"]
    for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):
        assert "NaN" not in path.read_text(), path


def test_a_continued_phase_resumes_as_it_would_have_gone_on(poisoned: Path, tmp_path: Path) -> None:
    """It keeps a work checkpoint of its beginning, to go back to, which is no release checkpoint of its own."""
    from stages.train.pretrain import STAGE

    first = run(poisoned, tmp_path / "first", spikes={"action": "rewind", **POLICY})
    (tmp_path / "order").mkdir()
    rows = [r for r in pq.read_table(poisoned / "order/part-00000.parquet").to_pylist() if r["step"] > 12]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "order/part-00000.parquet")
    meta = json.loads((poisoned / "order/meta.json").read_text())
    parts = [{"first_step": 13, "last_step": 24, "rows": Counter(r["source"] for r in rows)}]
    (tmp_path / "order/meta.json").write_text(json.dumps({**meta, "first_step": 13, "parts": parts}))
    inputs = {
        "tokens": Artifact.open(poisoned / "tokens"), "order": write_manifest(tmp_path / "order", "order-test"),
        "continue": write_manifest(first / "step-000012", "pretrain@12"),
    }  # fmt: skip
    settings = train_fixtures.config(
        **PHASE, continue_from="pretrain@12", spikes={"action": "rewind", "rewind_steps": 3, **POLICY}
    )

    def continue_phase(name: str, report: train_fixtures.Reporter | None = None, suffix: str = "") -> Path:
        out = tmp_path / name / ("out" + suffix)
        out.mkdir(parents=True)
        (tmp_path / name / "work").mkdir(exist_ok=True)
        config = STAGE.config.model_validate(settings)
        STAGE.run(config, inputs, tmp_path / name / "work", out, report or train_fixtures.Reporter())
        return out

    undisturbed = continue_phase("whole")
    assert sorted(p.name for p in undisturbed.glob("step-*")) == ["step-000024"]
    with pytest.raises(KeyboardInterrupt):
        continue_phase("killed", train_fixtures.Reporter(14, signal.SIGTERM))
    for newer in (tmp_path / "killed/work").glob("attempt-*/checkpoints/step-00000001[34]*"):
        shutil.rmtree(newer)  # as if it had been killed before it could save anything but its beginning
    assert train_fixtures.digest(continue_phase("killed", suffix="2")) == train_fixtures.digest(undisturbed)


def test_the_judge() -> None:
    policy = Spikes(action="skip", window=4, loss_sigmas=6, norm_factor=10)
    judge = SpikeDetector(policy, [{"loss": 2.0 + 0.01 * n, "grad_norm": 1.0, "tokens": 1} for n in range(3)])
    assert judge.reason(50.0, 50.0) is None, "too few steps to judge by"
    judge.accept(2.03, 1.0)
    assert judge.reason(2.05, 1.2) is None
    assert "above" in str(judge.reason(2.5, None)) and "gradient norm" in str(judge.reason(2.0, 11.0))
    assert judge.reason(math.inf, None) == "the loss is inf" and judge.reason(2.0, math.nan) is not None
    assert judge.reason(1.0, None) is None, "a fall is no spike"
    judge.accept(9.0, 1.0)  # one accepted outlier does not move a median
    assert judge.reason(2.5, None) is not None
    assert (
        SpikeDetector(None, []).reason(1e9, 1e9) is None and SpikeDetector(None, []).reason(math.nan, None) is not None
    )
    resumed = SpikeDetector(
        policy, [{"loss": 2.0, "grad_norm": 1.0}] * 4 + [{"loss": 9.0, "grad_norm": 9.0, "skipped": True}]
    )
    assert list(resumed.losses) == [2.0] * 4


class SecondTime(train_fixtures.Reporter):
    """Asks its process to stop when a step is finished for the second time (or the first, if it comes only once)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.when, self.seen = at, 0

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        self.seen += done == self.when
        if done == self.when and self.seen == (2 if self.when < AT else 1):
            signal.raise_signal(signal.SIGTERM)


@at_length("training", 20)
def test_ranks_judge_together(poisoned: Path, tmp_path: Path) -> None:
    """Two tensor-parallel ranks find the spike, go back and go on as one process does."""
    rewind = {"action": "rewind", "rewind_steps": 4, **POLICY}
    alone = layout_fixtures.settings_of({}, 1, **PHASE, spikes=rewind)
    records = {}
    for name, settings in {
        "one": alone,
        "two": layout_fixtures.settings_of({"tp": 2}, 2, **PHASE, spikes=rewind),
    }.items():
        layout_fixtures.run(poisoned, tmp_path / name, settings)
        (line,) = lines(tmp_path / name / "out", "spike")
        records[name] = line["spike"]
        records[name, "losses"] = layout_fixtures.figures(tmp_path / name / "out")
    one, two = records["one"], records["two"]
    assert one["excluded"] == two["excluded"] == [14, 15, 16, 17] and one["documents"] == two["documents"]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert records["two", "losses"] == pytest.approx(records["one", "losses"], rel=1e-3)
