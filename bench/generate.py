"""Sampling speed on one CPU core: our in-process sampler against transformers' `generate`, same model, same prompts.

    .venv/bin/python bench/generate.py            # about three minutes
    .venv/bin/python bench/generate.py --quick    # a tiny model, to see that it works; its figures mean nothing

Ours is `stages.generation.in_process.InProcess` as a stage of reinforcement learning runs it: a random stream for each
answer and the log-probability of each token. The peer is `generate` of the same `Qwen3MoeForCausalLM` object's class,
filled with the same weights: the whole batch at once, padded on the left, no cuts of the distribution (top_k 0, top_p
1), no scores returned, and the fastest of its own expert implementations and caches here. Both draw at temperature 1 in
fp32 on one thread. No token stops an answer, so every answer has the same number of tokens. They take turns in rounds;
a round's ratio is our tokens/s by the peer's, and the ratio reported is that of the batch size where it is smallest.
Seconds are CPU seconds of the process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import Initial
from stages.models.mixture import Qwen3MoeConfig

TARGET = 1.0
EXPERTS = ("grouped_mm", "eager")
CACHES = ("dynamic", "static")


@dataclass(frozen=True)
class Size:
    """What is measured: `new` tokens for each of a batch of prompts of `shortest` to `longest` tokens."""

    model: Qwen3MoeConfig
    vocab: int
    new: int
    shortest: int
    longest: int
    rounds: int
    batches: tuple[int, ...]
    busy: int  # answers of a round at least, in as many calls as it takes


FULL = Size(
    Qwen3MoeConfig(layers=3, hidden_size=96, heads=4, kv_heads=2, head_dim=32, experts=4, num_experts_per_tok=2,
                moe_intermediate_size=96, context_length=512, tie_embeddings=True, init_std=0.08),
    vocab=512, new=56, shortest=12, longest=48, rounds=9, batches=(1, 16, 128), busy=32,
)  # fmt: skip
QUICK = Size(
    Qwen3MoeConfig(layers=1, hidden_size=32, heads=4, kv_heads=2, head_dim=8, experts=4, num_experts_per_tok=2,
                moe_intermediate_size=16, context_length=64, tie_embeddings=True),
    vocab=64, new=6, shortest=3, longest=9, rounds=3, batches=(1, 4), busy=4,
)  # fmt: skip


class Sides:
    """Both samplers, filled with one model's random weights."""

    def __init__(self, size: Size) -> None:
        self.size = size
        config = hf_config(size.model, size.vocab, 1, 0, "float32")
        shapes = size.model.shapes(size.vocab)
        tensors = dict(to_hf(Initial(shapes, size.model, 0), size.model, size.vocab))
        self.sampler, other = (InProcess(config, stops=(), max_new_tokens=size.new) for _ in range(2))
        for sampler in (self.sampler, other):
            sampler.load(tensors)
        self.model: Any = other.model  # of the same class, in memory of its own
        self.model.generation_config.eos_token_id = None  # a setting of None in a call is filled in from here
        self.cache = CACHES[0]

    def prompts(self, count: int, number: int) -> list[Prompt]:
        """Random tokens of random lengths, of which no two are the same, so that none is read for another."""
        size, generator = self.size, torch.Generator().manual_seed(number)
        lengths = torch.randint(size.shortest, size.longest + 1, (count,), generator=generator).tolist()
        rows = [torch.randint(4, size.vocab, (length,), generator=generator) for length in lengths]
        return [Prompt(tuple(row.tolist()), seed) for seed, row in enumerate(rows)]

    def ours(self, prompts: list[Prompt], greedy: bool = False) -> list[list[int]]:
        return [list(completion.ids) for completion in self.sampler.generate(prompts, greedy)]

    def transformers(self, prompts: list[Prompt], greedy: bool = False) -> list[list[int]]:
        width = max(len(p.ids) for p in prompts)
        settings = GenerationConfig(
            do_sample=not greedy, temperature=None if greedy else 1.0, top_k=None if greedy else 0,
            top_p=None if greedy else 1.0, max_new_tokens=self.size.new, eos_token_id=None, pad_token_id=0,
            cache_implementation=self.cache,
        )  # fmt: skip
        ids = torch.tensor([[0] * (width - len(p.ids)) + list(p.ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=settings)
        return out[:, width:].tolist()

    def choose(self, prompts: list[Prompt]) -> str:
        """Sets the peer to the quickest of what transformers offers for these prompts; says what that is."""
        timings = {}
        for experts in EXPERTS:
            for cache in CACHES:
                self._set(experts, cache)
                self.transformers(prompts)
                timings[experts, cache] = min(seconds(self.transformers, prompts)[0] for _ in range(2))
        best = min(timings, key=lambda name: timings[name])
        self._set(*best)
        return f"{best[0]} experts, {best[1]} cache"

    def _set(self, experts: str, cache: str) -> None:
        self.model.set_experts_implementation(experts)
        self.cache = cache


def seconds(draw: Callable[[list[Prompt]], list[list[int]]], prompts: list[Prompt]) -> tuple[float, float]:
    """CPU seconds of this process and seconds by the clock that it takes to answer."""
    before = time.process_time(), time.perf_counter()
    draw(prompts)
    return time.process_time() - before[0], time.perf_counter() - before[1]


def measure(size: Size) -> dict[str, Any]:
    """Runs the rounds and prints the table; gives the JSON object. Raises SystemExit if the two are not one model."""
    torch.set_num_threads(1)
    sides = Sides(size)
    kinds = {"ours": sides.ours, "transformers": sides.transformers}
    print(f"{size.model.parameters(size.vocab)['total']:,} parameters; prompts of {size.shortest} to {size.longest} "
          f"tokens, {size.new} new ones for each; temperature 1, fp32, one thread")  # fmt: skip
    prompts = sides.prompts(min(4, max(size.batches)), 0)
    greedy = [draw(prompts, greedy=True) for draw in kinds.values()]
    if greedy[0] != greedy[1]:
        raise SystemExit("not the same model: the likeliest tokens differ")
    print(f"{'batch':>5}{'':2}{'':14}{'tokens/s, median':>18}{'lowest':>10}{'highest':>10}{'ratio':>8}{'quartiles':>16}"
          f"{'by clock':>10}")  # fmt: skip
    lines = []
    for batch in size.batches:
        chosen = sides.choose(sides.prompts(batch, 0))
        for draw in kinds.values():  # warm-up
            drawn = draw(sides.prompts(batch, 1))
            assert [len(row) for row in drawn] == [size.new] * batch, "not the same work"
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        repeats = max(1, size.busy // batch)  # as a step of a small batch is too short to time
        for turn in range(size.rounds):
            for name in sorted(kinds, reverse=turn % 2 == 1):
                each = [seconds(kinds[name], sides.prompts(batch, 2 + turn * repeats + n)) for n in range(repeats)]
                timings[name].append((sum(used for used, _ in each), sum(passed for _, passed in each)))
        ratios = [theirs[0] / ours[0] for ours, theirs in zip(*timings.values(), strict=True)]
        clock = statistics.median(theirs[1] / ours[1] for ours, theirs in zip(*timings.values(), strict=True))
        low, ratio, high = statistics.quantiles(ratios, n=4)
        lines.append((ratio, low, high))
        for name, each in timings.items():
            speeds = [repeats * batch * size.new / used for used, _ in each]
            line = f"{batch:5}  {name:14}{statistics.median(speeds):18,.0f}{min(speeds):10,.0f}{max(speeds):10,.0f}"
            ours = name == "ours"
            print(line + (f"{ratio:8.3f}{low:8.3f}{high:8.3f}{clock:10.3f}" if ours else f"  {chosen}"))
    ratio, low, high = min(lines)
    return {
        "name": "generate", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": "our tokens per CPU second by transformers' generate, one thread each, at the batch size of "
                f"{', '.join(map(str, size.batches))} where it is least; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, fp32",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    print(json.dumps(measure(QUICK if parser.parse_args().quick else FULL)))
