"""The report of a precision simulation: deviations, rates, a verdict, and Markdown. Plain arithmetic, no torch.

The deviation of a precision for one seed is the ratio of its mean loss over the last quarter of steps to the baseline's
for the same seed (same initial weights, same rows), minus 1. Over seeds this has a mean with a standard error, and the
verdict compares the magnitude of the mean with the bound:

    holds         magnitude + 2 standard errors < bound
    fails         magnitude - 2 standard errors > bound, or a loss is NaN where the baseline's is finite
    inconclusive  anything between, or too few tokens for blocks to act as in the recipe's model

With three seeds, two standard errors are a one-sided confidence of 91 % (Student's t), with five 94 %. DeepSeek-V3
reports a relative loss error of FP8 below 0.25 % (arXiv:2412.19437, section 3.3), which is the default bound.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.mcore import optimizer as optimizers
from stages.mcore.quantize import KINDS, RECIPES, Counts
from stages.models.registry import parse
from stages.train.precision_simulation.runner import BASELINE, Settings

ERRORS = 2
"""Standard errors on each side of a mean."""
SHORT = 0.01
"""Share of multiply-adds that may have run over fewer tokens than two blocks."""

Runs = Mapping[tuple[str, int], dict[str, Any]]
"""The result of each run, by precision and seed."""


def compose(
    settings: Settings,
    ratios: Sequence[tuple[str, float, float]],
    precisions: Sequence[str],
    seeds: int,
    bound: float,
    runs: Runs,
) -> dict[str, Any]:
    """Returns the report as JSON, without clocks and paths, so that equal runs have equal bytes.

    Args:
        settings: The common settings of the runs.
        ratios: (name, in the recipe, in the proxy) of what the proxy should share with the recipe's model.
        precisions: The simulated recipes.
        seeds: The number of seeds, from 0.
        bound: The largest relative deviation of the loss.
        runs: The result of each run.
    """
    window = settings.steps // 4
    base = [runs[BASELINE, seed] for seed in range(seeds)]
    entries = [_entry(name, base, [runs[name, seed] for seed in range(seeds)], window, bound) for name in precisions]
    verdicts = {entry["verdict"] for entry in entries}
    return {
        "recipe": settings.recipe,
        # The worst verdict of a precision is that of the report.
        "verdict": next(verdict for verdict in ("fails", "inconclusive", "holds") if verdict in verdicts),
        "bound": bound,
        "seeds": seeds,
        "window_steps": window,
        "settings": settings.model_dump(mode="json"),
        "ratios": [{"name": name, "recipe": recipe, "proxy": proxy} for name, recipe, proxy in ratios],
        "baseline": {"precision": BASELINE, "loss": [_tail_loss(run, window) for run in base]},
        "precisions": entries,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns mean, extremes, and the standard error of the mean; of at least two values."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "standard_error": error}


def verdict_of(deviations: Sequence[float], bound: float) -> str:
    """Returns holds, fails or inconclusive, as defined above."""
    figures = spread(deviations)
    size, error = abs(figures["mean"]), ERRORS * figures["standard_error"]
    if size + error < bound:
        return "holds"
    return "fails" if size - error > bound else "inconclusive"


def _tail_loss(run: Mapping[str, Any], window: int) -> float | None:
    """Returns the mean loss of the last steps; None if the run ended earlier."""
    return None if run["diverged_at"] else statistics.fmean(run["losses"][-window:])


def _entry(
    name: str, base: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], window: int, bound: float
) -> dict[str, Any]:
    recipe, linears = RECIPES[name], _merge_linears(runs)
    short = _share_below(linears, recipe.smallest_dimension)
    deviations = []
    for run, baseline in zip(runs, base, strict=True):
        loss, expected = _tail_loss(run, window), _tail_loss(baseline, window)
        deviations.append(None if loss is None or expected is None else loss / expected - 1)
    finite = [d for d in deviations if d is not None]
    # Where the baseline diverges too, the precision is not the cause.
    diverged = [
        run for run, baseline in zip(runs, base, strict=True) if run["diverged_at"] and not baseline["diverged_at"]
    ]
    verdict = "inconclusive"
    if short > SHORT:
        reason = f"{percent(short)} of the multiply-adds were over fewer than {recipe.smallest_dimension} tokens, two "
        reason += "blocks"
    elif diverged:
        verdict = "fails"
        reason = f"from seed {diverged[0]['seed']} the loss was not a number at step {diverged[0]['diverged_at']}"
    elif len(finite) < len(runs):
        reason = f"{BASELINE} itself diverged"
    else:
        verdict, figures = verdict_of(finite, bound), spread(finite)
        relation = {"holds": "is below", "fails": "is above", "inconclusive": "is not clear of"}[verdict]
        error = percent(ERRORS * figures["standard_error"])
        reason = f"|{percent(figures['mean'], '+')}| ± {error} {relation} {percent(bound)}"
    return {
        "precision": name,
        "formats": {kind: recipe.format(kind).name for kind in KINDS},
        "verdict": verdict,
        "reason": reason,
        "deviation": {"by_seed": deviations, **(spread(finite) if len(finite) == len(runs) else {})},
        "grad_norm_deviation": _norm_deviation(runs, base, window),
        "multiply_adds_over_few_tokens": short,
        "rates": {kind: _rates([x["counts"][kind] for x in linears]) for kind in KINDS},
        "linears": [
            {
                **{key: x[key] for key in ("layer", "linear", "k", "n")},
                "min_tokens": min(x["tokens"]),
                "rates": {kind: _rates([x["counts"][kind]]) for kind in KINDS},
            }
            for x in linears
        ],
    }


def _norm_deviation(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], window: int) -> dict[str, Any]:
    """Returns the deviation of the gradient norm from the baseline's; empty if a run ended earlier.

    It is taken in the first step, whose weights are equal, and of the mean over the last steps.
    """
    if any(run["diverged_at"] for run in (*runs, *base)):
        return {}
    pairs = [(run["grad_norms"], baseline["grad_norms"]) for run, baseline in zip(runs, base, strict=True)]
    first = [norms[0] / baseline[0] - 1 for norms, baseline in pairs]
    last = [statistics.fmean(norms[-window:]) / statistics.fmean(baseline[-window:]) - 1 for norms, baseline in pairs]
    return {"first_step": spread(first), "last_steps": spread(last)}


def _merge_linears(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the linear layers, with the tokens and counts of all runs."""
    linears: dict[tuple[int, str], dict[str, Any]] = {}
    for x in (x for run in runs for x in run["linears"]):
        initial = {**x, "tokens": Counter[int](), "counts": dict.fromkeys(KINDS, Counts())}
        entry = linears.setdefault((x["layer"], x["linear"]), initial)
        entry["tokens"].update({int(tokens): times for tokens, times in x["tokens"].items()})
        entry["counts"] = {kind: entry["counts"][kind] + Counts(**x["counts"][kind]) for kind in KINDS}
    return list(linears.values())


def _share_below(linears: Sequence[Mapping[str, Any]], limit: int) -> float:
    """Returns the share of multiply-adds in products over fewer than `limit` tokens."""
    products = [(x["k"] * x["n"] * m * times, m) for x in linears for m, times in x["tokens"].items()]
    total = sum(size for size, _ in products)
    return sum(size for size, m in products if m < limit) / total if total else 0.0


def _rates(counts: Iterable[Counts]) -> dict[str, float]:
    total = sum(counts, Counts())
    return {
        "underflow": total.underflow / total.nonzero if total.nonzero else 0.0,
        "overflow": total.overflow / total.values if total.values else 0.0,
    }


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.3g} %" if value or sign else "0"


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the report as Markdown: verdicts, the proxy, the rates of each linear layer."""
    settings, entries = report["settings"], report["precisions"]
    optimizer, data = settings["optimizer"], settings["data"]
    title = optimizers.KINDS[optimizers.kind_of(optimizer)].title
    ratios = [[r["name"], f"{r['recipe']:.4g}", f"{r['proxy']:.4g}"] for r in report["ratios"]]
    deviations, norms = [], []
    for x in entries:
        d, grad = x["deviation"], x["grad_norm_deviation"]
        figures = [percent(d[key], "+") for key in ("mean", "min", "max")] if "mean" in d else ["none"] * 3
        error = percent(d["standard_error"]) if "mean" in d else "none"
        deviations.append([x["precision"], *figures, error, x["verdict"], x["reason"]])
        parts = [f"{percent(y['mean'], '+')} ± {percent(y['standard_error'])}" for y in grad.values()]
        norms.append([x["precision"], *(parts or ["none"] * 2)])
    lines = [
        f"# Precision simulation of {report['recipe']}: {report['verdict']}",
        "",
        f"Deviation of the loss from {BASELINE}, mean over the last {report['window_steps']} of {settings['steps']} "
        f"steps, {report['seeds']} seeds, each with the same initial weights and rows in every precision. The bound is "
        f"{percent(report['bound'])}.",
        *_table("precision|deviation|least|most|standard error|verdict|because", deviations),
        "Deviation of the gradient norm, before clipping, mean ± standard error:",
        *_table("precision|first step|last steps", norms),
        f"{parse(settings['model']).describe()}. A step is {settings['rows']} rows of {settings['sequence_length']} "
        f"tokens. {title}, peak rate {optimizer['lr']:.3g} after {optimizer['warmup_steps']} steps, cosine to a tenth.",
        *_table("ratio|recipe|proxy", ratios),
        f"Data: the {data['files']} source files of Python {data['python']}'s standard library as bytes, "
        f"{data['bytes']} of them, SHA-256 {data['sha256']}; rows begin anywhere, drawn from the seed.",
        "",
        "Underflow: of the values that were not zero, those that became zero. Overflow: of all values, those that were "
        "clipped or no finite number.",
    ]
    for x in entries:
        rows = [[y["layer"], y["linear"], y["k"], y["n"], y["min_tokens"], *_shown(y["rates"])] for y in x["linears"]]
        header = "|".join(["layer|linear|K|N|tokens, least", *(f"{kind} underflow" for kind in KINDS), "overflow"])
        lines += ["", f"## {x['precision']}", *_table(header, [*rows, ["all", *[""] * 4, *_shown(x["rates"])]])]
    return "\n".join(lines).rstrip() + "\n"


def _shown(rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns the underflow of each kind of tensor, and the largest overflow."""
    overflow = max(rates[kind]["overflow"] for kind in KINDS)
    return [*(percent(rates[kind]["underflow"]) for kind in KINDS), percent(overflow)]


def _table(header: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Returns the lines of a table, with an empty line before and after it. header: the columns, with | between."""
    columns = header.split("|")
    body = [columns, ["---"] * len(columns), *rows]
    return ["", *(f"| {' | '.join(str(cell).replace('|', '∣') for cell in row)} |" for row in body), ""]
