"""Updates on packed answers with Transformer Engine's layers are those with ours: questions that answers share, the
weights of another policy in the model, and full tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.rendezvous import free_port
from tests.fixtures import answer_fixtures, layout_fixtures
from tests.fixtures.rank_simulation_fixtures import post_training
from tests.te.conftest import Spawn, spawn_on

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2, weights gathered late": {"ep": 2, "overlap_weights": True},
    "DP2, recomputed": {"recompute": "layer"},
}


def settings_of(precision: str, layout: dict[str, Any], ranks: int) -> dict[str, Any]:
    phase = {"precision": precision, "kl_coef": 0.1, "updates": 2, "prompts_per_step": 4}
    phase |= {"micro_batches": 2, "sampling": {"max_new_tokens": 8}, "num_generations": 4}
    settings = post_training("rlvr", {}, {**layout_fixtures.MODEL, "context_length": 16}, 64, **phase)
    return layout_fixtures.in_layout(settings, layout, ranks)


def curves(runs: dict[str, dict[str, Any]], ranks: int, out: Path) -> dict[str, list[Any]]:
    """What `answer_fixtures.train` gives for each run's settings."""
    ports: set[int] = set()
    while len(ports) < len(runs):  # a store that an earlier run left behind would answer at its port
        ports.add(free_port())
    arguments = [json.dumps(list(runs.values())), json.dumps(sorted(ports))]
    processes = layout_fixtures.spawn(answer_fixtures.MODULE, [*arguments, str(out)], ranks)
    codes, logs = layout_fixtures.end(processes, timeout=500)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    return dict(zip(runs, json.loads(out.read_text()), strict=True))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    """The figures of each precision in one process, with TE's layers and with ours."""
    runs, both = {precision: settings_of(precision, {}, 1) for precision in BOUNDS}, {}
    for name in ("hopper", "local"):
        with pytest.MonkeyPatch.context() as patch:
            spawn_on(patch, name)
            both[name] = curves(runs, 1, tmp_path_factory.mktemp(name) / "one.json")
    return both


def require_alike(actual: list[dict[str, float]], expected: list[dict[str, float]], bound: float, name: str) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=bound, abs=bound), name


@pytest.mark.parametrize("precision", BOUNDS)
def test_one_process_makes_the_updates_alike(one_process: dict[str, dict[str, list[Any]]], precision: str) -> None:
    te, ours = one_process["hopper"][precision], one_process["local"][precision]
    require_alike(te, ours, BOUNDS[precision], precision)
    assert ours[-1]["loss"] != ours[0]["loss"]


def test_layouts_make_the_updates_alike(
    one_process: dict[str, dict[str, list[Any]]], tmp_path: Path, device: Spawn
) -> None:
    device("hopper")
    runs = {name: settings_of("fp32", layout, 2) for name, layout in LAYOUTS.items()}
    for name, curve in curves(runs, 2, tmp_path / "two.json").items():
        require_alike(curve, one_process["hopper"]["fp32"], 1e-4, name)
