"""Answers that share their question in one packed row compute as each of them alone."""

from __future__ import annotations

import pytest
import torch

from stages.rl.rollout.batches import Example, build_rank_batch
from tests.fixtures import rl_fixtures

LENGTHS = ((5, (9, 1, 4)), (12, (3,)), (5, (2, 6, 7, 7)))
"""(tokens of a question, tokens of each of its answers)"""


def make_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for question, answers in LENGTHS:
        prompt = torch.randint(6, rl_fixtures.PADDED, (question,), generator=generator).tolist()
        for length in answers:
            answer = torch.randint(6, rl_fixtures.PADDED, (length,), generator=generator).tolist()
            examples.append(Example([*prompt, *answer], question, {"weight": 1.0}, {"number": [*range(length)]}))
    return examples


@pytest.mark.numeric
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_answers_of_one_question_compute_as_each_alone(micro_batches: int) -> None:
    from stages.rl.config import RlTrainConfig
    from stages.train import parallel
    from stages.train.engine import Engine

    config = RlTrainConfig.model_validate(rl_fixtures.config())
    examples = make_examples()
    with parallel.session(0) as ranks:
        engine = Engine(config, ranks, rl_fixtures.PADDED)
        engine.initialize()
        (gpt,) = engine.chunks
        engine.ddp[0].eval()  # no balancing loss, which does see a row as a whole
        batch = build_rank_batch([[x] for x in examples], micro_batches, ranks, 0, 1)
        assert len(batch.micro) == micro_batches
        assert sum(int((~micro.padding).sum()) for micro in batch.micro) < sum(len(x.ids) - 1 for x in examples)

        def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.autograd.grad(loss, list(gpt.parameters())))

        packed, numbers = [], []
        for micro in batch.micro:
            positions = torch.arange(micro.ids.shape[1])[None]
            losses = gpt(
                micro.ids, positions, micro.segments, labels=micro.labels, padding_mask=micro.padding,
                targets=micro.targets,
            )  # fmt: skip
            assert losses.shape == micro.loss_mask.shape
            for row, number, mask in zip(losses, micro.extras["number"], micro.loss_mask.bool(), strict=True):
                packed.append(row[mask])
                numbers.append(number[mask].tolist())
        assert numbers == [list(x.tokens["number"]) for x in examples]
        alone = []
        for example in examples:
            ids = torch.tensor([example.ids])
            where = torch.arange(ids.shape[1] - 1)[None]
            alone.append(gpt(ids[:, :-1], where, None, labels=ids[:, 1:])[0, example.start - 1 :])
        torch.testing.assert_close(torch.cat(packed), torch.cat(alone), atol=1e-5, rtol=1e-5)
        of_packed, of_alone = (gradients(torch.cat(losses).square().mean()) for losses in (packed, alone))
        for a, b in zip(of_packed, of_alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_micro_batches_have_like_numbers_of_tokens_and_none_is_empty() -> None:
    from stages.train import parallel

    with parallel.session(0) as ranks:
        examples = make_examples()
        for count in (1, 2, 4, 20):
            batch = build_rank_batch([[x] for x in examples], count, ranks, 0, 1)
            targets = [int(micro.loss_mask.sum()) for micro in batch.micro]
            assert len(targets) == count and sum(targets) == sum(len(x.ids) - x.start for x in examples)
            assert all(micro.targets is not None and micro.targets.shape[1] for micro in batch.micro)
            assert count > len(examples) or min(targets)
