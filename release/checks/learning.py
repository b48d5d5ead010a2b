"""Checks the effect of training: bits per byte, accuracy and passkeys of each model against the previous one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from release.assembly.checkpoint_facts import context_of, read_checkpoints
from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.layout import when
from stages.evaluation.scores import Figure, ModelScores
from stages.evaluation.settings import SURE

ALL = "over all"
BEYOND = f", beyond {SURE} standard errors of the difference"


def pretraining_lowers_bits_per_byte(build: BuildContext) -> Findings | None:
    """Over all held-out text, and for each source that pre-training read, so that a large source does not hide a small
    one. None without pre-training."""
    if "init" not in build.data.evaluation:
        return None
    init, base = (build.data.evaluation[name] for name in ("init", "base"))
    changes = _changes(_bits(init), _bits(base), {ALL, *build.data.sources_read("pretrain")})
    return Findings.of_measurement(max(_rises(changes)) < 0, f"bits per byte {_changes_text(changes)}")


def midtraining_raises_accuracy(build: BuildContext) -> Findings | None:
    """By more than the recipe requires. None without mid-training."""
    if "mid" not in build.data.evaluation:
        return None
    before, after = (build.data.evaluation[name]["accuracy_all"] for name in ("base", "mid"))
    required = build.evaluation["min_accuracy_gain"]
    text = (
        f"accuracy {before['value']:.3f} ± {before['se']:.3f} → {after['value']:.3f} ± {after['se']:.3f}, "
        f"a gain of more than {required:g} is demanded"
    )
    return Findings.of_measurement(after["value"] - before["value"] > required, text)


def midtraining_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """The loss over all sources read so far is within the recipe's limit. None without mid-training."""
    if "mid" not in build.data.evaluation:
        return None
    base, mid = (build.data.evaluation[name] for name in ("base", "mid"))
    sources = {ALL, *build.data.sources_read("pretrain"), *build.data.sources_read("midtrain")}
    changes, allowed = _changes(_bits(base), _bits(mid), sources), build.evaluation["bits_per_byte_tolerance"]
    text = f"bits per byte {_changes_text(changes)}, at most {allowed:g} may be lost on each{BEYOND}"
    return Findings.of_measurement(max(_significant_rises(changes, base, mid)) <= allowed, text)


def longcontext_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """The loss in bits per byte on short texts is within the recipe's limit. None without long-context phases."""
    scores, orders = build.data.evaluation, build.data.order
    long = [model for model in scores if model.startswith("long")]
    if not long:
        return None
    allowed, details, worst = build.evaluation["bits_per_byte_tolerance"], [], -math.inf
    for model in long:
        sources = {ALL}.union(*(build.data.sources_read(phase) for phase in orders if when(phase) < when("sft")))
        bits_changes = _changes(_bits(scores["mid"]), _bits(scores[model]), sources)
        details.append(f"{model}: bits per byte {_changes_text(bits_changes)}")
        worst = max(worst, *_significant_rises(bits_changes, scores["mid"], scores[model]))
        # both models see the same text up to mid-training's context; with bits per byte the longer context sees more
        losses = [_short_position_losses(scores[name].get("loss_by_position", {}), build) for name in ("mid", model)]
        if any(losses):
            changes = _changes(losses[0], losses[1], {*losses[0], *losses[1]})
            details.append(f"bits per token by position {_changes_text(changes)}")
            worst = max(worst, *_rises(changes))
    text = f"{'; '.join(details)}; at most {allowed:g} may be lost on each{BEYOND}"
    return Findings.of_measurement(worst <= allowed, text)


def longcontext_finds_passkeys(build: BuildContext) -> Findings | None:
    """The last model retrieves more keys than the mid-trained one from texts that are too long for that one. None if
    the models were not evaluated on keys."""
    scores = build.data.evaluation
    long = [model for model in scores if model.startswith("long")]
    if not long or not any("passkey" in scores[model] for model in ("mid", long[-1])):
        return None
    before, after = (scores[model].get("passkey", {}) for model in ("mid", long[-1]))
    context = _context_of_midtraining(build)
    lengths = [length for length in sorted({*before, *after}, key=int) if int(length) > context]
    if not lengths:
        return Findings([f"no passkey was asked for beyond the {context} tokens of mid-training"])
    if missing := [length for length in lengths if length not in before or length not in after]:
        return Findings([f"passkeys of {missing[0]} tokens were asked of one model only"])
    recall = [sum(rows[k]["value"] * rows[k]["n"] for k in lengths) / sum(rows[k]["n"] for k in lengths)
              for rows in (before, after)]  # fmt: skip
    text = f"keys found in more than {context} tokens: {recall[0]:.3f} → {recall[1]:.3f} ({', '.join(lengths)} tokens)"
    return Findings.of_measurement(recall[1] > recall[0], text)


def _context_of_midtraining(build: BuildContext) -> int:
    return context_of(read_checkpoints(build.folder / "checkpoints"), "midtrain")


def _short_position_losses(by_position: Mapping[str, Figure], build: BuildContext) -> dict[str, float]:
    """The loss at positions within mid-training's context."""
    context = _context_of_midtraining(build)
    return {name: float(row["value"]) for name, row in by_position.items() if int(name.split("-")[1]) < context}


def _bits(scores: ModelScores) -> dict[str, float]:
    """Bits per byte over all held-out text, and of each source."""
    by_source = {name: float(row["value"]) for name, row in sorted(scores["bits_per_byte"].items())}
    return {ALL: float(scores["bits_per_byte_all"]["value"]), **by_source}


def _changes(before: dict[str, float], after: dict[str, float], names: set[str]) -> dict[str, tuple[float, float]]:
    """Bits per byte before and after for each held-out name, the greatest rise first."""
    unknown = float("nan")
    pairs = {name: (before.get(name, unknown), after.get(name, unknown)) for name in names & {*before, *after}}
    return dict(sorted(pairs.items(), key=lambda pair: (-_rise(pair[1]), pair[0])))


def _rise(pair: tuple[float, float]) -> float:
    """The rise; infinite for a value that one of the phases lacks or that is NaN."""
    rise = pair[1] - pair[0]
    return rise if math.isfinite(rise) else math.inf


def _significant_rises(changes: dict[str, tuple[float, float]], before: ModelScores, after: ModelScores) -> list[float]:
    """The significant part of each rise in bits per byte: a small source has few held-out documents, so its figures are
    too uncertain for one bound for all sources."""
    rises = []
    for name, pair in changes.items():
        rows = [s["bits_per_byte_all"] if name == ALL else s["bits_per_byte"].get(name) for s in (before, after)]
        chance = SURE * math.hypot(*(row["se"] for row in rows if row)) if all(rows) else 0.0
        rises.append(_rise(pair) - chance)
    return rises


def _rises(changes: dict[str, tuple[float, float]]) -> list[float]:
    return [_rise(pair) for pair in changes.values()]


def _changes_text(changes: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {before:.4f} → {after:.4f}" for name, (before, after) in changes.items())
