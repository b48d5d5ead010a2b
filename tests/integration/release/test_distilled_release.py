"""A release with a student: built, verified to its last tensor, and trained again from its recorded answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from release.audit.replay import replay
from release.audit.verify import verify
from tests.fixtures.distilled_fixtures import DISTILLATION, SIZES
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.release_fixtures import resum
from tests.fixtures.replay_fixtures import build
from tests.fixtures.run_fixtures import at_length, atom


@at_length("training", 120)
def test_a_student_is_a_variant_that_anybody_can_verify_and_train_again(smoke_home: Path, tmp_path: Path) -> None:
    home, recipe = Path(shutil.copytree(smoke_home, tmp_path / "home")), tmp_path / "atom-smoke-distilled.yaml"
    body = yaml.safe_load(SMOKE.read_text())
    changes = {"name": "atom-smoke-distilled", "sizes": SIZES, "distillation": DISTILLATION}
    recipe.write_text(yaml.safe_dump({**body, **changes}, sort_keys=False))
    atom(home, "run", str(recipe), timeout=1800)
    release = build(home, str(recipe), tmp_path)
    for phase in ("student", "distillation"):
        result = replay(release, phase)
        assert (result.verdict, result.different, result.diverges) == ("bitwise", {}, None), phase
    verdict = verify(release, deep=True)
    assert verdict.ok, [check for check in verdict.checks if not check.ok]

    # Weights of another student are found, although they are whole and finite and the checksums are theirs.
    weights = release / "variant-distilled/model.safetensors"
    tensors = load_file(weights)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file({**tensors, name: torch.flip(tensors[name], [0])}, weights, metadata={"format": "pt"})
    resum(release)
    verdict = verify(release, deep=True)
    (found,) = [check for check in verdict.checks if check.name == "variant_weights"]
    assert not found.ok and f"tensor {name} is not that of distillation-step-2" in str(found)
