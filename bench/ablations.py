"""Runs pairs of recipes that differ in one setting, or pairs of stages of one recipe, and prints the effect of each.

    .venv/bin/python bench/ablations.py --home runs/ablations                 # all questions of bench/ablations.yaml
    .venv/bin/python bench/ablations.py --home runs/ablations muon anneal     # some of them
    .venv/bin/python bench/ablations.py --quick                               # 30 steps of one seed, to try it
    .venv/bin/python bench/ablations.py --plan bench/rlvr_seeds.yaml          # the questions of another file

All runs read the same data: those of the base or of the plan's `data`. Both arms of a pair have the same training
seed, so the same initial weights and rows as far as the setting leaves them equal.
The effect is the difference of the last held-out losses of a phase, arm minus control, in nats a token: below 0 the arm
is better. A question may name another figure, and another phase for its control. The 95 % interval is over seeds
(Student's). At this size an effect gives a sign, and no figure at scale.

Runs are sealed in the home: a run that was stopped goes on, and arms with equal settings are one run. The last line is
one JSON object; its ratio is the figure of the control divided by that of the arm, of the first question.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from intervals import interval

from pipeline.core.store import Store
from pipeline.graph import dag
from pipeline.graph import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
HELDOUT_LOSS = "heldout_loss.last"
REPORTS = ("scores.json", "summary.json")
# Settings of a run that shows only that everything runs.
QUICK = {
    f"{phase}.{name}": value
    for phase in ("pretrain", "midtrain")
    for name, value in {
        "steps": 30, "optimizer.warmup_steps": 5, "validation.every": 30, "release_checkpoint_interval": 10,
        "checkpoint_interval": 30,
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A pair of runs.

    Attributes:
        name: Its name in the file.
        text: What differs, in words.
        phase: The stage whose figure is compared.
        control_phase: That of the control; by default the same.
        figure: Path of the figure in the stage's summary.json or scores.json.
        arm: {path of a setting: value} of the arm.
        control: Those of the control; none is the base.
    """

    name: str
    text: str
    phase: str
    control_phase: str
    figure: str
    arm: Mapping[str, Any]
    control: Mapping[str, Any]


def changed(recipe: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a recipe with other settings. A value of None takes a setting away."""
    copy: dict[str, Any] = json.loads(json.dumps(recipe))
    for path, value in changes.items():
        *sections, name = path.split(".")
        section = copy
        for key in sections:
            section = section.setdefault(key, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return copy


def measured(home: Path, file: Path, phase: str, figure: str) -> float:
    """Runs a recipe until a phase is sealed, and returns a figure of it.

    Raises:
        SystemExit: With what the run printed, if it failed.
    """
    command = [sys.executable, "-m", "pipeline.cli", "run", str(file), "--until", phase]
    environment = {**os.environ, "ATOM_HOME": str(home), "MLFLOW_TRACKING_URI": "none", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{file.stem}: exit {run.returncode}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    store = Store(home)
    folder = store.artifacts / dag.compose(recipes.load(str(file)), store).nodes[phase].key
    value = json.loads(next(folder / name for name in REPORTS if (folder / name).exists()).read_text())
    for key in figure.split("."):
        value = value[key]
    return float(value)


def questions_of(body: Mapping[str, Any], names: list[str]) -> Iterator[Question]:
    """Yields the questions that were asked, or all. Raises SystemExit for an unknown name."""
    for name in names or body["questions"]:
        if name not in body["questions"]:
            raise SystemExit(f"ablations: no question {name}; known: {', '.join(body['questions'])}")
        row = body["questions"][name]
        phase = row["phase"]
        stages = phase, row.get("control_phase", phase), row.get("figure", HELDOUT_LOSS)
        yield Question(name, row["text"], *stages, row.get("arm", {}), row.get("control", {}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", nargs="*", help="names in bench/ablations.yaml; default: all")
    parser.add_argument("--home", type=Path, help="where runs are kept; default: a temporary folder")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: those of the file")
    plan_file = Path(__file__).with_suffix(".yaml")
    parser.add_argument("--plan", type=Path, default=plan_file, help="file of questions; default: bench/ablations.yaml")
    parser.add_argument("--quick", action="store_true", help="30 steps of one seed; the figures mean nothing")
    options = parser.parse_args()
    body = yaml.safe_load(options.plan.read_text("utf-8"))
    questions = list(questions_of(body, options.questions))
    seeds = body["seeds"][: 1 if options.quick else options.seeds]
    base = yaml.safe_load((ROOT / f"pipeline/recipes/{body['base']}.yaml").read_text("utf-8"))
    data = ROOT / f"data_recipes/{base['data']}.yaml"
    if "data" in body:
        data = (options.plan.parent / body["data"]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        home = (options.home or Path(scratch) / "home").absolute()
        folder = home / "recipes"
        folder.mkdir(parents=True, exist_ok=True)
        base["data"] = str(data)

        def measure(question: Question, arm: str, seed: int) -> float:
            is_arm = arm == "arm"
            changes, phase = (question.arm, question.phase) if is_arm else (question.control, question.control_phase)
            quick = QUICK if options.quick else {}
            recipe = changed(base, {**body["common"], **changes, **quick, "training_seed": seed})
            file = folder / f"{question.name}-{arm}-{seed}.yaml"
            file.write_text(yaml.safe_dump(recipe, sort_keys=False))
            return measured(home, file, phase, question.figure)

        figures: dict[tuple[str, str, int], float] = {}
        plan = [(q, arm, seed) for seed in seeds for q in questions for arm in ("control", "arm")]
        with ThreadPoolExecutor(options.jobs) as pool:
            for (question, arm, seed), figure in zip(plan, pool.map(lambda run: measure(*run), plan), strict=True):
                figures[question.name, arm, seed] = figure
                print(f"{question.name:<12} {arm:<8} seed {seed}: {figure:.4f}", flush=True)
    print(f"\n{'question':<12} {'control':>8} {'arm':>8} {'effect':>8} {'95 % interval':>20}  what differs")
    ratios = []
    for question in questions:
        controls = [figures[question.name, "control", seed] for seed in seeds]
        arms = [figures[question.name, "arm", seed] for seed in seeds]
        effect, low, high = interval([arm - control for arm, control in zip(arms, controls, strict=True)])
        means = f"{sum(controls) / len(seeds):>8.4f} {sum(arms) / len(seeds):>8.4f}"
        print(f"{question.name:<12} {means} {effect:>+8.4f} {f'{low:+.4f} to {high:+.4f}':>20}  {question.text}")
        # A share of right answers may be 0.
        ratios.append(interval([control / max(arm, 1e-9) for arm, control in zip(arms, controls, strict=True)]))
    ratio, low, high = ratios[0]
    result = {"name": "ablations", "ratio": ratio, "low": low, "high": high, "target": 1.0, "unit": "x"}
    print(json.dumps({**result, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
