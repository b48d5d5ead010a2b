"""Whether a preference reward saturates with compute where a verified one goes on: RLHF beside RLVR.

    .venv/bin/python bench/rlhf_saturation.py            # seeds 0, 1, 2 in two processes
    .venv/bin/python bench/rlhf_saturation.py --quick    # one seed, few steps: its figures mean nothing

A small dense model is fine-tuned from initial weights on problems and on requests for courteous notes. From these
weights the policy is trained three times by the same algorithm (`stages.rl.algorithms.grpo.GrpoTrainer`), with the same
settings and the same number of updates:

- **rlvr**: problems, scored by the verifier `exact`;
- **rlhf**: notes, scored by a reward model. It is trained once (stage `reward`) on scored pairs of the answers of the
  fine-tuned model, exported, and asked as the verifier `reward-model`, as in the phase `online_rlhf`;
- **rules**: the same notes, scored by the rules `courtesy` from which those pairs had their order. It tells what the
  reward model lost from what the notes allow.

Every few updates each policy answers held-out problems, or held-out requests, at temperature 1 with the same seeds. The
task's own success is the share of right results, or of notes that do what was asked (the part `task`). Notes are also
compared with those of the fine-tuned model (`stages.evaluation.win_rate.summary`). Compute counts FLOPs: a forward pass
of questions and answers as they are drawn, one more where a reward model reads them, three of all answers that are
learned from, and what the reward model took before (its pairs and its training).

What comes late is what is gained in the second half of the updates. The last line is one JSON object: `ratio` is 1 plus
the late rise of the task's own success by RLVR less that by RLHF, with its 95 % interval over seeds (Student's). Above
1, the verified reward goes on rising where the preferred one does not.
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
from saturation_figure import draw as draw_figure
from small_policies import OPTIMIZER, Encode, example_of, load, prepare_process, run_seeds, weights_of, write_inputs

from pipeline.core.store import Artifact, write_manifest
from stages.evaluation import win_rate
from stages.export import hf
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.formats.table import write_rows
from stages.rl import reward_model
from stages.rl.algorithms.grpo import GrpoTrainer
from stages.rl.algorithms.preferences import PAIRS, pair_rows
from stages.rl.config import RlTrainConfig
from stages.rl.policy import scored, unscored
from stages.rl.rollout.batches import Example
from stages.rl.rollout.task_sources.procedural_tasks import CourtesyTasks, ProblemTasks
from stages.tasks import Row, question, to_row
from stages.tasks.eval_set import courtesy_row
from stages.tasks.synthetic import courtesy_notes, problems
from stages.train.checkpoint import release_checkpoint
from stages.train.engine import Engine
from stages.train.parallel import session

ARMS = {"rlvr": "exact", "rlhf": "reward-model", "rules": "courtesy"}
"""{policy: the verifier of its tasks}."""
NOTES, RIGHT, DONE, CHECK_EVERY = 0.8, 1 / 3, 0.1, 50
"""Of fine-tuning: the share of conversations about notes; the shares of right results and of notes that do what was
asked which together end it; and the steps between two measurements of them."""


@dataclass(frozen=True)
class Size:
    """tuning: the most steps of fine-tuning, of `rows` answers each. requests: those whose answers make pairs; judging:
    updates of the reward model, of `pairs` each, whose rewards differ by more than `margin`. new: tokens of an answer.
    every: updates between two measurements, on `items` problems or requests."""

    model: Mapping[str, Any]
    vocab: int
    level: int
    tuning: int
    rows: int
    requests: int
    judging: int
    pairs: int
    margin: float
    prompts: int
    generations: int
    new: int
    steps: int
    every: int
    items: int


FULL = Size(
    dict(architecture="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, head_dim=16, intermediate_size=128,
         context_length=128, tie_embeddings=True, init_std=0.08),
    vocab=512, level=3, tuning=500, rows=48, requests=240, judging=120, pairs=32, margin=0.05, prompts=16,
    generations=8, new=40, steps=80, every=8, items=300,
)  # fmt: skip
QUICK = replace(
    FULL, tuning=40, rows=16, requests=24, judging=2, pairs=2, margin=-1.0, prompts=2, generations=2, new=24, steps=2,
    every=1, items=4,
)  # fmt: skip


def configuration(size: Size, seed: int, arm: str) -> RlTrainConfig:
    source = {"source": "problems", "task": "sort", "levels": [size.level], "count": size.prompts}
    if arm != "rlvr":
        source = {"source": "courtesies", "count": size.prompts, "verifier": ARMS[arm]}
    return small_policies.configuration(size, seed, source, name="online-rlhf" if arm == "rlhf" else "rlvr")


def make_inputs(folder: Path, size: Size, seed: int) -> tuple[dict[str, Artifact], dict[str, Artifact], list[Row]]:
    """Tokenizer and items, the tasks of each arm, and the held-out rows: problems that are no task, and requests of the
    held-out combinations."""
    rng = random.Random(seed_of("bench/saturation/tokenizer", seed))
    texts = [chat.render(conversation(rng, kind)) for kind in ("sort", "courtesy") for _ in range(1500)]
    source = ProblemTasks(source="problems", task="sort", levels=(size.level,), count=size.items + 40 * size.prompts)
    sorts = list(source.rows(seed, set()))
    requests = courtesy_notes.draw_distinct(size.items, rng, heldout=True)
    heldout = [to_row(f"test/{row['id']}", question(row), "exact", "sort", size.level, **_split(row)) for row in
               sorts[: size.items]]  # fmt: skip
    heldout += [courtesy_row(f"test/courtesy/{n:05d}", r, split="test") for n, r in enumerate(requests)]
    rows = {"rlvr": sorts[size.items :]}
    for arm in ("rlhf", "rules"):
        notes = CourtesyTasks(source="courtesies", count=max(40 * size.prompts, size.requests), verifier=ARMS[arm])
        rows[arm] = list(notes.rows(seed, set()))
    return (*write_inputs(folder, texts, size.vocab, rows, heldout), heldout)


def _split(row: Row) -> dict[str, Any]:
    return {"question": row["question"], "expected_answer": row["expected_answer"], "split": "test"}


def conversation(rng: random.Random, kind: str) -> list[dict[str, str]]:
    """A conversation about a problem, with its steps in seven of ten, or about a note, with the flaws that are drawn
    with it."""
    if kind == "sort":
        return problems.messages(problems.TASKS["sort"](rng), rng.random() < 0.7)
    return courtesy_notes.messages(courtesy_notes.draw_request(rng), rng)


def fine_tune(trainer: GrpoTrainer, size: Size, seed: int, heldout: Sequence[Row]) -> int:
    """Trains on conversations, of which none is held out, until RIGHT and DONE are reached. Returns the number of
    steps."""
    excluded = {question(row) for row in heldout}
    rng = random.Random(seed_of("bench/saturation/tuning", seed))

    def draw(encode: Encode) -> list[Example]:
        examples: list[Example] = []
        while len(examples) < size.rows:
            messages = conversation(rng, "courtesy" if rng.random() < NOTES else "sort")
            if messages[0]["content"] not in excluded:
                ((text, start),) = chat.turns(messages)
                examples.append(example_of(encode, text, start))
        return examples

    def is_enough(step: int) -> bool:
        right, done = (
            Measurement.of(trainer, seed, arm, trainer_rows(heldout, arm)[:100]).task for arm in ("rlvr", "rules")
        )
        print(f"seed {seed}: {right:.2f} right, {done:.2f} done after {step} steps of fine-tuning", flush=True)
        return right >= RIGHT and done >= DONE

    return small_policies.fine_tune(trainer, size.tuning, draw, CHECK_EVERY, is_enough)


def trainer_rows(heldout: Sequence[Row], arm: str) -> list[Row]:
    """The held-out rows of the kind that an arm is trained on."""
    return [row for row in heldout if (row["verifier"] == "exact") == (arm == "rlvr")]


@dataclass(frozen=True)
class Measurement:
    """Answers to held-out rows. sides: of each, in the columns of the stage `prefer`; reward: the mean reward by which
    the policy is trained."""

    task: float
    reward: float
    parts: dict[str, float]
    sides: list[dict[str, Any]]

    @classmethod
    def of(cls, trainer: GrpoTrainer, seed: int, arm: str, rows: Sequence[Row]) -> Measurement:
        policy = trainer.policy
        policy.load()
        completions = policy.draw([(row, seed_of(f"bench/saturation/{row['id']}", seed)) for row in rows])
        parts = policy.score(rows, completions)
        rewards = parts
        if arm == "rlhf":
            rewards = policy.score([{**row, "verifier": ARMS[arm]} for row in rows], completions)
        sides = []
        for row, completion, part in zip(rows, completions, parts, strict=True):
            response = policy.chat.response(completion)
            values = (response.answer, response.finished, len(completion.ids), part["reward"], json.dumps(part))
            names = ("answer", "finished", "tokens", "reward", "parts")
            sides.append({"id": row["id"], "question": question(row), **dict(zip(names, values, strict=True))})
        means = {name: statistics.fmean(part[name] for part in parts) for name in sorted(parts[0])}
        return cls(
            means["reward" if arm == "rlvr" else "task"],
            statistics.fmean(part["reward"] for part in rewards),
            means,
            sides,
        )

    def wins(self, before: Measurement) -> float:
        """The win rate of these notes over others to the same requests."""
        pairs = []
        for model, other in zip(self.sides, before.sides, strict=True):
            pair = {name: model[name] for name in ("id", "question")}
            for side, values in (("model", model), ("before", other)):
                pair |= {f"{side}_{name}": value for name, value in values.items()}
            pairs.append(pair)
        return win_rate.summary(pairs)["win_rate"]["value"]


def make_pairs(trainer: GrpoTrainer, size: Size, seed: int, folder: Path) -> tuple[Artifact, int]:
    """Scored pairs of the policy's own answers to training requests, as the phase `dpo` makes them, and the tokens of
    the answers."""
    digest, samples, rows = trainer.policy.load(), size.generations, trainer.rows[: size.requests]
    drawn = [row for row in rows for _ in range(samples)]
    seeds = [seed_of(f"bench/saturation/pairs/{n}", seed) for n in range(len(drawn))]
    completions = trainer.policy.draw(list(zip(drawn, seeds, strict=True)))
    answers = [
        unscored(1, 0, digest, row, number, trainer.policy.chat, completion)
        for row, number, completion in zip(drawn, seeds, completions, strict=True)
    ]
    answers = [
        replace(r, group=n // samples, sample=n % samples) for n, r in enumerate(scored(drawn, answers, trainer.policy))
    ]
    folder.mkdir()
    by_id = {row["id"]: row for row in rows}
    write_rows(folder / "pairs.parquet", PAIRS, pair_rows(answers, by_id, size.margin))
    return write_manifest(folder, "dpo-bench"), sum(r.length for r in answers)


def train_reward_model(
    folder: Path, size: Size, seed: int, inputs: Mapping[str, Artifact]
) -> tuple[dict[str, Artifact], dict[str, Any]]:
    """Stages `reward` and `export` on the pairs; the inputs of the verifier, and the training's summary."""
    phase = dict(pairs=size.pairs, steps=size.judging, micro_batches=1, optimizer=OPTIMIZER | {"lr": 5e-4},
                 validate_every=size.judging, release_checkpoint_interval=size.judging)  # fmt: skip
    common = dict(model=size.model, padded_vocab_size=size.vocab)
    for name in ("reward", "export", "work", "export-work"):
        (folder / name).mkdir()
    config = reward_model.STAGE.config.model_validate(dict(common, phase=phase, seed=seed))
    reward_model.STAGE.run(config, dict(inputs), folder / "work", folder / "reward", Quiet())
    trained = write_manifest(folder / "reward", "reward-bench")
    exported = {"checkpoint": trained, "tokenizer": inputs["tokenizer"]}
    hf.STAGE.run(hf.STAGE.config.model_validate(common), exported, folder / "export-work", folder / "export", Quiet())
    artifacts = {"reward": trained, "reward_model": write_manifest(folder / "export", "export-reward-bench")}
    return artifacts, trained.json("summary.json")


def train_arm(
    trainer: GrpoTrainer, size: Size, seed: int, arm: str, rows: Sequence[Row], start: Measurement, spent: float
) -> list[dict[str, Any]]:
    """The curve of one policy. spent: FLOPs before its first update."""
    forward = trainer.config.model.flops_per_token(size.vocab, size.new) / 3
    question_tokens = statistics.fmean(len(trainer.policy.chat.encode_prompt(row)) for row in trainer.rows)
    trainer.log.create()
    trainer.begin(0)
    points, answers = [], 0
    for step in range(size.steps + 1):
        if step:
            answers += trainer.train_step(step)["answers"]
        if step % size.every and step != size.steps:
            continue
        measured = Measurement.of(trainer, seed, arm, rows)
        read = answers * question_tokens + trainer.generated
        flops = spent + forward * (read * (2 if arm == "rlhf" else 1) + 3 * trainer.tokens)
        point = {"updates": step, "tokens": trainer.generated, "flops": flops,
                 "task": measured.task, "reward": measured.reward}  # fmt: skip
        if arm != "rlvr":
            point |= {"win_rate": measured.wins(start), "parts": measured.parts}
        points.append(point)
        shown = {name: round(value, 3) for name, value in point.items() if isinstance(value, float)}
        print(f"seed {seed}: {arm}, {step} updates: {json.dumps(shown)}", flush=True)
    return points


def run_seed(size: Size, seed: int) -> dict[str, Any]:
    """The curves of one seed."""
    prepare_process()
    started = time.process_time()
    result: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shared, tasks, heldout = make_inputs(folder, size, seed)
        config = configuration(size, seed, "rules")
        with session(0) as ranks:
            engine = Engine(config, ranks, GrpoTrainer.vocab_size(shared))
            engine.initialize()
            inputs = {**shared, "tasks": tasks["rules"]}
            trainer = GrpoTrainer("rlvr", config, inputs, folder / "tuning", Quiet(), engine, None)
            try:
                result["tuning"] = fine_tune(trainer, size, seed, heldout)
                weights = weights_of(engine)
                starts = {
                    arm: Measurement.of(trainer, seed, arm, trainer_rows(heldout, arm)) for arm in ("rlvr", "rules")
                }
                pairs, pair_tokens = make_pairs(trainer, size, seed, folder / "pairs")
                forward = config.model.flops_per_token(size.vocab, size.new) / 3
            finally:
                trainer.close()
        release_checkpoint.write(
            folder / "init" / release_checkpoint.name_of(1), {name: tuple(t.shape) for name, t in weights.items()}, {},
            lambda kind, name, shape: weights[name], {"step": 1, "optimizer_step": 0},
        )  # fmt: skip
        init = write_manifest(folder / "init", "sft-bench")
        judge, summary = train_reward_model(
            folder, size, seed, {"init": init, "pairs": pairs, "tokenizer": shared["tokenizer"]}
        )
        result["pairs"], result["heldout_accuracy"] = summary["pairs"], summary["heldout_accuracy"]["last"]
        print(f"seed {seed}: reward model of {summary['pairs']} pairs orders {result['heldout_accuracy']:.3f} of "
              f"held-out ones, {time.process_time() - started:.0f} s", flush=True)  # fmt: skip
        judging = forward * (pair_tokens + 3 * summary["tokens"])
        with session(0) as ranks:
            for arm in ARMS:
                config = configuration(size, seed, arm)
                engine = Engine(config, ranks, GrpoTrainer.vocab_size(shared))
                engine.initialize()
                load(engine, weights)
                inputs = {**shared, "tasks": tasks[arm]} | (judge if arm == "rlhf" else {})
                trainer = GrpoTrainer(config.name, config, inputs, folder / arm, Quiet(), engine, None)
                try:
                    rows, start = trainer_rows(heldout, arm), starts["rlvr" if arm == "rlvr" else "rules"]
                    spent = judging if arm == "rlhf" else 0.0
                    result[arm] = train_arm(trainer, size, seed, arm, rows, start, spent)
                finally:
                    trainer.close()
    result["cpu_seconds"] = time.process_time() - started
    return result


def late(points: Sequence[Mapping[str, Any]], name: str) -> float:
    """The rise in the second half of the updates."""
    middle = min(points, key=lambda point: abs(2 * point["updates"] - points[-1]["updates"]))
    return float(points[-1][name] - middle[name])


def report(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Prints the table; gives the line of the benchmark."""

    def line(title: str, values: Sequence[float]) -> str:
        mean, low, high = interval(values)
        return f"{title:34}" + "".join(f"{value:8.3f}" for value in values) + f"{mean:9.3f} ({low:+.3f} to {high:+.3f})"

    print(f"{'by seed, mean, 95 % over seeds':34}" + "".join(f"{result['seed']:8}" for result in results))
    print(line("reward model, held-out pairs", [result["heldout_accuracy"] for result in results]))
    for arm in ARMS:
        for name in ("task", "reward", *(() if arm == "rlvr" else ("win_rate",))):
            curves = [result[arm] for result in results]
            print(line(f"{arm}: {name} at first", [points[0][name] for points in curves]))
            print(line(f"{arm}: {name} at last", [points[-1][name] for points in curves]))
            print(line(f"{arm}: {name}, late rise", [late(points, name) for points in curves]))
        if arm != "rlvr":
            for part in sorted(curves[0][0]["parts"]):
                rises = [points[-1]["parts"][part] - points[0]["parts"][part] for points in curves]
                print(line(f"{arm}: part {part}, rise", rises))
        print(line(f"{arm}: GFLOPs", [points[-1]["flops"] / 1e9 for points in curves]))
    print(f"CPU seconds: {', '.join(format(result['cpu_seconds'], '.0f') for result in results)}")
    mean, low, high = interval([late(result["rlvr"], "task") - late(result["rlhf"], "task") for result in results])
    return {
        "name": "rlhf_saturation", "ratio": round(1 + mean, 4), "low": round(1 + low, 4), "high": round(1 + high, 4),
        "target": 1.0, "unit": f"1 + late rise of the task's success, RLVR less RLHF, {len(results)} seeds",
        "machine": f"{platform.machine()}, 1 thread a seed, torch {torch.__version__}, fp32",
    }  # fmt: skip


def measure(size: Size, seeds: int, processes: int, out: Path) -> dict[str, Any]:
    """Trains all seeds, reports, and writes `rlhf-saturation.json` and the figure into `out`."""
    results = run_seeds(run_seed, size, seeds, processes)
    curves = [{"seed": result["seed"], **{arm: result[arm] for arm in ARMS}} for result in results]
    out.mkdir(parents=True, exist_ok=True)
    (out / "rlhf-saturation.json").write_text(json.dumps(curves, sort_keys=True) + "\n")
    (out / "rlhf-saturation.png").write_bytes(draw_figure(curves))
    return report(results)


if __name__ == "__main__":
    parser = small_policies.argument_parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="seeds that are trained at once")
    parser.add_argument("--out", type=Path, help="folder of the figure and its points; runs/ by default, if not quick")
    arguments = parser.parse_args()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(measure(QUICK, 1, 1, arguments.out or Path(temporary))))
    else:
        runs = Path(__file__).parent.parent / "runs"
        print(json.dumps(measure(FULL, arguments.seeds, arguments.processes, arguments.out or runs)))
