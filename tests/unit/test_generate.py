"""The in-process sampler draws what transformers would, and returns the probabilities that it drew by."""

# ruff: noqa: F811 - a fixture is imported, and is an argument

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.mcore.hf_mapping import hf_config
from stages.models.mixture import Qwen3MoeConfig
from tests.fixtures.sampler_fixtures import MODEL, STOPS, VOCAB, prompts, tensors  # noqa: F401 - a fixture

pytestmark = pytest.mark.numeric


def sampler(new: int = 12, temperature: float = 1.0, rows: int = 256, model: Qwen3MoeConfig = MODEL) -> InProcess:
    engine = InProcess(hf_config(model, VOCAB, 1, 0, "float32"), STOPS, new, temperature, rows)
    engine.load(tensors(model=model))
    return engine


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_answers_are_transformers(prompts: list[Prompt], tied: bool) -> None:
    engine = sampler(model=MODEL.model_copy(update={"tie_embeddings": tied}))
    settings = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=list(STOPS), pad_token_id=0)
    for prompt, completion in zip(prompts, engine.generate(prompts, greedy=True), strict=True):
        theirs = engine.model.generate(torch.tensor([prompt.ids]), generation_config=settings)[0, len(prompt.ids) :]
        assert list(completion.ids) == theirs.tolist()
        assert completion.finished == (completion.ids[-1] in STOPS) and len(completion.ids) <= 12


@pytest.mark.parametrize(("temperature", "greedy"), [(1.0, False), (0.7, False), (1.0, True)])
def test_log_probabilities_are_those_of_a_whole_forward_pass(
    prompts: list[Prompt], temperature: float, greedy: bool
) -> None:
    engine = sampler(temperature=temperature)
    for prompt, completion in zip(prompts, engine.generate(prompts, greedy), strict=True):
        with torch.inference_mode():
            logits = engine.model(torch.tensor([[*prompt.ids, *completion.ids]])).logits[0, len(prompt.ids) - 1 : -1]
        spread = torch.log_softmax(logits / (1.0 if greedy else temperature), -1)
        expected = spread.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(expected, abs=2e-5)


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(prompts: list[Prompt]) -> None:
    together = sampler().generate(prompts)
    assert together == sampler(rows=3).generate(prompts) or [c.ids for c in together] == [
        c.ids for c in sampler(rows=3).generate(prompts)
    ]
    backwards = sampler().generate(prompts[::-1])[::-1]
    assert [c.ids for c in together] == [c.ids for c in backwards]
    assert together == sampler().generate(prompts), "the same call gives the same bits"
    redrawn = sampler().generate([Prompt(p.ids, p.seed + 1) for p in prompts])
    assert [c.ids for c in together] != [c.ids for c in redrawn]


def test_tokens_come_as_often_as_their_probability_says() -> None:
    engine, ids = sampler(new=1), (7, 8, 9)
    with torch.inference_mode():
        chances = torch.softmax(engine.model(torch.tensor([ids])).logits[0, -1], -1)
    count = 4000
    drawn = Counter(completion.ids[0] for completion in engine.generate([Prompt(ids, seed) for seed in range(count)]))
    statistic = sum((drawn[t] - count * p) ** 2 / (count * p) for t, p in enumerate(chances.tolist()))
    assert statistic < VOCAB - 1 + 5 * (2 * (VOCAB - 1)) ** 0.5, "chi-squared, five standard deviations"


def test_tensors_that_are_not_the_models_are_refused() -> None:
    engine, good = sampler(), tensors(1)
    with pytest.raises(ValueError, match="the sampler's model has no tensor model.layers.9.x"):
        engine.load({**good, "model.layers.9.x": torch.zeros(1)})
    with pytest.raises(KeyError, match="experts.3.down_proj"):
        engine.load({n: t for n, t in good.items() if not n.endswith("layers.1.mlp.experts.3.down_proj.weight")})
    with pytest.raises(RuntimeError, match="must match"):
        engine.load({**good, "model.norm.weight": torch.zeros(5)})
