"""What compute buys, drawn: the same bytes twice, other bytes for other figures, and the law that a ladder is fitted."""

from __future__ import annotations

import pytest

from bench import ladder
from release.cards import scaling_plots


def scores(value: float) -> dict:
    def part(x: float) -> dict:
        return {"value": x, "se": 0.02, "n": 50}

    at = {str(k): {"tokens": 20.0 * k, "pass": part(value + k / 20), "maj": part(value)} for k in (1, 2, 4, 8)}
    figures = {"greedy": {"accuracy": part(value), "tokens": 19.0}, "at": at}
    return {"problems_all": figures, "problems": {"add": figures}}


def test_plots_are_the_same_bytes_twice_and_show_what_they_are_given() -> None:
    lines = [{"step": n, "validation": {"add": n / 10, "sort": 0.5}, "generated": n * 1000} for n in (0, 2, 4)]
    lines.insert(1, {"step": 1, "reward": 0.5, "generated": 500})
    result, _ = ladder.report(runs(0.0))
    drawn = [
        (scaling_plots.inference, {"sft": scores(0.2), "rlvr": scores(0.4)}, {"sft": scores(0.2), "rlvr": scores(0.5)}),
        (scaling_plots.reinforcement, {"rlvr": lines}, {"rlvr": lines[:-1]}),
        (scaling_plots.pretraining, result, result | {"law": {"a": 1.0, "b": 1.0, "c": 1.0}}),
    ]
    for draw, values, other in drawn:
        first = draw(values)
        assert first.startswith(b"\x89PNG") and draw(values) == first != draw(other)
        assert b"Software" not in first
    assert scaling_plots.inference({"sft": scores(0.2)}, "add") != scaling_plots.inference({"sft": scores(0.2)})


def runs(noise: float) -> list[dict]:
    rows = []
    for n, size in enumerate("abcde"):
        flops = 1e9 * 4**n
        for seed in (0, 1):
            loss = 40 * flops**-0.15 + 1.5 + noise * (-1) ** (n + seed)
            rows.append({"size": size, "seed": seed, "flops": flops, "tokens": 10**n, "loss": loss})
    return rows


def test_a_law_is_found_again() -> None:
    result, line = ladder.report(runs(0.0))
    assert result["law"]["b"] == pytest.approx(0.15, rel=0.02) and result["law"]["c"] == pytest.approx(1.5, abs=0.05)
    assert line["ratio"] == pytest.approx(1, abs=2e-3) and line["low"] <= line["ratio"] <= line["high"]
    _, noisy = ladder.report(runs(0.02))
    assert noisy["high"] - noisy["low"] > line["high"] - line["low"]
