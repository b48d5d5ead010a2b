"""The balance loss: of the experts that tokens are dispatched to, over the tokens that the recipe says, and never small
because all scores are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.core.store import Artifact
from stages.mcore.megatron_imports import TopKRouter
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.data import Order, RankBatch, Shards
from stages.train.engine import Engine
from tests.fixtures import train_fixtures
from tests.fixtures.architecture_fixtures import MODELS

pytestmark = pytest.mark.numeric


def balance_loss(logits: torch.Tensor, routing_map: torch.Tensor, top_k: int) -> torch.Tensor:
    """E times the sum over experts of the share of assignments times the mean normalized score (Switch Transformer, with
    DeepSeek-V3's scores), written down once more."""
    scores = logits.double().sigmoid()
    share = routing_map.double().sum(0) / (routing_map.shape[0] * top_k)
    return logits.shape[1] * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()


@contextmanager
def trained(corpus: Path, model: dict[str, Any], **phase: Any) -> Iterator[tuple[Engine, RankBatch]]:
    """A model with its initial weights, and the batch of the first step."""
    config = TrainConfig.model_validate({**train_fixtures.config(**phase), "model": model})
    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, train_fixtures.VOCAB)
        engine.initialize()
        order = Order(Artifact.open(corpus / "order"), config.phase)
        shards = Shards(Artifact.open(corpus / "tokens"), "train")
        yield engine, RankBatch.read(order.rows(1), shards, config.phase.micro_rows, ranks)


def routers_of(engine: Engine) -> list[Any]:
    return [module for chunk in engine.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_the_loss_is_that_of_the_dispatched_experts(corpus: Path, architecture: str) -> None:
    """With biases and groups, which move tokens to other experts than those with the best scores."""
    balanced = {"aux_loss": 0.01, "balance": "batch", "router_bias_update_rate": 0.01, "init_std": 0.5}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with trained(corpus, {**MODELS[architecture], **balanced}) as (engine, share):
        routers = routers_of(engine)
        for router in routers:
            router.expert_bias.copy_(torch.linspace(0.2, -0.2, router.expert_bias.numel()))
            watch(router, seen)
        figures = engine.step(share, 3e-3, lambda loss, norm: None)
    top_k = engine.config.model.routing.top_k
    assert len(seen) == len(routers) * len(share.micro) > 0
    expected = sum(balance_loss(*each, top_k) for each in seen)
    best = [torch.zeros_like(m).scatter(1, logits.topk(top_k).indices, True) for logits, m in seen]
    unlike = sum(balance_loss(logits, m, top_k) for (logits, _), m in zip(seen, best, strict=True))
    assert figures.router.aux_loss == pytest.approx(float(expected) / len(share.micro), rel=1e-5)
    assert abs(float(expected - unlike)) > 0.01 * float(expected), "the case tells both maps apart"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_the_loss_over_a_step_takes_the_load_of_the_step_before(corpus: Path, architecture: str) -> None:
    model = {**MODELS[architecture], "aux_loss": 0.01, "balance": "global", "init_std": 0.5}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with trained(corpus, model, batch={"global_tokens": 256, "micro_tokens": 64}) as (engine, share):
        for router in (routers := routers_of(engine)):
            watch(router, seen)
        first, second = (engine.step(share, 3e-3, lambda loss, norm: None) for _ in range(2))
        load = engine.router_state()
        engine.step(share, 3e-3, lambda loss, norm: "refused")
        engine.evaluate(share)
        assert engine.router_state() == load, "only an update counts"
    top_k, micro_batches = engine.config.model.routing.top_k, len(share.micro)
    calls = [seen[layer :: len(routers)] for layer in range(len(routers))]
    expected, shares = 0.0, []
    for layer in calls:
        before, now = layer[:micro_batches], layer[micro_batches : 2 * micro_batches]
        counts = sum(routing_map.double().sum(0) for _, routing_map in before)
        for logits, _ in now:
            scores = logits.double().softmax(-1) if architecture == "qwen3_moe" else logits.double().sigmoid()
            mean_score = (scores / scores.sum(-1, keepdim=True)).mean(0)
            expected += float(logits.shape[1] * (counts / counts.sum() * mean_score).sum()) / micro_batches
        counts = sum(routing_map.double().sum(0) for _, routing_map in now)
        assert counts.sum() == top_k * sum(len(logits) for logits, _ in now)
        shares.append((counts / counts.sum()).float().tolist())
    assert first.router.aux_loss == pytest.approx(len(routers), rel=1e-5), "an even load makes the loss constant"
    assert second.router.aux_loss == pytest.approx(expected, rel=1e-5)
    assert abs(expected - len(routers)) > 1e-3, "the case is uneven"
    assert load == {"expert_load": shares}


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_under_its_own_load_a_micro_batch_has_the_loss_and_gradient_of_a_step(corpus: Path, architecture: str) -> None:
    """A step of one micro-batch that moves nothing, and again: then both scopes are the same loss."""
    figures = {}
    for balance in ("batch", "global"):
        model = {**MODELS[architecture], "aux_loss": 1.0, "balance": balance, "init_std": 0.5}
        model |= {} if architecture == "qwen3_moe" else {"router_bias_update_rate": 0.0}
        with trained(corpus, model, batch={"global_tokens": 256, "micro_tokens": 256}) as (engine, share):
            steps = [engine.step(share, 0.0, lambda loss, norm: None) for _ in range(2)]
        figures[balance] = [(x.router.aux_loss, x.grad_norm) for x in steps]
    assert figures["global"][1] == pytest.approx(figures["batch"][1], rel=1e-6)
    assert figures["global"][0][1] != pytest.approx(figures["batch"][0][1], rel=1e-4), "the gradient has a part of it"


def watch(router: Any, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Keeps the logits of a router, and the map by which it dispatches, without padding."""
    route = router.routing

    def routing(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        routed = route(logits, padding_mask=padding_mask)
        real = slice(None) if padding_mask is None else ~padding_mask.reshape(-1)
        seen.append((logits.detach().reshape(-1, logits.shape[-1])[real], routed[1][real]))
        return routed

    router.routing = routing


@pytest.mark.parametrize("size", [0.0, -20.0, -60.0, -80.0])
def test_small_scores_do_not_make_a_small_loss(size: float) -> None:
    """All tokens go to one pair of experts: the loss is as large as it gets, and pushes their scores down."""
    from megatron.core.transformer.moe import router
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    logits = torch.full((16, 8), size)
    logits[:, :2] += 3
    logits.requires_grad_()
    router.topk_routing_with_score_function(logits, 2, score_function="sigmoid")
    routing_map, scores = router.compute_routing_scores_for_aux_loss(logits, 2, "sigmoid")
    loss = switch_load_balancing_loss_func(scores, routing_map.sum(0), 16, 2, 8, 1.0)
    loss.backward()
    torch.testing.assert_close(scores.sum(-1), torch.ones(16))
    assert loss.item() > 1.2 and logits.grad is not None and (logits.grad[:, :2] > 0).all()


class Kernels(TorchDispatchMode):
    """The operations that compute something: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_layers_count_their_tokens_together(corpus: Path, architecture: str) -> None:
    """Bit for bit what each layer would add by itself, in whatever order layers and micro-batches come; a layer adds eight
    kernels to a router's own."""
    with trained(corpus, {**MODELS[architecture], "layers": 5}) as (engine, _):
        routers, watch = routers_of(engine), engine.routers
        expected = torch.zeros_like(watch.counts)
        passes = [
            (0, range(len(routers))),
            (1, range(len(routers))),
            (1, reversed(range(len(routers)))),
            (0, [2, 0, 1, 1]),
        ]
        masks = [torch.rand(3, 16, generator=torch.Generator().manual_seed(n)) < 0.3 for n in range(2)]
        for number, order in passes:
            for place, row in enumerate(order):
                padding, router = masks[number].transpose(0, 1), routers[row]
                logits = torch.randn(
                    48, watch.routing.experts, generator=torch.Generator().manual_seed(row + 9 * place)
                )
                with Kernels() as alone:
                    routed = TopKRouter.routing(router, logits, padding_mask=padding)
                with Kernels() as watched:
                    router.routing(logits, padding_mask=padding)
                added = len(watched.names) - len(alone.names)
                assert added <= (8 if place and order is not passes[3][1] else 16), watched.names
                score = logits.softmax(-1) if architecture == "qwen3_moe" else logits.sigmoid()
                score = score / score.sum(-1, keepdim=True)
                real = (~padding.reshape(-1)).float()
                expected[row, :-2] += real @ routed[1].float()
                expected[row, -2] += -torch.xlogy(score, score).sum(-1) @ real
                expected[row, -1] += real.sum()
        watch._add()
        assert torch.equal(watch.counts, expected) and expected[:, -2].min() > 0
