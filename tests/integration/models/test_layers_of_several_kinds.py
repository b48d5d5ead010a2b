"""A model whose layers are of several kinds, and not Megatron's GPTModel: the same model in Megatron's hybrid form, through
the engine, has the same names, losses, routing and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from stages.mcore.model import build, named_tensors
from stages.mcore.simulated_rank import fake_groups
from stages.models.parallel_layout import Layout
from stages.models.qwen3_moe import Qwen3MoeConfig
from stages.train import parallel
from tests.fixtures import hybrid_fixtures, layout_fixtures, train_fixtures

MODEL: dict[str, Any] = {
    **train_fixtures.MODEL, "layers": 4, "dense_layers": 1, "intermediate_size": 32, "z_loss": 1e-3,
}  # fmt: skip
"""Attention, dense and with experts: `*-*E*E*E`."""


@contextmanager
def hybrid() -> Iterator[None]:
    with mock.patch.object(Qwen3MoeConfig, "spec", lambda _: hybrid_fixtures.SPEC):
        yield


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The corpus, by whether its rows are packed."""
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return {False: folder, True: folder / "packed"}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_it_trains_with_the_same_bits(corpora: dict[bool, Path], packed: bool) -> None:
    """Figures of the routers by layer among them, and the sum of all weights after the steps."""
    settings = {**train_fixtures.config(pack=packed), "model": MODEL}
    expected = layout_fixtures.train(corpora[packed], settings, 3)
    with hybrid():
        assert layout_fixtures.train(corpora[packed], settings, 3) == expected
    assert expected[2]["loss"] != expected[0]["loss"] and len(expected[0]["share"]) == 3 * MODEL["experts"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_pipeline_names_its_tensors_alike(rank: int) -> None:
    """A rank has two layers of ours, four of Megatron's; experts are numbered over the whole model."""
    model, layout = Qwen3MoeConfig(**MODEL), Layout(ranks=4, pp=2, ep=2)
    with fake_groups(layout, 2 * rank + 1):
        ours = {name: tuple(p.shape) for name, p in named_tensors(build(model, train_fixtures.VOCAB, layout))}
        with hybrid():
            theirs = {name: tuple(p.shape) for name, p in named_tensors(build(model, train_fixtures.VOCAB, layout))}
    assert theirs == ours and f"decoder.layers.{3 * rank}.input_layernorm.weight" in theirs


def test_its_tensors_have_names_in_transformers() -> None:
    """And are those of the architecture's closed form."""
    model = Qwen3MoeConfig(**MODEL)
    with parallel.session(0), hybrid():
        tensors = {name: torch.randn(p.shape) for name, p in named_tensors(build(model, train_fixtures.VOCAB))}
    exported = dict(hybrid_fixtures.SPEC.to_hf(tensors, model, train_fixtures.VOCAB))
    back = dict(hybrid_fixtures.SPEC.from_hf(exported, model))
    assert {name: tuple(x.shape) for name, x in tensors.items()} == model.shapes(train_fixtures.VOCAB)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
