"""`atom simulate-precision`: a small rehearsal from the command to its report, kills, verdicts and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from pipeline.graph import recipe as recipes
from stages.mcore.fake_quantization import E2M1, QuantizationRecipe
from stages.train import precision_simulation
from stages.train.precision_simulation import compose, simulate, table, verdict_of
from tests.fixtures.run_fixtures import at_length, atom

SMALL = ("simulate-precision", "atom-tiny", "--precision", "fp8-tensorwise", "--steps", "8", "--seeds", "2")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed rehearsal: its folder, and what --json printed."""
    home = tmp_path_factory.mktemp("rehearsal")
    output = atom(home, *SMALL, "--bound", "0.5", "--json").stdout
    (folder,) = (home / "precision-simulations").iterdir()
    return folder, json.loads(output)


def losses_of(path: Path) -> list[float]:
    return json.loads(path.read_text().split("\n", 1)[1])


@at_length("training", 30)
def test_the_report_is_whole(rehearsed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = rehearsed
    assert report == json.loads((folder / "report.json").read_text())
    assert report["verdict"] == "holds" and report["window_steps"] == 2 and report["settings"]["recipe"] == "atom-tiny"
    (entry,) = report["precisions"]
    assert len(entry["by_seed"]) == 2 and all(entry["by_seed"])
    assert entry["mean"] == pytest.approx(sum(entry["by_seed"]) / 2)
    runs = {path.stem: losses_of(path) for path in folder.glob("*-seed*.json")}
    assert set(runs) == {f"{precision}-seed{seed}" for precision in ("bf16", "fp8-tensorwise") for seed in (0, 1)}
    tails = {name: sum(losses[-2:]) / 2 for name, losses in runs.items()}
    assert entry["by_seed"][1] == pytest.approx(tails["fp8-tensorwise-seed1"] / tails["bf16-seed1"] - 1)
    assert runs["bf16-seed0"][0] != runs["bf16-seed1"][0], "seeds are other weights and rows"
    assert all(losses[-1] < losses[0] - 1 for losses in runs.values()), "the model learns"
    assert table(report).splitlines()[2].startswith("| fp8-tensorwise | ")
    for place in (str(Path.home()), str(folder.parent.parent), "/tmp"):
        assert place not in (folder / "report.json").read_text()


@at_length("training", 60)
def test_a_killed_rehearsal_goes_on_to_the_same_bytes(rehearsed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *SMALL, "--bound", "0.5"]
    killed = subprocess.Popen(command, env={**os.environ, "ATOM_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/*/*-seed*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    modified = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*-seed*.json")}
    assert modified and not list(tmp_path.glob("*/*/report.json"))
    atom(tmp_path, *SMALL, "--bound", "0.5")
    assert all(path.stat().st_mtime_ns == when for path, when in modified.items()), (
        "what was finished is not done again"
    )
    (folder,) = (tmp_path / "precision-simulations").iterdir()
    for path in rehearsed[0].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(folder.glob("**/*.tmp"))
    atom(tmp_path, *SMALL, "--bound", "1e-9", code=1)


def test_ctrl_c_leaves_what_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *SMALL[:-4], "--steps", "400"]
    running = subprocess.Popen(
        command, env={**os.environ, "ATOM_HOME": str(tmp_path)}, text=True, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=180)
    assert running.returncode == 130 and errors == "atom: stopped; run the same command to go on from here\n"
    assert not list(tmp_path.glob("**/*.tmp"))


def rehearse(home: Path, *, recipe: str = "atom-tiny", **options: Any) -> Any:
    return simulate(recipes.load(recipe), home, lambda line: None, **options)


def test_a_bad_format_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of 4 bits with one scale for a whole tensor, in all layers: what is rounded so trains unlike bf16."""

    class Everywhere(QuantizationRecipe):
        def layers_in_bf16(self, layers: int) -> range:
            return range(0)

    monkeypatch.setattr(precision_simulation, "RECIPES", {"bad": Everywhere(E2M1, E2M1, None)})
    report, _ = rehearse(tmp_path, recipe="atom-smoke", precisions=["bad"], steps=16, seeds=2)
    (entry,) = report["precisions"]
    assert entry["verdict"] == report["verdict"] == "fails" and min(entry["by_seed"]) > 0.01


def verdict(ends: list[float], **changes: list[float]) -> dict[str, Any]:
    """Of runs that end with these losses beside a baseline of 2; first: the losses of the first of them."""
    runs = {("bf16", seed): [2.0] * 8 for seed in range(len(ends))}
    runs |= {("mxfp8", seed): [loss] * 8 for seed, loss in enumerate(ends)}
    runs["mxfp8", 0] = changes.get("first", runs["mxfp8", 0])
    report = compose({}, ["mxfp8"], len(ends), 0.0025, runs)
    json.dumps(report, allow_nan=False)
    assert report["verdict"] == report["precisions"][0]["verdict"]
    return {**report["precisions"][0], "row": table(report).splitlines()[2]}


def test_verdicts() -> None:
    good = verdict([2.001, 2.002, 2.0015])
    assert good["verdict"] == "holds" and good["row"] == "| mxfp8 | +0.075% ± 0.014% | +0.050% | +0.100% | holds |"
    assert verdict([2.01, 2.011, 2.0105])["verdict"] == "fails"
    assert verdict([1.99, 1.989, 1.9895])["verdict"] == "fails", "a lower loss is a deviation too"
    assert verdict([2.004, 2.005, 2.006])["verdict"] == "inconclusive", "0.25 % is within the error"
    assert verdict([2.0, 2.02, 1.98])["verdict"] == "inconclusive", "no seed agrees with another"
    for losses in ([2.0] * 4, []):
        diverged = verdict([2.0, 2.002, 2.0015], first=losses)
        assert diverged["verdict"] == "fails" and "| not a number |" in diverged["row"]
        assert diverged["by_seed"] == [None, pytest.approx(0.001), pytest.approx(0.00075)]


def test_two_standard_errors_count() -> None:
    assert verdict_of(0.0015, 0.0005, 0.0026) == "holds" and verdict_of(0.0015, 0.0005, 0.0024) == "inconclusive"
    assert verdict_of(0.0015, 0.0005, 0.0006) == "inconclusive" and verdict_of(0.0015, 0.0005, 0.0004) == "fails"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"precisions": ["fp4"]},
            "--precision fp4 is not known; choose of fp8-tensorwise, fp8-blockwise, mxfp8, nvfp4",
        ),
        (
            {"recipe": "atom-1b-a300m"},
            "recipe atom-1b-a300m has a model of 1113 million parameters, and a simulation trains at most 50 million; "
            "name a recipe of a smaller model of its architecture",
        ),
        (
            {"recipe": "atom-smoke-adapter"},
            "recipe atom-smoke-adapter has no pretrain section, whose settings are simulated; add it",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AtomError) as raised:
        rehearse(tmp_path, **options)
    assert str(raised.value) == sentence
    assert not list(tmp_path.iterdir())


def test_a_mistake_on_the_command_line_has_exit_code_2(tmp_path: Path) -> None:
    process = atom(tmp_path, "simulate-precision", "atom-tiny", "--precision", "fp8", code=2)
    assert (
        process.stderr == "atom: --precision fp8 is not known; choose of fp8-tensorwise, fp8-blockwise, mxfp8, nvfp4\n"
    )
