"""The planner's closed forms: parameters as Megatron builds them, activations as autograd saves them, by hand elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.mcore import layer_spec, lora_layers
from stages.mcore.layout_check import problem
from stages.mcore.lora import Lora
from stages.mcore.megatron_imports import Float16Module
from stages.mcore.memory import Activations, in_flight, layers_of, memory_share, owned_bytes, sharing, state_bytes
from stages.mcore.model import build
from stages.mcore.optimizer import Adam
from stages.models.base import SLICE, AttentionCost, MemoryShare, ModelConfig, Rows, training_flops
from stages.models.mixture import Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.models.registry import parse
from stages.train import parallel
from stages.train.config import PhaseConfig, TrainConfig
from stages.train.estimate import estimate, layout_label, release_checkpoints
from tests.fixtures import fake_rank_fixtures, train_fixtures

VOCAB = 128
MODEL = dict(
    layers=4, hidden_size=64, heads=8, kv_heads=4, head_dim=16, experts=8, num_experts_per_tok=2, moe_intermediate_size=48,
    context_length=512, tie_embeddings=False,
)  # fmt: skip
GLM = {"architecture": "glm4_moe", "dense_layers": 1, "intermediate_size": 384, "moe_intermediate_size": 384}
EXTRAS = st.fixed_dictionaries({
    "tie_embeddings": st.booleans(),
}) | st.just({"dense_layers": 1, "intermediate_size": 96}) | st.just(GLM)  # fmt: skip
LAYOUTS = st.builds(
    Layout,
    ranks=st.sampled_from([8, 16, 32]),
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    vpp=st.sampled_from([1, 1, 2]),
    cp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2, 8]),
    etp=st.sampled_from([None, 1, 2]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(extra=EXTRAS, layout=LAYOUTS, data=st.data())
def test_parameters_of_a_rank_are_those_that_megatron_builds(extra: dict[str, Any], layout: Layout, data: Any) -> None:
    model = parse({**MODEL, **extra, "layers": data.draw(st.sampled_from([4, 5, 7]))})
    if layout.data == 0 or problem(layout, model, VOCAB, [32 * layout.data]):
        return
    place, part = fake_rank_fixtures.part(model, VOCAB, layout, data.draw(st.integers(0, layout.ranks - 1)), "bf16")
    expected = memory_share(model, VOCAB, layout, place.pipeline)
    experts = sum(torch.Size(shape).numel() for name, shape in part.shapes.items() if ".experts." in name)
    assert (part.trained, experts) == (expected.all, expected.experts)
    layers = {int(name.split(".")[2]) for name in part.shapes if name.startswith("decoder.layers.")}
    assert layers == {layer for chunk in layers_of(model, layout, place.pipeline) for layer in chunk}


def test_layers_of_an_uneven_pipeline() -> None:
    """By hand: embedding and loss count as a layer, and the first chunks get what is left over."""
    assert Layout(pp=16).chunk_layers(94) == (5, *[6] * 14, 5)
    assert Layout(pp=4).chunk_layers(94) == (23, 24, 24, 23)
    assert Layout(pp=2).chunk_layers(94) == (47, 47) and Layout(pp=2).chunk_layers(5) == (3, 2)
    model, layout = Qwen3MoeConfig(**MODEL), Layout(ranks=2, pp=2, vpp=2, pp_layers=(1, 1, 1, 2))
    model = model.model_copy(update={"layers": 5})
    assert [layers_of(model, layout, rank) for rank in (0, 1)] == [[[0], [2]], [[1], [3, 4]]]


def test_one_rank_holds_the_model() -> None:
    model = Qwen3MoeConfig(**MODEL)
    assert memory_share(model, VOCAB, Layout(), 0).all == model.parameters(VOCAB)["total"]


def test_state_of_the_published_layout() -> None:
    """Qwen3-30B-A3B on 16 H100: 8 experts of 128 a layer on each, dense optimizer state shared by 16, experts' by none."""
    model = Qwen3MoeConfig(
        layers=48, hidden_size=2048, heads=32, kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, context_length=4096, tie_embeddings=False,
    )  # fmt: skip
    layout = Layout(ranks=16, ep=16)
    part = memory_share(model, 151936, layout, 0)
    assert part.experts == 48 * 8 * 3 * 2048 * 768 and sharing(layout) == (16, 1)
    assert state_bytes(part, layout, "bf16", Adam) == pytest.approx(
        6 * part.dense + 12 * part.dense / 16 + 18 * part.experts
    )
    assert state_bytes(part, layout, "bf16", Adam) / 2**30 == pytest.approx(40.0, abs=0.1)


def test_state_by_precision() -> None:
    part, layout = MemoryShare(1000, 0, 400), Layout(ranks=4)
    assert state_bytes(part, layout, "fp32", Adam) == 8000 + 8000 / 4  # weights are the optimizer's own
    assert state_bytes(part, layout, "bf16", Adam) == 6000 + 12000 / 4
    assert state_bytes(part, layout, "fp8-blockwise", Adam) == 6000 + 12000 / 4 + 2 * 600
    assert owned_bytes(part, layout, Adam) == 3000


def test_flops() -> None:
    """By hand: two matrices, and attention to half a row."""
    assert training_flops(10, AttentionCost(1, 2, 3, 5), 8) == 6 * (10 + 2 * 8 * 4)
    model = Qwen3MoeConfig(**{**MODEL, "dense_layers": 1, "intermediate_size": 96})
    by_hand = 4 * (64 * 16 * (8 + 2 * 4) + 8 * 16 * 64) + 3 * 64 * 96 + 3 * (64 * 8 + 3 * 64 * 2 * 48)
    assert model.matrices(VOCAB) == by_hand + VOCAB * 64
    tied = model.model_copy(update={"tie_embeddings": True})
    assert tied.matrices(VOCAB) == model.matrices(VOCAB)


def test_cache() -> None:
    """By hand: heads of keys and values are shared by ranks, or copied where there are fewer."""
    whole = 2 * 4 * 4 * 32 * 1000
    assert [Qwen3MoeConfig(**MODEL).cache_bytes(2, n, 1000) for n in (1, 2, 4, 8)] == [whole / n for n in (1, 2, 4, 4)]


def test_micro_batches_in_flight() -> None:
    """1F1B keeps as many as ranks lie behind, and its own; interleaving more, by chunks; never more than there are."""
    one = Layout(ranks=4, pp=4)
    assert [in_flight(one, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    assert [in_flight(one, rank, 2) for rank in range(4)] == [2, 2, 2, 1]
    two = Layout(ranks=4, pp=4, vpp=2)
    assert [in_flight(two, rank, 16) for rank in range(4)] == [11 / 2, 9 / 2, 7 / 2, 5 / 2]


class _Norm(torch.autograd.Function):
    """An RMSNorm that saves its input, as fused kernels do; PyTorch's on CPU saves several fp32 tensors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.rms_norm(x, (x.shape[-1],)) * weight


@contextmanager
def _gpu_like(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norms of one kernel, and sums that need not be deterministic, which save nothing."""
    monkeypatch.setattr(layer_spec.RMSNorm, "forward", lambda self, x: _Norm.apply(x, self.weight))
    torch.use_deterministic_algorithms(False)
    yield


def _saved_by_autograd(
    model: ModelConfig,
    rows: Rows,
    layout: Layout,
    precision: Any,
    monkeypatch: pytest.MonkeyPatch,
    lora: Lora | None = None,
) -> int:
    """Bytes of all distinct tensors that a forward pass saves, without weights."""
    saved: dict[int, torch.Tensor] = {}
    with parallel.session(0), _gpu_like(monkeypatch):
        (gpt,) = build(model, VOCAB, layout, precision, packed=rows.packed)
        for parameter in gpt.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        if lora is not None:
            lora_layers.install([gpt], lora)
        net = gpt if precision == "fp32" else Float16Module(gpt.config, gpt)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = tensor  # kept, so that no address is used again
            return tensor

        ids = torch.randint(VOCAB, (rows.rows, rows.length), generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(ids, torch.arange(rows.length).expand_as(ids), torch.zeros_like(ids) if rows.packed else None,
                labels=ids, padding_mask=torch.zeros_like(ids, dtype=torch.bool))  # fmt: skip
    # Of what is computed again, nothing is left after the forward pass.
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    saved.clear()  # the graph holds what packs its tensors, and that held the graph
    return measured


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [("attention", "mlp"), ("attention",)], ids=["all", "attention"])
def test_a_pass_saves_the_sums_of_matrices_and_adapters(
    precision: Any, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what full fine-tuning saves. The inputs of matrices without an adapter are not kept."""
    model, rows, lora = parse(MODEL), Rows(2, 512, packed=True), Lora(rank=4, alpha=8, targets=targets)
    full = _saved_by_autograd(model, rows, Layout(), precision, monkeypatch)
    measured = _saved_by_autograd(model, rows, Layout(), precision, monkeypatch, lora)
    sums = [size for sizes in lora.sums(model, Layout()).values() for size in sizes]
    element = 4 if precision == "fp32" else 2
    matrices = 4 * (64 * 16 * (8 + 2 * 4) + 8 * 16 * 64) + ("mlp" in targets) * 4 * 8 * 3 * 64 * 48
    assert sum(sums) == matrices
    on_a_rank = Activations(model, VOCAB, Layout(), precision, rows, 1, 0)
    assert on_a_rank.merged(lora) == element * (matrices + max(sums))
    unkept = on_a_rank.unkept(lora) * 4 / 3  # of all layers but the one at work
    assert (unkept > 0.1 * full) == (targets == ("attention",))
    assert measured == pytest.approx(full + element * matrices - unkept, rel=0.01)


def test_ranks_share_the_sums() -> None:
    """By hand: tensor ranks share attention, expert ranks experts; a stage keeps those of each micro-batch in flight."""
    model, lora = Qwen3MoeConfig(**MODEL), Lora(rank=4, alpha=8, targets=("attention", "mlp"))
    attention, expert = 64 * 16 * (8 + 2 * 4) + 8 * 16 * 64, 3 * 64 * 48
    largest = 64 * 16 * (8 + 2 * 4)

    def numbers(rank: int = 0, micro: int = 8, **layout: Any) -> float:
        return Activations(model, VOCAB, Layout(**layout), "bf16", Rows(1, 1), micro, rank).merged(lora) / 2

    assert numbers() == 4 * (attention + 8 * expert) + largest
    assert numbers(ranks=2, tp=2, ep=2, etp=1) == 4 * (attention / 2 + 4 * expert) + largest / 2
    assert numbers(ranks=2, pp=2) == 2 * 2 * (attention + 8 * expert) + largest
    assert numbers(rank=1, ranks=2, pp=2) == 2 * (attention + 8 * expert) + largest
    assert numbers(recompute="layer") == attention + 8 * expert + largest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "layer"])
@pytest.mark.parametrize(
    "extra",
    [{}, {"dense_layers": 1, "intermediate_size": 96}, GLM],
    ids=["experts", "dense layer", "part turned"],
)
def test_activations_are_what_autograd_saves(
    precision: Any, recompute: Any, extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all distinct tensors that one forward pass keeps, with the kernels that packed rows have everywhere."""
    model, rows, layout = parse({**MODEL, **extra}), Rows(2, 512, packed=True), Layout(recompute=recompute)
    if recompute == "selective" and extra is GLM:
        layout = layout.model_copy(update={"recompute_modules": ("layernorm", "moe_act", "mlp", "shared_experts")})
    measured = _saved_by_autograd(model, rows, layout, precision, monkeypatch)
    tokens, element = rows.rows * rows.length, 4 if precision == "fp32" else 2
    predicted = Activations(model, VOCAB, layout, precision, rows, 1, 0).saved()
    # by slices of queries, whose masks all layers share; half of a row on average
    masks = tokens * element * (rows.length + SLICE) / 2
    if recompute == "layer":  # the tables are there, and autograd does not keep them
        predicted -= tokens * 8 * model.rotary_dim * rows.packed
    elif precision == "bf16":  # on CPU attention goes by slices, which GPUs do in fp32
        predicted += masks
    # ids, labels, maps of tokens to experts and the like are some bytes a token, in any precision
    assert measured == pytest.approx(predicted, rel=0.01, abs=400 * tokens)


def test_modules_that_are_computed_again_by_hand() -> None:
    """What each saves in a token's two layers, and that it is there again in the layer at work; products of two."""
    glm = {"layers": 2, "n_shared_experts": 1, "partial_rotary_factor": 0.5, **GLM}
    model, rows = parse({**MODEL, **glm}), Rows(1, 512)

    def activations(**layout: Any) -> Activations:
        return Activations(model, VOCAB, Layout(**layout), "bf16", rows, 1, 0)

    plain, inner, hidden = activations(), 384, 64
    for module, bytes_, matrices in (
        ("layernorm", 2 * 2 * 2 * hidden, 0),
        ("moe_act", 4 * 2 * inner * 2, 0),
        ("mlp", 5 * 2 * inner, 3 * hidden * inner),
        ("shared_experts", 5 * 2 * inner, 3 * hidden * inner),
    ):
        again = activations(recompute="selective", recompute_modules=(module,))
        assert plain.saved() - again.saved() == 512 * bytes_
        assert plain.peak() - again.peak() <= 512 * bytes_
        assert model.matrices_again([module]) == matrices
    both = activations(recompute="selective", recompute_modules=("layernorm", "moe_act"))
    assert both.saved() == activations(recompute="selective").saved()


def test_parallel_ranks_share_activations() -> None:
    """Tensor and context ranks split rows; pipeline ranks split layers and keep more micro-batches the earlier they are."""
    model, rows = Qwen3MoeConfig(**MODEL), Rows(1, 512)

    def bytes_of(rank: int = 0, micro: int = 8, **layout: Any) -> float:
        return Activations(model, VOCAB, Layout(**layout), "bf16", rows, micro, rank, fused=True).saved()

    unsplit, tables = bytes_of(), 512 * 8 * 16  # the rotary tables are of all tensor ranks and micro-batches
    assert bytes_of(ranks=2, cp=2) == pytest.approx(unsplit / 2)
    # each expert's tensor ranks all get the tokens of both, and half of its width
    assert unsplit / 2 < bytes_of(ranks=2, tp=2, ep=2) < 0.6 * unsplit
    assert bytes_of(ranks=2, tp=2, ep=2, etp=1) == pytest.approx((unsplit + tables) / 2)
    first, last = (bytes_of(rank, ranks=2, pp=2) for rank in (0, 1))
    ends, output = 512 * (VOCAB * 4 + 2 * 2 * 64), 512 * 2 * 64  # of the last stage; of the first, which it keeps
    assert first == pytest.approx(unsplit - ends + 2 * output) and last == pytest.approx(
        (unsplit + tables - ends) / 2 + ends
    )
    assert bytes_of(0, micro=1, ranks=2, pp=2) == pytest.approx((unsplit + tables - ends) / 2 + output)


def test_a_layer_and_the_loss_do_not_work_at_the_same_time() -> None:
    """By hand: in the first stage gradients of an expert's weighted product beside those of outputs, or tokens on their
    way to experts; in the last one logits, or the output head's gradient."""
    model, rows = Qwen3MoeConfig(**MODEL), Rows(1, 512)

    def working(rank: int, vocabulary: int, precision: Any = "bf16", **layout: Any) -> float:
        arguments = (model, vocabulary, Layout(**layout), precision, rows, 8, rank)
        return Activations(*arguments).peak() - Activations(*arguments).saved()

    sent, received = 2 * 64 * 2, 2 * 64  # bytes of a token's copies; of what the next stage has sent
    weighted = sent + received + 3 * 4 * 48 * 2 / 8  # one of eight experts, in fp32
    assert working(0, VOCAB, ranks=2, pp=2) == 512 * weighted > 512 * 2 * sent
    assert working(0, VOCAB, ranks=4, pp=2, ep=2) == 512 * 4 * sent
    assert working(0, 10_000) == 512 * 10_000 * 2  # a bf16 gradient of the logits
    assert working(0, 10_000, "fp32") == 4 * 64 * 10_000  # fp32: in place; then the head's own
    one_layer = sum(model.layer_activations(Layout(), "bf16", rows, 0).values())
    again = one_layer - 2 * 64 + weighted
    assert working(0, VOCAB, ranks=2, pp=2, recompute="layer") == 512 * (again + received)


def test_a_later_stage_has_the_gradient_that_it_sent_last() -> None:
    """By hand: until the next one replaces it, so not if all micro-batches are in flight; the first stage sends none."""
    model, rows = Qwen3MoeConfig(**MODEL), Rows(1, 512)

    def working(rank: int, micro_batches: int) -> float:
        arguments = (model, VOCAB, Layout(ranks=4, pp=4), "bf16", rows, micro_batches, rank)
        return Activations(*arguments).peak() - Activations(*arguments).saved()

    gradient = 512 * 2 * 64
    assert working(1, 4) - working(1, 3) == working(2, 3) - working(2, 2) == gradient
    assert working(0, 8) == working(0, 4) == working(1, 3)


def test_attention_at_work_has_no_second_half_beside_it() -> None:
    """By hand: the norm of queries in the backward pass, three tensors in fp32 beside gradients, where keys, values and
    outputs are gone; only in the last layer does nothing later fill the gap."""
    wide = {**MODEL, "heads": 64, "layers": 2}
    model, rows = Qwen3MoeConfig(**wide), Rows(1, 512, packed=True)
    q, kv, size = 64 * 16, 4 * 16, 2
    second = 2 * size * 64 + 13 * 8 + size * 2 * (64 + 2 * 48 + 4 * 48)
    expected = 3 * 4 * q + 2 * size * (q + 2 * kv) - size * (q + 2 * kv) - size * q - second
    arguments = (model, 16, Layout(), "bf16", rows, 1, 0)
    kept = Activations(*arguments).saved() - 512 * (2 * size * 64 + 4 * 16)  # without what only the loss needs
    assert Activations(*arguments).peak() == kept + 512 * expected
    # twice the keys of a rank with half of the tokens: in what is kept, and again gone
    split = Layout(ranks=2, cp=2)
    assert model.layer_working_set(split, "bf16", rows, 0) == expected - size * 2 * kv


def test_a_layer_that_is_computed_again_has_a_gradient_beside_it() -> None:
    """By hand, in the last stage: that of its output, and that of a tied head. The loss's inputs and softmax are gone."""
    model, rows, layout = Qwen3MoeConfig(**MODEL), Rows(1, 512), Layout(recompute="layer")
    one_layer = sum(model.layer_activations(layout, "bf16", rows, 0).values())
    weighted = 2 * 64 * (2 + 1) + 3 * 4 * 48 * 2 / 8
    inputs, again, gradient = 4 * 2 * 64, one_layer - 2 * 64 + weighted, 2 * 64
    tables = 8 * 16
    expected = 512 * (inputs + again + gradient + tables)
    assert Activations(model, VOCAB, layout, "bf16", rows, 8, 0).peak() == expected
    tied = model.model_copy(update={"tie_embeddings": True})
    head = Activations(tied, VOCAB, layout, "bf16", rows, 8, 0).peak() - expected
    assert head == 2 * 64 * VOCAB


def test_estimate_of_a_phase() -> None:
    phase = {**train_fixtures.PHASE, "precision": "bf16", "parallelism": {"ranks": 4, "tp": 2, "pp": 2}}
    config = TrainConfig.model_validate({**train_fixtures.config(), "phase": phase})
    phase_estimate = estimate(config)
    t, counts = phase_estimate.training, phase_estimate.parameters
    assert t is not None and phase_estimate.memory_bytes is not None
    assert t.layout == layout_label(config.phase.parallelism) == "TP2 PP2"
    assert max(t.state_bytes, t.activation_bytes) < phase_estimate.memory_bytes <= t.state_bytes + t.activation_bytes
    assert (
        t.checkpoint_bytes == 12 * counts["total"]
        and t.gflop_per_token * 1e9 * config.phase.tokens() == phase_estimate.flops
    )
    assert phase_estimate.cpu_seconds is None  # calibrated in fp32 only
    rows = sum(config.phase.rows_of(step) for step in range(1, config.phase.steps + 1))
    assert (t.order_rows, t.data_bytes) == (rows, 2 * config.phase.tokens() + 27 * rows)


def test_flops_of_recomputation() -> None:
    """A forward pass of what is computed again, beside three passes of the model."""

    def factor(**layout: Any) -> float:
        settings = train_fixtures.config(parallelism=layout)
        settings["model"] = settings["model"] | {"dense_layers": 1, "intermediate_size": 32}
        training = estimate(TrainConfig.model_validate(settings)).training
        assert training is not None
        return training.recomputed

    settings = train_fixtures.config()
    model = parse({**settings["model"], "dense_layers": 1, "intermediate_size": 32})
    flops = model.flops_per_token(settings["padded_vocab_size"], settings["phase"]["sequence_length"])
    assert factor() == factor(recompute="selective") == 1 and factor(recompute="layer") == pytest.approx(4 / 3)
    mlp = factor(recompute="selective", recompute_modules=["mlp"])
    assert mlp == pytest.approx(1 + 2 * 3 * model.hidden_size * 32 / flops)


@pytest.mark.parametrize(("every", "start", "count"), [(4, None, 4), (5, None, 4), (4, "pretrain@4", 2), (20, None, 2)])
def test_release_checkpoints(every: int, start: str | None, count: int) -> None:
    """Of steps 1 to 12: every n-th and the last, and step 0 of a phase that does not go on from another run's."""
    phase = {**train_fixtures.PHASE, "steps": 12, "release_checkpoint_interval": every, "continue_from": start}
    assert release_checkpoints(PhaseConfig.model_validate(phase)) == count


def test_words_of_layouts() -> None:
    layout = Layout(ranks=512, tp=4, pp=2, cp=8, ep=32, etp=1, recompute="layer")
    assert layout_label(layout) == "TP4 PP2 CP8 EP32 ETP1 DP8 recompute" and layout_label(Layout()) == "one rank"
