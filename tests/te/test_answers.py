"""Updates on packed answers with Transformer Engine's layers are those with ours: questions that answers share, replayed
routing, the weights of another policy in the model, and full tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch.rendezvous import free_port
from tests.fixtures import answer_fixtures, layout_fixtures
from tests.fixtures.rank_simulation_fixtures import post_training
from tests.te.conftest import Spawn

BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2+SP": {"tp": 2},
    "PP2": {"pp": 2},
    "EP2, weights gathered late": {"ep": 2, "overlap_weights": True},
    "DP2, recomputed": {"recompute": "layer"},
}


def curves(precision: str, layouts: dict[str, dict[str, Any]], ranks: int, out: Path) -> dict[str, list[Any]]:
    phase = {"precision": precision, "kl_coef": 0.1, "updates": 2, "routing_replay": True, "prompts_per_step": 4}
    phase |= {"micro_batches": 2, "sampling": {"max_new_tokens": 8}, "num_generations": 4}
    settings = post_training("rlvr", {}, {**layout_fixtures.MODEL, "context_length": 16}, 64, **phase)
    ports: set[int] = set()
    while len(ports) < len(layouts):  # a store that an earlier layout left behind would answer at its port
        ports.add(free_port())
    arguments = [json.dumps(x) for x in (settings, list(layouts.values()), sorted(ports))]
    processes = layout_fixtures.spawn(answer_fixtures.MODULE, [*arguments, str(out)], ranks)
    codes, logs = layout_fixtures.end(processes, timeout=500)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    return dict(zip(layouts, json.loads(out.read_text()), strict=True))


def require_alike(actual: list[dict[str, float]], expected: list[dict[str, float]], bound: float, name: str) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=bound, abs=bound), name


@pytest.mark.parametrize("precision", BOUNDS)
def test_one_process_makes_the_updates_alike(tmp_path: Path, device: Spawn, precision: str) -> None:
    both = []
    for name in ("hopper", "local"):
        device(name)
        both.append(curves(precision, {"one": {}}, 1, tmp_path / f"{name}.json")["one"])
    require_alike(*both, BOUNDS[precision], precision)
    assert both[1][-1]["loss"] != both[1][0]["loss"]


def test_layouts_make_the_updates_alike(tmp_path: Path, device: Spawn) -> None:
    device("hopper")
    one = curves("fp32", {"one": {}}, 1, tmp_path / "one.json")["one"]
    for name, curve in curves("fp32", LAYOUTS, 2, tmp_path / "two.json").items():
        require_alike(curve, one, 1e-4, name)
