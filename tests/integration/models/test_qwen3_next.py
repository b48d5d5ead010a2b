"""A hybrid of linear and full attention behind the same ModelSpec: built, counted, trained, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError
from pipeline.core.store import write_manifest
from stages.export import hf
from stages.export.variants.registry import obstacle
from stages.generation.in_process import InProcess, LibraryDecoder
from stages.generation.protocols import Prompt
from stages.mcore.architectures.hf_mapping import hf_config
from stages.mcore.layout_check import problem
from stages.mcore.memory import memory_share
from stages.mcore.model import build, named_tensors
from stages.models.parallel_layout import Layout
from stages.models.qwen3_next import Qwen3NextConfig
from stages.train import parallel
from tests.fixtures import fake_rank_fixtures, layout_fixtures, qwen3_next_fixtures, train_fixtures
from tests.fixtures.model_fixtures import load_tensors
from tests.fixtures.qwen3_next_fixtures import MODEL, PUBLISHED, VOCABULARY
from tests.fixtures.run_fixtures import at_length

VOCAB = train_fixtures.VOCAB


def settings(**phase: Any) -> dict[str, Any]:
    return {**train_fixtures.config(**phase), "model": MODEL}


# -- counted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"full_attention_interval": 2, "kv_heads": 4},
        {"dense_layers": 1, "intermediate_size": 48, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3},
    ],
)
def test_counts_shapes_and_names_are_those_of_both_programs(change: dict[str, Any]) -> None:
    model = Qwen3NextConfig(**{**MODEL, **change})
    with parallel.session(0):
        built = {name: tuple(p.shape) for name, p in named_tensors(build(model, VOCAB))}
    assert built == model.shapes(VOCAB)
    total = model.parameters(VOCAB)["total"]
    assert total == sum(torch.Size(s).numel() for s in built.values()) == memory_share(model, VOCAB, Layout(), 0).all
    tensors = qwen3_next_fixtures.tensors_of(model)
    exported = dict(model.spec().to_hf(tensors, model, VOCAB))
    back = dict(model.spec().from_hf(exported, model))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in back)
    with pytest.raises(ValueError, match="does not have: left.over"):
        list(model.spec().from_hf({**exported, "left.over": torch.ones(1)}, model))


@pytest.mark.parametrize(
    "layout",
    [{"ranks": 2, "tp": 2}, {"ranks": 2, "pp": 2}, {"ranks": 8, "tp": 2, "ep": 2, "pp": 2}, {"ranks": 2, "ep": 2}],
    ids=str,
)
def test_a_rank_has_the_counted_parameters(layout: dict[str, int]) -> None:
    model = Qwen3NextConfig(**{**MODEL, "dense_layers": 1, "intermediate_size": 48})
    for rank in range(layout["ranks"]):
        place, part = fake_rank_fixtures.part(model, VOCAB, Layout(**layout), rank, "bf16")
        share = memory_share(model, VOCAB, Layout(**layout), place.pipeline)
        experts = sum(torch.Size(shape).numel() for name, shape in part.shapes.items() if ".experts." in name)
        assert (part.trained, experts) == (share.all, share.experts)


def test_the_published_80b_model_has_the_parameters_that_transformers_builds() -> None:
    """Published: 80B parameters, 79B without embeddings, 3B active (its model card, which rounds)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf_config(PUBLISHED, VOCABULARY, 1, 0, "bfloat16"))
        )
    counts = PUBLISHED.parameters(VOCABULARY)
    assert type(theirs).__name__ == "Qwen3NextForCausalLM"
    assert counts["total"] == sum(p.numel() for p in theirs.parameters()) == 79_674_391_296
    assert counts["total"] == pytest.approx(80e9, rel=0.01)
    assert counts["total"] - 2 * counts["embedding"] == pytest.approx(79e9, rel=0.01)
    assert round(counts["active"] / 1e9, 1) == 3.9


def test_flops_by_hand() -> None:
    """Of a gated delta net as NVIDIA counts one: projections, convolution, four products with the state."""
    model = Qwen3NextConfig(**MODEL)
    hidden, keys, values, heads = 32, 2 * 8, 4 * 12, 4
    linear = (
        hidden * (2 * keys + 2 * values + 2 * heads) + 4 * (2 * keys + values) + heads * 4 * 8 * 12 + hidden * values
    )
    full = hidden * 16 * (4 * 2 + 2 * 2) + 4 * 16 * hidden + 4 * 2 * 16 * (64 / 2)
    experts = hidden * 4 + 3 * hidden * (2 * 16 + 24) + hidden
    assert model.flops_per_token(VOCAB, 64) == pytest.approx(6 * (3 * linear + full + 4 * experts + VOCAB * hidden))


def test_flops_are_those_of_nvidias_formula() -> None:
    """`num_floating_point_operations` of Megatron-Bridge (flop_utils.py at 067f987d) gives 22.73968128 GFLOP a token in
    rows of 4,096. It leaves out routers and the gates of shared experts, which we count: 1.3 % with 512 experts."""
    left_out = 6 * 48 * 2048 * (512 + 1)
    assert PUBLISHED.flops_per_token(VOCABULARY, 4096) - left_out == pytest.approx(22.73968128e9, rel=1e-12)


def test_a_state_takes_the_place_of_the_cache() -> None:
    """By hand, of the published model: 12 layers keep keys and values, 36 a state in fp32 and three tokens."""
    tokens = 131_072
    state = 36 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128))
    assert PUBLISHED.cache_bytes(2, 1, tokens) == 12 * 2 * 2 * 256 * 2 * tokens + state
    cost = PUBLISHED.long_context(VOCABULARY)
    assert cost.full_cache_bytes / cost.cache_bytes == pytest.approx(3.9, abs=0.1)
    assert cost.flops_per_token < 0.5 * cost.full_flops_per_token


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_does_not_apply_is_refused_in_one_sentence() -> None:
    model = Qwen3NextConfig(**MODEL)
    assert problem(Layout(ranks=2, cp=2), model, VOCAB, [4]) == (
        "parallelism.cp = 2 divides rows, and the state of a gated delta net passes through a whole row; leave it out"
    )
    wide = Qwen3NextConfig(**{**MODEL, "heads": 8, "kv_heads": 4})
    sentence = problem(Layout(ranks=4, tp=4), wide, VOCAB, [4])
    assert sentence == "parallelism.tp = 4 does not divide linear_num_key_heads = 2; nearest: 2"
    assert "qwen3_next are not known" in (obstacle("gguf-q8_0", model) or "")
    assert "gated delta nets are not known" in (obstacle("fp8", model) or "")
    biased = Qwen3NextConfig(**{**MODEL, "router_bias_update_rate": 1e-3})
    with pytest.raises(AtomError, match=r"Qwen3NextForCausalLM.* no bias of experts"):
        hf_config(biased, VOCAB, 1, 0, "float32")
    for change, sentence in (
        ({"linear_num_value_heads": 3}, "no multiple of linear_num_key_heads = 2; nearest: 2 or 4"),
        ({"tie_embeddings": True}, "leaves vLLM's class of the architecture qwen3_next without an output head"),
        ({"partial_rotary_factor": 0.3}, "turns pairs; nearest: 0.25"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Qwen3NextConfig(**{**MODEL, **change})


# -- computed ---------------------------------------------------------------------------------------------------------


def logits(model: Qwen3NextConfig, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Megatron's, of one row or several."""
    with parallel.session(0):
        (gpt,) = build(model, VOCAB, packed=mask is not None)
        load_tensors([gpt], model, VOCAB, qwen3_next_fixtures.tensors_of(model))
        with torch.no_grad():
            result: torch.Tensor = gpt.eval()(ids, torch.arange(ids.shape[1]).expand_as(ids), mask)
    return result


def test_logits_are_those_of_transformers() -> None:
    """Of rows of several chunks, with weights that are nowhere 0 or 1."""
    model = Qwen3NextConfig(**{**MODEL, "dense_layers": 1, "intermediate_size": 48, "context_length": 256})
    sampler = InProcess(hf_config(model, VOCAB, 1, 0, "float32"), (), 1)
    sampler.load(dict(model.spec().to_hf(qwen3_next_fixtures.tensors_of(model), model, VOCAB)))
    ids = torch.randint(0, VOCAB, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), sampler.model(ids).logits, atol=1e-4, rtol=0)


def test_documents_of_a_row_are_as_alone() -> None:
    """Also answers that share a question, each of which goes on from the question's state."""
    model = Qwen3NextConfig(**{**MODEL, "context_length": 256})
    lengths = [5, 70, 1, 20]
    ids = torch.randint(0, VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    begins = [sum(lengths[:n]) for n in range(4)]
    starts = torch.tensor(begins).repeat_interleave(torch.tensor(lengths))[None]
    row = logits(model, ids, starts)
    for begin, length in zip(begins, lengths, strict=True):
        alone = logits(model, ids[:, begin : begin + length])
        torch.testing.assert_close(row[:, begin : begin + length], alone, atol=1e-4, rtol=0)
    question, first = slice(0, 5), slice(5, 75)  # the last two segments answer the question too
    prefixes = torch.zeros(2, *starts.shape, dtype=torch.long)
    prefixes[1, :, 5:] = 5
    row = logits(model, ids, torch.cat((starts[None], prefixes)))
    for begin, length in list(zip(begins, lengths, strict=True))[1:]:
        text = torch.cat((ids[:, question], ids[:, begin : begin + length]), 1)
        torch.testing.assert_close(row[:, begin : begin + length], logits(model, text)[:, 5:], atol=1e-4, rtol=0)
    torch.testing.assert_close(row[:, question], logits(model, ids[:, : first.stop])[:, question], atol=1e-4, rtol=0)


def test_it_is_megatrons_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's own GatedDeltaNet with its PyTorch code, on the same weights, whose rows it has by kind."""
    from megatron.core.ssm import gated_delta_net as theirs

    from stages.mcore.architectures import qwen3_next, qwen3_next_layers
    from stages.mcore.layer_spec import RMSNorm
    from stages.mcore.megatron_imports import tensor_parallel

    if not hasattr(theirs, "causal_conv1d_fn"):
        pytest.skip("from megatron-core 0.17 on, its layer needs the package flash-linear-attention, which needs CUDA")

    def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)

    monkeypatch.setattr(theirs, "HAVE_FLA", True)
    monkeypatch.setattr(theirs, "l2norm", l2norm, raising=False)
    monkeypatch.setattr(theirs, "causal_conv1d_fn", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    model = Qwen3NextConfig(**MODEL)
    with parallel.session(0):
        (gpt,) = build(model, VOCAB)
        load_tensors([gpt], model, VOCAB, qwen3_next_fixtures.tensors_of(model))
        ours = gpt.decoder.layers[0].self_attention
        assert isinstance(ours, qwen3_next_layers.GatedDeltaNet)
        parts = theirs.GatedDeltaNetSubmodules(
            tensor_parallel.ColumnParallelLinear, RMSNorm, tensor_parallel.RowParallelLinear
        )
        gpt.config.deterministic_mode = True
        groups = gpt.decoder.layers[0].self_attention.in_proj.tp_group
        collection = type("Groups", (), {"tp": groups})()
        layer = theirs.GatedDeltaNet(gpt.config, parts, layer_number=1, pg_collection=collection)
        layer.out_norm.offset = 0
        rows, channels = qwen3_next._parts(model, 0)
        state = dict(ours.named_parameters())
        for name, sizes in (("in_proj.weight", rows), ("conv1d.weight", channels)):
            kinds = qwen3_next._split(state[name].detach(), model.linear_num_key_heads, sizes)
            state[name] = torch.cat([part.flatten(0, 1) for part in kinds])
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(state[name])
        hidden = torch.randn(150, 2, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = layer(hidden, None)[0]
            torch.testing.assert_close(ours(hidden, None)[0], expected, atol=2e-6, rtol=0)
    assert expected.abs().max() > 0.01


# -- trained ----------------------------------------------------------------------------------------------------------


@at_length("training", 50)
def test_layouts_train_alike(tmp_path: Path) -> None:
    """On packed rows. On rows of one document, a periodic text, the norm of a gradient is 27 after two steps, and
    roundings of the first step have grown to a hundredth of it."""
    train_fixtures.make(tmp_path)
    train_fixtures.pack(tmp_path, {})
    corpus, config = tmp_path / "packed", settings(batch=layout_fixtures.BATCH, pack=True)
    (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, config, tmp_path / "one.json", 3).values()
    layouts = {name: layout_fixtures.TWO[name] for name in ("TP2+SP", "PP2", "EP2 alltoall", "TP2 EP2 ETP1")}
    for name, curve in layout_fixtures.compare(corpus, layouts, 2, config, tmp_path / "two.json", 3).items():
        layout_fixtures.agree(curve, one, 1e-4, name)
    assert one[2]["loss"] < one[0]["loss"]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On rows of several documents."""
    folder = tmp_path_factory.mktemp("hybrid")
    packed = folder / "packed"
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    train_fixtures.pretrain(packed, folder / "work", folder / "out", settings(pack=True))
    with pytest.raises(KeyboardInterrupt):
        report = train_fixtures.Reporter(7, 2)
        train_fixtures.pretrain(packed, folder / "again", folder / "first", settings(pack=True), report)
    train_fixtures.pretrain(packed, folder / "again", folder / "second", settings(pack=True))
    return folder


def test_it_learns_and_a_resumed_run_ends_in_the_same_bytes(trained: Path) -> None:
    losses = train_fixtures.losses(trained / "out")
    assert losses[-1] < losses[0]
    assert train_fixtures.digest(trained / "second") == train_fixtures.digest(trained / "out")


def test_the_export_is_the_trained_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "WHOLE_BYTES", 0)  # transformers loads one layer at a time, as of a large model
    inputs = {
        "checkpoint": write_manifest(trained / "out", "pretrain-hybrid"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer"),
    }
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=VOCAB)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["max_abs_logit_delta"] < 2e-5 and parity["tensors_compared"] == len(config.model.shapes(64))
    written = json.loads((tmp_path / "out/model/config.json").read_text())
    assert written["architectures"] == ["Qwen3NextForCausalLM"]
    assert written["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_the_sampler_draws_from_states() -> None:
    """Greedy tokens and log-probabilities are those of whole forward passes, also after rows have ended."""
    model = Qwen3NextConfig(**MODEL)
    engine = InProcess(hf_config(model, VOCAB, 1, 0, "float32"), range(0, VOCAB, 5), 20)
    assert isinstance(engine.decoder, LibraryDecoder)
    engine.load(dict(model.spec().to_hf(qwen3_next_fixtures.tensors_of(model), model, VOCAB)))
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 3, 5, 5, 9, 12]
    requests = [Prompt(tuple(torch.randint(6, VOCAB, (n,), generator=generator).tolist()), n) for n in lengths]
    completions = engine.generate(requests, greedy=True)
    assert len({len(completion.ids) for completion in completions}) > 1, "rows end at different steps"
    for request, completion in zip(requests, completions, strict=True):
        with torch.inference_mode():
            out = engine.model(torch.tensor([[*request.ids, *completion.ids]])).logits[0, len(request.ids) - 1 : -1]
        assert out.argmax(-1).tolist() == list(completion.ids)
        expected = out.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=0)
