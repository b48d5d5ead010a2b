"""Training speed on one CPU core: our whole step against transformers with torch AdamW, same model, same rows.

    .venv/bin/python bench/train.py            # about five minutes
    .venv/bin/python bench/train.py --quick    # a tiny model, to see that it works; its figures mean nothing

Ours is `stages.train.engine.Engine` as a phase runs it: forward, backward, Megatron's DDP, clipping, distributed
optimizer, deterministic kernels. The peer is `Qwen3MoeForCausalLM` as fast as it gets without a compiler: SDPA, the
fastest of its own expert implementations on this machine, fused AdamW, `clip_grad_norm_`, kernels that need not be
deterministic. Both start from the same weights, compute in fp32 on one thread, and take the same steps in turn, in
rounds; the load-balancing loss is off in both. A round's ratio is our tokens/s by the peer's. Seconds are CPU seconds:
one thread that waits for nobody uses as many as pass on the clock, unless other programs take the core from it. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer_kernels import plain_kernels

from stages.mcore.hf_mapping import hf_config, to_hf
from stages.mcore.model import named_tensors
from stages.models.mixture import Qwen3MoeConfig
from stages.train.config import TrainConfig
from stages.train.data import Batch, RankBatch
from stages.train.engine import Engine
from stages.train.parallel import session

TARGET = 1.1
# transformers' expert implementations that run here; its `batched_mm` copies an expert's weights for every token.
EXPERTS = ("grouped_mm", "eager")


@dataclass(frozen=True)
class Size:
    """What is measured: `rows` rows of `length` tokens a step, in one micro-batch."""

    model: Qwen3MoeConfig
    vocab: int
    rows: int
    length: int
    steps: int  # that each side takes in a round
    rounds: int
    matrix: int  # width of the square matrices that the machine's peak is measured with

    @property
    def tokens(self) -> int:
        return self.rows * self.length


FULL = Size(
    Qwen3MoeConfig(layers=6, hidden_size=256, heads=8, kv_heads=4, head_dim=64, experts=16, num_experts_per_tok=4,
                moe_intermediate_size=192, context_length=512, aux_loss=0.0),
    vocab=4096, rows=8, length=512, steps=2, rounds=20, matrix=2048,
)  # fmt: skip
QUICK = Size(
    Qwen3MoeConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, experts=4, num_experts_per_tok=2,
                moe_intermediate_size=16, context_length=64, aux_loss=0.0),
    vocab=64, rows=4, length=32, steps=1, rounds=3, matrix=64,
)  # fmt: skip

OPTIMIZER = dict(lr=1e-4, final_lr=1e-4, warmup_steps=0, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0)


class Tokens:
    """Random rows in the place of shards: step n always has the same ones, [rows, length + 1]."""

    def __init__(self, size: Size) -> None:
        self.size = size

    def step(self, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randint(self.size.vocab, (self.size.rows, self.size.length + 1), generator=generator)

    def share(self, number: int) -> RankBatch:
        data, length = self.step(number), self.size.length
        padding = torch.zeros(len(data), length, dtype=torch.bool)
        batch = Batch(data[:, :-1], data[:, 1:], torch.ones(len(data), length), padding)
        return RankBatch([batch], length, self.size.tokens)


Step = Callable[[int], float]
"""Takes the optimizer step of that number and gives its loss."""


def ours(engine: Engine, tokens: Tokens) -> Step:
    def step(number: int) -> float:
        return engine.step(tokens.share(number), OPTIMIZER["lr"], lambda loss, norm: None).loss

    return step


def peer(model: Any, tokens: Tokens) -> Step:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": norms, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        weight_decay=OPTIMIZER["weight_decay"],
        fused=True,
    )

    def step(number: int) -> float:
        with plain_kernels():
            data = tokens.step(number)
            logits = model(data[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

    return step


def peer_model(engine: Engine, size: Size) -> Any:
    """transformers' model with the engine's weights, by the way that a release goes."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        tensors = dict(to_hf({k: v.detach() for k, v in named_tensors(engine.chunks)}, size.model, size.vocab))
        save_file({k: v.contiguous() for k, v in tensors.items()}, f"{folder}/model.safetensors", {"format": "pt"})
        config = hf_config(size.model, size.vocab, eos_token_id=1, pad_token_id=0, dtype="float32")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a leaf of its own in memory, not the mapped file
    return model.train()


def seconds(step: Step, numbers: Iterable[int]) -> tuple[float, float]:
    """CPU seconds of this process and seconds by the clock that some steps take."""
    before = time.process_time(), time.perf_counter()
    for number in numbers:
        step(number)
    return time.process_time() - before[0], time.perf_counter() - before[1]


def fastest_experts(model: Any, tokens: Tokens, tries: int) -> tuple[str, dict[str, float]]:
    """transformers' quickest expert implementation here, and the seconds of a forward and backward with each."""
    timings = {}
    for name in EXPERTS:
        model.set_experts_implementation(name)

        def step(number: int) -> float:
            with plain_kernels():
                data = tokens.step(number)
                loss = F.cross_entropy(model(data[:, :-1], use_cache=False).logits.flatten(0, 1), data[:, 1:].flatten())
                loss.backward()
                model.zero_grad(set_to_none=True)
                return loss.item()

        step(0)
        timings[name] = min(seconds(step, [0])[0] for _ in range(tries))
    best = min(timings, key=lambda name: timings[name])
    model.set_experts_implementation(best)
    return best, timings


def matmul_peak(width: int) -> float:
    """fp32 FLOP/s of one product of square matrices, the better of three."""
    a, b = torch.randn(width, width), torch.randn(width, width)
    out = torch.empty(width, width)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        torch.mm(a, b, out=out)
        best = min(best, time.process_time() - start)
    return 2 * width**3 / best


def measure(size: Size) -> dict[str, Any]:
    """Runs the rounds and prints the table; gives the JSON object. Raises SystemExit if the two are not one model."""
    config = TrainConfig(
        model=size.model, padded_vocab_size=size.vocab, seed=0,
        phase=dict(
            mix={"random": 1.0}, sequence_length=size.length, steps=10**6, optimizer=OPTIMIZER,
            batch={"global_tokens": size.tokens, "micro_tokens": size.tokens}, validation={"every": 1, "rows": 1},
            release_checkpoint_interval=1,
        ),
    )  # fmt: skip
    with session(0) as ranks:
        engine = Engine(config, ranks, size.vocab)
        engine.initialize()
        model, tokens = peer_model(engine, size), Tokens(size)
        experts, comparison = fastest_experts(model, tokens, 2)
        sides = {"ours": ours(engine, tokens), "transformers": peer(model, tokens)}
        counts, tries = size.model.parameters(size.vocab), ", ".join(f"{k} {v:.2f} s" for k, v in comparison.items())
        print(f"{counts['total']:,} parameters, {counts['active']:,} active; {size.rows} rows of {size.length} tokens "
              f"a step; fp32, one thread; transformers: {experts} experts (forward and backward: {tries})")  # fmt: skip

        first = {name: step(1) for name, step in sides.items()}
        if abs(first["ours"] - first["transformers"]) > 1e-4:
            raise SystemExit(f"not the same model: first losses {first['ours']} and {first['transformers']}")
        for step in sides.values():  # warm-up
            step(2)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        clocks: dict[str, list[float]] = {name: [] for name in sides}
        peaks, steps_done = [], 2
        for turn in range(size.rounds):
            numbers = range(steps_done + 1, steps_done + 1 + size.steps)
            for name in sorted(sides, reverse=turn % 2 == 1):
                used, passed = seconds(sides[name], numbers)
                speeds[name].append(size.steps * size.tokens / used)
                clocks[name].append(passed)
            peaks.append(matmul_peak(size.matrix))
            steps_done += size.steps
        last = {name: step(steps_done + 1) for name, step in sides.items()}

    flops, peak = size.model.flops_per_token(size.vocab, size.length), max(peaks)
    print(f"peak: {peak / 1e9:.0f} GFLOP/s (fp32 product of {size.matrix}-wide matrices, best of all rounds)")
    print(f"{'':14}{'tokens/s, median':>18}{'lowest':>10}{'highest':>10}{'of peak':>10}"
          f"{'first loss':>14}{f'loss {steps_done + 1}':>14}")  # fmt: skip
    for name, speed in speeds.items():
        middle = statistics.median(speed)
        print(f"{name:14}{middle:18,.0f}{min(speed):10,.0f}{max(speed):10,.0f}{flops * middle / peak:10.1%}"
              f"{first[name]:14.6f}{last[name]:14.6f}")  # fmt: skip
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    by_clock = statistics.median(b / a for a, b in zip(*clocks.values(), strict=True))
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"ratio by round: median {ratio:.3f}, quartiles {low:.3f} to {high:.3f}, lowest {min(ratios):.3f}, "
          f"highest {max(ratios):.3f} ({size.rounds} rounds of {size.steps} steps); "
          f"median by the clock {by_clock:.3f}")  # fmt: skip
    return {
        "name": "train", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": "our tokens per CPU second by transformers', one thread each; low and high: quartiles over rounds",
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, fp32, {peak / 1e9:.0f} GFLOP/s",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    print(json.dumps(measure(QUICK if parser.parse_args().quick else FULL)))
