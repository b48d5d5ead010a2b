"""What layers with windows or linear attention keep and lose against full attention, at equal compute.

    .venv/bin/python bench/attention_kinds.py            # seeds 0, 1, 2 in two processes
    .venv/bin/python bench/attention_kinds.py --quick    # twenty steps of one seed: its figures mean nothing

Mixtures of experts of four layers of the same widths are trained from initial weights on rows of 80 tokens: 8 pairs
of a key and a value, 48 bytes of docstrings of Python's standard library, then the keys again in another order, each
with its value (multi-query associative recall; Arora et al., 2023, arXiv:2312.04927). The loss is that of the text and
of the last values, a mean each. All models see the same rows in the same order, as many as take the FLOPs of the first
one, counted as `atom plan` counts them. Measured on held-out rows: bits per byte of the text, and the probability of
the right value. It is 1/16 by chance, and 0.34 if each value of the row that was not yet given is as likely.

The last line is one JSON object. Its `ratio` is the bits per byte of full attention over those of the hybrid with
linear attention.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from intervals import interval
from small_policies import argument_parser, prepare_process

from stages.data.acquire.readers.base import Document
from stages.data.acquire.readers.python_stdlib import library_files, read
from stages.formats.seeds import seed_of
from stages.models.registry import parse
from stages.train.config import TrainConfig
from stages.train.data import Batch, RankBatch
from stages.train.engine import Engine
from stages.train.parallel import session

PAIRS, KEYS, VALUES = 8, 32, 16
LENGTH, VOCAB = 80, 256 + KEYS + VALUES
TEXT = slice(2 * PAIRS, LENGTH - 2 * PAIRS)
RATE = 3e-3
COMMON = dict(
    layers=4, hidden_size=64, heads=4, kv_heads=2, head_dim=16, experts=4, moe_intermediate_size=64,
    context_length=LENGTH, init_std=0.05, aux_loss=1e-3, tie_embeddings=False,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "full": dict(architecture="qwen3_moe", num_experts_per_tok=2, shared_expert_intermediate_size=64),
    "windows": dict(architecture="gpt_oss", num_experts_per_tok=3, sliding_window=16),
    "linear": dict(architecture="qwen3_next", num_experts_per_tok=2, shared_expert_intermediate_size=64,
                   linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16),
}  # fmt: skip
"""Full attention; a window of 16 tokens in every other layer; linear attention in three layers of four. A token uses
two experts and a shared one, or, where the architecture has no shared one, three."""


@dataclass(frozen=True)
class Size:
    """steps: of full attention; rows: of a step; heldout: rows that are measured."""

    steps: int
    rows: int
    heldout: int


FULL = Size(steps=600, rows=32, heldout=512)
QUICK = replace(FULL, steps=20, rows=2, heldout=2)


class Rows:
    """Rows by a seed: the text from a random place of the split."""

    def __init__(self, split: str, seed: int) -> None:
        """split: `train` or `heldout`, every tenth docstring."""
        docstrings = (each.text for each in read(library_files(True), "docstring") if isinstance(each, Document))
        texts = [text for n, text in enumerate(docstrings) if (n % 10 == 0) == (split == "heldout")]
        self.text = np.frombuffer("\n\n".join(texts).encode(), np.uint8)
        self.rng = np.random.default_rng(seed_of(f"bench/attention/{split}", seed))

    def draw(self, count: int) -> torch.Tensor:
        """Token ids [count, LENGTH]."""
        rows = np.empty((count, LENGTH), np.int64)
        for row in rows:
            keys = 256 + self.rng.choice(KEYS, PAIRS, replace=False)
            values = 256 + KEYS + self.rng.choice(VALUES, PAIRS, replace=False)
            order = self.rng.permutation(PAIRS)
            start = self.rng.integers(len(self.text) - LENGTH)
            row[TEXT] = self.text[start : start + TEXT.stop - TEXT.start]
            row[: TEXT.start : 2], row[1 : TEXT.start : 2] = keys, values
            row[TEXT.stop :: 2], row[TEXT.stop + 1 :: 2] = keys[order], values[order]
        return torch.from_numpy(rows)


def batch(ids: torch.Tensor) -> RankBatch:
    """One micro-batch of rows [rows, LENGTH]. The mask holds each token's weight, which sums to 1 for the text of a row
    and for its values."""
    weights = torch.zeros(ids.shape)
    weights[:, TEXT] = 1 / (TEXT.stop - TEXT.start)
    weights[:, TEXT.stop + 1 :: 2] = 1 / PAIRS
    weights = weights[:, 1:].contiguous()
    starts = torch.zeros(weights.shape, dtype=torch.bool)
    return RankBatch([Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights, starts)], LENGTH - 1, len(ids))


def objective(losses: torch.Tensor, part: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the losses, and over rows the sums of the text's nats a byte and of the recall."""
    losses = losses.reshape(part.loss_mask.shape)
    return (losses * part.loss_mask).sum(), {
        "nats": losses[:, TEXT.start - 1 : TEXT.stop - 1].mean(1).sum(),
        "recall": (-losses[:, TEXT.stop :: 2]).exp().mean(1).sum(),
    }


def configuration(kind: str, seed: int) -> TrainConfig:
    optimizer = dict(lr=RATE, final_lr=RATE, warmup_steps=0, weight_decay=0.0, clip=1.0)
    phase = dict(
        mix={"text": 1}, steps=10**6, sequence_length=LENGTH - 1, optimizer=optimizer, checkpoint_interval=10**6,
        batch={"global_tokens": LENGTH - 1, "micro_tokens": LENGTH - 1}, release_checkpoint_interval=10**6,
        validation={"every": 10**6, "rows": 1},
    )  # fmt: skip
    return TrainConfig.model_validate(dict(model=COMMON | KINDS[kind], phase=phase, padded_vocab_size=VOCAB, seed=seed))


def flops(kind: str) -> float:
    """Training FLOPs of a token."""
    return parse(COMMON | KINDS[kind]).flops_per_token(VOCAB, LENGTH - 1)


def run(size: Size, kind: str, seed: int) -> dict[str, Any]:
    """The figures of one model."""
    prepare_process()
    steps = round(size.steps * flops("full") / flops(kind))
    train, heldout = Rows("train", seed), batch(Rows("heldout", seed).draw(size.heldout))
    start = time.process_time()
    with session(0) as ranks:
        engine = Engine(configuration(kind, seed), ranks, VOCAB)
        engine.initialize()
        for step in range(steps):
            rate = RATE * min(1.0, (step + 1) / 30, (steps - step) / (0.3 * steps))
            engine.step(batch(train.draw(size.rows)), rate, lambda loss, norm: None, objective=objective)
        _, sums = engine.figures(heldout, objective)
    result = {"bits": sums["nats"] / size.heldout / math.log(2), "recall": sums["recall"] / size.heldout}
    print(f"seed {seed}: {kind}, {steps} steps, {json.dumps(result)}, {time.process_time() - start:.0f} s", flush=True)
    return {"kind": kind, "seed": seed, **result}


def report(results: Mapping[tuple[str, int], Mapping[str, float]], seeds: int) -> dict[str, Any]:
    """Prints the table; returns the line of the benchmark."""
    print(f"{'kind':8} {'MFLOPs a token':>15} {'bits a byte':>12} {'difference to full':>28} {'recall':>8} "
          f"{'difference to full':>28}")  # fmt: skip
    for kind in KINDS:
        cells = f"{kind:8} {flops(kind) / 1e6:15.4f}"
        for name in ("bits", "recall"):
            values = [results[kind, seed][name] for seed in range(seeds)]
            mean, low, high = interval([value - results["full", seed][name] for seed, value in enumerate(values)])
            cells += f" {statistics.fmean(values):{12 if name == 'bits' else 8}.3f}"
            cells += f" {f'{mean:+.3f} ({low:+.3f} to {high:+.3f})':>28}"
        print(cells)
    ratios = [results["full", seed]["bits"] / results["linear", seed]["bits"] for seed in range(seeds)]
    mean, low, high = interval(ratios)
    return {
        "name": "attention_kinds", "ratio": round(mean, 4), "low": round(low, 4), "high": round(high, 4),
        "target": 1.0, "unit": f"bits per byte of full over those of linear attention, {seeds} seeds, equal FLOPs",
        "machine": f"{platform.machine()}, 1 thread a model, torch {torch.__version__}, fp32",
    }  # fmt: skip


def measure(size: Size, seeds: int, processes: int) -> dict[str, Any]:
    """Trains all models and reports."""
    context = multiprocessing.get_context("spawn")
    todo = [(size, kind, seed) for seed in range(seeds) for kind in KINDS]
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        results = list(pool.map(run, *zip(*todo, strict=True)))
    return report({(result["kind"], result["seed"]): result for result in results}, seeds)


if __name__ == "__main__":
    arguments = argument_parser(__doc__).parse_args()
    size, seeds, processes = (QUICK, 1, 1) if arguments.quick else (FULL, arguments.seeds, 2)
    print(json.dumps(measure(size, seeds, processes)))
