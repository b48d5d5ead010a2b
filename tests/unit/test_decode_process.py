"""Weights that come while the decoder draws: the tokens before are of the old policy, those after of the new one."""

# ruff: noqa: F811 - a fixture is imported, and is an argument

from __future__ import annotations

import pytest
import torch

from stages.models.hf import hf_config
from stages.rl.protocols import Completion, Prompt
from stages.rl.samplers.decode_process import Decoding
from stages.rl.samplers.generate import InProcess
from tests.fixtures.sampler_fixtures import MODEL, VOCAB, prompts, tensors  # noqa: F401 - a fixture

TOKENS, CHANGE = 12, 5


class Changed(Decoding):
    """Gets the second policy after some tokens, as if it came through the pipe then."""

    def _renew(self, drawn: int) -> bool:
        if drawn == CHANGE:
            self.next_weights = "second", tensors(1)
        return super()._renew(drawn)


def draw(kind: type[Decoding], prompts: list[Prompt], seed: int) -> list[Completion]:
    sampler = kind(hf_config(MODEL, VOCAB, 1, 0, "float32"), (1, 3), TOKENS)
    sampler.next_weights = "first", tensors(seed)
    return sampler.generate(prompts)


@pytest.mark.numeric
def test_each_token_is_of_the_policy_that_its_span_names(prompts: list[Prompt]) -> None:
    changed, first = draw(Changed, prompts, 0), draw(Decoding, prompts, 0)
    longer = [c for c in changed if len(c.ids) > CHANGE]
    assert len(longer) > 2 and len(longer) < len(changed), "some end before, some after"
    models = {}
    for digest, seed in ("first", 0), ("second", 1):
        sampler = InProcess(hf_config(MODEL, VOCAB, 1, 0, "float32"), (1, 3), TOKENS)
        sampler.load(tensors(seed))
        models[digest] = sampler.model
    for prompt, c, unchanged in zip(prompts, changed, first, strict=True):
        assert c.ids[:CHANGE] == unchanged.ids[:CHANGE] and c.logprobs[:CHANGE] == unchanged.logprobs[:CHANGE]
        tokens = len(c.ids)
        assert c.versions == (
            (("first", tokens),) if tokens <= CHANGE else (("first", CHANGE), ("second", tokens - CHANGE))
        )
        for digest, span in ("first", slice(0, CHANGE)), ("second", slice(CHANGE, None)):
            with torch.inference_mode():
                logits = models[digest](torch.tensor([[*prompt.ids, *c.ids]])).logits[0, len(prompt.ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
            assert torch.tensor(c.logprobs[span]) == pytest.approx(expected[span], abs=2e-5)
    other = [c.ids for c in draw(Decoding, prompts, 1)]
    assert [c.ids for c in changed] != [c.ids for c in first] and [c.ids for c in changed] != other
