"""A model of whose heads a part is rotary trains with Transformer Engine's layers as with ours, with YaRN and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.fixtures import layout_fixtures, train_fixtures
from tests.fixtures.architecture_fixtures import GLM4_MOE as MODEL
from tests.te.conftest import Spawn

YARN = {"factor": 4, "original_length": 64}


def test_rows_of_one_document_train_alike(corpus: Path, tmp_path: Path, device: Spawn) -> None:
    """Megatron's own attention, which such rows have otherwise, turns whole heads: losses then differ by 2e-2. Without
    biases, which the stand-ins' products do not add."""
    settings: dict[str, Any] = train_fixtures.config(batch=layout_fixtures.BATCH)
    changes: dict[str, dict[str, Any]] = {"half": {}, "half, YaRN": {"yarn": YARN, "use_qk_norm": True}}
    runs = {
        name: (corpus, {**settings, "model": {**MODEL, "attention_bias": False, **change}})
        for name, change in changes.items()
    }
    curves = {}
    for place in ("hopper", "local"):
        device(place)
        curves[place] = layout_fixtures.compare_runs(runs, 1, tmp_path / f"{place}.json")
    for name in runs:
        layout_fixtures.agree(curves["hopper"][name], curves["local"][name], 1e-5, name)
