"""A context of a million tokens is planned: what it costs, which layout fits, and which does not and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.long_recipe_fixtures import PHASE, TOKENS, write_recipe
from tests.fixtures.run_fixtures import at_length, atom


def planned(folder: Path, cp: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the stage, its cost on the profile)"""
    options = ("--only", PHASE, "--cluster", "h100-pyxis", "--json")
    body = json.loads(atom(folder / "home", "plan", write_recipe(folder, cp), *options).stdout)
    (stage,) = body["stages"]
    return stage, body["cluster"]


def test_a_million_tokens_fit_over_eight_nodes_and_not_over_one(tmp_path: Path) -> None:
    stage, cost = planned(tmp_path, 64)
    assert stage["fits"] and stage["reasons"] == []
    # by hand: 6 x (matmul parameters of a token) and 6 x layers x row x heads x (d_qk + d_v) / 2
    attention = 6 * 48 * TOKENS * 32 * (128 + 128) / 2
    matrices = 6 * (3_353_032_704 - 151_936 * 2048)
    per_token = stage["training"]["gflop_per_token"] * 1e9
    assert per_token == pytest.approx(attention + matrices, rel=0.01) and attention > 0.98 * per_token
    assert stage["flops"] == pytest.approx(per_token * 600 * 8 * TOKENS)
    (row,) = (row for row in cost["stages"] if row["name"] == PHASE)
    assert row["hours"] > 0 and row["cost"] > 0 and row["energy_wh"] > 0
    one_node, _ = planned(tmp_path, 8)
    assert not one_node["fits"] and any("GPU" in reason or "memory" in reason for reason in one_node["reasons"])


@at_length("training", 15)
def test_a_rank_of_it_needs_what_the_plan_says(tmp_path: Path) -> None:
    """Two layers at full width on a row of full length; the soak has all 48."""
    recipe = write_recipe(tmp_path, layers=2)
    body = json.loads(atom(tmp_path / "home", "plan", recipe, "--only", PHASE, "--simulate", "0", "--json").stdout)
    simulated = body["simulations"][PHASE]
    assert simulated["parameters"] == simulated["planned_parameters"] and simulated["ranks"] == 256
    assert simulated["planned_state_bytes"] == pytest.approx(simulated["state_bytes"], rel=0.05)
    assert simulated["planned_peak_bytes"] == pytest.approx(simulated["peak_bytes"], rel=0.05)
    # keys and values of the whole row are gathered in each layer, 4 heads of 128 in bf16
    gathered = [row for row in simulated["traffic"] if row["group"] == "cp" and row["operation"] == "allgather"]
    assert {(row["ranks"], row["bytes"]) for row in gathered} == {(64, TOKENS * 4 * 128 * 2)}
