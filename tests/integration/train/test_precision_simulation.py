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
from pipeline.core.progress import Display
from pipeline.graph import recipe as recipes
from stages.mcore import quantize
from stages.mcore.quantize import E2M1, RECIPES, QuantizationRecipe
from stages.models.qwen3_moe import Qwen3MoeConfig
from stages.train.precision_simulation import report, runner, simulation
from stages.train.precision_simulation.report import compose, markdown, verdict_of
from stages.train.precision_simulation.simulation import build_proxy, dimensions, ratios, step_tokens
from tests.fixtures.run_fixtures import at_length, atom

# tensorwise alone needs no blocks, and so the smallest proxy: 96 wide, sixteen rows of 64
SMALL = ("simulate-precision", "atom-tiny", "--precision", "fp8-tensorwise", "--steps", "8", "--seeds", "2")
PRODUCTS = ("report.json", "report.md")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed rehearsal: its folder, and what --json printed."""
    home = tmp_path_factory.mktemp("rehearsal")
    output = atom(home, *SMALL, "--bound", "0.5", "--json").stdout
    (folder,) = (home / "precision-simulations").iterdir()
    return folder, json.loads(output)


@at_length("training", 30)
def test_the_report_is_whole(rehearsed: tuple[Path, dict[str, Any]]) -> None:
    folder, report = rehearsed
    assert report == json.loads((folder / "report.json").read_text())
    assert report["verdict"] == "holds" and report["window_steps"] == 2 and report["seeds"] == 2
    data = report["settings"]["data"]
    assert data["python"] == sys.version.split()[0] and data["bytes"] > 10**6
    (entry,) = report["precisions"]
    assert entry["formats"] == {"input": "e4m3", "weight": "e4m3", "gradient": "e5m2"}
    by_seed, mean = entry["deviation"]["by_seed"], entry["deviation"]["mean"]
    assert len(by_seed) == 2 and all(by_seed) and mean == pytest.approx(sum(by_seed) / 2)
    runs = {path.stem: json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")}
    assert set(runs) == {f"{precision}-seed{seed}" for precision in ("bf16", "fp8-tensorwise") for seed in (0, 1)}
    tails = {name: sum(run["losses"][-2:]) / 2 for name, run in runs.items()}
    assert by_seed[1] == pytest.approx(tails["fp8-tensorwise-seed1"] / tails["bf16-seed1"] - 1)
    assert runs["bf16-seed0"]["losses"][0] != runs["bf16-seed1"]["losses"][0], "seeds are other weights and rows"
    assert all(run["losses"][-1] < run["losses"][0] - 1 for run in runs.values()), "the proxy learns"
    linears = {(x["layer"], x["linear"]): x for x in entry["linears"]}
    assert (
        len(linears) == 8
        and linears[1, "mlp.experts.linear_fc1"]["k"] == report["settings"]["model"]["hidden_size"] == 96
    )
    assert linears[0, "self_attention.linear_qkv"]["min_tokens"] == 1024
    assert 0 < entry["rates"]["input"]["underflow"] < 0.01 and entry["rates"]["input"]["overflow"] == 0
    table = (folder / "report.md").read_text()
    assert table.startswith("# Precision simulation of atom-tiny: holds") and "| mlp.experts.linear_fc2 |" in table
    assert markdown(report) == table
    for place in (str(Path.home()), str(folder.parent.parent), "/tmp"):
        assert place not in (folder / "report.json").read_text() + table


@at_length("training", 60)
def test_a_killed_rehearsal_goes_on_to_the_same_bytes(rehearsed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, out = rehearsed[0], tmp_path / "out"
    command = [sys.executable, "-m", "pipeline.cli", *SMALL, "--bound", "0.5", "--out", str(out)]
    killed = subprocess.Popen(command, env={**os.environ, "ATOM_HOME": str(tmp_path)}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    modified = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert modified and not (out / "report.json").exists()
    atom(tmp_path, *SMALL, "--bound", "0.5", "--out", str(out))
    assert all(path.stat().st_mtime_ns == when for path, when in modified.items()), (
        "what was finished is not done again"
    )
    for name in PRODUCTS:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not list(out.glob("**/*.tmp"))
    output = atom(tmp_path, *SMALL, "--bound", "1e-9", "--out", str(out), code=1).stdout
    assert "all of 4 runs are there already" in output and "1e-07 %" in output


def test_ctrl_c_leaves_what_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", *SMALL[:-4], "--steps", "400"]
    running = subprocess.Popen(
        command, env={**os.environ, "ATOM_HOME": str(tmp_path)}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None and "simulation: started" in running.stdout.readline()
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=180)
    assert running.returncode == 130 and errors == "atom: stopped; run the same command to go on from here\n"
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.fixture(scope="module")
def settings(rehearsed: tuple[Path, dict[str, Any]]) -> runner.Settings:
    return runner.Settings.model_validate_json((rehearsed[0] / "settings.json").read_text())


def test_a_bad_format_fails(
    rehearsed: tuple[Path, dict[str, Any]], settings: runner.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of 4 bits with one scale for a whole tensor, in all layers: what is rounded so trains unlike bf16."""

    class Everywhere(QuantizationRecipe):
        def layers_in_bf16(self, layers: int) -> range:
            return range(0)

    bad = {**RECIPES, "bad": Everywhere(E2M1, E2M1, None)}
    monkeypatch.setattr(quantize, "RECIPES", bad)
    monkeypatch.setattr(report, "RECIPES", bad)
    runs = {("bad", seed): runner.train(settings, "bad", seed) for seed in (0, 1)}
    runs |= {("bf16", s): json.loads((rehearsed[0] / "runs" / f"bf16-seed{s}.json").read_text()) for s in (0, 1)}
    (entry,) = compose(settings, [], ["bad"], 2, 0.0025, runs)["precisions"]
    assert entry["verdict"] == "fails" and entry["deviation"]["min"] > 0.01
    assert entry["rates"]["weight"]["underflow"] > 0.1


def run(precision: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    none = {"values": 10, "nonzero": 10, "underflow": 1, "overflow": 0}
    linear = {
        "layer": 0,
        "linear": "x",
        "k": 96,
        "n": 96,
        "tokens": {"384": 8},
        "counts": dict.fromkeys(quantize.KINDS, none),
    }
    body = {
        "precision": precision,
        "seed": seed,
        "losses": [loss] * 8,
        "grad_norms": [1.0] * 8,
        "diverged_at": None,
        "linears": [linear],
    }
    return {**body, **changes}


def verdict(settings: runner.Settings, ends: list[float], **changes: Any) -> dict[str, Any]:
    """Of fp8-tensorwise runs that end with these losses beside a baseline of 2; changes: to the first of them."""
    runs = {("bf16", seed): run("bf16", seed, 2.0) for seed in range(len(ends))}
    runs |= {("fp8-tensorwise", s): run("fp8-tensorwise", s, loss) for s, loss in enumerate(ends)}
    runs["fp8-tensorwise", 0] |= changes
    report = compose(settings, [], ["fp8-tensorwise"], len(ends), 0.0025, runs)
    json.dumps(report, allow_nan=False)
    assert report["verdict"] == report["precisions"][0]["verdict"]
    markdown(report)
    return report["precisions"][0]


def test_verdicts(settings: runner.Settings) -> None:
    assert verdict(settings, [2.001, 2.002, 2.0015])["verdict"] == "holds"
    assert verdict(settings, [2.01, 2.011, 2.0105])["verdict"] == "fails"
    assert verdict(settings, [1.99, 1.989, 1.9895])["verdict"] == "fails", "a lower loss is a deviation too"
    assert verdict(settings, [2.004, 2.005, 2.006])["verdict"] == "inconclusive", "0.25 % is within the error"
    assert verdict(settings, [2.0, 2.02, 1.98])["verdict"] == "inconclusive", "no seed agrees with another"
    assert verdict(settings, [2.001, 2.002, 2.0015])["reason"] == "|+0.075 %| ± 0.0289 % is below 0.25 %"
    diverged = verdict(settings, [2.001, 2.002, 2.0015], diverged_at=5, losses=[2.0] * 4)
    assert diverged["verdict"] == "fails" and diverged["reason"] == "from seed 0 the loss was not a number at step 5"
    assert diverged["deviation"] == {"by_seed": [None, pytest.approx(0.001), pytest.approx(0.00075)]}
    thin = run("fp8-tensorwise", 0, 2.0)["linears"][0] | {"tokens": {"384": 8, "20": 8}}
    few = verdict(settings, [2.0, 2.001, 2.0], linears=[thin])
    assert few["verdict"] == "inconclusive"
    assert few["reason"] == "1.71 % of the multiply-adds were over fewer than 32 tokens, two blocks"
    assert few["linears"][0]["min_tokens"] == 20
    at_once = verdict(settings, [2.0, 2.0], diverged_at=1, losses=[])
    assert at_once["verdict"] == "fails" and at_once["reason"] == "from seed 0 the loss was not a number at step 1"


def test_judge_counts_two_standard_errors() -> None:
    """Of 0.1 % and 0.2 % the mean is 0.15 % with a standard error of 0.05 %."""
    assert verdict_of([0.001, 0.002], 0.0026) == "holds" and verdict_of([0.001, 0.002], 0.0024) == "inconclusive"
    assert verdict_of([0.001, 0.002], 0.0006) == "inconclusive" and verdict_of([0.001, 0.002], 0.0004) == "fails"


BIG: dict[str, Any] = dict(
    layers=48, hidden_size=2048, heads=32, kv_heads=4, head_dim=128, experts=128, num_experts_per_tok=8,
    moe_intermediate_size=768, context_length=4096,
)  # fmt: skip
ODD: dict[str, Any] = dict(
    layers=8, hidden_size=1024, heads=12, kv_heads=3, head_dim=96, experts=60, num_experts_per_tok=5, moe_intermediate_size=704,
    context_length=4096, dense_layers=2, intermediate_size=4096, shared_expert_intermediate_size=1408,
)  # fmt: skip


@pytest.mark.parametrize("sizes", [BIG, ODD, None], ids=["big", "odd", "atom-tiny"])
def test_a_twin_has_the_recipes_ratios_and_two_blocks(sizes: dict[str, Any] | None) -> None:
    model = Qwen3MoeConfig.model_validate(sizes) if sizes else recipes.load("atom-tiny").config.model
    for smallest in (32, 64, 256):
        small = build_proxy(model, smallest)
        assert min(dimensions(small)) >= smallest
        assert all(of_proxy == pytest.approx(of_model, rel=0.05) for _, of_model, of_proxy in ratios(model, small))
        assert small.experts <= 32 and small.layers == 2
        tokens = step_tokens(small, smallest, 128)
        assert tokens % 128 == 0 and tokens * small.num_experts_per_tok / small.experts >= 3 * smallest
    assert small.parameters(256)["total"] < 40e6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"precisions": ["fp4"]},
            "--precision fp4 is not known; choose of fp8-tensorwise, fp8-blockwise, mxfp8, nvfp4, mxfp4",
        ),
        ({"layers": 0}, "--layers 0 is no depth of a small proxy; use at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AtomError) as raised:
        rehearse(tmp_path, **options)
    assert str(raised.value) == sentence
    assert not list(tmp_path.iterdir())


def rehearse(home: Path, **options: Any) -> Any:
    from rich.console import Console

    return simulation.simulate(recipes.load("atom-tiny"), home, Display(Console()), **options)


@at_length("training", 1)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, rehearsed: tuple[Path, dict[str, Any]]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AtomError, match="is not empty and no simulation's; name another folder"):
        rehearse(tmp_path, out=tmp_path)
    with pytest.raises(AtomError, match="holds a simulation of another optimizer, steps; name another folder"):
        rehearse(tmp_path, out=rehearsed[0], precisions=["fp8-tensorwise"], steps=40)


def test_a_mistake_on_the_command_line_has_exit_code_2(tmp_path: Path) -> None:
    process = atom(tmp_path, "simulate-precision", "atom-tiny", "--precision", "fp8", code=2)
    assert (
        process.stderr
        == "atom: --precision fp8 is not known; choose of fp8-tensorwise, fp8-blockwise, mxfp8, nvfp4, mxfp4\n"
    )
