"""What takes too long for every test run: all layouts on several models, checkpoints between all layouts, many kills.

    make soak            # about three quarters of an hour on two cores; writes docs/soak.md

Exits with 1, and says where, if anything is not as it must be.
"""

from __future__ import annotations

import itertools
import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.train.config import TrainConfig
from tests.fixtures import layout_fixtures, train_fixtures

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5
MODELS: dict[str, dict[str, Any]] = {
    "4 experts, tied": {},
    "8 experts, top-3, untied, 4 kv heads": {
        "experts": 8, "num_experts_per_tok": 3, "tie_embeddings": False, "kv_heads": 4,
    },
    "width 48, 8 layers": {"hidden_size": 48, "head_dim": 12, "layers": 8, "moe_intermediate_size": 24},
}  # fmt: skip
PLACES = ("one", "DP2", "TP2+SP", "PP2", "EP2 alltoall", "CP2", "PP2 interleaved", "EP2xDP2", "TP2xPP2", "PP2xEP2",
          "TP2xEP4 ETP1")  # fmt: skip
KILLS, DRAWS, DRAWN_LAYOUTS = 25, 3, 8


def worst(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def matrix(corpus: Path, folder: Path) -> list[str]:
    """Every layout against one process: the largest relative difference in five steps."""
    lines = ["| layout | " + " | ".join(f"{model}, seed {seed}" for model in MODELS for seed in (0, 1)) + " |"]
    lines.append("|---|" + "---|" * 2 * len(MODELS))
    rows: dict[str, list[str]] = {name: [] for name in (*layout_fixtures.TWO, *layout_fixtures.FOUR)}
    for model in MODELS.values():
        for seed in (0, 1):
            settings = layout_fixtures.settings_of({}, 1, seed)
            settings["model"] = {**settings["model"], **model}
            (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, settings, folder / "one.json").values()
            for ranks, chosen in ((2, layout_fixtures.TWO), (4, layout_fixtures.FOUR)):
                for name, steps in layout_fixtures.compare(
                    corpus, chosen, ranks, settings, folder / "out.json"
                ).items():
                    pairs = [(a[key], b[key]) for a, b in zip(steps, one, strict=True) for key in b if key != "share"]
                    rows[name].append(f"{checked(f'layout {name}', worst(*map(list, zip(*pairs, strict=True)))):.0e}")
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def compare_random_layouts(folder: Path) -> list[str]:
    """Layouts and models drawn at random, against one process: three steps of each."""
    lines = []
    for seed in range(DRAWS):
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
        corpus = folder / f"drawn-{seed}"
        train_fixtures.make(corpus, {"batch": batch})
        (one,) = layout_fixtures.compare(corpus, {"one": {}}, 1, settings, folder / "one.json", steps=3).values()
        for ranks in (2, 4, 8):
            legal = possible_layouts(ranks, settings)
            chosen = {json.dumps(layout): layout for layout in chance.sample(legal, min(DRAWN_LAYOUTS, len(legal)))}
            largest = 0.0
            for name, steps in layout_fixtures.compare(
                corpus, chosen, ranks, settings, folder / "out.json", steps=3
            ).items():
                pairs = [(a[key], b[key]) for a, b in zip(steps, one, strict=True) for key in b if key != "share"]
                largest = max(largest, checked(f"{ranks} ranks, {name}", worst(*map(list, zip(*pairs, strict=True)))))
            lines.append(f"| {seed} | {ranks} | {len(legal)} | {len(chosen)} | {largest:.0e} |")
    return ["| seed | ranks | possible | run | largest difference |", "|---|---|---|---|---|", *lines]


def possible_layouts(ranks: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every layout of that many ranks that `plan` lets pass, each once."""
    sizes, candidates = [n for n in range(1, ranks + 1) if ranks % n == 0], []
    options: dict[str, list[Any]] = {
        "tp": sizes, "pp": sizes, "vpp": [1, 2], "cp": sizes, "ep": sizes,
        "etp": sizes, "dispatcher": ["alltoall", "allgather"], "overlap_gradients": [False, True],
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


def pairs(corpus: Path, folder: Path) -> list[str]:
    """Stopped after step 7 in one layout, gone on in another."""
    lines = ["| from \\ to | " + " | ".join(PLACES) + " |", "|---|" + "---|" * len(PLACES)]
    calm: dict[str, Path] = {}
    for name in PLACES:
        calm[name] = folder / f"calm {name}"
        layout_fixtures.run(corpus, calm[name], layout_fixtures.settings_named(name))
    expected = layout_fixtures.figures(calm["one"] / "out")
    for before in PLACES:
        stopped = folder / f"stopped {before}"
        layout_fixtures.end(
            layout_fixtures.start(corpus, stopped, layout_fixtures.settings_named(before), at=7, number=signal.SIGTERM)
        )
        cells = []
        for after in PLACES:
            place = folder / "next"
            shutil.copytree(stopped / "work", place / "work")
            assert (
                "going on after step 7" in layout_fixtures.run(corpus, place, layout_fixtures.settings_named(after))[0]
            )
            if before == after:
                if train_fixtures.digest(place / "out") != train_fixtures.digest(calm[after] / "out"):
                    raise SystemExit(f"soak: {before}, stopped and gone on, gives other bytes")
                cells.append("same bytes")
            else:
                cells.append(
                    f"{checked(f'{before} to {after}', worst(layout_fixtures.figures(place / 'out'), expected)):.0e}"
                )
            shutil.rmtree(place)
        lines.append(f"| {before} | {' | '.join(cells)} |")
    return lines


def kills(corpus: Path, folder: Path) -> list[str]:
    """Kills of one rank or all over a run of four processes."""
    settings = layout_fixtures.settings_of(layout_fixtures.FOUR["PP2xEP2"], 4, checkpoint_interval=2)
    folder.mkdir()
    layout_fixtures.run(corpus, folder / "calm", settings)
    digests = layout_fixtures.kill_at_random(corpus, folder / "kills", settings, KILLS, random.Random(0), 15)
    if set(digests) != {train_fixtures.digest(folder / "calm" / "out")}:
        raise SystemExit("soak: a killed run gives other bytes than the undisturbed one")
    return [f"{KILLS} × `kill -9` of one rank or all four, at random moments, over {len(digests)} runs of PP2xEP2: "
            f"every run ended in the digest of the undisturbed one."]  # fmt: skip


def main() -> None:
    began = time.monotonic()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_fixtures.make(folder / "corpus", {"batch": layout_fixtures.BATCH})
        parts = {
            "Layouts against one process": matrix(folder / "corpus", folder),
            "Layouts and models drawn at random": compare_random_layouts(folder),
            "Work checkpoints between layouts": pairs(folder / "corpus", folder),
            "Random kills": kills(folder / "corpus", folder / "random"),
        }
    head = (
        f"# Last soak\n\n`make soak` of {datetime.now(UTC):%Y-%m-%d} at commit {commit.stdout.strip()}: "
        f"Python {platform.python_version()}, torch {version('torch')}, megatron-core {version('megatron-core')}, "
        f"{platform.machine()}, {(time.monotonic() - began) / 60:.0f} minutes. fp32 on CPU over gloo; figures are the "
        f"largest relative difference of loss, balance loss, gradient norm and held-out loss at any step; the bound "
        f"is {TOLERANCE:g}.\n"
    )
    body = "\n".join(f"\n## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts.items())
    (ROOT / "docs" / "soak.md").write_text(head + body)
    print(head + body)


if __name__ == "__main__":
    sys.exit(main())
