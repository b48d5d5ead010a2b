"""The report of a precision simulation: deviations, rates, a verdict, and Markdown. Plain arithmetic, no torch.

The deviation of a precision for one seed is the ratio of its mean loss over the last quarter of steps to the baseline's
for the same seed (same initial weights, same rows), minus 1. Over seeds this has a mean with a standard error, and the
verdict compares the magnitude of the mean with the bound:

    holds         magnitude + 2 standard errors < bound
    fails         magnitude - 2 standard errors > bound, or a loss is NaN where the baseline's is finite
    inconclusive anything between, or a proxy too small for its blocks to act as in the recipe's model

With three seeds, two standard errors are a one-sided confidence of 91 % (Student's t), with five 94 %. DeepSeek-V3
reports a relative loss error of FP8 below 0.25 % (arXiv:2412.19437, section 3.3), which is the default bound.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stages.mcore.quantize import KINDS, RECIPES, Counts, Kind
from stages.models.registry import parse
from stages.train.precision_simulation.runner import Settings

MIN_STEPS = 8
ERRORS = 2
"""Standard errors on each side of a mean."""
SHORT = 0.01
"""Share of multiply-adds that may have run over fewer tokens than two blocks."""

Runs = Mapping[tuple[str, int], dict[str, Any]]
"""The result of each run, by precision and seed."""


def compose(
    settings: Settings, proportions: Sequence[tuple[str, float, float]], dimensions: Sequence[int],
    precisions: Sequence[str], seeds: int, bound: float, runs: Runs,
) -> dict[str, Any]:  # fmt: skip
    """The report as JSON, without clocks and paths, so that equal runs have equal bytes.

    proportions: (name, in the recipe, in the proxy). dimensions: the widths in and out of the proxy's linear layers.
    """
    window = settings.steps // 4
    base = [_tail_loss(runs[settings.baseline, seed], window) for seed in range(seeds)]
    entries = [_compare_precision(name, settings, dimensions, window, base, seeds, bound, runs) for name in precisions]
    verdicts = {entry["verdict"] for entry in entries}
    verdict = "fails" if "fails" in verdicts else "inconclusive" if "inconclusive" in verdicts else "holds"
    finite_losses = [loss for loss in base if loss is not None]
    return {
        "recipe": settings.recipe,
        "verdict": verdict,
        "bound": bound,
        "seeds": seeds,
        "window_steps": window,
        "proxy": settings.model.model_dump(mode="json", exclude={"yarn", "stated_parameters"}),
        "ratios": [{"name": name, "recipe": recipe, "proxy": proxy} for name, recipe, proxy in proportions],
        "training": {
            "steps": settings.steps,
            "rows": settings.rows,
            "sequence_length": settings.sequence_length,
            "optimizer": settings.optimizer.model_dump(mode="json"),
        },
        "data": settings.data.model_dump(mode="json"),
        "packages": settings.packages,
        "code": settings.code,
        "baseline": {
            "precision": settings.baseline,
            "loss": base,
            **({} if len(finite_losses) < seeds else spread(finite_losses)),
        },
        "precisions": entries,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, extremes, and the standard error of the mean; of at least two values."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "standard_error": error}


def verdict_of(deviations: Sequence[float], bound: float) -> str:
    """holds, fails or inconclusive, as defined above."""
    figures = spread(deviations)
    size, error = abs(figures["mean"]), ERRORS * figures["standard_error"]
    return "holds" if size + error < bound else "fails" if size - error > bound else "inconclusive"


def _tail_loss(run: Mapping[str, Any], window: int) -> float | None:
    """The mean loss of the last steps; None if the run ended earlier."""
    return None if run["diverged_at"] else statistics.fmean(run["losses"][-window:])


def _compare_precision(
    name: str, settings: Settings, dimensions: Sequence[int], window: int, base: Sequence[float | None], seeds: int,
    bound: float, runs: Runs,
) -> dict[str, Any]:  # fmt: skip
    recipe = RECIPES[name]
    precision_runs = [runs[name, seed] for seed in range(seeds)]
    linears = _merge_linears(precision_runs)
    smallest = recipe.smallest_dimension
    short = _share_below(linears, smallest)
    pairs = zip((_tail_loss(run, window) for run in precision_runs), base, strict=True)
    deviations = [
        None if loss is None or baseline_loss is None else loss / baseline_loss - 1 for loss, baseline_loss in pairs
    ]
    finite_deviations = [d for d in deviations if d is not None]
    diverged = [
        run
        for run, baseline_loss in zip(precision_runs, base, strict=True)
        if run["diverged_at"] and baseline_loss is not None
    ]
    if min(dimensions) < smallest:
        verdict = "inconclusive"
        reason = f"the proxy has a linear layer of width {min(dimensions)}, less than two blocks ({smallest})"
    elif short > SHORT:
        verdict = "inconclusive"
        reason = f"{_percent(short)} of the multiply-adds were over fewer than {smallest} tokens, two blocks"
    elif diverged:
        verdict = "fails"
        reason = f"from seed {diverged[0]['seed']} the loss was not a number at step {diverged[0]['diverged_at']}"
    elif len(finite_deviations) < seeds:
        verdict = "inconclusive"
        reason = f"{settings.baseline} itself diverged"
    else:
        verdict, figures = verdict_of(finite_deviations, bound), spread(finite_deviations)
        relation = {"holds": "is below", "fails": "is above", "inconclusive": "is not clear of"}[verdict]
        reason = f"|{_signed_percent(figures['mean'])}| ± {_percent(ERRORS * figures['standard_error'])} {relation} "
        reason += _percent(bound)
    return {
        "precision": name,
        "formats": {kind: recipe.format(kind).name for kind in KINDS},
        "blocks": {kind: _shape(recipe.shape(kind, 1)) for kind in KINDS},
        "scale": recipe.scale,
        "stochastic_gradients": recipe.stochastic_gradients,
        "hadamard": recipe.hadamard,
        "layers_in_bf16": list(recipe.layers_in_bf16(settings.model.layers)),
        "verdict": verdict,
        "reason": reason,
        "deviation": {
            "by_seed": deviations,
            **(spread(finite_deviations) if finite_deviations and len(finite_deviations) == seeds else {}),
        },
        "grad_norm_deviation": _norm_deviation(
            precision_runs, [runs[settings.baseline, s] for s in range(seeds)], window
        ),
        "multiply_adds_over_few_tokens": short,
        "rates": {kind: _rates([x["counts"][kind] for x in linears]) for kind in KINDS},
        "linears": [
            {
                "layer": x["layer"],
                "linear": x["linear"],
                "k": x["k"],
                "n": x["n"],
                "tokens": {"min": min(x["tokens"]), "median": _median(x["tokens"])},
                "rates": {kind: _rates([x["counts"][kind]]) for kind in KINDS},
            }
            for x in linears
        ],
    }


def _norm_deviation(
    precision_runs: Sequence[Mapping[str, Any]], base_runs: Sequence[Mapping[str, Any]], window: int
) -> dict[str, Any]:
    """The deviation of the gradient norm from the baseline's: in the first step, whose weights are equal, and of the
    mean over the last steps. Empty if a run ended earlier."""
    if any(run["diverged_at"] for run in (*precision_runs, *base_runs)):
        return {}
    pairs = [(run["grad_norms"], base["grad_norms"]) for run, base in zip(precision_runs, base_runs, strict=True)]
    first = [norms[0] / base[0] - 1 for norms, base in pairs]
    last = [statistics.fmean(norms[-window:]) / statistics.fmean(base[-window:]) - 1 for norms, base in pairs]
    return {"first_step": {"by_seed": first, **spread(first)}, "last_steps": {"by_seed": last, **spread(last)}}


def _merge_linears(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The linear layers, with the tokens and counts of all runs."""
    linears: dict[tuple[int, str], dict[str, Any]] = {}
    for run in runs:
        for x in run["linears"]:
            zero_counts: dict[Kind, Counts] = dict.fromkeys(KINDS, Counts())
            initial = {**x, "tokens": Counter[int](), "counts": zero_counts}
            entry = linears.setdefault((x["layer"], x["linear"]), initial)
            entry["tokens"].update({int(tokens): times for tokens, times in x["tokens"].items()})
            entry["counts"] = {kind: entry["counts"][kind] + Counts(**x["counts"][kind]) for kind in KINDS}
    return list(linears.values())


def _share_below(linears: Sequence[Mapping[str, Any]], limit: int) -> float:
    """The share of multiply-adds in products over fewer than `limit` tokens."""
    below, total = 0, 0
    for x in linears:
        size = x["k"] * x["n"]
        total += size * sum(tokens * times for tokens, times in x["tokens"].items())
        below += size * sum(tokens * times for tokens, times in x["tokens"].items() if tokens < limit)
    return below / total if total else 0.0


def _median(tokens: Counter[int]) -> int:
    """The lower median."""
    half = (tokens.total() + 1) // 2
    for value in sorted(tokens):
        half -= tokens[value]
        if half <= 0:
            return value
    raise ValueError("no product ran")


def _rates(counts: Sequence[Counts]) -> dict[str, float]:
    total = sum(counts, Counts())
    return {
        "underflow": total.underflow / total.nonzero if total.nonzero else 0.0,
        "overflow": total.overflow / total.values if total.values else 0.0,
    }


def _shape(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]}" if shape else "tensor"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %" if value else "0"


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.3g} %"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: verdicts, the proxy, the rates of each linear layer."""
    training, data = report["training"], report["data"]
    base, optimizer = report["baseline"], training["optimizer"]
    by_seed = [_signed_percent(loss / base["mean"] - 1) for loss in base["loss"]] if "mean" in base else []
    lines = [
        f"# Precision simulation of {report['recipe']}: {report['verdict']}",
        "",
        f"Deviation of the loss from {base['precision']}, mean over the last {report['window_steps']} of "
        f"{training['steps']} steps, {report['seeds']} seeds, each with the same initial weights and rows in every "
        f"precision. The bound is {_percent(report['bound'])}.",
        "",
        "| precision | deviation | least | most | standard error | verdict | because |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in report["precisions"]:
        d = x["deviation"]
        cells = ["none"] * 4
        if "mean" in d:
            cells = [
                _signed_percent(d["mean"]),
                _signed_percent(d["min"]),
                _signed_percent(d["max"]),
                _percent(d["standard_error"]),
            ]
        lines.append(f"| {' | '.join([x['precision'], *cells, x['verdict'], x['reason'].replace('|', '∣')])} |")
    lines += ["", "Deviation of the gradient norm, before clipping:", ""]
    lines += ["| precision | first step, mean ± standard error | last steps | least | most |", "|---|---|---|---|---|"]
    for x in report["precisions"]:
        cells = ["none"] * 4
        if norms := x["grad_norm_deviation"]:
            first, last = norms["first_step"], norms["last_steps"]
            cells = [f"{_signed_percent(y['mean'])} ± {_percent(y['standard_error'])}" for y in (first, last)]
            cells += [_signed_percent(last["min"]), _signed_percent(last["max"])]
        lines.append(f"| {' | '.join([x['precision'], *cells])} |")
    lines += [
        "",
        f"For scale: the {base['precision']} loss is {base['mean']:.4f}, and by seed {', '.join(by_seed)} of that."
        if by_seed
        else f"{base['precision']} itself diverged.",
        "",
        "## Proxy",
        "",
        f"{parse(report['proxy']).describe()}. A step is {training['rows']} rows of {training['sequence_length']} "
        f"tokens. AdamW, peak rate {optimizer['lr']:.3g} after {optimizer['warmup_steps']} steps, cosine to a tenth.",
        "",
        "| ratio | recipe | proxy |",
        "|---|---|---|",
        *(f"| {r['name']} | {r['recipe']:.4g} | {r['proxy']:.4g} |" for r in report["ratios"]),
        "",
        f"Data: the {data['files']} source files of Python {data['python']}'s standard library as bytes, "
        f"{data['bytes']} of them, SHA-256 {data['sha256']}; rows begin anywhere, drawn from the seed.",
    ]
    for x in report["precisions"]:
        lines += ["", f"## {x['precision']}", "", _format_summary(x), "", *_table(x)]
    return "\n".join(lines) + "\n"


def _format_summary(entry: Mapping[str, Any]) -> str:
    formats, blocks = entry["formats"], entry["blocks"]
    words = [f"{kind} {formats[kind]} by {blocks[kind]}" for kind in KINDS]
    parts = ["gradients rounded stochastically"] if entry["stochastic_gradients"] else []
    parts += ["a random Hadamard transform of the operands of weight gradients"] if entry["hadamard"] else []
    if layers := entry["layers_in_bf16"]:
        parts.append(f"in bf16: layers {', '.join(map(str, layers))} (from 0)")
    parts = [f"scales: {entry['scale']}", *parts]
    return (
        f"{', '.join(words)}; {'; '.join(parts)}. Underflow: of the values that were not zero, those that "
        f"became zero. Overflow: of all values, those that were clipped or no finite number. "
        f"{_percent(entry['multiply_adds_over_few_tokens'])} of the multiply-adds were over fewer tokens than two "
        f"blocks."
    )


def _table(entry: Mapping[str, Any]) -> list[str]:
    header = [
        "layer",
        "linear",
        "K",
        "N",
        "tokens, least",
        "median",
        *(f"{kind} underflow" for kind in KINDS),
        "overflow",
    ]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for x in entry["linears"]:
        underflows = [_percent(x["rates"][kind]["underflow"]) for kind in KINDS]
        overflow = _percent(max(x["rates"][kind]["overflow"] for kind in KINDS))
        cells = [
            x["layer"],
            x["linear"],
            x["k"],
            x["n"],
            x["tokens"]["min"],
            x["tokens"]["median"],
            *underflows,
            overflow,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    underflows = [_percent(entry["rates"][kind]["underflow"]) for kind in KINDS]
    overflow = _percent(max(entry["rates"][kind]["overflow"] for kind in KINDS))
    lines.append(f"| all | | | | | | {' | '.join([*underflows, overflow])} |")
    return lines
