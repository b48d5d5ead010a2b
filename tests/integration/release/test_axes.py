"""What compute buys, drawn: the same bytes twice, other bytes for other figures."""

from __future__ import annotations

from release.cards import plots


def scores(value: float) -> dict:
    def part(x: float) -> dict:
        return {"value": x, "se": 0.02, "n": 50}

    at = {str(k): {"tokens": 20.0 * k, "pass": part(value + k / 20)} for k in (1, 2, 4, 8)}
    figures = {"greedy": {"accuracy": part(value), "tokens": 19.0}, "at": at}
    return {"problems_all": figures}


def test_plots_are_the_same_bytes_twice_and_show_what_they_are_given() -> None:
    lines = [{"step": n, "validation": {"add": n / 10, "sort": 0.5}, "generated": n * 1000} for n in (0, 2, 4)]
    lines.insert(1, {"step": 1, "reward": 0.5, "generated": 500})
    drawn = [
        (plots.inference, {"sft": scores(0.2), "rlvr": scores(0.4)}, {"sft": scores(0.2), "rlvr": scores(0.5)}),
        (plots.reinforcement, {"rlvr": lines}, {"rlvr": lines[:-1]}),
    ]
    for draw, values, other in drawn:
        first = draw(values)
        assert first.startswith(b"\x89PNG") and draw(values) == first != draw(other)
        assert plots.version().encode() in first, "which version of matplotlib drew it"
