"""A gate that fails after a phase stops the run before the next one; a waiver goes on, and the phase is not repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fixtures.recipe_fixtures import write
from tests.fixtures.run_fixtures import DATA, atom, copy_sealed

GATE = "pretraining_lowers_bits_per_byte"
# Two steps at a rate so high that the model is worse than a random one.
HARMFUL = {"lr": 1.0, "final_lr": 1.0, "warmup_steps": 0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95, "clip": 1.0}
SHORT = {"steps": 2, "optimizer": HARMFUL, "validation": {"every": 2, "rows": 4}, "release_checkpoint_interval": 2,
         "checkpoint_interval": 2}  # fmt: skip
PHASES = {f"{phase}__{name}": value for phase in ("pretrain", "midtrain") for name, value in SHORT.items()}
# The items of evaluation stay those of the recipe, with which its data was made. Rounding grows with the logits.
SMALL = {
    "evaluation__stop_at_gates": True,
    "evaluation__max_new_tokens": 4,
    "evaluation__parity_tolerance": 0.05,
}


def sealed(home: Path, name: str) -> dict[str, int]:
    """{key: time of the artifact} of a node."""
    return {folder.name: folder.stat().st_mtime_ns for folder in (home / "artifacts").glob(f"{name}-*")}


def test_a_failed_gate_stops_the_run_and_a_waiver_goes_on(smoke_data: Path, tmp_path: Path) -> None:
    home, changes = tmp_path / "home", {**PHASES, **SMALL}
    copy_sealed(smoke_data, home, *DATA)
    path = write(tmp_path / "fails.yaml", **changes)

    failed = atom(home, "run", path, "--until", "midtrain", code=1)

    assert f"after pretrain, the gate {GATE} failed: bits per byte" in failed.stderr
    assert sealed(home, "pretrain") and not sealed(home, "gates-pretrain") and not sealed(home, "midtrain")
    stages = json.loads(atom(home, "status", "--json", code=None).stdout)["stages"]
    states = {stage["name"]: stage["state"] for stage in stages}
    assert states["gates-pretrain"] == "failed" and states["midtrain"] == "waiting"
    assert f"gate {GATE}: FAILED, bits per byte" in atom(home, "logs", "gates-pretrain").stdout
    # Naming the phase alone is no way round.
    alone = atom(home, "run", path, "--only", "midtrain", code=2)
    assert "stage midtrain needs gates-pretrain, which is not sealed" in alone.stderr

    before = sealed(home, "pretrain")
    waived: dict[str, Any] = {"midtraining_raises_accuracy": "two steps", GATE: "an example"}
    path = write(tmp_path / "fails.yaml", **changes, evaluation__waived_gates=waived)
    atom(home, "run", path, "--until", "midtrain")

    assert sealed(home, "pretrain") == before and sealed(home, "midtrain")
    (folder,) = sealed(home, "gates-pretrain")
    result = json.loads((home / "artifacts" / folder / "gates.json").read_text())["gates"][GATE]
    assert result["ok"] is None and result["detail"].startswith("waived by the recipe (an example); bits per byte")


def test_the_plan_lists_the_gates(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", evaluation__stop_at_gates=True)
    lines = atom(tmp_path, "plan", path, COLUMNS="160").stdout.splitlines()
    (row,) = (line for line in lines if GATE in line)
    assert row.split()[:3] == ["pretrain", GATE, "gates-pretrain"] and "bits per byte of base and init" in row
    assert any("rlvr_raises_pass_at_1" in line and "nothing: waived" in line for line in lines)
    body = json.loads(atom(tmp_path, "plan", path, "--until", "midtrain", "--json").stdout)
    assert [(gate["name"], gate["phase"], gate["judged_by"]) for gate in body["gates"]] == [
        (GATE, "pretrain", "gates-pretrain"),
        ("midtraining_raises_accuracy", "midtrain", "gates-midtrain"),
        ("midtraining_keeps_bits_per_byte", "midtrain", "gates-midtrain"),
    ]
