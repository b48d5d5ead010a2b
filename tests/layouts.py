"""A few optimizer steps of one model in several layouts, in one set of processes: what each gives, to compare.

    python tests/layouts.py CORPUS '{"layouts": {"one": {}}, "ports": [20000], "config": {...}, "steps": 5}' OUT.json

RANK, WORLD_SIZE and MASTER_ADDR as usual; each layout meets at a port of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import train_world as world

from pipeline.launch.rendezvous import free_port

MODEL: dict[str, Any] = {**world.MODEL, "layers": 4, "tie_embeddings": True}
GRACE = 60.0
BATCH = {"global_tokens": 256, "micro_tokens": 64}  # eight rows in four micro-batches
TWO: dict[str, dict[str, Any]] = {
    "DP2": {},
    "DP2 overlap": {"overlap_gradients": True},
    "TP2+SP": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2 alltoall": {"ep": 2},
    "EP2 allgather": {"ep": 2, "dispatcher": "allgather"},
    "CP2": {"cp": 2},
    "PP2 interleaved": {"pp": 2, "vpp": 2},
    "TP2 EP2 ETP1": {"tp": 2, "ep": 2, "etp": 1},
}
FOUR: dict[str, dict[str, Any]] = {
    "EP2xDP2": {"ep": 2},
    "TP2xPP2": {"tp": 2, "pp": 2},
    "PP2xEP2": {"pp": 2, "ep": 2},
    "PP2 interleaved xDP2": {"pp": 2, "vpp": 2},
    "PP4": {"pp": 4},
    "EP4": {"ep": 4},
    "TP2xEP2": {"tp": 2, "ep": 2},
    "TP2xCP2": {"tp": 2, "cp": 2},
    "CP2xEP2": {"cp": 2, "ep": 2, "overlap_gradients": True},
    "TP2xEP4 ETP1": {"tp": 2, "ep": 4, "etp": 1},
}


def train(corpus: Path, settings: dict[str, Any], steps: int) -> list[dict[str, float]]:
    """Figures of the first steps, and the loss on held-out rows after them."""
    from pipeline.core.store import Artifact
    from stages.train import parallel
    from stages.train.config import TrainConfig
    from stages.train.data import Order, RankBatch, Shards, heldout_rows
    from stages.train.engine import Engine
    from stages.train.schedule import learning_rate

    config = TrainConfig.model_validate(settings)
    tokens = Artifact.open(corpus / "tokens")
    phase, out = config.phase, []
    with parallel.session(config.seed, phase.parallelism) as ranks:
        engine = Engine(config, ranks, tokens.json("meta.json")["vocab_size"])
        engine.initialize()
        order = Order(Artifact.open(corpus / "order"), phase)
        shards = Shards(tokens, "train")
        for step in range(1, steps + 1):
            share = RankBatch.read(order.rows(step), shards, phase.micro_rows, ranks, phase.pack)
            figures = engine.step(share, learning_rate(step, phase.steps, phase.optimizer), lambda loss, norm: None)
            out.append({"loss": figures.loss, "aux_loss": figures.aux_loss, "grad_norm": figures.grad_norm})
            out[-1] |= {"z_loss": figures.z_loss, "busiest": figures.experts.max_violation}
            out[-1] |= {"share": figures.experts.share.flatten().tolist()}
            out[-1] |= {"entropy": float(figures.experts.entropy.mean()), "dropped": float(figures.experts.dropped)}
        heldout_shards = Shards(tokens, "heldout")
        share = RankBatch.read(heldout_rows(tokens, phase)[:7], heldout_shards, phase.micro_rows, ranks)
        out.append({"heldout_loss": engine.evaluate(share)})
    return out


def spawn(command: list[str], ranks: int, env: dict[str, str] | None = None, **options: Any) -> list[Any]:
    """One process for each rank, on a free port."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = {**os.environ, **(env or {}), "OMP_NUM_THREADS": "1", **meeting}
    places = [{"RANK": str(n), "WORLD_SIZE": str(ranks)} if ranks > 1 else {} for n in range(ranks)]
    return [
        subprocess.Popen([sys.executable, *command], env={**common, **place}, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, **options) for place in places
    ]  # fmt: skip


def compare(corpus: Path, layouts: dict[str, dict[str, Any]], ranks: int, settings: dict[str, Any], out: Path,
            steps: int = 5) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Runs layouts of that many ranks. Raises AssertionError with the log of a rank that failed."""
    ports: set[int] = set()
    while len(ports) < len(layouts):  # a store that an earlier layout left behind would answer at its port
        ports.add(free_port())
    task = {"layouts": layouts, "ports": sorted(ports), "config": settings, "steps": steps}
    codes, logs = end(spawn([__file__, str(corpus), json.dumps(task), str(out)], ranks), timeout=500)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    curves: dict[str, list[dict[str, float]]] = json.loads(out.read_text())
    return curves


def agree(curve: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float, name: str) -> None:
    """Asserts that two layouts trained alike, step by step, until a token whose two experts are as good as equal to it
    goes to another one, which rounding decides and which is seen in the experts' exact shares: few tokens may, and what
    follows then agrees to a thousandth."""
    assert len(curve) == len(reference)
    flipped = False
    for step, (a, b) in enumerate(zip(curve, reference, strict=True), start=1):
        a, b = dict(a), dict(b)
        shares = a.pop("share", []), b.pop("share", [])
        distance = max((abs(x - y) for x, y in zip(*shares, strict=True)), default=0.0)
        assert distance < 0.02, f"{name}, step {step}: the experts' shares differ by {distance}"
        flipped = flipped or distance > 1e-6
        assert a == pytest.approx(b, rel=max(tolerance, 2e-3) if flipped else tolerance), f"{name}, step {step}"


def settings_of(layout: dict[str, Any], ranks: int, seed: int = 0, **phase: Any) -> dict[str, Any]:
    """world.config() of the deeper model, in small micro-batches, in that layout."""
    config = world.config(seed, **{"batch": BATCH, "parallelism": {"ranks": ranks, **layout}, **phase})
    return {**config, "model": MODEL}


def start(corpus: Path, folder: Path, settings: dict[str, Any], at: int = 0, number: int = 0, **env: str) -> list[Any]:
    """The ranks of the pretrain stage, `work` and `out` under `folder`; rank 0 sends itself a signal at a step."""
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "out", ignore_errors=True)  # the worker gives each attempt an empty one
    (folder / "config.json").write_text(json.dumps(settings))
    places = [str(p) for p in (corpus, folder / "work", folder / "out", folder / "config.json")]
    script = str(Path(__file__).with_name("train_world.py"))
    return spawn([script, *places, str(at), str(number)], settings["phase"]["parallelism"]["ranks"], env)


def end(processes: list[Any], timeout: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and logs of ranks. As a launcher does, those that wait in vain for one that failed are killed."""
    deadline = time.monotonic() + timeout
    with ThreadPoolExecutor(len(processes)) as pool:
        logs = [pool.submit(p.communicate) for p in processes]
        while not all(log.done() for log in logs) and time.monotonic() < deadline:
            if any(p.returncode for p in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.05)
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], [log.result()[0] for log in logs]


def run(corpus: Path, folder: Path, settings: dict[str, Any], **options: Any) -> list[str]:
    """Runs the pretrain stage to its end. Returns the ranks' logs. Raises AssertionError if one failed."""
    codes, logs = end(start(corpus, folder, settings, **options))
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    return logs


def settings_named(name: str) -> dict[str, Any]:
    """The settings of a layout by its name here; "one" is one process."""
    ranks = 1 if name == "one" else 2 if name in TWO else 4
    return settings_of({"one": {}, **TWO, **FOUR}[name], ranks)


def reads(folder: Path) -> dict[int, dict[int, list[tuple[Any, ...]]]]:
    """step -> rank -> rows that this rank read, as TEST_READS left them."""
    reads_by_rank: dict[int, dict[int, list[tuple[Any, ...]]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            step, row = json.loads(line)
            reads_by_rank.setdefault(step, {}).setdefault(int(path.stem), []).append(tuple(row))
    return reads_by_rank


def figures(out: Path, keys: tuple[str, ...] = ("loss", "aux_loss", "grad_norm", "heldout_loss")) -> list[float]:
    """All figures of a phase's log, in order."""
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in keys if key in line]


def kill_at_random(
    corpus: Path, folder: Path, settings: dict[str, Any], kills: int, chance: random.Random, longest: float
) -> list[str]:
    """Runs the pretrain stage to its end through `kills` `kill -9` of one rank or of all, each at a random moment up to
    `longest` seconds after the start. A run that ends before gives its digest and another begins. Returns the digests.
    """
    digests, kills_left, number = [], kills, 0
    folder.mkdir()
    while True:
        processes = start(corpus, folder / f"run-{number}", settings)
        try:
            processes[0].wait(chance.uniform(0, longest) if kills_left else 300)
        except subprocess.TimeoutExpired:
            victims = processes if chance.random() < 0.3 else [chance.choice(processes)]
            for process in victims:
                process.kill()
            kills_left -= 1
            deadline = time.monotonic() + 5
            while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
                time.sleep(0.1)
            for process in processes:  # as a launcher does: those that were still waiting to meet the dead one
                process.kill()
            end(processes)
            continue
        codes, logs = end(processes)
        assert not any(codes), logs
        digests.append(world.digest(folder / f"run-{number}" / "out"))
        if not kills_left:
            return digests
        number += 1


def main(corpus: Path, task: dict[str, Any], out: Path) -> None:
    ranks, report = int(os.environ.get("WORLD_SIZE", "1")), {}
    for port, (name, layout) in zip(task["ports"], task["layouts"].items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        settings = task["config"]
        settings["phase"]["parallelism"] = {"ranks": ranks, **layout}
        try:
            report[name] = train(corpus, settings, task["steps"])
        except Exception as error:
            raise RuntimeError(f"layout {name}") from error
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
