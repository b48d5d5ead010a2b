"""The model of a step's time: by hand, and what must hold of any layout and machine."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from pipeline.core.stage import RECOMPUTED, Accelerator
from stages.mcore.throughput import (
    CONSTANTS,
    Again,
    Constants,
    LayerShape,
    Shape,
    StepSetup,
    StepTime,
    collective,
    dispatch,
    shape_of,
    step_time,
)
from stages.models.base import AttentionCost, Rows
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout

GPU = Accelerator(
    {"bf16": 1000.0, "fp8": 2000.0, "fp4": 6000.0}, memory=100.0, nvlink=50.0, nvlink_gpus=8, network=10.0
)
PLAIN = Constants(
    bf16=0.5, fp8=0.5, grouped=0.5, attention=0.7, passes=2, link=0.5, launch=0.1, fp4=0.5, host=0, sparse_host=0
)
DENSE = Shape(10, 20, (LayerShape(4, 300, 0, 50, 0),), AttentionCost(4, 2, 128, 128))
SPARSE = Shape(10, 20, (LayerShape(4, 300, 800, 50, 40),), AttentionCost(4, 2, 128, 128), experts=8, top_k=2)
QWEN3_30B = shape_of(
    Qwen3MoeConfig(
        layers=48, hidden_size=2048, heads=32, kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, context_length=4096, tie_embeddings=False,
    ),
    151_936,
)  # fmt: skip
H100 = Accelerator({"bf16": 989e12, "fp8": 1979e12}, 3.35e12, 450e9, 8, 50e9, 700)


def run(precision: str = "bf16", micro_batches: int = 1, **layout: Any) -> StepSetup:
    return StepSetup(Layout(**layout), precision, Rows(1, 8), micro_batches)


def test_a_dense_step_by_hand() -> None:
    """8 tokens of 4 layers of 300 parameters, at 500 FLOP/s; a head of 200 parameters; each query sees 4 keys."""
    assert step_time(DENSE, GPU, run(micro_batches=3), PLAIN) == StepTime(
        products=pytest.approx(3 * 6 * 8 * (1200 + 200) / 500),
        attention=pytest.approx(3 * 6 * 8 * 4 * 2 * 256 * 4 * 7 / 6 / 700),
        between=pytest.approx(3 * 8 * (4 * 50 * 2 + 16 * 20) / 100),
        weights=pytest.approx(3 * 1200 * 2 * (2 + 4) / 100),
        launches=pytest.approx(3 * 4 * 80 * 0.1),
        tensor=0,
        experts=0,
        # 1,200 + 2 x 200 parameters: master and moments both ways, gradient, weight; gradient measured and zeroed
        optimizer=pytest.approx(1600 * (24 + 4 + 2 + 8) / 100),
    )


def test_a_sparse_step_by_hand() -> None:
    """2 of 8 experts of 100 parameters, at half the rate; 2 experts on each of 4 ranks."""
    time = step_time(SPARSE, GPU, run(ranks=4, ep=4), PLAIN)
    assert time.products == pytest.approx(6 * 8 * (1200 + 4 * 2 * 100 / 0.5 + 200) / 500)
    assert time.between == pytest.approx(8 * (4 * (50 + 40) * 2 + 16 * 20) / 100)
    assert time.weights == pytest.approx((1200 + 3200 / 4) * 12 / 100)
    assert time.launches == pytest.approx(4 * (80 + 40 + 2 * 6) * 0.1)
    assert time.experts == pytest.approx(4 * 4 * (2 * 10 * 8) * 2 * (3 / 4) / 50 / 0.5)


def test_what_is_computed_again_by_hand() -> None:
    """A third of what passing 30 of the kept bytes costs, and of the products of 100 parameters."""
    shape = replace(SPARSE, again={"layernorm": Again(0, 30), "shared_experts": Again(100, 0)})
    plain, norms, experts = (
        step_time(shape, GPU, run(ranks=4, ep=4, **layout), PLAIN)
        for layout in (
            {},
            {"recompute": "selective", "recompute_modules": ("layernorm",)},
            {"recompute": "selective", "recompute_modules": ("shared_experts",)},
        )
    )
    assert norms == replace(plain, between=pytest.approx(plain.between + 8 * 30 * 2 / 3 / 100))
    assert experts == replace(plain, products=pytest.approx(plain.products + 2 * 8 * 100 / 500))


def test_a_gpu_waits_for_its_host() -> None:
    """A host of 2,000 s a layer, 2,998.8 more for experts and 1.2 to launch their kernels, two experts of six a rank. The
    GPU takes less."""
    slow = replace(PLAIN, host=2000.0, sparse_host=2998.8)

    def micro_batch(setup: StepSetup, constants: Constants) -> StepTime:
        one, two = (step_time(SPARSE, GPU, replace(setup, micro_batches=n), constants) for n in (1, 2))
        return StepTime(*(getattr(two, f.name) - getattr(one, f.name) for f in fields(StepTime)))

    for setup, seconds in (
        (run(ranks=4, ep=4), 4 * (2000 + 3000)),
        (run(ranks=4, ep=4, dispatcher="flex"), 4 * 2000),
        (run(ranks=4, ep=4, recompute="layer"), 4 * (2000 + 3000) * RECOMPUTED),
        (run(ranks=8, ep=4, pp=2), 2 * (2000 + 3000)),
        (replace(run(ranks=4, ep=4), graphs="mlp"), 4 * (1000 + 3000)),
        (replace(run(ranks=4, ep=4), graphs="partial"), 4 * 3000),
    ):
        free = micro_batch(setup, PLAIN)
        assert free.host == 0
        waiting = micro_batch(setup, slow)
        assert replace(waiting, host=0) == free
        assert waiting.host == pytest.approx(seconds - free.total) and waiting.host > 0
    full = replace(run(ranks=4, ep=4), graphs="full")
    assert step_time(SPARSE, GPU, full, slow) == step_time(SPARSE, GPU, full, PLAIN)
    assert step_time(SPARSE, GPU, run(ranks=4, ep=4), replace(slow, host=0.1, sparse_host=0.1)).host == 0


def test_one_micro_batch_has_no_other_to_hide_the_traffic_of_experts() -> None:
    setup = run(ranks=4, ep=4)
    bare, alone, four = (
        step_time(SPARSE, GPU, replace(setup, micro_batches=n, hides_experts=hides), PLAIN).experts
        for n, hides in ((1, False), (1, True), (4, True))
    )
    assert alone == bare > 0 and four == pytest.approx(bare)  # a quarter of each of four


def test_fp8_moves_what_it_quantizes_and_keeps_attention_and_head_in_bf16() -> None:
    bf16, blockwise, tensorwise = (
        step_time(SPARSE, GPU, run(p), PLAIN) for p in ("bf16", "fp8-blockwise", "fp8-tensorwise")
    )
    layers = 6 * 8 * (1200 + 4 * 2 * 100 / 0.5)
    assert bf16.products - tensorwise.products == pytest.approx(layers / 500 - layers / 1000)
    assert bf16.attention == blockwise.attention
    assert blockwise.between - bf16.between == pytest.approx(8 * 200 * 2 / 100)
    assert tensorwise.between - bf16.between == pytest.approx(8 * 200 * 4 / 100)
    assert tensorwise.launches - bf16.launches == pytest.approx(4 * 8 * 12 * 0.1)


def test_nvfp4_leaves_its_last_layers_in_bf16() -> None:
    """Three quarters of the layers at 3000, the rest at 500 FLOP/s; weights of 4.5 bits."""
    run_ = replace(run("nvfp4"), bf16_layers=1)
    bf16, nvfp4 = step_time(SPARSE, GPU, run("bf16"), PLAIN), step_time(SPARSE, GPU, run_, PLAIN)
    layers = 6 * 8 * (1200 + 4 * 2 * 100 / 0.5)
    assert bf16.products - nvfp4.products == pytest.approx(layers * 0.75 * (1 / 500 - 1 / 3000))
    assert nvfp4.between - bf16.between == pytest.approx(8 * 200 * 4 / 100)
    assert bf16.weights - nvfp4.weights == pytest.approx((1200 + 3200) * 2 * (2 - 4.5 / 8) / 100)


@pytest.mark.parametrize("pp, vpp", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_the_bubble_is_exact(pp: int, vpp: int) -> None:
    """(pp - 1) / vpp of a micro-batch's time, for any number of them (Narayanan et al., 2021)."""
    one, ten = (step_time(DENSE, GPU, run(micro_batches=n, ranks=pp, pp=pp, vpp=vpp), PLAIN) for n in (1, 10))
    micro_batch = (ten.total - one.total) / 9
    assert one.bubble == ten.bubble == pytest.approx((pp - 1) / vpp * micro_batch)


def test_the_fullest_stage_decides() -> None:
    """Of 5 layers a pipeline of 2 has 3 on one stage, the first one unless stated; balanced ranks share the head."""
    five = replace(DENSE, layers=(replace(DENSE.layers[0], layers=5),))
    two = run(ranks=2, pp=2)
    assert step_time(five, GPU, two, PLAIN).products == pytest.approx(6 * 8 * 3 * 300 / 500)
    turned = run(ranks=2, pp=2, pp_layers=(2, 3))
    assert step_time(five, GPU, turned, PLAIN).products == pytest.approx(6 * 8 * (3 * 300 + 200) / 500)
    assert step_time(five, GPU, two, PLAIN).bubble < step_time(five, GPU, turned, PLAIN).bubble
    shared = step_time(five, GPU, replace(two, balanced=True), PLAIN)
    assert shared.products == pytest.approx(6 * 8 * (3 * 300 + 100) / 500)


def test_a_collective_uses_nvlink_inside_a_domain_and_the_network_between() -> None:
    assert collective(GPU, 100, 1, 1) == 0
    assert collective(GPU, 100, 8, 1) == pytest.approx(100 * 7 / 8 / 50)
    assert collective(GPU, 100, 2, 8) == pytest.approx(100 / 2 / 10)
    # 32 ranks in 4 domains: each of a domain's 8 carries an eighth over the network
    assert collective(GPU, 100, 32, 1) == pytest.approx(100 * 7 / 8 / 50 + 100 * 3 / 4 / 8 / 10)


def test_dispatch_by_hand() -> None:
    """A domain of 2 among 4 ranks: of two copies half leave it. flex: 4 (1 - (3/4)^2) ranks and 2 (1 - (1/2)^2)
    domains differ."""
    gpu, layout = replace(GPU, nvlink_gpus=2), Layout(ranks=4, ep=4)
    flex = layout.model_copy(update={"dispatcher": "flex"})
    assert dispatch(gpu, 100, 2, layout) == pytest.approx(100 / 10 + 2 * 100 / 2 / 50)
    assert dispatch(gpu, 100, 2, flex) == pytest.approx(0.75 * 100 / 10 + 1.75 * 100 / 2 / 50)
    assert dispatch(gpu, 100, 2, Layout(ranks=4)) == 0


LAYOUTS = [
    Layout(ranks=16, ep=16),
    Layout(ranks=64, tp=4, pp=2, ep=8),
    Layout(ranks=64, tp=16, cp=2, ep=4, etp=2, recompute="layer"),
    Layout(ranks=32, pp=4, vpp=3, ep=8, dispatcher="flex", overlap_gradients=False),
]


def test_muon_orthogonalizes_what_a_rank_owns() -> None:
    """A layer has queries, keys and values of 2,048 by 5,120 in one matrix, an output of 4,096 by 2,048, and experts."""

    def seconds(**layout: Any) -> float:
        setup = StepSetup(Layout(**layout), "bf16", Rows(1, 4096), 8)
        adam, muon = (step_time(QWEN3_30B, H100, replace(setup, orthogonalized=each)) for each in (0, 5))
        assert muon.total - adam.total == pytest.approx(muon.optimizer - adam.optimizer)
        return muon.optimizer - adam.optimizer

    def flops(short: int, long: int) -> float:
        return 4 * short**2 * long + 2 * short**3

    qkv, output = flops(2048, 5120), flops(2048, 4096)
    of_expert = flops(1536, 2048) + flops(768, 2048)
    rate, launch = 989e12 * CONSTANTS.bf16, 3 * CONSTANTS.launch
    alone = 48 * ((qkv + output + 128 * of_expert) / rate + (2 + 128 * 2) * launch)
    assert seconds() == pytest.approx(5 * alone, rel=1e-6)
    # Every rank has its share of the experts. The other matrices are fewer than the ranks, so a rank has at least one,
    # and all of them are divided; of experts, those across the 63 borders between 64 ranks.
    many = seconds(ranks=512, ep=8)
    experts = 48 * 128 * (of_expert / rate + 2 * launch) / 512
    dense_bytes, expert_bytes = 2 * 2048 * (5120 + 4096) / 2, 2 * 2048 * (1536 + 768) / 2
    sums = 96 * collective(H100, dense_bytes, 512, 1) + 63 * collective(H100, expert_bytes, 64, 8)
    assert many == pytest.approx(5 * (experts + qkv / rate + launch) + 2 * sums / CONSTANTS.link, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["bf16", "fp8-tensorwise"])
@pytest.mark.parametrize("field", ["peaks", "memory", "nvlink", "nvlink_gpus", "network", "watts"])
def test_more_of_anything_is_never_slower(layout: Layout, precision: str, field: str) -> None:
    value = getattr(H100, field)
    faster = replace(H100, **{field: {k: 2 * v for k, v in value.items()} if field == "peaks" else 2 * value})
    before, after = (
        step_time(QWEN3_30B, gpu, StepSetup(layout, precision, Rows(1, 4096), 8)).total for gpu in (H100, faster)
    )
    assert 0 < after <= before * (1 + 1e-12)


def test_tensor_ranks_on_two_nodes_and_recomputation_are_slower() -> None:
    """With so many tokens that no GPU waits for its host."""

    def seconds(rows: int, **layout: Any) -> float:
        return step_time(QWEN3_30B, H100, StepSetup(Layout(**layout), "bf16", Rows(rows, 4096), 8)).total

    assert seconds(8, ranks=16, tp=16) > seconds(8, ranks=8, tp=8)
    assert seconds(2, ranks=16, ep=16) > seconds(2, ranks=16, ep=16, dispatcher="flex") > seconds(2, ranks=16, ep=8)
    assert 1.2 < seconds(2, ranks=16, ep=8, recompute="layer") / seconds(2, ranks=16, ep=8) < RECOMPUTED
    assert 1 < seconds(2, ranks=16, ep=8, recompute="selective") / seconds(2, ranks=16, ep=8) < 1.1


def test_fp8_is_slower_for_narrow_experts_on_h100_and_faster_for_wide_ones() -> None:
    """As published of Qwen3-30B-A3B; the wide ones have four times the hidden size and width, and as many FLOPs."""
    wide = Qwen3MoeConfig(
        layers=12, hidden_size=8192, heads=64, kv_heads=8, head_dim=128, experts=32, num_experts_per_tok=2,
        moe_intermediate_size=3072, context_length=4096, tie_embeddings=False,
    )  # fmt: skip
    gains = []
    for shape in (QWEN3_30B, shape_of(wide, 151_936)):
        bf16, fp8 = (
            step_time(shape, H100, StepSetup(Layout(ranks=16, ep=8), precision, Rows(1, 4096), 8)).total
            for precision in ("bf16", "fp8-tensorwise")
        )
        gains.append(bf16 / fp8)
    assert gains[0] < 1 < gains[1]


def test_the_shape_of_a_config_has_its_parameters() -> None:
    """With the norms of its layers."""
    model = Qwen3MoeConfig(
        layers=4, hidden_size=64, heads=8, kv_heads=4, head_dim=16, experts=8, num_experts_per_tok=2,
        moe_intermediate_size=48, context_length=512, tie_embeddings=False, dense_layers=1, intermediate_size=96,
    )  # fmt: skip
    shape, norms = shape_of(model, 128), 4 * (2 * 64 + 2 * 16)
    assert shape.matrices == model.matrices(128) + norms
    total = shape.total.dense + shape.total.experts + 2 * shape.head
    assert total + model.hidden_size == model.parameters(128)["total"]
    assert (shape.depth, shape.sparse, shape.experts, shape.top_k) == (4, 3, 8, 2)
