"""Pre-training with Muon: in other layouts, from work checkpoints, and from a release checkpoint of another optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError
from pipeline.core.store import no_progress, write_manifest
from stages.models.mixture import Qwen3MoeConfig
from stages.models.param_names import EMBEDDING
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.config import TrainConfig
from stages.train.data import Batch, RankBatch
from stages.train.engine import Engine
from tests.fixtures import layout_fixtures, train_fixtures

OPTIMIZER: dict[str, Any] = {"kind": "muon", "lr": 2e-2, "final_lr": 1e-2, "warmup_steps": 3, "weight_decay": 0.05}


def batch_of_one() -> RankBatch:
    """One row of 16 tokens."""
    ids, labels = torch.randint(train_fixtures.VOCAB, (2, 1, 16), generator=torch.Generator().manual_seed(0))
    return RankBatch([Batch(ids, labels, torch.ones(1, 16), torch.zeros(1, 16, dtype=torch.bool), None)], 16, 16)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of a run, and its work folder beside it."""
    folder = tmp_path_factory.mktemp("muon")
    settings = train_fixtures.config(optimizer=OPTIMIZER)
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", settings)
    return folder / "out"


@pytest.mark.parametrize("kind", ["adam", "muon"])
def test_an_embedding_without_weight_decay(kind: str) -> None:
    """After one step, by hand: the decay of lr x weight_decay x weight is missing from the table, and from nothing else."""
    rate, first, after = 1e-2, dict[str, torch.Tensor](), list[dict[str, torch.Tensor]]()
    for decays in (True, False):
        # Without clipping, by a norm whose sum has another order with other groups.
        optimizer = {**OPTIMIZER, "kind": kind, "decay_embeddings": decays, "clip": 1000}
        config = TrainConfig.model_validate(train_fixtures.config(optimizer=optimizer))
        with parallel.session(0) as ranks:
            engine = Engine(config, ranks, train_fixtures.VOCAB)
            engine.initialize()
            first = {name: tensor.clone() for name, tensor in engine.full_tensors().items()}
            engine.step(batch_of_one(), rate, lambda loss, norm: None)
            after.append({name: tensor.clone() for name, tensor in engine.full_tensors().items()})

    decayed, kept = after
    missing = {name for name in first if not torch.equal(decayed[name], kept[name])}
    assert missing == {EMBEDDING}
    table = first[EMBEDDING]
    torch.testing.assert_close(
        kept[EMBEDDING] - decayed[EMBEDDING], rate * OPTIMIZER["weight_decay"] * table, rtol=1e-3, atol=1e-7
    )


@pytest.mark.numeric
def test_ranks_that_share_matrices_train_like_one(tmp_path: Path) -> None:
    """Data ranks have slices of matrices, tensor ranks rows or columns of most, and expert ranks some of the experts.

    Tensor ranks also share the log-sum-exp of a z-loss, and pipeline ranks have a tied table twice, which is not decayed.
    """
    corpus = tmp_path / "corpus"
    train_fixtures.make(corpus, {"batch": layout_fixtures.BATCH})
    optimizer = {**OPTIMIZER, "decay_embeddings": False}
    settings = layout_fixtures.settings_of({}, 1, optimizer=optimizer, output_z_loss=1e-3)
    one = layout_fixtures.train(corpus, settings, 5)
    layouts = {name: layout_fixtures.TWO[name] for name in ("DP2", "TP2+SP", "EP2", "PP2")}

    curves = layout_fixtures.compare(corpus, layouts, 2, settings, tmp_path / "two.json")

    for name, curve in curves.items():
        for figures in curve:
            figures.pop("policy", None)
        layout_fixtures.agree(curve, one, 1e-5, name)
    assert one[4]["loss"] < one[0]["loss"] - 1.5


def test_checkpoints_hold_the_states_that_exist(trained: Path) -> None:
    shapes = Qwen3MoeConfig(**train_fixtures.MODEL).shapes(train_fixtures.VOCAB)

    states = release_checkpoint.Tensors(trained / "step-000012", release_checkpoint.OPTIMIZER)

    matrices = {
        n
        for n, shape in shapes.items()
        if n.startswith("decoder") and len(shape) == 2 and not n.endswith("router.weight")
    }
    names = {f"momentum.{name}" for name in matrices}
    names |= {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in shapes.keys() - matrices}
    assert set(states) == names
    assert all(tensor.abs().sum() > 0 for tensor in states.values())


def test_a_resumed_run_ends_in_the_same_bytes(corpus: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.parent / "work", tmp_path / "work")
    for newer in (tmp_path / "work").glob("attempt-0001/checkpoints/step-*12"):
        shutil.rmtree(newer)
    report = train_fixtures.Reporter()

    train_fixtures.pretrain(
        corpus, tmp_path / "work", tmp_path / "out", train_fixtures.config(optimizer=OPTIMIZER), report
    )

    assert any("going on after step 8" in note for note in report.notes), report.notes
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(trained)


def test_states_of_another_optimizer_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "step-000006", tmp_path / "continue")
    origin = Origin(write_manifest(tmp_path / "continue", "pretrain@6-test"), "", no_progress)
    config = TrainConfig.model_validate(train_fixtures.config(optimizer=OPTIMIZER))
    tokenizer = release_checkpoint.load_state(tmp_path / "continue")["tokenizer"]
    sentence = "pretrain@6-test is of another optimizer than optimizer.kind = muon: it lacks momentum.decoder.layers.0"

    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, train_fixtures.VOCAB)
        with pytest.raises(AtomError, match=sentence):
            origin.load(engine, config, tokenizer)
