"""GPT-OSS's shape, with windows, sinks and biases: built, counted, trained in several layouts, exported, drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.store import write_manifest
from release.facts.model_facts import read_model_facts
from stages.export import hf
from stages.export.variants.registry import obstacle
from stages.generation.in_process import InProcess, LibraryDecoder
from stages.generation.protocols import Prompt
from stages.mcore.architectures.hf_mapping import hf_config
from stages.mcore.layout_check import problem
from stages.mcore.memory import memory_share
from stages.mcore.model import Initial, build, named_tensors
from stages.models.gpt_oss import GptOssConfig
from stages.models.parallel_layout import Layout
from stages.train import parallel
from tests.fixtures import layout_fixtures, rl_fixtures, train_fixtures
from tests.fixtures.model_fixtures import load_tensors
from tests.fixtures.run_fixtures import at_length

MODEL: dict[str, Any] = {
    **train_fixtures.MODEL,
    "architecture": "gpt_oss",
    "sliding_window": 12,
    "tie_embeddings": False,
}
VOCAB = train_fixtures.VOCAB
VOCABULARY = 201_088


def published(layers: int, experts: int) -> GptOssConfig:
    """GPT-OSS 120B or 20B (arXiv:2508.10925)."""
    return GptOssConfig(
        architecture="gpt_oss", layers=layers, hidden_size=2880, heads=64, kv_heads=8, head_dim=64, experts=experts,
        num_experts_per_tok=4, moe_intermediate_size=2880, sliding_window=128, context_length=131_072,
        tie_embeddings=False, norm_eps=1e-5, rope_theta=150_000,
    )  # fmt: skip


def tensors_of(model: GptOssConfig, vocabulary: int = VOCAB) -> dict[str, torch.Tensor]:
    """Random tensors. Biases and sinks are zero at first, which would hide where they go; large gates are cut off."""
    generator = torch.Generator().manual_seed(0)
    tensors = dict(Initial(model.shapes(vocabulary), model, 0).items())
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        if "linear_fc1" in name:
            tensor *= 20
    return tensors


@pytest.mark.parametrize("change", [{}, {"z_loss": 1e-3}, {"kv_heads": 1, "layers": 3}])
def test_counts_and_shapes_are_those_that_megatron_builds(change: dict[str, Any]) -> None:
    model = GptOssConfig(**{**MODEL, **change})
    with parallel.session(0):
        built = {name: tuple(p.shape) for name, p in named_tensors(build(model, VOCAB))}
    assert built == model.shapes(VOCAB)
    total = sum(torch.Size(s).numel() for s in built.values())
    experts = sum(torch.Size(s).numel() for name, s in built.items() if ".experts." in name)
    idle = experts * (model.experts - model.num_experts_per_tok) // model.experts
    counts = model.parameters(VOCAB)
    assert (counts["total"], counts["active"]) == (total, total - idle)
    assert memory_share(model, VOCAB, Layout(), 0).all == total


@pytest.mark.parametrize(("layers", "experts", "total", "active"), [(36, 128, 116.83, 5.13), (24, 32, 20.91, 3.61)])
def test_the_published_models(layers: int, experts: int, total: float, active: float) -> None:
    """Counts of the model card (arXiv:2508.10925, table 1), which counts the output head as active and not the input
    table; the parameters that transformers builds; FLOPs of a token of NVIDIA's run of the larger one (535.230 TFLOP/s
    and 16,398 tokens/s a GPU in rows of 4,096, Megatron-Bridge's card of gpt-oss-120b)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = published(layers, experts)
    counts = model.parameters(VOCABULARY)
    assert counts["total"] / 1e9 == pytest.approx(total, abs=0.005)
    assert (counts["active"] - counts["embedding"]) / 1e9 == pytest.approx(active, abs=0.005)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**hf_config(model, VOCABULARY, 1, 0, "bfloat16"))
        )
    assert type(theirs).__name__ == "GptOssForCausalLM"
    assert counts["total"] == sum(p.numel() for p in theirs.parameters())
    assert memory_share(model, VOCABULARY, Layout(), 0).all == counts["total"]
    if layers == 36:
        assert model.flops_per_token(VOCABULARY, 4096) == pytest.approx(535.230e12 / 16398.332, rel=0.01)
    long = model.long_context(VOCABULARY)
    kept = 2 * 2 * 8 * 64 * layers / 2  # bytes of a token in half of the layers
    assert (long.cache_bytes, long.full_cache_bytes) == (kept * (131_072 + 128), kept * 2 * 131_072)
    assert long.flops_per_token < long.full_flops_per_token


def test_a_small_proxy_keeps_the_proportions() -> None:
    model = published(24, 32)
    changes = model.scaled(360, lambda width: width // 8)
    assert changes is not None
    proxy = GptOssConfig.model_validate(model.model_dump() | changes)
    assert proxy.proportions() == model.proportions() and proxy.sliding_window == model.sliding_window
    assert (proxy.heads * proxy.head_dim, proxy.moe_intermediate_size) == (512, 360)
    with pytest.raises(ValueError, match=r"without an output head; set it to false"):
        GptOssConfig.model_validate(model.model_dump() | {"tie_embeddings": True})


def test_layouts_that_do_not_divide_are_refused() -> None:
    model = GptOssConfig(**MODEL)
    assert problem(Layout(ranks=8, ep=8), model, VOCAB, [8]) == (
        "parallelism.ep = 8 does not divide experts = 4; nearest: 4"
    )
    assert "kv_heads = 2" in (problem(Layout(ranks=4, tp=4, ep=4, etp=1), model, VOCAB, [4]) or "")
    for layout, field in (
        (Layout(ranks=2, tp=2), "tp = 2 without etp"),
        (Layout(ranks=4, tp=2, ep=2, etp=2), "etp = 2"),
    ):
        assert problem(layout, model, VOCAB, [4]) == (
            f"parallelism.{field} splits experts, and Megatron-core splits none that have biases; set etp to 1 and ep to "
            "a multiple of tp"
        )
    assert problem(Layout(ranks=2, tp=2, ep=2, etp=1), model, VOCAB, [4]) is None
    for variant, word in (("gguf-q8_0", "GGUF files of the architecture gpt_oss"), ("int8", "stacked experts")):
        assert word in (obstacle(variant, model) or ""), variant
    assert obstacle("bf16", model) is None


def test_logits_are_those_of_transformers_in_rows_of_one_and_of_several_documents() -> None:
    """A window neither reaches into the document before it, nor ends at it; and a document that continues a prefix in
    its row, as answers to one question do, is one text with it."""
    model = GptOssConfig(**{**MODEL, "layers": 3})
    tensors = tensors_of(model)
    exported = dict(model.spec().to_hf(tensors, model, VOCAB))
    returned = dict(model.spec().from_hf(exported, model))
    assert returned.keys() == tensors.keys() and all(torch.equal(returned[n], tensors[n]) for n in tensors)
    theirs = InProcess(hf_config(model, VOCAB, 1, 0, "float32"), (), 1)
    theirs.load(exported)
    text = torch.randint(6, VOCAB, (1, 60), generator=torch.Generator().manual_seed(1))
    lengths, prefix = (34, 9, 17), 20  # the last of them continues the first 20 tokens
    with parallel.session(0), torch.no_grad():
        (gpt,) = build(model, VOCAB, packed=True)
        load_tensors([gpt], model, VOCAB, tensors)
        gpt.eval()
        where = torch.arange(60)[None]
        alone = theirs.model(text).logits
        torch.testing.assert_close(gpt(text, where, None), alone, atol=2e-5, rtol=1e-5)
        starts = torch.tensor([at for n, at in zip(lengths, (0, 34, 43), strict=True) for _ in range(n)])[None]
        parts = [theirs.model(part).logits for part in text.split(lengths, 1)]
        torch.testing.assert_close(gpt(text, where, starts), torch.cat(parts, 1), atol=2e-5, rtol=1e-5)
        prefixes = torch.stack([torch.zeros_like(starts), torch.where(starts == 43, prefix, 0)])
        prefixed = torch.cat((starts[None], prefixes))
        continued = theirs.model(torch.cat((text[:, :prefix], text[:, 43:]), 1)).logits[:, prefix:]
        expected = torch.cat((*parts[:2], continued), 1)
        torch.testing.assert_close(gpt(text, where, prefixed), expected, atol=2e-5, rtol=1e-5)
        theirs.model.config.sliding_window = 60
        for layer in theirs.model.model.layers:
            layer.self_attn.sinks.data.fill_(-1e9)
        unaware = (theirs.model(text).logits - alone).abs()
        assert unaware.amax() > 1e-2, "windows and sinks matter"


def test_answers_are_drawn_beyond_the_window() -> None:
    """Greedy tokens and their log-probabilities are those of whole forward passes, for prompts shorter and longer than
    the window."""
    model = GptOssConfig(**MODEL)
    engine = InProcess(hf_config(model, VOCAB, 1, 0, "float32"), (), 20)
    engine.load(dict(model.spec().to_hf(tensors_of(model), model, VOCAB)))
    assert isinstance(engine.decoder, LibraryDecoder)
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(tuple(torch.randint(6, VOCAB, (n,), generator=generator).tolist()), n) for n in (3, 11, 12, 30)]
    for prompt, answer in zip(prompts, engine.generate(prompts, greedy=True), strict=True):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([[*prompt.ids, *answer.ids]])).logits[0, len(prompt.ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(answer.ids) and len(answer.ids) == 20
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_policy_computes_what_its_sampler_drew(tmp_path: Path) -> None:
    """Answers behind a shared question, packed, with windows that reach into it. The sampler is transformers' model."""
    model = GptOssConfig(**{**MODEL, "sliding_window": 6})
    assert rl_fixtures.largest_gap(model, tensors_of(model, rl_fixtures.PADDED), tmp_path) < 1e-4


@at_length("training", 60)
def test_layouts_train_alike(corpus: Path, tmp_path: Path) -> None:
    """Every axis; a sampler gets the same weights, with the experts of a layer from one rank. Biases of experts are on
    each tensor rank, and are neither counted nor summed twice."""
    model = GptOssConfig(**{**MODEL, "layers": 4})
    config = {**train_fixtures.config(batch=layout_fixtures.BATCH), "model": {**MODEL, "layers": 4}}
    (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, config, tmp_path / "one.json").values()
    assert one[4]["loss"] < one[0]["loss"]
    for ranks, named in ((2, layout_fixtures.TWO), (4, layout_fixtures.FOUR_IN_EVERY_RUN)):
        layouts = {name: x for name, x in named.items() if not model.layout_obstacle(Layout(ranks=ranks, **x))}
        assert {"TP2 EP2 ETP1", "TP2xEP4 ETP1"} & layouts.keys()
        for name, curve in layout_fixtures.compare(corpus, layouts, ranks, config, tmp_path / "out.json").items():
            layout_fixtures.agree(curve, one, 1e-5, name)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", {**train_fixtures.config(), "model": MODEL})
    return folder / "out"


def test_the_export_is_the_trained_model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.loads(line) for line in (trained / "training.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    monkeypatch.setattr(hf, "WHOLE_BYTES", 0)  # transformers loads one layer at a time, as of a large model
    inputs = {
        "checkpoint": write_manifest(trained, "pretrain-windows"),
        "tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer"),
    }
    (tmp_path / "out").mkdir()
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=VOCAB)
    hf.run(config, inputs, tmp_path, tmp_path / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    parity = json.loads((tmp_path / "out/parity.json").read_text())
    assert parity["max_abs_logit_delta"] < 1e-5 and parity["tensors_compared"] == len(config.model.shapes(VOCAB))
    written = json.loads((tmp_path / "out/model/config.json").read_text())
    assert written["architectures"] == ["GptOssForCausalLM"] and written["sliding_window"] == 12
    assert written["layer_types"] == ["sliding_attention", "full_attention"]
    facts = read_model_facts(tmp_path / "out/model")
    assert facts.has_experts and facts.config["sliding_window"] == 12
    unused = VOCAB - written["vocab_size"]  # rows of table and head that only pad the vocabulary
    counts, padding = config.model.parameters(VOCAB), 2 * unused * config.model.hidden_size
    stated = facts.parameters.total, facts.parameters.active
    assert stated == (counts["total"] - padding, counts["active"] - padding)
