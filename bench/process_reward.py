"""What a process reward adds to the reward of the result alone, at equal tokens and at most equal updates.

    .venv/bin/python bench/process_reward.py                 # seeds 0, 1, 2 in two processes
    .venv/bin/python bench/process_reward.py --task trace    # another kind of problem
    .venv/bin/python bench/process_reward.py --quick         # one seed, few steps: its figures mean nothing

A small dense model is fine-tuned from initial weights on conversations about one kind of problem
(stages/data/synthetic/problems.py), seven in ten with their intermediate values as reasoning, until a third of its
answers to the tasks are right. From these weights the policy of `stages.rl.algorithms.grpo.GrpoTrainer` is trained
twice on problems of one level, with the same tasks, settings and seeds of answers:

- **result**: the verifier `steps` with the weights answer 1, steps 0, which is the reward of the result alone;
- **process**: the same verifier with the weights answer 0.5, steps 0.5.

The first takes all steps; the second ends at the same number of updates, or earlier with the step in which it has
generated as many tokens. Both then answer the same held-out problems with the same seeds at temperature 1. A gain is
the difference in pass@1, paired by item; its interval over seeds is Student's with one degree of freedom fewer than
seeds.

The last line is one JSON object, whose `ratio`, `low` and `high` are 1 plus the gain and its interval.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import small_policies
import torch
from intervals import interval
from quiet import Quiet
from small_policies import Encode, example_of, load, prepare_process, run_seeds, weights_of, write_inputs

from pipeline.core.store import Artifact
from stages.data import chat
from stages.data.seeds import seed_of
from stages.data.synthetic import problems
from stages.evaluation.confidence import clustered
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.config import RlTrainConfig
from stages.rl.protocols import Row
from stages.rl.rollout.batches import Example
from stages.rl.rollout.task_sources.worked_tasks import WorkedTasks
from stages.train.engine import Engine
from stages.train.parallel import session

ARMS = {"result": {"answer": 1.0, "steps": 0.0}, "process": {"answer": 0.5, "steps": 0.5}}
THINKING, ENOUGH, CHECK_EVERY = 0.7, 1 / 3, 50
"""Of fine-tuning: the share of answers with their intermediate values, the share of right answers to tasks that ends
it, and the steps between two measurements of that."""


@dataclass(frozen=True)
class Size:
    """level: of the problems of reinforcement learning. tuning: the most steps of fine-tuning, of `rows` answers each.
    new: tokens of an answer; samples: answers to each of the held-out `items`."""

    model: Mapping[str, Any]
    vocab: int
    task: str
    level: int
    tuning: int
    rows: int
    prompts: int
    generations: int
    new: int
    steps: int
    items: int
    samples: int


FULL = Size(
    dict(architecture="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16, intermediate_size=128,
         context_length=256, tie_embeddings=True, init_std=0.08),
    vocab=384, task="sort", level=3, tuning=1500, rows=48, prompts=16, generations=8, new=48, steps=60, items=100,
    samples=4,
)  # fmt: skip
QUICK = replace(FULL, tuning=2, rows=4, prompts=2, generations=2, new=8, steps=1, items=2, samples=2)


def make_inputs(folder: Path, size: Size, seed: int) -> tuple[dict[str, Artifact], dict[str, Artifact], list[Row]]:
    """Tokenizer and items, the tasks of each arm, and held-out problems that are no task."""
    rng = random.Random(seed_of("bench/process/tokenizer", seed))
    texts = [chat.render(problems.messages(problems.TASKS[size.task](rng), True)) for _ in range(2000)]
    count = size.items + 40 * size.prompts
    tasks: dict[str, list[Row]] = {}
    heldout: list[Row] = []
    for arm, weights in ARMS.items():
        source = WorkedTasks.model_validate(
            {"source": "worked-problems", "task": size.task, "levels": [size.level], "count": count,
             "weights": weights})  # fmt: skip
        rows = list(source.rows(seed, set()))
        heldout, tasks[arm] = rows[: size.items], rows[size.items :]
    return (*write_inputs(folder, texts, size.vocab, tasks), heldout)


def configuration(size: Size, seed: int) -> RlTrainConfig:
    source = {"source": "worked-problems", "task": size.task, "levels": [size.level], "count": size.prompts}
    return small_policies.configuration(size, seed, source)


def fine_tune(trainer: GrpoTrainer, size: Size, seed: int, heldout: Sequence[Row]) -> int:
    """Trains on conversations about problems of all levels, none of them held out, until ENOUGH answers to tasks are
    right. Returns the number of steps."""
    excluded = {row["question"] for row in heldout}
    rng = random.Random(seed_of("bench/process/tuning", seed))

    def draw(encode: Encode) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < size.rows:
            problem = problems.TASKS[size.task](rng)
            if problem.question not in excluded:
                ((text, start),) = chat.turns(problems.messages(problem, rng.random() < THINKING))
                examples.append(example_of(encode, text, start))
        return examples

    def is_enough(step: int) -> bool:
        right = statistics.fmean(accuracies(trainer, trainer.rows[:100], 1, seed)["task"])
        print(f"seed {seed}: {right:.2f} right after {step} steps of fine-tuning", flush=True)
        return right >= ENOUGH

    return small_policies.fine_tune(trainer, size.tuning, draw, CHECK_EVERY, is_enough)


def accuracies(trainer: GrpoTrainer, rows: Sequence[Row], samples: int, seed: int) -> dict[str, list[float]]:
    """The mean over samples of the parts `task` and `steps` of each held-out problem."""
    trainer.policy.load()
    requests = [(row, seed_of(f"bench/process/answer/{row['id']}/{n}", seed)) for row in rows for n in range(samples)]
    parts = trainer.policy.score([row for row, _ in requests], trainer.policy.draw(requests))
    return {name: [statistics.fmean(part[name] for part in parts[i : i + samples])
                   for i in range(0, len(parts), samples)] for name in ("task", "steps")}  # fmt: skip


def run_seed(size: Size, seed: int) -> dict[str, Any]:
    """The figures of one seed."""
    prepare_process()
    config, result = configuration(size, seed), dict[str, Any](seed=seed)
    with tempfile.TemporaryDirectory() as place, session(0) as ranks:
        folder = Path(place)
        shared, tasks, heldout = make_inputs(folder, size, seed)
        engine = Engine(config, ranks, GrpoTrainer.vocab_size(shared))
        engine.initialize()
        weights: dict[str, torch.Tensor] = {}
        tokens = 0
        for name in ARMS:
            inputs = {**shared, "tasks": tasks[name]}
            trainer = GrpoTrainer("rlvr", config, inputs, folder / name, Quiet(), engine, None)
            try:
                if not weights:
                    start = time.process_time()
                    result["tuning"] = fine_tune(trainer, size, seed, heldout)
                    weights = weights_of(engine)
                    result["before"] = accuracies(trainer, heldout, size.samples, seed)
                    print(f"seed {seed}: fine-tuned in {time.process_time() - start:.0f} s, "
                          f"pass@1 {statistics.fmean(result['before']['task']):.3f}", flush=True)  # fmt: skip
                load(engine, weights)
                trainer.log.create()
                trainer.begin(0)
                lines, start = [], time.process_time()
                while len(lines) < size.steps and not (tokens and trainer.generated >= tokens):
                    lines.append(trainer.train_step(len(lines) + 1))
                    if len(lines) % 20 == 0:
                        shown = {part: lines[-1][part] for part in ("reward", "parts", "completion_length")}
                        print(f"seed {seed}: {name}, step {len(lines)}: {json.dumps(shown)}", flush=True)
                tokens = tokens or trainer.generated
                result[name] = accuracies(trainer, heldout, size.samples, seed)
                result[f"{name} cost"] = {
                    "updates": sum("idle" not in line for line in lines), "steps": len(lines),
                    "tokens": trainer.generated, "groups": statistics.fmean(line["groups"] for line in lines),
                    "seconds": time.process_time() - start,
                }  # fmt: skip
                print(f"seed {seed}: {name} {json.dumps(result[f'{name} cost'])}, "
                      f"pass@1 {statistics.fmean(result[name]['task']):.3f}", flush=True)  # fmt: skip
            finally:
                trainer.close()
    return result


def report(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prints the table; gives the line of the benchmark."""
    arms = ("before", *ARMS)
    print(f"{'seed':>4}  {'part':6}" + "".join(f"{name:>10}" for name in arms) + f"{'gain ± s.e.':>18}")
    gains: dict[str, list[float]] = {"task": [], "steps": []}
    for result in results:
        for part, values in gains.items():
            pairs = zip(result["process"][part], result["result"][part], strict=True)
            gain = clustered([process - alone for process, alone in pairs])
            values.append(gain["value"])
            cells = [statistics.fmean(result[name][part]) for name in arms]
            print(f"{result['seed']:4}  {part:6}" + "".join(f"{cell:10.3f}" for cell in cells)
                  + f"{gain['value']:+10.3f} ± {gain['se']:.3f}")  # fmt: skip
    for name in ARMS:
        costs = [result[f"{name} cost"] for result in results]
        print(f"{name}: " + ", ".join(f"{key} {'/'.join(f'{cost[key]:.4g}' for cost in costs)}" for key in costs[0]))
    for part, values in gains.items():
        mean, low, high = interval(values)
        print(f"gain in {part}, mean of {len(values)} seeds: {mean:+.3f} (95 % {low:+.3f} to {high:+.3f})")
    mean, low, high = interval(gains["task"])
    return {
        "name": "process_reward", "ratio": round(1 + mean, 4), "low": round(1 + low, 4), "high": round(1 + high, 4),
        "target": 1.0, "unit": f"1 + gain in pass@1, {len(results)} seeds, equal tokens and at most equal updates",
        "machine": f"{platform.machine()}, 1 thread a seed, torch {torch.__version__}, fp32",
    }  # fmt: skip


if __name__ == "__main__":
    parser = small_policies.argument_parser(__doc__)
    parser.add_argument("--task", choices=sorted(problems.TASKS), default=FULL.task, help="the kind of problem")
    arguments = parser.parse_args()
    if arguments.quick:
        results = run_seeds(run_seed, QUICK, seeds=1, processes=1)
    else:
        results = run_seeds(run_seed, replace(FULL, task=arguments.task), arguments.seeds, processes=2)
    print(json.dumps(report(results)))
