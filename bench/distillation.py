"""Whether a small model learns more from the final model's word on its own answers than from as many tokens of text.

    .venv/bin/python bench/distillation.py --home runs/distillation    # seeds 0, 1, 2; what is measured already is read
    .venv/bin/python bench/distillation.py --quick                     # one seed, few steps: its figures mean nothing

A teacher is fine-tuned from initial weights on conversations that sort digits, seven of ten with worked steps, and
then trained by RLVR: it is the final model. A student with a third of its parameters is fine-tuned on the same
conversations, and goes on in three ways, which train on equally many tokens, step by step:

- **on policy**: on-policy distillation (stage `distillation`) on the training problems;
- **answers**: fine-tuning on the teacher's answers to these problems, drawn at temperature 1;
- **sft**: fine-tuning on more of the conversations.

Each has a learning rate of its own, chosen among RATES on the seed CHOICE, of which no figure is. Models answer
held-out problems at temperature 1 with the same seeds; `gap` is the mean over tokens of these answers of the student's
log-probability less the teacher's. The last line is one JSON object: `ratio` is 1 plus the share of right results on
policy less that of `sft`, with its 95 % interval over seeds (Student's, paired).
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import small_policies
from intervals import interval
from quiet import Quiet
from small_policies import Encode, example_of, load, prepare_process, weights_of, write_inputs

from pipeline.core.store import Artifact, write_manifest
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.models.registry import parse
from stages.rl.algorithms.distillation import DistillationTrainer
from stages.rl.algorithms.grpo import GrpoTrainer, objective, training_groups, with_logprobs
from stages.rl.config import DistillationConfig
from stages.rl.policy import unscored
from stages.rl.rollout.batches import Example, build_rank_batch
from stages.rl.rollout.task_sources.procedural_tasks import ProblemTasks
from stages.tasks import Row, question, to_row
from stages.tasks.synthetic import problems
from stages.train.checkpoint import release_checkpoint
from stages.train.engine import Engine, cross_entropy
from stages.train.parallel import session

ARMS = ("on policy", "answers", "sft")
RATES = (3e-4, 1e-3, 3e-3)
CHOICE = 9
TASK = "sort"


@dataclass(frozen=True)
class Size:
    """tuning: steps of fine-tuning of teacher and student, of `rows` conversations each; rlvr: updates of the teacher
    after it. steps: updates of each arm. new: tokens of an answer. items: held-out problems."""

    model: Mapping[str, Any]
    teacher: Mapping[str, Any]
    vocab: int
    level: int
    tuning: tuple[int, int]
    rows: int
    rlvr: int
    steps: int
    prompts: int
    generations: int
    new: int
    items: int


TEACHER = dict(architecture="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16, intermediate_size=128,
               context_length=128, tie_embeddings=True, init_std=0.08)  # fmt: skip
FULL = Size(
    {**TEACHER, "hidden_size": 32, "heads": 2, "kv_heads": 1, "intermediate_size": 64}, TEACHER, vocab=512, level=3,
    tuning=(500, 200), rows=48, rlvr=30, steps=60, prompts=32, generations=4, new=40, items=400,
)  # fmt: skip
QUICK = replace(FULL, tuning=(4, 4), rows=8, rlvr=1, steps=2, prompts=2, generations=2, items=4)


def make_inputs(folder: Path, size: Size, seed: int) -> tuple[dict[str, Artifact], list[Row]]:
    """The tokenizer, the items and the training problems, by role; and the held-out problems."""
    rng = random.Random(seed_of("bench/distillation/tokenizer", seed))
    texts = [chat.render(conversation(rng)) for _ in range(1500)]
    source = ProblemTasks(source="problems", task=TASK, levels=(size.level,), count=size.items + 40 * size.prompts)
    rows = list(source.rows(seed, set()))
    heldout = [
        to_row(f"test/{row['id']}", question(row), "exact", TASK, size.level, question=row["question"],
               expected_answer=row["expected_answer"], split="test")
        for row in rows[: size.items]
    ]  # fmt: skip
    shared, tasks = write_inputs(folder, texts, size.vocab, {"": rows[size.items :]}, heldout)
    return {**shared, "tasks": tasks[""]}, heldout


def conversation(rng: random.Random) -> list[dict[str, str]]:
    return problems.messages(problems.TASKS[TASK](rng), rng.random() < 0.7)


@contextmanager
def trainer_of(
    kind: type[GrpoTrainer], size: Size, seed: int, rate: float, inputs: Mapping[str, Artifact], folder: Path
) -> Iterator[GrpoTrainer]:
    """A policy at its initial weights: the student with its teacher, or the teacher itself."""
    source = {"source": "problems", "task": TASK, "levels": [size.level], "count": size.prompts}
    config: Any = small_policies.configuration(size, seed, source)
    optimizer = {**small_policies.OPTIMIZER, "lr": rate, "final_lr": rate}
    body = config.model_dump(mode="json")
    body["phase"]["optimizer"] = optimizer
    if kind is DistillationTrainer:
        config = DistillationConfig.model_validate(body | {"name": "distillation", "teacher": size.teacher})
    else:
        config = type(config).model_validate(body | {"model": size.teacher})
    watchdog: Any = SimpleNamespace(progress=lambda size: None)
    with session(0) as ranks:
        engine = Engine(config, ranks, kind.vocab_size(dict(inputs)))
        engine.initialize()
        trainer = kind(config.name, config, dict(inputs), folder, Quiet(), engine, None, watchdog)
        try:
            trainer.log.create()
            trainer.begin(0)
            yield trainer
        finally:
            trainer.close()


def fine_tune(trainer: GrpoTrainer, size: Size, seed: int, steps: int, heldout: Sequence[Row]) -> None:
    """Trains on conversations of which none is held out, with a rate that falls in the second half."""
    draw = conversations(size, seed, heldout)
    small_policies.fine_tune(trainer, steps, draw, steps, lambda step: True, decay=steps // 2)


def conversations(size: Size, seed: int, heldout: Sequence[Row]) -> Any:
    """A function that draws the examples of a step."""
    excluded = {question(row) for row in heldout}
    rng = random.Random(seed_of("bench/distillation/tuning", seed))

    def draw(encode: Encode) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < size.rows:
            if (messages := conversation(rng))[0]["content"] not in excluded:
                ((text, start),) = chat.turns(messages)
                examples.append(example_of(encode, text, start))
        return examples

    return draw


def measure(trainer: GrpoTrainer, seed: int, rows: Sequence[Row]) -> dict[str, float]:
    """The share of right answers to held-out problems, and of a student the gap to its teacher on them."""
    policy, digest = trainer.policy, trainer.policy.load()
    requests = [(row, seed_of(f"bench/distillation/{row['id']}", seed)) for row in rows]
    completions = policy.draw(requests)
    figures = {"right": statistics.fmean(parts["reward"] for parts in policy.score(rows, completions))}
    if isinstance(trainer, DistillationTrainer):
        pairs = zip(requests, completions, strict=True)
        answers = [unscored(1, 0, digest, row, number, policy.chat, each) for (row, number), each in pairs]
        answers = [replace(r, group=n) for n, r in enumerate(answers)]
        units = [[example] for group in training_groups(answers, trainer.algorithm) for example in group]
        tokens = sum(unit[0].targets for unit in units)
        batch = build_rank_batch(units, 2, trainer.engine.ranks, policy.chat.pad, tokens)
        batch = with_logprobs(trainer.teacher, batch, "teacher")
        figures["gap"] = trainer.engine.figures(batch, objective(trainer.phase))[1]["teacher_gap"] / tokens
    return figures


def train_teacher(size: Size, seed: int, inputs: Mapping[str, Artifact], heldout: Sequence[Row], folder: Path) -> Any:
    """The teacher's last checkpoint, its figures, and an endless supply of its answers to training problems."""
    with trainer_of(GrpoTrainer, size, seed, small_policies.OPTIMIZER["lr"], inputs, folder / "rlvr") as trainer:
        fine_tune(trainer, size, seed, size.tuning[0], heldout)
        figures = {"tuned": measure(trainer, seed, heldout)["right"]}
        for step in range(1, size.rlvr + 1):
            trainer.train_step(step)
        figures["right"] = measure(trainer, seed, heldout)["right"]
        print(f"seed {seed}: teacher {json.dumps(figures)}", flush=True)
        weights, policy = weights_of(trainer.engine), trainer.policy
        policy.load()
        count = size.steps * size.prompts * size.generations
        rows = [trainer.rows[n % len(trainer.rows)] for n in range(count)]
        requests = [(row, seed_of(f"bench/distillation/answers/{n}", seed)) for n, row in enumerate(rows)]
        drawn = [each for start in range(0, count, 256) for each in policy.draw(requests[start : start + 256])]
        prompts = [list(policy.chat.encode_prompt(row)) for row in rows]
        answers = [Example([*prompt, *each.ids], len(prompt)) for prompt, each in zip(prompts, drawn, strict=True)]
    release_checkpoint.write(
        folder / "teacher" / release_checkpoint.name_of(1), parse(size.teacher).shapes(size.vocab), {},
        lambda kind, name, shape: weights[name], {"step": 1, "optimizer_step": 0},
    )  # fmt: skip
    return write_manifest(folder / "teacher", "teacher-bench"), figures, answers


def train_on(trainer: GrpoTrainer, rate: float, tokens: Sequence[int], supply: Iterator[Example]) -> None:
    """Fine-tunes in as many steps, of at least so many targets each, at a constant rate."""
    for target in tokens:
        examples: list[Example] = []
        while (total := sum(example.targets for example in examples)) < target or len(examples) < 2:
            examples.append(next(supply))
        units = [[example] for example in examples]
        batch = build_rank_batch(units, 2, trainer.engine.ranks, trainer.policy.chat.pad, total)
        trainer.engine.step(batch, rate, lambda loss, norm: None, objective=summed)


def summed(losses: Any, batch: Any) -> Any:
    """The sum over targets, as an objective of its own: packed rows of answers are no plain text."""
    return cross_entropy(losses, batch)


def run_seed(size: Size, seed: int, rates: Mapping[str, Sequence[float]], home: Path) -> dict[str, Any]:
    """The figures of a seed: by arm and rate. They are read if they are there already."""
    file = home / f"seed-{seed}.json"
    if file.is_file():
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures
    started = time.process_time()
    with TemporaryDirectory() as place:
        folder = Path(place)
        inputs, heldout = make_inputs(folder, size, seed)
        teacher, figures, answers = train_teacher(size, seed, inputs, heldout, folder)
        inputs = {**inputs, "teacher": teacher}
        result: dict[str, Any] = {"seed": seed, "teacher": figures, "arms": {}}
        start: Any = None
        tokens: list[int] = []
        for arm, rate in [(name, each) for name in ARMS for each in rates[name]]:
            with trainer_of(DistillationTrainer, size, seed, rate, inputs, folder / f"{arm} {rate}") as trainer:
                trainer.load_base()
                if start is None:
                    fine_tune(trainer, size, seed, size.tuning[1], heldout)
                    start = weights_of(trainer.engine)
                    result["start"] = measure(trainer, seed, heldout)
                    print(f"seed {seed}: start {json.dumps(result['start'])}", flush=True)
                load(trainer.engine, start)
                if arm == "on policy":
                    ends = [0]
                    for step in range(1, size.steps + 1):
                        trainer.train_step(step)
                        ends.append(trainer.tokens)
                    # Every arm trains on the tokens of the first rate's answers.
                    tokens = tokens or [end - begin for begin, end in pairwise(ends)]
                elif arm == "answers":
                    train_on(trainer, rate, tokens, (answers[n % len(answers)] for n in range(10**9)))
                else:
                    draw, chat_of = conversations(size, seed + 1000, heldout), trainer.policy.chat
                    encode = lambda text, c=chat_of: c.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
                    train_on(trainer, rate, tokens, (example for _ in range(10**9) for example in draw(encode)))
                measured = measure(trainer, seed, heldout)
            result["arms"].setdefault(arm, {})[str(rate)] = measured
            print(f"seed {seed}: {arm} at {rate:g} {json.dumps(measured)}", flush=True)
        result |= {"tokens": sum(tokens), "seconds": time.process_time() - started}
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    parser = small_policies.argument_parser(__doc__ or "")
    parser.add_argument("--home", type=Path, help="folder of the figures of finished seeds; by default a temporary one")
    parser.add_argument("--tuning", type=int, default=FULL.tuning[1], help="steps of the student's fine-tuning")
    arguments = parser.parse_args()
    full = replace(FULL, tuning=(FULL.tuning[0], arguments.tuning))
    size, seeds = (QUICK, 1) if arguments.quick else (full, arguments.seeds)
    prepare_process()
    with TemporaryDirectory() as place:
        home = arguments.home or Path(place)
        home.mkdir(parents=True, exist_ok=True)
        choice = run_seed(size, CHOICE, dict.fromkeys(ARMS, RATES), home)["arms"]
        rates = {arm: [float(max(figures, key=lambda r: figures[r]["right"]))] for arm, figures in choice.items()}
        print(f"rates: {json.dumps(rates)}", flush=True)
        results = [run_seed(size, seed, rates, home) for seed in range(seeds)]
    last = {arm: [next(iter(r["arms"][arm].values())) for r in results] for arm in ARMS}
    rows = {"start": [r["start"] for r in results], **last}
    print(f"\n{'':>10}  {'right':>24}  {'gap':>24}")
    for name, figures in rows.items():
        cells = [interval([figure[column] for figure in figures]) for column in ("right", "gap")]
        print(f"{name:>10}  " + "  ".join(f"{m:8.3f} [{low:6.3f}, {high:6.3f}]" for m, low, high in cells))
    print(f"   teacher  {interval([r['teacher']['right'] for r in results])[0]:8.3f}")
    for other in ("sft", "answers", "start"):
        pairs = zip(rows["on policy"], rows[other], strict=True)
        mean, low, high = interval([a["right"] - b["right"] for a, b in pairs])
        print(f"on policy less {other}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    pairs = zip(rows["on policy"], rows["sft"], strict=True)
    mean, low, high = interval([a["right"] - b["right"] for a, b in pairs])
    line = {"name": "distillation", "ratio": 1 + mean, "low": 1 + low, "high": 1 + high, "target": 1.0}
    line |= {"unit": "right results on policy less sft, plus 1", "machine": platform.processor() or platform.machine()}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
