"""A gate that fails after a phase stops the run before the next one; a waiver goes on, and the phase is not repeated."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fixtures.recipe_fixtures import write
from tests.fixtures.run_fixtures import DATA, atom, copy_sealed

PRETRAINING, GATE = "pretraining_lowers_bits_per_byte", "midtraining_raises_accuracy"
# More accuracy than mid-training gives this small model, on any machine.
DEMANDING = {"evaluation__stop_at_gates": True, "evaluation__min_accuracy_gain": 0.5}
WAIVED = {"rlvr_raises_pass_at_1": "few steps"}


def sealed(home: Path, name: str) -> dict[str, int]:
    """{key: time of the artifact} of a node."""
    return {folder.name: folder.stat().st_mtime_ns for folder in (home / "artifacts").glob(f"{name}-*")}


def test_a_failed_gate_stops_the_run_and_a_waiver_goes_on(smoke_home: Path, tmp_path: Path) -> None:
    """On the models and measurements of a whole run: the gates change no key but their own."""
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, *DATA, "pretrain", "midtrain", "export", "evaluate")
    path = write(tmp_path / "fails.yaml", **DEMANDING, evaluation__waived_gates=WAIVED)

    failed = atom(home, "run", path, "--until", "sft", code=1)

    assert f"after midtrain, the gate {GATE} failed: accuracy" in failed.stderr
    assert sealed(home, "gates-pretrain") and not sealed(home, "gates-midtrain") and not sealed(home, "sft")
    stages = json.loads(atom(home, "status", "--json", code=None).stdout)["stages"]
    states = {stage["name"]: stage["state"] for stage in stages}
    assert states["gates-midtrain"] == "failed" and states["sft"] == "waiting"
    assert f"gate {GATE}: FAILED, accuracy" in atom(home, "logs", "gates-midtrain").stdout
    # Naming the phase alone is no way round.
    alone = atom(home, "run", path, "--only", "sft", code=2)
    assert "stage sft needs gates-midtrain, which is not sealed" in alone.stderr

    before = sealed(home, "midtrain")
    path = write(tmp_path / "fails.yaml", **DEMANDING, evaluation__waived_gates={**WAIVED, GATE: "an example"})
    atom(home, "run", path, "--until", "sft")

    assert sealed(home, "midtrain") == before and sealed(home, "sft")
    (folder,) = sealed(home, "gates-midtrain")
    result = json.loads((home / "artifacts" / folder / "gates.json").read_text())["gates"][GATE]
    assert result["ok"] is None and result["detail"].startswith("waived by the recipe (an example); accuracy")


def test_the_plan_lists_the_gates(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", evaluation__stop_at_gates=True)
    lines = atom(tmp_path, "plan", path, COLUMNS="160").stdout.splitlines()
    (row,) = (line for line in lines if PRETRAINING in line)
    assert row.split()[:3] == ["pretrain", PRETRAINING, "gates-pretrain"] and "bits per byte of base and init" in row
    assert any("rlvr_raises_pass_at_1" in line and "nothing: waived" in line for line in lines)
    body = json.loads(atom(tmp_path, "plan", path, "--until", "midtrain", "--json").stdout)
    assert [(gate["name"], gate["phase"], gate["judged_by"]) for gate in body["gates"]] == [
        (PRETRAINING, "pretrain", "gates-pretrain"),
        (GATE, "midtrain", "gates-midtrain"),
        ("midtraining_keeps_bits_per_byte", "midtrain", "gates-midtrain"),
    ]
