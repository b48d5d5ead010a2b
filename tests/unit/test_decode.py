"""The decoder's logits are those of a whole forward pass of transformers, whatever the model's shape and the rows."""

from __future__ import annotations

import pytest
import torch

from stages.generation.in_process import Decoder, InProcess, LibraryDecoder
from stages.generation.protocols import Prompt
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import full_tensor
from stages.models.base import ModelConfig, Yarn
from stages.models.grouped_query import Qwen3Config
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures import rl_fixtures

pytestmark = pytest.mark.numeric

MODEL = Qwen3MoeConfig.model_validate(rl_fixtures.MODEL)
DENSE = Qwen3Config(
    architecture="qwen3", intermediate_size=48,
    **{name: value for name, value in MODEL.model_dump().items() if name in ModelConfig.model_fields},
    heads=MODEL.heads, kv_heads=MODEL.kv_heads, head_dim=MODEL.head_dim,
)  # fmt: skip
VOCAB, STEPS = rl_fixtures.PADDED, 90  # more than the cache grows by at once


def sampler(changes: dict[str, object], new: int = STEPS, seed: int = 0, **config: object) -> InProcess:
    model = DENSE if changes.get("architecture") == "qwen3" else MODEL.model_copy(update=changes)
    engine = InProcess({**hf_config(model, VOCAB, 1, 0, "float32"), **config}, (), new)
    tensors = {n: full_tensor(n, s, model, seed) for n, s in model.shapes(VOCAB).items()}
    engine.load(dict(to_hf(tensors, model, VOCAB)))
    return engine


def prompts(lengths: list[int]) -> list[Prompt]:
    rng = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, VOCAB, (n,), generator=rng) for n in sorted(lengths)]
    return [Prompt(tuple(row.tolist()), i) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"kv_heads": 4, "tie_embeddings": False}, {}),
        ({"kv_heads": 1, "experts": 8, "num_experts_per_tok": 3}, {"norm_topk_prob": False}),
        ({"dense_layers": 1, "intermediate_size": 24}, {}),
        ({"architecture": "qwen3"}, {}),
        ({"yarn": Yarn(factor=4.0, original_length=32), "context_length": 128}, {}),
    ],
)
@pytest.mark.parametrize("lengths", [[5, 1, 30, 9], [7, 7], [40]])
def test_logits_are_those_of_a_whole_forward_pass(changes, config, lengths, monkeypatch) -> None:
    monkeypatch.setattr(
        "stages.generation.in_process.READ_TOKENS", 16
    )  # so that the prompts are read in several pieces
    engine, requests = sampler(changes, **config), prompts(lengths)
    forced_ids = torch.randint(6, VOCAB, (len(requests), STEPS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits, rows = [engine.decoder.read([request.ids for request in requests], STEPS)], torch.arange(len(requests))
        for n in range(STEPS):
            if n == STEPS // 2 and len(rows) > 2:  # some rows have ended
                rows = rows[[0, 2]]
                engine.decoder.select(rows)
            logits.append(engine.decoder.step(forced_ids[rows, n]))
        for at, row in enumerate(rows.tolist()):
            sequence = torch.tensor([[*requests[row].ids, *forced_ids[row].tolist()]])
            expected = engine.model(sequence).logits[0, len(requests[row].ids) - 1 :]
            stepwise = torch.stack([x[row] if len(x) == len(requests) else x[at] for x in logits])
            assert torch.allclose(stepwise, expected, atol=2e-5, rtol=1e-5), (stepwise - expected).abs().max()


def test_a_prompt_asked_several_times_is_read_once() -> None:
    engine, (request,) = sampler({}, new=12), prompts([9])
    reads = []
    engine.model.register_forward_pre_hook(lambda model, inputs: reads.append(len(inputs[0])))
    several = engine.generate([Prompt(request.ids, seed) for seed in range(5)])
    assert reads == [1]
    assert [c.ids for c in several] == [engine.generate([Prompt(request.ids, seed)])[0].ids for seed in range(5)]
    assert len({c.ids for c in several}) == 5


def test_weights_that_are_loaded_later_are_used() -> None:
    engine, requests = sampler({}, new=12), prompts([9, 4])
    before, shapes = engine.generate(requests), MODEL.shapes(VOCAB).items()
    engine.load(dict(to_hf({n: full_tensor(n, s, MODEL, 5) for n, s in shapes}, MODEL, VOCAB)))
    assert before != engine.generate(requests) == sampler({}, new=12, seed=5).generate(requests)


def test_another_architecture_is_decoded_by_its_own_forward_pass() -> None:
    """Greedy tokens and log-probabilities are those of whole forward passes, also after rows have ended."""
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
    }
    torch.manual_seed(0)
    stops = range(0, VOCAB, 3)
    engine = InProcess({"model_type": "llama", **size}, stops, 20)
    assert isinstance(engine.decoder, LibraryDecoder)
    requests = prompts([5, 1, 12, 9, 5, 3])
    completions = engine.generate(requests, greedy=True)
    assert len({len(completion.ids) for completion in completions}) > 1, "rows end at different steps"
    for request, completion in zip(requests, completions, strict=True):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([[*request.ids, *completion.ids]])).logits[0, len(request.ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(completion.ids)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="not from LlamaForCausalLM"):
        Decoder(engine.model)
