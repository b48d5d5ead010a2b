"""Routing replay: the trainer's tokens visit the experts that the sampler chose."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.core.errors import CheckFailed
from stages.generation.protocols import decode_routes, encode_routes
from stages.models.base import Routing
from stages.rl.config import RlTrainConfig
from stages.rl.rollout import rollouts
from tests.fixtures import rl_fixtures
from tests.fixtures.rl_fixtures import place  # noqa: F401 - fixtures

ROUTING = Routing(experts=4, top_k=2, layers=range(2), z_loss=False)
REPLAYED: dict[str, Any] = {"routing_replay": True, "steps": 2, "validate_every": 1}


@pytest.fixture(scope="module")
def replayed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    rl_fixtures.rlvr(place, folder / "work", folder / "out", rl_fixtures.config(**REPLAYED))
    return folder / "out"


def test_every_answer_names_the_experts_of_its_tokens(replayed: Path) -> None:
    answers = rollouts.read(replayed / "rollouts.parquet")
    recorded = []
    for r in answers:
        tokens = len(r.prompt_ids) + len(r.ids) - 1
        assert r.routes is not None and len(r.routes) == tokens * 2 * 2
        recorded.append(decode_routes(r.routes, tokens, ROUTING))
    by_prompt: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for r, x in zip(answers, recorded, strict=True):
        before = x[: len(r.prompt_ids)]
        assert torch.equal(by_prompt.setdefault((r.policy, tuple(r.prompt_ids)), before), before)
    assert len(torch.cat(recorded).flatten().unique()) == ROUTING.experts


@pytest.mark.numeric
def test_the_log_has_the_gap_with_and_without_replay(replayed: Path) -> None:
    lines = [x for x in rl_fixtures.lines(replayed) if "sampler_gap" in x]
    assert len(lines) == 2 and max(x["sampler_gap"] for x in lines) <= 1e-6
    assert all(math.isfinite(x["sampler_gap_own_routing"]) for x in lines)


def gaps(precision: str, seed: int) -> tuple[float, float]:
    """Mean difference of a token's log-probability between a sampler in fp32 and a trainer: with routing replay, and
    with routers that choose."""
    from stages.generation.in_process import InProcess
    from stages.generation.protocols import Prompt
    from stages.mcore.hf_mapping import hf_config, to_hf
    from stages.rl.algorithms.grpo import without_routes
    from stages.rl.rollout.batches import Example, build_rank_batch
    from stages.train import parallel
    from stages.train.data import Batch
    from stages.train.engine import Engine

    sizes = {"layers": 3, "experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "init_std": 0.2}
    settings = rl_fixtures.config(routing_replay=True, precision=precision)
    settings |= {"seed": seed, "model": {**rl_fixtures.MODEL, **sizes}}
    config, padded = RlTrainConfig.model_validate(settings), rl_fixtures.PADDED
    assert config.model.routing is not None
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        Prompt(tuple(torch.randint(6, padded, (9,), generator=generator).tolist()), seed=n // 2) for n in range(32)
    ]
    sampler = InProcess(hf_config(config.model, padded, 1, 0, "float32"), (padded,), 16, routes=True)
    with parallel.session(seed) as ranks:
        engine = Engine(config, ranks, padded)
        engine.initialize()
        sampler.load(dict(to_hf(engine.full_tensors(), config.model, padded)))
        examples = []
        for prompt, drawn in zip(prompts, sampler.generate(prompts), strict=True):
            assert drawn.routes is not None
            recorded = decode_routes(drawn.routes, 24, config.model.routing)
            examples.append(Example([*prompt.ids, *drawn.ids], 9, {}, {"sampler": drawn.logprobs}, recorded))
        batch = build_rank_batch([[x] for x in examples], 2, ranks, 0, 32 * 16)

        def gap(cross_entropy: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return ((-cross_entropy - batch.extras["sampler"]).abs() * batch.loss_mask).sum(), {}

        return engine.figures(batch, gap)[0], engine.figures(without_routes(batch), gap)[0]


@pytest.mark.numeric
def test_replay_narrows_the_gap_of_a_trainer_in_bf16() -> None:
    """Its routers see rounded activations, and choose other experts now and then."""
    with_replay, without = gaps("bf16", 0)
    assert with_replay < 0.7 * without  # 0.27 to 0.47 of it over three seeds


def test_with_several_updates_it_replays_bit_by_bit(place: Path, tmp_path: Path) -> None:
    changes = {"updates": 2, "kl_coef": 0.1, "max_resample_rounds": 4, "parallelism": {"recompute": "layer"}}
    settings = rl_fixtures.config(**REPLAYED, **changes)
    rl_fixtures.rlvr(place, tmp_path / "calm-work", tmp_path / "calm", settings)
    answers = rl_fixtures.record(tmp_path / "calm", tmp_path / "answers")
    rl_fixtures.rlvr(place, tmp_path / "replay-work", tmp_path / "replay", settings, rollouts=answers)
    assert rl_fixtures.trained(tmp_path / "replay") == rl_fixtures.trained(tmp_path / "calm")


def test_recorded_experts_that_no_router_chose_are_refused(place: Path, replayed: Path, tmp_path: Path) -> None:
    answers = rl_fixtures.record(replayed, tmp_path / "answers")
    path = answers.path / "rollouts.parquet"
    edited = rollouts.read(path)
    assert edited[0].routes is not None
    vars(edited[0])["routes"] = bytes([0, 0]) + edited[0].routes[2:]
    rollouts.write(path, edited)
    with pytest.raises(CheckFailed, match="answer 0 in step 1, wave 0 has experts that its tokens cannot have"):
        rl_fixtures.rlvr(place, tmp_path / "work", tmp_path / "out", rl_fixtures.config(**REPLAYED), rollouts=answers)


def test_a_token_visits_the_given_experts_and_a_router_chooses_for_the_others() -> None:
    from stages.mcore.model import build, full_tensor
    from stages.mcore.routers import UNRECORDED, RoutingReplay
    from stages.models.mixture import Qwen3MoeConfig
    from stages.train import parallel
    from tests.fixtures.model_fixtures import load_tensors

    model = Qwen3MoeConfig.model_validate(rl_fixtures.MODEL)
    full = {n: full_tensor(n, s, model, 0) for n, s in model.shapes(rl_fixtures.PADDED).items()}
    with parallel.session(0):
        (gpt,) = build(model, rl_fixtures.PADDED, packed=True, routing_replay=True)
        load_tensors([gpt], model, rl_fixtures.PADDED, full)
        assert model.routing is not None
        replay = RoutingReplay([gpt], model.routing)
        ids = torch.arange(6, 30)[None]
        maps: list[torch.Tensor] = []
        for layer in gpt.decoder.layers:
            layer.mlp.router.register_forward_hook(lambda router, inputs, output: maps.append(output[1]))

        def run(given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            maps.clear()
            with replay.forward(0, given):
                logits = gpt(ids, torch.arange(24)[None], None)
            gpt.zero_grad()
            logits.square().mean().backward()
            replay.clear()
            assert all(layer.mlp.router.weight.grad.any() for layer in gpt.decoder.layers)
            return torch.stack(maps, 1), logits

        routed, logits = run(None)
        again, same = run(torch.full((24, 2, 2), UNRECORDED, dtype=torch.int16))
        assert torch.equal(routed, again) and torch.equal(logits, same)
        other = (~routed).int().topk(2).indices.short()  # the two that it did not choose
        mixed = other.clone()
        mixed[::2] = UNRECORDED
        chosen, _ = run(mixed)
        assert torch.equal(chosen[1::2], ~routed[1::2])
        assert torch.equal(chosen[::2, 0], routed[::2, 0])


@pytest.mark.parametrize(
    ("model", "phase", "message"),
    [
        (
            {},
            {"sampling": {"kind": "vllm", "max_new_tokens": 12}},
            "vLLM records its experts only by a kernel in Triton",
        ),
        ({}, {"parallelism": {"fusions": ["router"]}}, "whose kernel chooses the experts by itself"),
        ({"kind": "qwen3"}, {}, "has no effect on a dense model"),
    ],
)
def test_what_cannot_replay_is_refused(model: dict[str, Any], phase: dict[str, Any], message: str) -> None:
    config = rl_fixtures.config(routing_replay=True, **phase)
    if model:
        dropped = ("experts", "num_experts_per_tok", "moe_intermediate_size", "aux_loss")
        config["model"] = {k: v for k, v in config["model"].items() if k not in dropped}
        config["model"] |= {"architecture": "qwen3", "intermediate_size": 64}
    with pytest.raises(ValidationError, match=message):
        RlTrainConfig.model_validate(config)


def test_records_of_large_and_small_mixtures_come_back() -> None:
    for experts, size in ((256, 1), (257, 2)):
        routing = Routing(experts=experts, top_k=3, layers=range(2), z_loss=False)
        chosen = torch.rand(7, 2, experts, generator=torch.Generator().manual_seed(0)).topk(3).indices
        record = encode_routes(chosen, experts)
        assert len(record) == 7 * 2 * 3 * size
        assert torch.equal(decode_routes(record, 7, routing), chosen.short())
        with pytest.raises(ValueError, match="are not those of 8 tokens"):
            decode_routes(record, 8, routing)
