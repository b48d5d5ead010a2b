"""Checks the effect of training: bits per byte, accuracy and passkeys of each model against the previous one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from release.assembly.checkpoint_facts import context_of, read_checkpoints
from release.assembly.published_tables import read_rows
from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.checks.gains import BEYOND, judge_gain
from release.layout import numbered, when
from stages.evaluation.scores import Figure, Mean, ModelScores
from stages.evaluation.settings import SURE

TOGETHER = "together"
Change = tuple[Figure, Figure]
"""A figure of two models, the earlier one first."""


def pretraining_lowers_bits_per_byte(build: BuildContext) -> Findings | None:
    """For the sources that pre-training read, together and one by one, so that a large source does not hide a small
    one. None without pre-training."""
    if "init" not in build.data.evaluation:
        return None
    read = build.data.sources_read("pretrain")
    changes = _changes(*(_bits(build.data.evaluation[name], read) for name in ("init", "base")))
    if not changes:
        return _nothing_to_judge("pretrain")
    return Findings.of_measurement(max(map(_rise, changes.values())) < 0, f"bits per byte {_text(changes)}")


def midtraining_raises_accuracy(build: BuildContext) -> Findings | None:
    """By more than the recipe requires. None without mid-training."""
    if "mid" not in build.data.evaluation:
        return None
    before, after = (build.data.evaluation[name]["accuracy_all"] for name in ("base", "mid"))
    return judge_gain("accuracy", before, after, build.evaluation["min_accuracy_gain"], significant=False)


def midtraining_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """The loss on the sources that the phase reads is within the recipe's limit. None without mid-training."""
    if "mid" not in build.data.evaluation:
        return None
    return _keeps_bits_per_byte(build, "base", {"mid": "midtrain"})


def longcontext_keeps_bits_per_byte(build: BuildContext) -> Findings | None:
    """The loss in bits per byte on short texts is within the recipe's limit. None without long-context phases."""
    long = [model for model in build.data.evaluation if model.startswith("long")]
    if not long:
        return None
    return _keeps_bits_per_byte(build, "mid", {model: f"longcontext-{numbered(model)[1]}" for model in long})


def _keeps_bits_per_byte(build: BuildContext, before: str, phases: Mapping[str, str]) -> Findings:
    """Compares models with an earlier one on the held-out documents of the sources that the phase of each model reads,
    together and one by one. A phase forgets what its mix leaves out: those sources are stated and not judged.

    phases: {model: the phase that trained it}.
    """
    scores, allowed = build.data.evaluation, build.evaluation["bits_per_byte_tolerance"]
    details, worst = [], -math.inf
    for model, phase in phases.items():
        read = build.data.sources_read(phase)
        changes = _changes(*(_bits(scores[name], read) for name in (before, model)))
        if not changes:
            return _nothing_to_judge(phase)
        details.append(f"{model}: bits per byte {_text(changes)}")
        worst = max(worst, *map(_sure_rise, changes.values()))
        # both models see the same text up to mid-training's context; with bits per byte the longer context sees more
        losses = _changes(*(_losses_by_position(build, name, read) for name in (before, model)))
        if losses and model.startswith("long"):
            details.append(f"bits per token by position {_text(losses)}")
            worst = max(worst, *map(_rise, losses.values()))
        earlier = {source for name in build.data.order if when(name) < when(phase)
                   for source in build.data.sources_read(name)}  # fmt: skip
        left_out = _changes(*(_bits(scores[name], earlier - read) for name in (before, model)))
        left_out.pop(TOGETHER, None)
        if left_out:
            details.append(f"not judged, because {phase} does not read them: {_text(left_out)}")
    text = f"{'; '.join(details)}; at most {allowed:g} may be lost on each{BEYOND}"
    return Findings.of_measurement(worst <= allowed, text)


def _nothing_to_judge(phase: str) -> Findings:
    return Findings([f"no source that {phase} reads has held-out documents; set heldout_fraction of one"])


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
    earlier, later = (_pooled([rows[length] for length in lengths]) for rows in (before, after))
    measure = f"keys found in more than {context} tokens ({', '.join(lengths)} tokens)"
    return judge_gain(measure, earlier, later, required=0.0, significant=False)


def _pooled(shares: Sequence[Mean]) -> Mean:
    """The share over all items of several sets."""
    n = sum(row["n"] for row in shares)
    value = sum(row["value"] * row["n"] for row in shares) / n
    return {"value": value, "se": math.sqrt(value * (1 - value) / n), "n": n}


def _context_of_midtraining(build: BuildContext) -> int:
    return context_of(read_checkpoints(build.folder / "checkpoints"), "midtrain")


def _losses_by_position(build: BuildContext, model: str, sources: Collection[str]) -> dict[str, Figure]:
    """Bits per token of the long documents of some sources, at positions within mid-training's context. Empty if the
    model was not evaluated on long documents."""
    path = build.folder / "dataset/evaluation" / model / "positions.parquet"
    if not path.is_file():
        return {}
    context, bits, tokens = _context_of_midtraining(build), Counter[str](), Counter[str]()
    for row in read_rows(path):
        if row["source"] in sources and row["last"] < context:
            position = f"{row['first']}-{row['last']}"
            bits[position] += row["nll_bits"]
            tokens[position] += row["tokens"]
    return {position: {"value": bits[position] / tokens[position], "se": 0.0} for position in bits}


def _bits(scores: ModelScores, sources: Collection[str]) -> dict[str, Figure]:
    """Bits per byte of the held-out documents of some sources, one by one and together."""
    rows = {name: row for name, row in scores["bits_per_byte"].items() if name in sources}
    figures: dict[str, Figure] = {name: {"value": row["value"], "se": row["se"]} for name, row in rows.items()}
    if len(rows) > 1:
        size = sum(row["bytes"] for row in rows.values())
        value = math.fsum(row["value"] * row["bytes"] for row in rows.values()) / size
        figures[TOGETHER] = {"value": value, "se": math.hypot(*(r["se"] * r["bytes"] for r in rows.values())) / size}
    return figures


def _changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> dict[str, Change]:
    """Figures before and after, by name, the greatest rise first."""
    unknown: Figure = {"value": math.nan, "se": 0.0}
    changes = {name: (before.get(name, unknown), after.get(name, unknown)) for name in {*before, *after}}
    return dict(sorted(changes.items(), key=lambda change: (-_rise(change[1]), change[0])))


def _rise(change: Change) -> float:
    """The rise; infinite for a value that one of the models lacks or that is NaN."""
    rise = change[1]["value"] - change[0]["value"]
    return rise if math.isfinite(rise) else math.inf


def _sure_rise(change: Change) -> float:
    """The significant part of a rise: a small source has few held-out documents, so its figures are too uncertain for
    one bound for all sources."""
    return _rise(change) - SURE * math.hypot(change[0]["se"], change[1]["se"])


def _text(changes: Mapping[str, Change]) -> str:
    return ", ".join(
        f"{name} {before['value']:.4f} → {after['value']:.4f}" for name, (before, after) in changes.items()
    )
