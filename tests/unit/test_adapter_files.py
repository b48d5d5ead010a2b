"""The comparison of base and adapter with the merged model: numbers that are none are no small difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.core.errors import CheckFailed
from stages.export.variants import adapter_files


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["adapter", "merged"])
def test_a_weight_that_is_no_number_is_no_sum(value: float, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"adapter": torch.tensor([1.0, 2.0]), "merged": torch.tensor([1.0, 2.0])}
    monkeypatch.setattr(adapter_files, "combined", lambda base, folder: [("w", weights["adapter"])])
    monkeypatch.setattr(adapter_files, "Tensors", lambda folder: {"w": weights["merged"]})
    assert "merged model" in adapter_files.require_sum(Path("base"), Path("adapter"), Path("merged"))
    weights[side][1] = value
    with pytest.raises(CheckFailed, match="on its base differs from merged"):
        adapter_files.require_sum(Path("base"), Path("adapter"), Path("merged"))
