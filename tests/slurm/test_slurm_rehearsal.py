"""On a real Slurm cluster: a rehearsal starts its ranks twice in one allocation, and the phase goes on with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.core import provenance
from tests.fixtures import slurm_fixtures
from tests.fixtures.run_fixtures import at_length, atom

pytestmark = slurm_fixtures.ON_SLURM


@pytest.mark.parametrize("spare", [0, pytest.param(1, marks=at_length("slurm-stages", 55))])
def test_a_rehearsal_restarts_and_the_phase_follows(spare: int, home: Path, calm: str, tmp_path: Path) -> None:
    path = Path(slurm_fixtures.write_recipe(tmp_path))
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "rehearsal": {"above_gpu_hours": 0.0}}))
    profile = slurm_fixtures.write_profile(tmp_path, train={"spare_nodes": spare})
    atom(home, "submit", str(path), "--until", "pretrain", "--cluster", profile)
    rehearsed = slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "rehearsal-pretrain"), "the rehearsal")
    folders = sorted(home.glob("logs/*/rehearsal-pretrain/ranks/*/"))
    names = [path.name.partition(".")[2] for path in folders]
    assert names == ["0", "0.1"], "a new step of the same job, without a wait in the queue"
    before, after = ([(path / f"started-{rank}").read_text() for rank in (0, 1)] for path in folders)
    moved = sum(first != second for first, second in zip(before, after, strict=True))
    # With a spare node, Slurm chooses those of the first step.
    assert len({*before}) == 2 and moved >= 1 and (spare or before == after[::-1])
    body = json.loads((rehearsed.parent / "rehearsal.json").read_text())
    assert body["ranks"] == 2 and body["before"] == body["after"]
    bodies = [body for _, body in provenance.read(home / "ledger", rehearsed.parent.name)]
    (statement,) = [body for body in bodies if provenance.kind(body) is None]
    measured = provenance.starts(statement)[-1]["rehearsed"]
    assert (measured["nodes"], measured["moved_ranks"], measured["planned_tokens_per_s"]) == (2, moved, None)
    slurm_fixtures.until(lambda: slurm_fixtures.sealed(home, "pretrain"), "the phase")
    assert slurm_fixtures.digest(home, "pretrain") == calm
