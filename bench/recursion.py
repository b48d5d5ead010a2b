"""What recursive calls add to a single call at equal tokens, on a question about more text than the context holds.

    .venv/bin/python bench/recursion.py            # seeds 0, 1, 2 in two processes
    .venv/bin/python bench/recursion.py --quick    # one seed, few steps: its figures mean nothing

The question is for the largest of 128 distinct numbers (stages/rl/rollout/task_sources/long_list_tasks.py), of which
the context of 320 tokens holds 60. A small dense model is fine-tuned from initial weights on conversations of three
kinds: lists of four numbers with the largest number so far as reasoning, recursive calls with their results
(stages/rl/tools/recursive_call.py), and the first numbers of long lists, with those as reasoning that are larger than
all before. From these weights the policy of `stages.rl.algorithms.grpo.GrpoTrainer` is trained twice:

- **recursive**: tasks of 4 to 128 numbers, of which a prompt shows four at most; the tool `recurse` answers questions
  about a part, which the model splits as it likes;
- **single**: the prompt has as many of 128 numbers as fit, and the answer is one call. It takes as many steps as the
  other arm, or fewer if it has read and drawn as many tokens before.

Both then answer the same held-out questions at temperature 1. Tokens are those read and drawn of all calls: a recursive
answer has one try, and the single call as many as have its tokens, of which the most frequent answer counts. A gain is
the difference in the share of right answers, paired by item; its interval over seeds is Student's with one degree of
freedom fewer than seeds.

The last line is one JSON object, whose `ratio`, `low` and `high` are 1 plus the gain and its interval.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
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
from stages.evaluation.confidence import clustered
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.config import RlTrainConfig
from stages.rl.protocols import Completion, Prompt, Row, Sampler, question
from stages.rl.rollout.batches import Example
from stages.rl.rollout.task_sources.long_list_tasks import draw_numbers, row_of
from stages.rl.tools.recursive_call import RecursiveTool
from stages.train.engine import Engine
from stages.train.parallel import session

ARMS = ("recursive", "single")
OPERATION = "largest"
TOOLS = {"offered": [{"tool": "recurse", "max_depth": 5}], "max_turns": 2}
CHECK_EVERY = 250
"""Steps of fine-tuning between two measurements of it."""
PROBES = 24
"""Held-out questions that show the progress of fine-tuning."""


@dataclass(frozen=True)
class Size:
    """shown: numbers that a prompt of the recursive arm has at most; level: its doublings in a question; fits: numbers
    in a prompt of the single call. tuning: steps of fine-tuning, decay: the last of them. new: tokens of a turn."""

    model: Mapping[str, Any]
    vocab: int
    shown: int
    level: int
    fits: int
    tuning: int
    decay: int
    rows: int
    prompts: int
    generations: int
    new: int
    steps: int
    items: int


FULL = Size(
    dict(architecture="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16, intermediate_size=128,
         context_length=320, tie_embeddings=True, init_std=0.08),
    vocab=768, shown=4, level=5, fits=60, tuning=2500, decay=1000, rows=48, prompts=8, generations=8, new=68, steps=150,
    items=100,
)  # fmt: skip
QUICK = replace(FULL, tuning=2, decay=1, rows=4, prompts=2, generations=2, steps=1, items=2)


def shortened(row: Row, fits: int) -> Row:
    """The task of a single call: the prompt has the first numbers, and the answer is that of all."""
    numbers = [int(part) for part in row["parts"][:fits]]
    return {**row_of(row["id"], OPERATION, numbers, fits, row["level"]), "expected_answer": row["expected_answer"]}


def conversation(rng: random.Random, size: Size) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A conversation to learn from, and the functions that it may call."""
    kind = rng.choice(("short", "split", "long"))
    if kind == "split":
        row = row_of("", OPERATION, draw_numbers(rng, OPERATION, size.shown << rng.randint(1, size.level)),
                     size.shown, 0)  # fmt: skip
        numbers = [int(part) for part in row["parts"]]
        half = len(numbers) // 2
        first = 1 + len(numbers) * rng.randrange((size.shown << size.level) // len(numbers))
        spans = [(first, first + half - 1), (first + half, first + len(numbers) - 1)]
        calls = [{"name": "recurse", "arguments": {"first": str(a), "last": str(b)}} for a, b in spans]
        results = [max(numbers[:half]), max(numbers[half:])]
        return [
            {"role": "user", "content": f"{OPERATION}\nparts {first} to {first + len(numbers) - 1}"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            *({"role": "tool", "content": str(result)} for result in results),
            {"role": "assistant", "content": str(max(results))},
        ], [{"type": "function", "function": schema} for schema in RecursiveTool(tool="recurse").functions(row)]
    numbers = draw_numbers(rng, OPERATION, size.shown if kind == "short" else size.fits)
    best = [max(numbers[: n + 1]) for n in range(len(numbers))]
    reasoning = best if kind == "short" else list(dict.fromkeys(best))
    answer = {
        "role": "assistant", "content": str(best[-1]), "reasoning_content": " ".join(map(str, reasoning)),
    }  # fmt: skip
    row = row_of("", OPERATION, numbers, size.fits, 0)
    return [{"role": "user", "content": question(row)}, answer], []


def make_inputs(folder: Path, size: Size, seed: int) -> tuple[dict[str, Artifact], dict[str, Artifact], list[Row]]:
    """Tokenizer and items, the tasks of each arm, and held-out questions that are no task: first those that measure,
    then those that show the progress of fine-tuning."""
    rng = random.Random(seed_of("bench/recursion/tokenizer", seed))
    texts = [text for _ in range(2000) for text, _ in chat.turns(*conversation(rng, size))]
    rng = random.Random(seed_of("bench/recursion/tasks", seed))

    def draw(count: int, levels: int) -> list[Row]:
        rows = []
        for i in range(count):
            level = size.level - i % levels
            numbers = draw_numbers(rng, OPERATION, size.shown << level)
            rows.append(row_of(f"{OPERATION}/{level}/{len(rows):06d}", OPERATION, numbers, size.shown, level))
        return rows

    heldout, training = draw(size.items + PROBES, 1), draw(size.steps * size.prompts, 1)
    tasks = {
        "recursive": draw(size.steps * size.prompts, size.level + 1),
        "single": [shortened(row, size.fits) for row in training],
    }
    return (*write_inputs(folder, texts, size.vocab, tasks), heldout)


def configuration(size: Size, arm: str, seed: int) -> RlTrainConfig:
    source = {
        "source": "long-lists", "operation": OPERATION, "shown_parts": size.shown, "count": size.prompts,
        "levels": list(range(size.level + 1)) if arm == "recursive" else [size.level],
    }  # fmt: skip
    return small_policies.configuration(size, seed, source, tools=TOOLS if arm == "recursive" else None)


class Counting:
    """A sampler that counts the tokens that it has read and drawn."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.tokens = sampler, 0

    def generate(self, prompts: Sequence[Prompt], greedy: bool = False) -> list[Completion]:
        drawn = self.sampler.generate(prompts, greedy)
        self.tokens += sum(len(prompt.ids) + len(c.ids) for prompt, c in zip(prompts, drawn, strict=True))
        return drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def fine_tune(trainer: GrpoTrainer, size: Size, seed: int, probes: Sequence[Row]) -> int:
    """Trains on conversations. Returns the number of steps."""
    rng = random.Random(seed_of("bench/recursion/tuning", seed))

    def draw(encode: Encode) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < size.rows:
            turns = chat.turns(*conversation(rng, size))
            examples += (example_of(encode, text, start) for text, start in turns)
        return examples

    def show(step: int) -> bool:
        right = statistics.fmean(answers(trainer, probes, 1, seed)[0])
        print(f"seed {seed}: {right:.2f} right after {step} steps of fine-tuning", flush=True)
        return False

    return small_policies.fine_tune(trainer, size.tuning, draw, CHECK_EVERY, show, size.decay)


def answers(trainer: GrpoTrainer, rows: Sequence[Row], tries: int, seed: int) -> tuple[list[float], float]:
    """(whether the most frequent answer of the tries is right, for each question; tokens read and drawn for one)."""
    policy = trainer.policy
    policy.load()
    sampler = policy.sampler
    assert isinstance(sampler, Counting)
    before = sampler.tokens
    requests = [(row, seed_of(f"bench/recursion/answer/{row['id']}/{n}", seed)) for row in rows for n in range(tries)]
    drawn = [policy.chat.response(completion) for completion in policy.draw(requests)]
    right = []
    for i, row in enumerate(rows):
        counts = Counter(r.answer.strip() for r in drawn[i * tries : (i + 1) * tries] if r.finished)
        best = max(sorted(counts), key=counts.__getitem__, default="")
        right.append(float(best == row["expected_answer"]))
    return right, (sampler.tokens - before) / len(rows)


def run_seed(size: Size, seed: int) -> dict[str, Any]:
    """The figures of one seed."""
    prepare_process()
    result = dict[str, Any](seed=seed)
    with tempfile.TemporaryDirectory() as place, session(0) as ranks:
        folder = Path(place)
        shared, tasks, rows = make_inputs(folder, size, seed)
        heldout, probes = rows[: size.items], rows[size.items :]
        engine = Engine(configuration(size, "single", seed), ranks, GrpoTrainer.vocab_size(shared))
        engine.initialize()
        weights: dict[str, torch.Tensor] = {}
        spent = 0
        for arm in ARMS:
            config = configuration(size, arm, seed)
            inputs = {**shared, "tasks": tasks[arm]}
            trainer = GrpoTrainer("rlvr", config, inputs, folder / arm, Quiet(), engine, None)
            trainer.policy.sampler = counting = Counting(trainer.policy.sampler)  # type: ignore[assignment,arg-type]
            try:
                start = time.process_time()
                if not weights:
                    result["tuning"] = fine_tune(trainer, size, seed, probes)
                    weights = weights_of(engine)
                load(engine, weights)
                rows = heldout if arm == "recursive" else [shortened(row, size.fits) for row in heldout]
                if arm == "recursive":
                    result["before"], _ = answers(trainer, rows, 1, seed)
                    tries = 1
                else:
                    _, tokens = answers(trainer, rows, 1, seed)
                    tries = max(1, round(result["recursive tokens"] / tokens))
                    result["single before"], _ = answers(trainer, rows, tries, seed)
                trainer.log.create()
                trainer.begin(0)
                lines: list[dict[str, Any]] = []
                counting.tokens = 0
                while len(lines) < size.steps and not (spent and counting.tokens >= spent):
                    lines.append(trainer.train_step(len(lines) + 1))
                    if len(lines) % 10 == 0:
                        print(f"seed {seed}: {arm}, step {len(lines)}: reward {lines[-1]['reward']}", flush=True)
                spent = spent or counting.tokens
                result[f"{arm} cost"] = {"steps": len(lines), "tokens": counting.tokens, "tries": tries}
                result[arm], result[f"{arm} tokens"] = answers(trainer, rows, tries, seed)
                print(f"seed {seed}: {arm} {json.dumps(result[f'{arm} cost'])}, right "
                      f"{statistics.fmean(result[arm]):.3f} with {result[f'{arm} tokens']:.0f} tokens a question, "
                      f"{time.process_time() - start:.0f} s", flush=True)  # fmt: skip
            finally:
                trainer.close()
    return result


def report(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prints the table; gives the line of the benchmark."""
    columns = ("single before", "single", "before", "recursive")
    print(
        f"{'seed':>4}" + "".join(f"{name:>15}" for name in columns) + f"{'gain ± s.e.':>18}   tokens a question, tries"
    )
    gains = []
    for result in results:
        gain = clustered([a - b for a, b in zip(result["recursive"], result["single"], strict=True)])
        gains.append(gain["value"])
        cells = [statistics.fmean(result[name]) for name in columns]
        print(f"{result['seed']:4}" + "".join(f"{cell:15.3f}" for cell in cells)
              + f"{gain['value']:+10.3f} ± {gain['se']:.3f}   {result['recursive tokens']:.0f} and "
              + f"{result['single tokens']:.0f}, {result['single cost']['tries']}")  # fmt: skip
    mean, low, high = interval(gains)
    print(f"gain, mean of {len(gains)} seeds: {mean:+.3f} (95 % {low:+.3f} to {high:+.3f})")
    return {
        "name": "recursion", "ratio": round(1 + mean, 4), "low": round(1 + low, 4), "high": round(1 + high, 4),
        "target": 1.0, "unit": f"1 + gain in right answers, {len(results)} seeds, equal tokens",
        "machine": f"{platform.machine()}, 1 thread a seed, torch {torch.__version__}, fp32",
    }  # fmt: skip


if __name__ == "__main__":
    arguments = small_policies.argument_parser(__doc__).parse_args()
    if arguments.quick:
        results = run_seeds(run_seed, QUICK, seeds=1, processes=1)
    else:
        results = run_seeds(run_seed, FULL, arguments.seeds, processes=2)
    print(json.dumps(report(results)))
