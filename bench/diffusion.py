"""Masked text diffusion beside next-token prediction, on a tiny model: the try that docs/diffusion.md reports.

    .venv/bin/python bench/diffusion.py            # three seeds, about a minute of one core
    .venv/bin/python bench/diffusion.py --quick    # to see that it works

One transformer, twice, of equal shape, with equal optimizer, rows and steps, on the bytes of Python's standard
library. `next token` has a causal mask, and its loss is the negative log-likelihood. `diffusion` sees the whole row; a
share t of its bytes, drawn evenly from (0, 1], is masked, and the loss is the sum over masked bytes by t. That bounds
the same likelihood (MDLM, Sahoo et al., 2024, arXiv:2406.07524; LLaDA, Nie et al., 2025, arXiv:2502.09992). The t of a
batch are spread evenly, which lowers the variance. Held-out figures are bits a byte; that of diffusion is an upper
bound, averaged over DRAWS masks of each row.

`samples` are rows that diffusion draws from nothing in so many passes, the same number of bytes in each, at places
drawn evenly. Their figure is what the seed's causal model gives them, in bits a byte. The last line is one JSON object;
`ratio` is next token's bits by diffusion's.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from stages.data.python_stdlib import library_files
from stages.data.seeds import seed_of

BYTES, MASK, LENGTH, ROWS, WIDTH, LAYERS, HEADS = 256, 256, 64, 32, 96, 3, 3
RATE, DRAWS = 2e-3, 16
PASSES = (4, 16, 64)


class Model(nn.Module):
    """Bytes [rows, LENGTH] -> logits [rows, LENGTH, BYTES]."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(BYTES + 1, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, BYTES)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.table(ids) + self.positions, self.mask, is_causal=self.mask is not None)
        logits: torch.Tensor = self.head(hidden)
        return logits


def windows(text: bytes, rows: int, label: str, seed: int) -> torch.Tensor:
    rng = random.Random(seed_of(label, seed))
    starts = [rng.randrange(len(text) - LENGTH) for _ in range(rows)]
    return torch.tensor([list(text[start : start + LENGTH]) for start in starts])


def next_token(model: Model, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Nats a byte. The first byte is predicted from the mask."""
    shifted = torch.cat([torch.full((len(rows), 1), MASK), rows[:, :-1]], 1)
    return F.cross_entropy(model(shifted).flatten(0, 1), rows.flatten())


def diffusion(model: Model, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The bound, in nats a byte."""
    t = (torch.rand(1, generator=generator) + torch.arange(len(rows)) / len(rows)) % 1
    t = 1 - t[:, None]  # in (0, 1]
    masked = torch.rand(rows.shape, generator=generator) < t
    logits = model(torch.where(masked, MASK, rows))
    losses = F.cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="none").view(rows.shape)
    return (losses * masked / t).mean()


OBJECTIVES = {"next token": next_token, "diffusion": diffusion}


def train(name: str, text: bytes, steps: int, seed: int) -> Model:
    torch.manual_seed(seed)
    model, generator = Model(name == "next token"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(steps):
        loss = OBJECTIVES[name](model, windows(text, ROWS, f"train {step}", seed), generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits(name: str, model: Model, rows: torch.Tensor) -> float:
    """Bits a byte of rows."""
    generator, draws = torch.Generator().manual_seed(0), DRAWS if name == "diffusion" else 1
    return statistics.fmean(float(OBJECTIVES[name](model, rows, generator)) for _ in range(draws)) / math.log(2)


@torch.no_grad()
def samples(model: Model, rows: int, passes: int, seed: int) -> torch.Tensor:
    """Rows from nothing: each pass draws the bytes of some masked places independently."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, LENGTH), MASK)
    order = torch.rand(ids.shape, generator=generator).argsort(1)
    for places in order.tensor_split(passes, 1):
        drawn = torch.multinomial(model(ids).softmax(-1).flatten(0, 1), 1, generator=generator).view(ids.shape)
        ids.scatter_(1, places, drawn.gather(1, places))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    seeds, steps, measured = (2, 20, 32) if quick else (3, 160, 128)
    text = b"".join(path.read_bytes() for _, path in library_files())
    end = len(text) * 19 // 20
    heldout = windows(text[end:], measured, "held out", 0)
    figures: dict[str, list[float]] = {}
    for seed in range(seeds):
        models = {name: train(name, text[:end], steps, seed) for name in OBJECTIVES}
        for name, model in models.items():
            figures.setdefault(f"{name}, bits a byte", []).append(bits(name, model, heldout))
        for passes in PASSES:
            drawn = samples(models["diffusion"], measured // 4, passes, seed)
            figures.setdefault(f"samples in {passes} passes", []).append(
                bits("next token", models["next token"], drawn)
            )
    parameters = sum(p.numel() for p in Model(True).parameters())
    print(f"{parameters:,} parameters, {steps} steps of {ROWS * LENGTH} bytes, {seeds} seeds")
    print(f"{'':30}{'mean':>10}{'least':>10}{'most':>10}")
    for label, values in figures.items():
        print(f"{label:30}{statistics.fmean(values):10.3f}{min(values):10.3f}{max(values):10.3f}")
    pairs = zip(figures["next token, bits a byte"], figures["diffusion, bits a byte"], strict=True)
    ratios = [mine / theirs for mine, theirs in pairs]
    print(json.dumps({
        "name": "diffusion", "ratio": round(statistics.fmean(ratios), 4), "low": round(min(ratios), 4),
        "high": round(max(ratios), 4), "target": 1.0, "unit": "bits of next token / bound of diffusion",
        "machine": platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
