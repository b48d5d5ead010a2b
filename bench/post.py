"""What reinforcement learning against verifiers (RLVR) adds to fine-tuning (SFT), beside two controls.

    .venv/bin/python bench/post.py --home post            # seeds 0, 1, 2: some 35 minutes of CPU time if none is sealed
    .venv/bin/python bench/post.py --home post --seeds 1  # seed 0 alone: a third of that
    .venv/bin/python bench/post.py --quick                # to see that it works: two minutes of CPU time

For each seed atom-tiny is trained from raw text by `atom run`, test items included: they follow from the seed. Two
controls start from the same SFT checkpoint as RLVR:

- **random reward**: the same RLVR with the same settings and steps, but what an answer earns is a coin that knows
  nothing of the answer. It falls on 1 as often as answers were right in the real run.
- **SFT continued**: more steps of SFT on its mix in a new order, with a fresh optimizer as in RLVR. The rate is warmed
  up to 1e-3, a third of SFT's, and comes down to SFT's own final rate, so that neither a rate that is still high at the
  end nor one that moves nothing is held against it. Compute is processor time as the ledger has it of the sealed
  stages, with all that they do beside training: the steps are SFT's times RLVR's seconds by SFT's, and a tenth more,
  since start-up counts in both. What the control then took is printed.

All four models are exported and answer the test items by the stages themselves: the same settings, and the same random
numbers for each sample. Errors are clustered by item, those of a gain paired as well. Two processes at a time, one
thread each; what is sealed or finished under --home is not run again, and output goes to --home/controls/*.txt.

The last line is one JSON object. `ratio` is the smallest gain in pass@1 over the seeds by the 0.20 that is claimed; low
and high are its 95 % interval over items, which knows nothing of seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CLAIM = 0.20
RATE, MARGIN = 1e-3, 1.1
RANDOM, CONTINUED = "random reward", "SFT continued"
NODES = {"SFT": "sft", "RLVR": "rlvr"}
MODELS = (*NODES, RANDOM, CONTINUED)

Scores = dict[str, dict[str, dict[str, float]]]
"""kind → measure → item → how likely it is right."""


def recipe(seed: int, folder: Path, name: str = "atom-tiny") -> Path:
    """A copy of a packaged recipe with that seed."""
    path = folder / f"{name}-seed-{seed}.yaml"
    text = (ROOT / "pipeline" / "recipes" / f"{name}.yaml").read_text()
    path.write_text(re.sub(r"(?m)^seed: .*$", f"seed: {seed}", text))
    return path


def coin(seed: int, rate: float) -> float:
    """The random reward of the answer that was drawn with this seed, which no two answers share."""
    from stages.formats.seeds import seed_of

    return float(Random(seed_of("coin", seed)).random() < rate)


def with_random_reward(rate: float) -> Any:
    """The RLVR stage's trainer around verifiers whose rewards are replaced by coins. What the answers earn in truth
    stays in the files (`parts`), and validation is by the verifiers."""
    from stages.rl.algorithms.grpo import GrpoTrainer
    from stages.rl.policy import RolloutFiles

    class Tossed(RolloutFiles):
        def load_or_draw(self, *args: Any) -> Any:
            return [replace(rollout, reward=coin(rollout.seed, rate)) for rollout in super().load_or_draw(*args)]

    class RandomReward(GrpoTrainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.files = Tossed(self.files.folder, self.report)

    return RandomReward


class PrintedReport:
    """A stage's report: notes to this process's output."""

    lease: int | None = None

    def note(self, text: str) -> None:
        print(text, flush=True)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Release:
    """A recipe's graph and what is sealed of it under a home."""

    def __init__(self, path: Path, home: Path) -> None:
        from pipeline.core.store import Store
        from pipeline.graph import dag
        from pipeline.graph import recipe as recipes

        self.store = Store(home)
        self.graph = dag.compose(recipes.load(str(path)), self.store)
        self.seed = int(self.graph.recipe.config.seed)

    def config(self, node: str) -> Any:
        return self.graph.nodes[node].config

    def inputs_of(self, node: str) -> dict[str, Any]:
        materials = self.graph.materials(self.graph.nodes[node])
        return {role: self.store.open(key) for role, key in materials.items()}

    def artifact(self, node: str) -> Any:
        return self.store.open(self.graph.nodes[node].key)

    def seconds(self, node: str) -> float:
        """Processor time that the sealed stage took."""
        from pipeline.core import provenance

        body = provenance.sealed(self.store.ledger, self.artifact(node))
        if body is None:
            raise SystemExit(f"no statement says how {node} was made")
        return float(provenance.usage(body[1])["cpu_seconds"])

    def pass_rate(self) -> float:
        """Share of right answers in all that RLVR drew."""
        lines = [json.loads(line) for line in (self.artifact("rlvr") / "training.jsonl").read_text().splitlines()]
        drawn = [(line["reward"], line["answers"]) for line in lines if "answers" in line]
        return float(sum(reward * n for reward, n in drawn) / sum(n for _, n in drawn))

    def continued(self) -> Any:
        """The SFT stage's config for the control."""
        was = self.config("sft")
        steps = round(MARGIN * was.phase.steps * self.seconds("rlvr") / self.seconds("sft"))
        optimizer = was.phase.optimizer.model_copy(update={"lr": RATE})
        changed = {"steps": steps, "optimizer": optimizer, "release_checkpoint_interval": steps}
        return was.model_copy(update={"phase": was.phase.model_copy(update=changed)})


def control(variant: str, path: Path, home: Path) -> dict[str, Any]:
    """Trains, exports and measures a control in this process. Kept under home/controls, in a folder by all that it
    follows from. Returns what is reported of it beside its scores."""
    from pipeline.core.stage import identity
    from pipeline.core.store import MANIFEST, Artifact, canonical, once, sha256_bytes, write_manifest
    from stages.train.trainer import train

    release = Release(path, home)
    config = release.continued() if variant == CONTINUED else release.config("rlvr")
    rate = release.pass_rate()
    about = canonical([identity(config), rate, release.artifact("rlvr").digest, release.artifact("sft").digest])
    folder = home / "controls" / f"{variant.replace(' ', '-').lower()}-{release.seed}-{sha256_bytes(about)[:12]}"

    def make(node: str, run: Any, **inputs: Any) -> Any:
        """What a stage makes of a node's inputs, of which some are replaced; from the folder if it is there."""
        out, work = folder / node, folder / f"{node}-work"
        if not (out / MANIFEST).exists():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            work.mkdir(exist_ok=True)
            run({**release.inputs_of(node), **inputs}, work, out, PrintedReport())
            write_manifest(out, f"{folder.name}-{node}")
        return Artifact.open(out)

    def stage(node: str, config: Any = None, **inputs: Any) -> Any:
        graph_node = release.graph.nodes[node]
        return make(node, lambda *rest: graph_node.stage.run(config or graph_node.config, *rest), **inputs)

    def trained() -> Any:
        if variant == RANDOM:
            trainer = with_random_reward(rate)
            return make("rlvr", lambda *rest: train(trainer, "rlvr", config, *rest))
        was, changed = release.config("order-sft"), {"phase": "sft-continued", "steps": config.phase.steps}
        order = stage("order-sft", was.model_copy(update=changed))
        return stage("sft", config, order=order, init=release.artifact("sft"))

    def timed() -> float:
        began = time.process_time()
        trained()
        return time.process_time() - began

    folder.mkdir(parents=True, exist_ok=True)
    seconds = once(folder / "seconds.json", timed)
    model = stage("export-sft", checkpoint=trained())
    for node in ("solve-sft", "evaluate-sft"):
        stage(node, model=model)
    return {"folder": str(folder), "steps": config.phase.steps, "seconds": seconds, "rate": rate}


def scores(solved: Any) -> Scores:
    """pass@1, pass@k for all k samples, and the greedy answer, from a solve stage's table."""
    from stages.confidence import pass_at
    from stages.evaluation.pass_at_k import GREEDY, JUDGED
    from stages.formats.table import read_table

    items: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_table(solved / "answers.parquet").to_pylist():
        if row["kind"] not in JUDGED:
            items.setdefault((row["kind"], row["id"]), []).append(row)
    by_kind: Scores = {}
    for (kind, id), rows in sorted(items.items()):
        right = [row["reward"] >= 1 for row in rows if row["sample"] != GREEDY]
        metrics = {f"pass@{k}": pass_at(len(right), sum(right), k) for k in (1, len(right))}
        metrics["greedy"] = float(next(row["reward"] >= 1 for row in rows if row["sample"] == GREEDY))
        for name, value in metrics.items():
            for each in (kind, "all"):
                by_kind.setdefault(each, {}).setdefault(name, {})[id] = value
    return by_kind


def side_metrics(solved: Any, evaluated: Any) -> dict[str, float]:
    """What else may rise or fall: bits per byte of held-out text, problems in document form, courteous notes, the share
    of sampled answers that reason first, and their length."""
    evaluation, solves = evaluated.json("scores.json"), solved.json("scores.json")
    figures = {f"bits per byte, {name}": row["value"] for name, row in evaluation["bits_per_byte"].items()}
    figures |= {f"as a document, {name}": row["value"] for name, row in evaluation["accuracy"].items()}
    figures |= {f"reward, {name}": row["reward"]["value"] for name, row in solves["judged"].items()}
    figures |= {f"with reasoning, {name}": row["samples"]["reasoning"] for name, row in solves["problems"].items()}
    return figures | {"tokens of an answer": solves["problems_all"]["samples"]["tokens"]}


def measure(seeds: Sequence[int], home: Path, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Every seed's four models. Raises SystemExit if a process fails."""
    alone = {**os.environ, "ATOM_HOME": str(home), "PYTHONPATH": str(ROOT)}
    alone |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    logs = home / "controls"
    logs.mkdir(parents=True, exist_ok=True)

    def started(name: str, *arguments: str) -> str:
        log = logs / f"{name}.txt"
        with open(log, "a") as file:
            begin = file.tell()
            process = subprocess.run(
                [sys.executable, "-P", *arguments], env=alone, stdout=file, stderr=subprocess.STDOUT
            )
        text = log.read_bytes()[begin:].decode()
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)} failed; see {log}:\n{text[-2000:]}")
        return text

    def run_recipe(seed: int) -> Path:
        path = recipe(seed, folder, "atom-smoke" if quick else "atom-tiny")
        for node in NODES.values():
            for until in (f"solve-{node}", f"evaluate-{node}"):
                started(f"seed-{seed}", "-m", "pipeline.cli", "run", str(path), "--until", until)
        return path

    def run_control(variant: str, path_future: Future[Path]) -> dict[str, Any]:
        path = path_future.result()  # no deadlock: every seed's own training was begun before any control
        text = started(
            f"{path.stem}-{variant.replace(' ', '-')}", __file__, "--home", str(home), "--one", variant, str(path)
        )
        result: dict[str, Any] = json.loads(text.splitlines()[-1])
        return result

    with ThreadPoolExecutor(2) as pool:
        paths = {seed: pool.submit(run_recipe, seed) for seed in seeds}
        controls = {(s, w): pool.submit(run_control, w, path) for s, path in paths.items() for w in (CONTINUED, RANDOM)}
    return [
        collected(paths[seed].result(), home, {w: controls[seed, w].result() for w in (RANDOM, CONTINUED)})
        for seed in seeds
    ]


def collected(path: Path, home: Path, controls: Mapping[str, Any]) -> dict[str, Any]:
    """What `report` says of a seed."""
    from pipeline.core.store import Artifact

    release = Release(path, home)
    artifacts = {
        name: (release.artifact(f"solve-{node}"), release.artifact(f"evaluate-{node}")) for name, node in NODES.items()
    }
    for name, result in controls.items():
        folder = Path(result["folder"])
        artifacts[name] = Artifact.open(folder / "solve-sft"), Artifact.open(folder / "evaluate-sft")
    costs = {name: (release.config(node).phase.steps, release.seconds(node)) for name, node in NODES.items()}
    costs |= {name: (result["steps"], result["seconds"]) for name, result in controls.items()}
    return {
        "seed": release.seed,
        "rate": controls[RANDOM]["rate"],
        "costs": costs,
        "scores": {name: scores(solved) for name, (solved, _) in artifacts.items()},
        "beside": {name: side_metrics(*both) for name, both in artifacts.items()},
    }


def gain(seed: Mapping[str, Any], kind: str, metric: str) -> dict[str, Any]:
    """RLVR's gain over SFT, item by item, so that an item's luck counts once."""
    from stages.confidence import clustered

    after, before = (seed["scores"][name][kind][metric] for name in ("RLVR", "SFT"))
    return clustered([after[id] - before[id] for id in sorted(before)])


def table(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines for people."""
    lines = [f"{'seed':>4}  {'kind':5}{'measure':9}{'items':>6}{'SFT':>7}{'RLVR':>7}{'gain ± s.e.':>17}"
             f"{RANDOM:>15}{CONTINUED:>15}"]  # fmt: skip
    for seed in seeds:
        for kind, measures in sorted(seed["scores"]["SFT"].items(), key=lambda entry: (entry[0] == "all", entry[0])):
            for metric in measures:
                values = {name: seed["scores"][name][kind][metric] for name in MODELS}
                means = {name: sum(entry.values()) / len(entry) for name, entry in values.items()}
                rise = gain(seed, kind, metric)
                difference = f"{rise['value']:+.3f} ± {rise['se']:.3f}"
                lines.append(f"{seed['seed']:4}  {kind:5}{metric:9}{rise['n']:6}{means['SFT']:7.3f}{means['RLVR']:7.3f}"
                             f"{difference:>17}{means[RANDOM]:15.3f}{means[CONTINUED]:15.3f}")  # fmt: skip
    lines += ["", f"{'seed':>4}  {'beside':32}" + "".join(f"{name:>15}" for name in MODELS)]
    for seed in seeds:
        costs = {"steps": 0, "processor seconds of training": 1}
        rows = {name: [float(seed["costs"][model][n]) for model in MODELS] for name, n in costs.items()}
        rows |= {name: [seed["beside"][model][name] for model in MODELS] for name in seed["beside"]["SFT"]}
        for name, row in rows.items():
            digits = 0 if name in costs else 1 if name.startswith("tokens") else 3
            lines.append(f"{seed['seed']:4}  {name:32}" + "".join(f"{value:15.{digits}f}" for value in row))
    rates = ", ".join(f"{seed['rate']:.3f}" for seed in seeds)
    return [*lines, f"chance of a random reward, by seed: {rates}"]


def last_line(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from stages.confidence import Z95

    least = min((gain(seed, "all", "pass@1") for seed in seeds), key=lambda rise: rise["value"])
    half = Z95 * least["se"]
    return {
        "name": "rlvr-gain", "ratio": round(least["value"] / CLAIM, 4),
        "low": round((least["value"] - half) / CLAIM, 4), "high": round((least["value"] + half) / CLAIM, 4),
        "target": 1.0, "unit": f"smallest gain in pass@1 of RLVR over SFT by {CLAIM:.2f}, {len(seeds)} seeds",
        "machine": f"{platform.machine()}, 2 processes of 1 thread",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="atom-smoke, one seed; the figures mean nothing")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument(
        "--home", type=Path, help="the ATOM_HOME, of which sealed stages and finished controls are taken"
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(control(arguments.one[0], Path(arguments.one[1]), arguments.home)))
        return
    with tempfile.TemporaryDirectory() as folder:
        home = (arguments.home or Path(folder) / "home").absolute()
        seeds = range(1 if arguments.quick else arguments.seeds)
        results = measure(seeds, home, Path(folder), arguments.quick)
    print("\n".join(table(results)))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(json.dumps(last_line(results)))


if __name__ == "__main__":
    main()
