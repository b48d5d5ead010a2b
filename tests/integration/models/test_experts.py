"""Where tokens go: counted exactly, reported when an expert starves, and evened out in each of the ways that there are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, no_progress, write_manifest
from stages.mcore.routers import DEAD_SHARE, Experts
from stages.train import parallel
from stages.train.checkpoint.load_checkpoint import Origin
from stages.train.config import TrainConfig
from stages.train.data import Order, RankBatch, Shards
from stages.train.engine import Engine
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric


def step(corpus: Path, model: dict[str, Any], count: int = 1) -> tuple[Engine, list[Any], RankBatch]:
    settings = train_fixtures.config()
    settings["model"] = {**settings["model"], **model}
    config = TrainConfig.model_validate(settings)
    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, train_fixtures.VOCAB)
        engine.initialize()
        order = Order(Artifact.open(corpus / "order"), config.phase)
        shards = Shards(Artifact.open(corpus / "tokens"), "train")
        figures = []
        for number in range(1, count + 1):
            share = RankBatch.read(order.rows(number), shards, config.phase.micro_rows, ranks)
            figures.append(engine.step(share, 3e-3, lambda loss, norm: None))
        return engine, figures, share


def test_counts_are_those_of_another_implementation(corpus: Path) -> None:
    """Hugging Face's model with the initial weights routes the real tokens of the first step in the same way."""
    from transformers import Qwen3MoeConfig as HfConfig
    from transformers import Qwen3MoeForCausalLM

    from stages.mcore.hf_mapping import hf_config, to_hf
    from stages.mcore.model import full_tensor
    from stages.models.mixture import Qwen3MoeConfig

    model = Qwen3MoeConfig(**train_fixtures.MODEL)
    _, (figures,), share = step(corpus, {})
    hf = Qwen3MoeForCausalLM(HfConfig(**hf_config(model, train_fixtures.VOCAB, 1, 0, "float32"))).eval()
    full = {n: full_tensor(n, s, model, 0) for n, s in model.shapes(train_fixtures.VOCAB).items()}
    mapped = dict(to_hf(full, model, train_fixtures.VOCAB))
    for layer in range(model.layers):  # transformers holds the experts of a layer as one tensor
        at = f"model.layers.{layer}.mlp.experts."
        parts = [[mapped.pop(f"{at}{e}.{p}.weight") for p in ("gate_proj", "up_proj", "down_proj")] for e in range(4)]
        mapped[at + "gate_up_proj"] = torch.stack([torch.cat(x[:2]) for x in parts])
        mapped[at + "down_proj"] = torch.stack([x[2] for x in parts])
    hf.load_state_dict(mapped, strict=False)
    counts, entropy, tokens = torch.zeros(2, 4), torch.zeros(2), 0
    for batch in share.micro:
        with torch.no_grad():
            logits = hf(batch.ids, output_router_logits=True).router_logits
        real = ~batch.padding.flatten()
        tokens += int(real.sum())
        for layer, x in enumerate(logits):
            p = x[real].float().softmax(-1)
            counts[layer] += torch.zeros_like(p).scatter(1, p.topk(2).indices, 1).sum(0)
            entropy[layer] -= (p * p.log()).sum()
    torch.testing.assert_close(figures.router.experts.share, counts / counts.sum(1, keepdim=True))
    torch.testing.assert_close(figures.router.experts.entropy, entropy / tokens, rtol=1e-5, atol=0)
    assert figures.router.experts.dropped == 0 and counts.sum() == 2 * 2 * tokens
    assert figures.router.experts.max_violation == pytest.approx(float(counts.max() / counts.mean() - 1))


def test_an_expert_that_starves_is_reported(corpus: Path, tmp_path: Path) -> None:
    """Many experts without any balancing and with large weights: some are left out, and the alarm names them."""
    settings = train_fixtures.config()
    settings["model"] = {**settings["model"], "aux_loss": 0.0, "init_std": 1.0, "experts": 32}
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings, report)
    lines = [json.loads(x) for x in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    reports = [x for x in lines if "experts" in x]
    assert [x["step"] for x in reports] == [4, 8, 12]
    last = reports[-1]["experts"]
    assert last["layers"] == [0, 1] and all(math.isclose(sum(row), 1, abs_tol=1e-5) for row in last["share"])
    dead = [[n, e] for n, row in enumerate(last["share"]) for e, x in enumerate(row) if x * 32 < DEAD_SHARE]
    assert dead and last["dead"] == dead
    layer, expert = dead[0]
    assert any(f"experts starve at step 12: {expert} of layer {layer}" in note for note in report.notes)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["dead_experts"] == dead and summary["dropped_tokens"] == 0
    steps = [x for x in lines if "loss" in x]
    assert all(x["expert_max_violation"] >= 0 and 0 <= x["router_entropy"] <= math.log(32) for x in steps)


def test_dead_and_busy() -> None:
    share = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.9, 0.09, 0.01, 0.0]])
    experts = Experts([3, 4], share, torch.tensor([1.0, 0.1]), 0)
    assert experts.dead() == [(4, 2), (4, 3)] and experts.max_violation == pytest.approx(2.6)


def test_biases_even_out_the_load_without_a_loss(corpus: Path) -> None:
    model = {**train_fixtures.SIGMOID, "aux_loss": 0.0, "init_std": 1.0}
    engine, figures, _ = step(corpus, {**model, "router_bias_update_rate": 0.02}, 12)
    _, without, _ = step(corpus, {**model, "router_bias_update_rate": 1e-9}, 12)
    uneven = [sum(x.router.experts.max_violation for x in part[4:]) for part in (figures, without)]
    assert uneven[0] < 0.9 * uneven[1]
    assert set(engine.buffers) == {f"decoder.layers.{n}.mlp.router.expert_bias" for n in (0, 1)}
    for bias in engine.buffers.values():
        assert bias.dtype == torch.float32 and 0 < bias.abs().max() <= 12 * 0.02 + 1e-6
        assert torch.allclose(bias / 0.02, (bias / 0.02).round(), atol=1e-3), "by one rate a step, up or down"


def test_biases_and_the_load_are_kept_and_taken_over(corpus: Path, tmp_path: Path) -> None:
    settings = train_fixtures.config(precision="bf16")
    settings["model"] = {**train_fixtures.SIGMOID, "router_bias_update_rate": 0.02, "balance": "global"}
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings)
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(corpus, tmp_path / "w2", tmp_path / "o2", settings, train_fixtures.Reporter(7, 15))
    train_fixtures.pretrain(corpus, tmp_path / "w2", tmp_path / "o3", settings)
    assert train_fixtures.digest(tmp_path / "o3") == train_fixtures.digest(tmp_path / "out")
    load = json.loads((tmp_path / "out/step-000012/state.json").read_text())["expert_load"]
    lines = [json.loads(x) for x in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    share = [x["experts"]["share"] for x in lines if "experts" in x][-1]
    assert [[round(x, 6) for x in row] for row in load] == share != [[0.25] * 4] * 2
    config, product = (
        TrainConfig.model_validate(settings),
        write_manifest(tmp_path / "out/step-000012", "pretrain@12-test"),
    )
    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, train_fixtures.VOCAB)
        Origin(product, "", no_progress).load(engine, config, "")
        assert engine.router_state() == {"expert_load": load}, "a phase that continues"
        Origin(product, "", no_progress).load_weights(engine)
        assert engine.router_state() == {"expert_load": [[0.25] * 4] * 2}, "the next phase"
        with pytest.raises(AtomError, match="expert_load in the state of the checkpoint is \\(1, 4\\), not \\(2, 4\\)"):
            engine.routers.load_state({"expert_load": load[:1]})
    from safetensors.torch import load_file

    biases = [
        tensor
        for step in (6, 12)  # a bias that rose and fell as often is 0 again
        for name, tensor in load_file(tmp_path / f"out/step-{step:06d}/model.safetensors").items()
        if name.endswith("router.expert_bias")
    ]
    assert len(biases) == 2 * settings["model"]["layers"] and any(bias.abs().max() > 0 for bias in biases)
    assert not any("expert_bias" in name for name in load_file(tmp_path / "out/step-000012/optimizer.safetensors"))


def test_z_loss_keeps_the_routers_logits_small(corpus: Path) -> None:
    loose = step(corpus, {"init_std": 0.3}, 12)[1]
    tight = step(corpus, {"init_std": 0.3, "z_loss": 0.1}, 12)[1]
    assert loose[0].router.z_loss is None and 0 < tight[-1].router.z_loss < 0.8 * tight[0].router.z_loss


def test_balance_by_sequence_is_another_loss(corpus: Path) -> None:
    batch, sequence = (step(corpus, {"balance": kind})[1][0] for kind in ("batch", "sequence"))
    assert batch.loss == sequence.loss and sequence.router.aux_loss > batch.router.aux_loss, (
        "rows are less even than batches"
    )
