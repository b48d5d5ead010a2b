"""The loss by slices of tokens against Megatron's, which holds all logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.mcore.language_model import token_losses
from stages.mcore.model import named_tensors
from stages.models import parallel_layout
from stages.models.parallel_layout import Layout
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.data import Batch, RankBatch
from stages.train.engine import Engine, Objective, cross_entropy
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric

ROWS, WIDTH, VOCABULARY, PADDED, SLICE = 4, 32, 90, 128, 48


def squares(losses: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An objective whose gradient depends on the losses, as those of preferences and rewards do."""
    return (losses.square() * batch.loss_mask).sum(), {}


def batch_of(packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCABULARY, (2, ROWS, WIDTH), generator=generator)
    loss_mask = (torch.rand(ROWS, WIDTH, generator=generator) < 0.7).float()
    loss_mask[:, -5:] = 0
    padding = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    padding[:, -5:] = True
    starts = (torch.arange(WIDTH) >= 20).long().mul(20).expand(ROWS, WIDTH).contiguous() if packed else None
    return Batch(ids, labels, loss_mask, padding, starts)


def step(objective: Objective, settings: dict[str, Any], *micro_batches: Batch) -> dict[str, torch.Tensor]:
    """The loss with and without gradients, and the gradient of each tensor."""
    config = TrainConfig.model_validate(settings)
    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, VOCABULARY)
        engine.initialize()
        share = RankBatch([*micro_batches], WIDTH, int(sum(batch.loss_mask.sum() for batch in micro_batches)))
        figures = {"evaluated": torch.tensor(engine.figures(share, objective)[0])}
        refused = engine.step(share, 1e-3, lambda loss, norm: "an update would change the gradients", False, objective)
        figures["loss"] = torch.tensor(refused.loss)
        return figures | {name: tensor.main_grad.clone() for name, tensor in named_tensors(engine.chunks)}


def settings_of(precision: str = "fp32", packed: bool = False, recompute: str = "none", **model: Any) -> dict[str, Any]:
    settings = train_fixtures.config(precision=precision, pack=packed, parallelism={"recompute": recompute})
    return settings | {"model": {**train_fixtures.MODEL, **model}, "padded_vocab_size": PADDED}


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have a micro-batch in slices of 48 tokens from then on."""

    def start() -> None:
        monkeypatch.setattr(parallel_layout, "LOSS_SLICE", SLICE)
        monkeypatch.setattr(parallel_layout, "MOST_LOGITS", 0)

    return start


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *names: str) -> float:
    """The relative difference of some tensors together."""
    x, y = (torch.cat([tensors[name].flatten() for name in names]).double() for tensors in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize(
    ("objective", "packed", "recompute", "model"),
    [
        (cross_entropy, False, "none", {"tie_embeddings": True, "z_loss": 1e-3}),
        (cross_entropy, True, "layer", {"tie_embeddings": False}),
        (squares, True, "none", {"tie_embeddings": True}),
        (squares, False, "layer", {"tie_embeddings": False, "z_loss": 1e-3}),
    ],
)
def test_loss_and_gradients_are_megatrons(
    objective: Objective, packed: bool, recompute: str, model: dict[str, Any], slices: Callable[[], None]
) -> None:
    """In bf16, slices are as far from fp32 as Megatron's loss is."""
    batch = batch_of(packed)
    configs = [settings_of(precision, packed, recompute, **model) for precision in ("fp32", "bf16")]
    plain, plain_bf16 = (step(objective, config, batch, batch) for config in configs)
    slices()
    sliced, sliced_bf16 = (step(objective, config, batch, batch) for config in configs)
    assert plain.keys() == sliced.keys() and ("output_layer.weight" in plain) != model["tie_embeddings"]
    for name in plain:
        assert difference(sliced, plain, name) < 1e-6, name
        assert difference(sliced_bf16, plain_bf16, name) < 0.03, name
    assert not all(torch.equal(sliced[name], plain[name]) for name in plain), "the sums were in the same order"
    assert difference(sliced_bf16, plain, *plain) < 1.1 * difference(plain_bf16, plain, *plain)


def test_z_loss_is_in_the_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd of the formula, by hand: loss + weight x log-sum-exp², over the ids that exist."""
    monkeypatch.setattr(parallel_layout, "LOSS_SLICE", 5)
    generator, ids, weight = torch.Generator().manual_seed(0), 9, 0.1
    hidden = torch.randn(8, 2, 4, generator=generator, requires_grad=True)
    head = torch.randn(12, 4, generator=generator, requires_grad=True)
    labels = torch.randint(ids, (2, 8), generator=generator)
    mask = (torch.rand(2, 8, generator=generator) < 0.7).float()
    with parallel.session(0):
        losses = token_losses(hidden, head, labels, ids, mask, weight)
        gradients = torch.autograd.grad((losses * mask).sum() / 3, (hidden, head))

    logits = (hidden @ head.t())[..., :ids].transpose(0, 1)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 8)
    with_z = plain + weight * logits.logsumexp(-1) ** 2
    expected = torch.autograd.grad((with_z * mask).sum() / 3, (hidden, head))
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gradients, expected)


def test_a_phase_with_z_loss() -> None:
    """The phase's setting reaches the gradients, with logits that are few, and changes no stated loss."""
    batch, settings = batch_of(False), settings_of()
    plain = step(cross_entropy, settings, batch)
    with_z = step(cross_entropy, settings | {"phase": {**settings["phase"], "output_z_loss": 1e-2}}, batch)
    for name in ("loss", "evaluated"):
        torch.testing.assert_close(with_z[name], plain[name])
    assert difference(with_z, plain, "decoder.final_layernorm.weight") > 0.01


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))])
        return out


@pytest.mark.parametrize("objective", [cross_entropy, squares])
def test_no_tensor_has_all_logits(
    objective: Objective, slices: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PADDED", 4096)
    with Largest() as plain:
        step(objective, settings_of(), batch_of(False))
    assert plain.elements == ROWS * WIDTH * PADDED
    slices()
    with Largest() as sliced:
        step(objective, settings_of(), batch_of(False))
    assert sliced.elements == SLICE * PADDED


def test_a_micro_batch_without_targets(slices: Callable[[], None]) -> None:
    batch = batch_of(False)
    empty = dataclasses.replace(batch, loss_mask=torch.zeros(ROWS, WIDTH))
    plain = step(cross_entropy, settings_of(), batch, empty)
    slices()
    sliced = step(cross_entropy, settings_of(), batch, empty)
    assert all(difference(sliced, plain, name) < 1e-6 for name in plain)


def test_when_the_loss_is_sliced() -> None:
    """By the recipe's sizes: atom-tiny-long's longest micro-batch is not; those of most recipes for clusters are."""
    assert not Layout().slices_loss(8192, 96, 512) and Layout().slices_loss(8193, 96, 512)
    assert Layout().slices_loss(4096, 2048, 151936)
    assert Layout(fusions=("cross_entropy",)).slices_loss(8, 96, 512, has_z_loss=True), "the others have none"
    assert not Layout().slices_loss(4096, 4096, 151936), "the gradient of the head would take as much as its logits"
    split = Layout(ranks=4, tp=4)
    assert not split.slices_loss(8192, 1024, 2048) and split.slices_loss(8200, 1024, 2048)
    assert not Layout(fusions=("cross_entropy",)).slices_loss(4096, 2048, 151936)
    assert Layout(fusions=("rope",)).slices_loss(4096, 2048, 151936)
