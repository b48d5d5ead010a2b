"""The parts of the soak about layouts: on several models, drawn at random, checkpoints between all of them, kills."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.train.config import TrainConfig
from tests.fixtures import layout_fixtures, train_fixtures

TOLERANCE = 1e-5
MODELS: dict[str, dict[str, Any]] = {
    "4 experts, tied": {},
    "8 experts, top-3, untied, 4 kv heads": {
        "experts": 8, "num_experts_per_tok": 3, "tie_embeddings": False, "kv_heads": 4,
    },
    "width 48, 8 layers": {"hidden_size": 48, "head_dim": 12, "layers": 8, "moe_intermediate_size": 24},
}  # fmt: skip
PLACES = ("one", "DP2", "TP2+SP", "PP2", "EP2", "CP2", "PP2 interleaved", "EP2xDP2", "TP2xPP2", "PP2xEP2",
          "TP2xEP4 ETP1")  # fmt: skip
KILLS, KILL_SEEDS, DRAWS, DRAWN_LAYOUTS = 5, 5, 3, 8


def worst(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


Cells = list[str]
Step = Callable[[Path], Cells]
"""(an empty folder) -> the cells of a row of the part's table."""


def corpus_in(folder: Path, batch: dict[str, Any] = layout_fixtures.BATCH) -> Path:
    train_fixtures.make(folder / "corpus", {"batch": batch})
    return folder / "corpus"


def matrix_steps() -> dict[str, Step]:
    """A row for each model and seed: the largest relative difference of every layout to one process in five steps."""
    return {
        f"{name}, seed {seed}": partial(compare_layouts, model, seed)
        for name, model in MODELS.items()
        for seed in (0, 1)
    }


MATRIX_HEAD = ["model", *layout_fixtures.TWO, *layout_fixtures.FOUR]


def compare_layouts(model: dict[str, Any], seed: int, folder: Path) -> Cells:
    corpus, settings = corpus_in(folder), layout_fixtures.settings_of({}, 1, seed)
    settings["model"] = {**settings["model"], **model}
    (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, settings, folder / "one.json").values()
    cells = []
    for ranks, chosen in ((2, layout_fixtures.TWO), (4, layout_fixtures.FOUR)):
        for name, steps in layout_fixtures.compare(corpus, chosen, ranks, settings, folder / "out.json").items():
            cells.append(f"{checked(f'layout {name}', largest_difference(steps, one)):.0e}")
    return cells


def largest_difference(steps: list[dict[str, float]], one: list[dict[str, float]]) -> float:
    values = [(a[key], b[key]) for a, b in zip(steps, one, strict=True) for key in b if key not in ("share", "policy")]
    return worst(*map(list, zip(*values, strict=True)))


def drawn_steps() -> dict[str, Step]:
    """A row for each draw of a model and each number of ranks: layouts drawn at random against one process."""
    return {
        f"draw {seed}, {ranks} ranks": partial(compare_drawn_layouts, seed, ranks)
        for seed in range(DRAWS)
        for ranks in (2, 4, 8)
    }


DRAWN_HEAD = ["draw", "possible layouts", "run", "largest difference"]


def compare_drawn_layouts(seed: int, ranks: int, folder: Path) -> Cells:
    chance = random.Random(seed)
    kv_heads, experts = chance.choice([1, 2, 4]), chance.choice([2, 4, 6, 8])
    model = {
        **layout_fixtures.MODEL, "layers": chance.choice([2, 4, 6, 8]), "hidden_size": chance.choice([16, 32, 48]),
        "kv_heads": kv_heads, "heads": kv_heads * chance.choice([1, 2, 4]), "head_dim": chance.choice([4, 8, 12]),
        "experts": experts, "num_experts_per_tok": chance.randint(2, min(4, experts)),
        "moe_intermediate_size": chance.choice([8, 16, 24]), "tie_embeddings": chance.random() < 0.5,
    }  # fmt: skip
    batch = {"global_tokens": 512, "micro_tokens": 32}
    settings = {**layout_fixtures.settings_of({}, 1, seed), "model": model}
    settings["phase"]["batch"] = batch
    corpus = corpus_in(folder, batch)
    (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, settings, folder / "one.json", steps=3).values()
    legal = possible_layouts(ranks, settings)
    drawn = random.Random(seed * 100 + ranks).sample(legal, min(DRAWN_LAYOUTS, len(legal)))
    chosen = {json.dumps(layout): layout for layout in drawn}
    curves = layout_fixtures.compare(corpus, chosen, ranks, settings, folder / "out.json", steps=3)
    largest = max(checked(f"{ranks} ranks, {name}", largest_difference(steps, one)) for name, steps in curves.items())
    return [str(len(legal)), str(len(chosen)), f"{largest:.0e}"]


def possible_layouts(ranks: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every layout of that many ranks that `plan` lets pass, each once."""
    sizes, candidates = [n for n in range(1, ranks + 1) if ranks % n == 0], []
    options: dict[str, list[Any]] = {
        "tp": sizes, "pp": sizes, "vpp": [1, 2], "cp": sizes, "ep": sizes,
        "etp": sizes, "overlap_gradients": [False, True],
    }  # fmt: skip
    for values in itertools.product(*options.values()):
        layout = dict(zip(options, values, strict=True))
        try:
            phase = {**settings["phase"], "parallelism": {"ranks": ranks, **layout}}
            TrainConfig.model_validate({**settings, "phase": phase})
        except ValidationError:
            continue
        candidates.append(layout)
    return candidates


def checked(label: str, difference: float) -> float:
    if not difference <= TOLERANCE:
        raise SystemExit(f"soak: {label} differs by {difference:.1e}, more than {TOLERANCE:g}")
    print(f"{label}: {difference:.1e}", flush=True)
    return difference


def checkpoint_steps() -> dict[str, Step]:
    """A row for each layout in which a run is stopped after step 7, to go on in every other."""
    return {name: partial(go_on_everywhere, name) for name in PLACES}


CHECKPOINT_HEAD = ["from, to", *PLACES]


def go_on_everywhere(before: str, folder: Path) -> Cells:
    corpus = corpus_in(folder)
    calm = {name: folder / f"calm {name}" for name in {"one", before}}
    for name, place in calm.items():
        layout_fixtures.run(corpus, place, layout_fixtures.settings_named(name))
    expected = layout_fixtures.figures(calm["one"] / "out")
    settings = layout_fixtures.settings_named(before)
    layout_fixtures.end(layout_fixtures.start(corpus, folder / "stopped", settings, at=7, number=signal.SIGTERM))
    cells = []
    for after in PLACES:
        place = folder / "next"
        shutil.copytree(folder / "stopped/work", place / "work")
        logs = layout_fixtures.run(corpus, place, layout_fixtures.settings_named(after))
        assert "going on after step 7" in logs[0]
        if before == after:
            if train_fixtures.digest(place / "out") != train_fixtures.digest(calm[after] / "out"):
                raise SystemExit(f"soak: {before}, stopped and resumed, gives other bytes")
            cells.append("same bytes")
        else:
            difference = worst(layout_fixtures.figures(place / "out"), expected)
            cells.append(f"{checked(f'{before} to {after}', difference):.0e}")
        shutil.rmtree(place)
    return cells


def kill_steps() -> dict[str, Step]:
    """A row for each seed of random kills, of one rank or all, over runs of four processes."""
    return {f"seed {seed}": partial(kill_runs, seed) for seed in range(KILL_SEEDS)}


KILL_HEAD = ["moments", "kills", "runs", "digests"]


def kill_runs(seed: int, folder: Path) -> Cells:
    corpus = corpus_in(folder)
    settings = layout_fixtures.settings_of(layout_fixtures.FOUR["PP2xEP2"], 4, checkpoint_interval=2)
    layout_fixtures.run(corpus, folder / "calm", settings)
    digests = layout_fixtures.kill_at_random(corpus, folder / "kills", settings, KILLS, random.Random(seed), 15)
    if set(digests) != {train_fixtures.digest(folder / "calm" / "out")}:
        raise SystemExit("soak: a killed run gives other bytes than the undisturbed one")
    return [str(KILLS), str(len(digests)), "that of the undisturbed run"]
