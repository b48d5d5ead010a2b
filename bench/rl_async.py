"""Wall time of asynchronous reinforcement learning against the synchronous loop, with equal processes and equal data.

    .venv/bin/python bench/rl_async.py            # about five minutes
    .venv/bin/python bench/rl_async.py --quick    # a tiny model, to see that it works; its figures mean nothing

Both draw with the sampler `subprocess`: the trainer has one core, the sampler another, each with one thread. Both train
on the same number of groups in each step, by `stages.rl.algorithms.grpo.GrpoTrainer.train_step` as a stage runs it,
with the weights handed over as files, the answers on disk and their scores. The synchronous loop draws the groups of a
step, then updates; the asynchronous one draws groups of the next step meanwhile (max_staleness 1).

One token in 24 of the vocabulary ends an answer, so that lengths differ; at most 72 are drawn. The reward is the share
of letters, which differs within every group, so no group is replaced. The two take turns; a round is a new process of
the sampler, one step that does not count, and some that do. Idle shares: of the trainer, seconds that it waits for
answers; of the sampler, seconds in which it draws nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quiet import Quiet
from rl import BETAS, CLIP, FULL, QUICK, RATE, Letters, Size, make_inputs

from stages.models.hf import hf_config
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.config import RlTrainConfig
from stages.rl.samplers.subprocess_sampler import SubprocessSampler
from stages.train.engine import Engine
from stages.train.parallel import session

TARGET = 1.3
END_EVERY = 24
"""One token of so many ends an answer."""


@dataclass
class Round:
    """Seconds of the steps that count, and those in which either side had nothing to do."""

    seconds: float = 0.0
    trainer_idle: float = 0.0
    sampler_idle: float = 0.0
    tokens: list[float] = field(default_factory=list)


class IdleTimes(Quiet):
    """A report that sums the idle seconds of an asynchronous phase."""

    def __init__(self, result: Round) -> None:
        self.result = result

    def metric(self, step: int, **values: float) -> None:
        if step > 1:
            self.result.trainer_idle += values.get("trainer_idle_seconds", 0.0)
            self.result.sampler_idle += values.get("sampler_idle_seconds", 0.0)


def run_round(size: Size, steps: int, asynchronous: bool, cores: tuple[int, int]) -> Round:
    """cores: of the trainer and of the sampler."""
    optimizer = dict(
        lr=RATE, final_lr=RATE, warmup_steps=0, weight_decay=0.0, beta1=BETAS[0], beta2=BETAS[1], clip=CLIP
    )
    phase: dict[str, Any] = dict(
        tasks=[{"source": "problems", "task": "add", "levels": [2], "count": size.groups}], steps=10**6,
        prompts_per_step=size.groups, num_generations=size.samples,
        sampling={"kind": "subprocess", "max_new_tokens": size.new}, micro_batches=size.micro_batches,
        optimizer=optimizer, validate_every=10**6, release_checkpoint_interval=10**6, max_resample_rounds=0,
        asynchronous={} if asynchronous else None,
    )  # fmt: skip
    config = RlTrainConfig(model=size.model, phase=phase, padded_vocab_size=size.vocab, seed=0)
    result = Round()
    with tempfile.TemporaryDirectory() as place, session(0) as ranks:
        folder = Path(place)
        inputs, _ = make_inputs(folder, size)
        engine = Engine(config, ranks, size.vocab)
        trainer = GrpoTrainer("rlvr", config, inputs, folder / "work", IdleTimes(result), engine, None)
        engine.initialize()
        policy = trainer.policy
        assert policy.sampler is not None and policy.verifiers is not None
        policy.sampler.close()
        model_config = hf_config(config.model, size.vocab, policy.chat.end, policy.chat.pad, "float32")
        stops = range(policy.chat.end, size.vocab, END_EVERY)
        policy.sampler = SubprocessSampler(model_config, stops, size.new, folder / "work" / "served")
        policy.verifiers.by_name = {name: Letters() for name in policy.verifiers.by_name}
        os.sched_setaffinity(0, {cores[1]})
        policy.load()  # starts the process, which keeps this core
        os.sched_setaffinity(0, {cores[0]})
        trainer.log.create()
        try:
            trainer.begin(0)
            drawing = time_calls(policy) if not asynchronous else []
            for step in range(1, steps + 2):
                if step == 2:
                    drawing.clear()
                    start = time.perf_counter()
                line = trainer.train_step(step)
                result.tokens.append(line["completion_length"])
                if line["groups"] != size.groups:
                    raise SystemExit(f"not the same work: {line['groups']} groups of {size.groups}")
            result.seconds = time.perf_counter() - start
        finally:
            trainer.close()
    if not asynchronous:
        result.trainer_idle, result.sampler_idle = sum(drawing), result.seconds - sum(drawing)
    return result


def time_calls(policy: Any) -> list[float]:
    """Collects the seconds of each call of the sampler."""
    seconds: list[float] = []
    draw = policy.draw

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        completions = draw(*arguments)
        seconds.append(time.perf_counter() - start)
        return completions

    policy.draw = timed
    return seconds


def measure(size: Size, steps: int, rounds: int) -> dict[str, Any]:
    """Runs the rounds and prints the table; gives the line of the benchmark."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the trainer and the sampler need a core each")
    torch.set_num_threads(1)
    results: dict[str, list[Round]] = {"synchronous": [], "asynchronous": []}
    for _ in range(rounds):
        for name, each in results.items():
            each.append(run_round(size, steps, name == "asynchronous", (cores[0], cores[1])))
    print(f"{size.groups} questions, {size.samples} answers to each, {steps} steps a round, {rounds} rounds")
    print(
        f"{'':13}{'s a step, median':>17}{'lowest':>8}{'highest':>9}{'trainer idle':>14}{'sampler idle':>14}"
        f"{'tokens':>8}"
    )
    for name, each in results.items():
        seconds = [r.seconds / steps for r in each]
        shares = [
            statistics.median(getattr(r, f"{side}_idle") / r.seconds for r in each) for side in ("trainer", "sampler")
        ]
        tokens = statistics.fmean(count for r in each for count in r.tokens)
        print(f"{name:13}{statistics.median(seconds):17.3f}{min(seconds):8.3f}{max(seconds):9.3f}{shares[0]:14.2f}"
              f"{shares[1]:14.2f}{tokens:8.1f}")  # fmt: skip
    ratios = [sync.seconds / other.seconds for sync, other in zip(*results.values(), strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    print(f"ratio by round: median {ratio:.3f}, quartiles {low:.3f} to {high:.3f}")
    return {
        "name": "rl_async", "ratio": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "target": TARGET,
        "unit": "synchronous wall seconds by asynchronous ones, equal groups and processes; quartiles over rounds",
        "machine": f"{platform.machine()}, a core each, torch {torch.__version__}, fp32",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if parser.parse_args().quick:
        print(json.dumps(measure(replace(QUICK, new=8), steps=1, rounds=2)))
    else:
        print(json.dumps(measure(replace(FULL, new=72), steps=6, rounds=5)))
