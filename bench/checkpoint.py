"""How long training stands still for a work checkpoint, against a copy of the same state in memory.

    .venv/bin/python bench/checkpoint.py            # about a minute
    .venv/bin/python bench/checkpoint.py --quick    # a tiny model, to see that it works; its figures mean nothing

Ours is `Checkpoints.save` as a phase calls it, with the files written by its thread; the peer is `Tensor.copy_` of
weights and both Adam moments into tensors that are there already, the least that a checkpoint which does not stop
training can do. The two take turns; a round's ratio is the peer's seconds by ours. The table also states what the
checkpoint would cost if training waited for it, and what a training step costs while one is being written. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quiet import Quiet
from train import FULL, OPTIMIZER, QUICK, Size, Tokens

from stages.train.checkpoint.work_checkpoint import Checkpoints
from stages.train.config import TrainConfig
from stages.train.engine import Engine
from stages.train.parallel import session

TARGET = 0.8  # a copy and what it takes to name 700 pieces and start a thread
ROUNDS = 12


def measure(size: Size, folder: Path, rounds: int) -> dict[str, Any]:
    phase = dict(
        mix={"random": 1.0}, sequence_length=size.length, steps=10**6, optimizer=OPTIMIZER,
        batch={"global_tokens": size.tokens, "micro_tokens": size.tokens}, validation={"every": 1, "rows": 1},
        release_checkpoint_interval=10**6,
    )  # fmt: skip
    config = TrainConfig.model_validate(dict(model=size.model, phase=phase, padded_vocab_size=size.vocab, seed=0))
    tokens, times = Tokens(size), {"stall": [], "copy": [], "whole": [], "step": [], "step while writing": []}

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        times[name].append(time.perf_counter() - began)
        return result

    with session(0) as ranks:
        engine = Engine(config, ranks, size.vocab)
        engine.initialize()
        share = tokens.share(0)
        step = lambda: engine.step(share, OPTIMIZER["lr"], lambda loss, norm: None)  # noqa: E731
        step()
        checkpoints = Checkpoints(folder, 2, engine, Quiet())
        (checkpoints.folder / "training.jsonl").write_text("")
        copies: list[torch.Tensor] = []
        for number in range(rounds + 1):
            began = time.perf_counter()
            timed("stall", lambda n=number: checkpoints.save(n, {}, seal=False))
            checkpoints.wait()
            times["whole"].append(time.perf_counter() - began)
            state = [t for _, tensors in engine.state() for t in tensors.values()]
            copies = copies or [torch.empty_like(t) for t in state]
            both = list(zip(copies, state, strict=True))
            timed("copy", lambda pairs=both: [mine.copy_(t) for mine, t in pairs])
            timed("step", step)
            checkpoints.save(10**6 + number, {}, seal=False)
            timed("step while writing", step)
            checkpoints.wait()
        size_bytes = sum(t.numel() * t.element_size() for t in state)
    for values in times.values():
        del values[0]  # the first save also allocates its buffers
    ratios = [copy / stall for copy, stall in zip(times["copy"], times["stall"], strict=True)]
    print(f"state: {size_bytes / 2**20:.0f} MiB in {len(state)} tensors, {rounds} rounds, median (least, most) in ms")
    for name, values in times.items():
        low, high = min(values), max(values)
        print(f"  {name:20} {1e3 * statistics.median(values):9.2f}   ({1e3 * low:.2f}, {1e3 * high:.2f})")
    quarters = statistics.quantiles(ratios, n=4)
    print("ratio of a round = copy / stall; low and high are its quartiles")
    return {
        "name": "checkpoint",
        "ratio": round(statistics.median(ratios), 3),
        "low": round(quarters[0], 3),
        "high": round(quarters[2], 3),
        "target": TARGET,
        "unit": "seconds of an in-memory copy by seconds of stall",
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(QUICK if quick else FULL, Path(folder), 3 if quick else ROUNDS)))


if __name__ == "__main__":
    main()
