"""The gates on the effect of training: rules that compare a model with the previous one.

A rule reads measurements alone, so it is the same after a phase (the stage `gates`) and in a release (`atom build`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from stages.confidence import Figure, Mean
from stages.evaluation.scores import ModelScores, PairScores

# Standard errors beyond which a difference is significant in one direction, at 95 %.
SURE = 1.645
BEYOND = f", beyond {SURE} standard errors of the difference"
TOGETHER = "together"
OUTCOMES = {True: "passed", False: "FAILED", None: "not judged"}
"""The words for the result of a gate."""
AFTER_RLVR = ("dpo", "online-rlhf")
"""Models that learned from preferences, in the order of training."""
REWARD = "reward"
"""The reward model, and the phase that trains it."""
Change = tuple[Figure, Figure]
"""A figure of two models, the earlier one first."""
Thresholds = Mapping[str, Any]
"""The fields of the section `evaluation` that are thresholds."""


class Judgement(NamedTuple):
    """Whether a figure passes, and the figure with its threshold in words."""

    ok: bool
    text: str


@dataclass(frozen=True)
class Measurements:
    """What was measured of the models of a recipe, up to one of them. Models and phases are in the order of training.

    Attributes:
        scores: By model.
        sources: {phase: sources that its order reads}
        pass_at_1: {chat model: accuracy on all test problems}
        preferences: {chat model: comparison with the model before}
        positions: Returns the rows of a model's losses by position; none if it was not evaluated on long documents.
        context: Returns the context of mid-training, in tokens.
        reward_model: What its training measured on held-out pairs; None without one.
    """

    scores: Mapping[str, ModelScores]
    sources: Mapping[str, Collection[str]]
    pass_at_1: Mapping[str, Mean]
    preferences: Mapping[str, PairScores]
    positions: Callable[[str], Sequence[Mapping[str, Any]]]
    context: Callable[[], int]
    reward_model: Mapping[str, Any] | None = None

    def sources_read(self, phase: str) -> set[str]:
        """Returns the sources of a phase's order; none for a phase without an order."""
        return set(self.sources.get(phase, ()))

    def sources_before(self, phase: str) -> set[str]:
        """Returns the sources of all earlier phases."""
        earlier = takewhile(lambda name: name != phase, self.sources)
        return {source for name in earlier for source in self.sources[name]}


@dataclass(frozen=True)
class Rule:
    """A gate on the effect of training.

    Attributes:
        judge: Returns None if the gate does not apply to the models.
        section: The section of the recipe with the phase that it judges.
        compares: What it compares, for a table.
    """

    judge: Callable[[Measurements, Thresholds], Judgement | None]
    section: str
    compares: str

    @property
    def remedy(self) -> str:
        """The advice of a failed gate."""
        # Post-training could else be tuned on the test split, which these gates read.
        chosen = ", choosing on the validation split alone," if self.section in ("rlvr", "dpo", "online_rlhf") else ""
        return f"change the recipe's {self.section} section{chosen} and run again"


def waived_detail(reason: str, detail: str) -> str:
    """Returns the detail of a gate that the recipe waives."""
    return f"waived by the recipe ({reason}); {detail}"


def pretraining_lowers_bits_per_byte(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether pre-training lowers the bits per byte on the sources that it read.

    The sources are judged together and one by one, so that a large source does not hide a small one. None without
    pre-training.
    """
    if "init" not in measured.scores:
        return None
    read = measured.sources_read("pretrain")
    changes = _changes(*(_bits(measured.scores[name], read) for name in ("init", "base")))
    if not changes:
        return _nothing_to_judge("pretrain")
    return Judgement(max(map(_rise, changes.values())) < 0, f"bits per byte {_text(changes)}")


def midtraining_raises_accuracy(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether mid-training raises the accuracy by more than is required. None without mid-training."""
    if "mid" not in measured.scores:
        return None
    before, after = (measured.scores[name]["accuracy_all"] for name in ("base", "mid"))
    return judge_gain("accuracy", before, after, thresholds["min_accuracy_gain"], significant=False)


def midtraining_keeps_bits_per_byte(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether the loss on the sources that the phase reads is within the limit. None without mid-training."""
    if "mid" not in measured.scores:
        return None
    return _keeps_bits_per_byte(measured, thresholds, "base", {"mid": "midtrain"})


def longcontext_keeps_bits_per_byte(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether the loss in bits per byte on short texts is within the limit. None without long-context phases."""
    long = _long_models(measured)
    if not long:
        return None
    return _keeps_bits_per_byte(measured, thresholds, "mid", {model: f"longcontext{model[4:]}" for model in long})


def _long_models(measured: Measurements) -> list[str]:
    return [model for model in measured.scores if model.startswith("long")]


def _keeps_bits_per_byte(
    measured: Measurements, thresholds: Thresholds, before: str, phases: Mapping[str, str]
) -> Judgement:
    """Compares models with an earlier one on the held-out documents of the sources that the phase of each model reads.

    The sources are compared together and one by one. A phase forgets the sources that its mix leaves out, so these are
    judged by a limit of their own, `left_out_tolerance`, and only stated without it.

    Args:
        measured: The measurements.
        thresholds: The thresholds.
        before: The earlier model.
        phases: {model: the phase that trained it}.
    """
    scores, allowed = measured.scores, thresholds["bits_per_byte_tolerance"]
    allowed_left_out: float | None = thresholds.get("left_out_tolerance")
    details, worst, is_kept = [], -math.inf, True
    for model, phase in phases.items():
        read = measured.sources_read(phase)
        changes = _changes(*(_bits(scores[name], read) for name in (before, model)))
        if not changes:
            return _nothing_to_judge(phase)
        details.append(f"{model}: bits per byte {_text(changes)}")
        worst = max(worst, *map(_sure_rise, changes.values()))
        # both models see the same text up to mid-training's context; with bits per byte the longer context sees more
        losses = _changes(*(_losses_by_position(measured, name, read) for name in (before, model)))
        if losses and model.startswith("long"):
            details.append(f"bits per token by position {_text(losses)}")
            worst = max(worst, *map(_rise, losses.values()))
        earlier = measured.sources_before(phase)
        left_out = _changes(*(_bits(scores[name], earlier - read) for name in (before, model)))
        # A sum over sources that are not judged would only be read as a judgement.
        left_out.pop(TOGETHER, None)
        if left_out and allowed_left_out is not None:
            details.append(f"left out by {phase}, which may lose {allowed_left_out:g} on each: {_text(left_out)}")
            is_kept &= max(map(_sure_rise, left_out.values())) <= allowed_left_out
        elif left_out:
            details.append(f"not judged, because {phase} does not read them: {_text(left_out)}")
    text = f"{'; '.join(details)}; at most {allowed:g} may be lost on each{BEYOND}"
    return Judgement(worst <= allowed and is_kept, text)


def _nothing_to_judge(phase: str) -> Judgement:
    return Judgement(False, f"no source that {phase} reads has held-out documents; set heldout_fraction of one")


def longcontext_finds_passkeys(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether the last model retrieves more keys than the mid-trained one.

    The texts are too long for the mid-trained one. None if the models were not evaluated on keys.
    """
    scores, long = measured.scores, _long_models(measured)
    if not long or not any("passkey" in scores[model] for model in ("mid", long[-1])):
        return None
    before, after = (scores[model].get("passkey", {}) for model in ("mid", long[-1]))
    context = measured.context()
    lengths = [length for length in sorted({*before, *after}, key=int) if int(length) > context]
    if not lengths:
        return Judgement(False, f"no passkey was asked for beyond the {context} tokens of mid-training")
    # Longer texts are harder, so both models must be judged by the same lengths.
    if missing := [length for length in lengths if length not in before or length not in after]:
        return Judgement(False, f"passkeys of {missing[0]} tokens were asked of one model only")
    earlier, later = (_pooled([rows[length] for length in lengths]) for rows in (before, after))
    measure = f"keys found in more than {context} tokens ({', '.join(lengths)} tokens)"
    return judge_gain(measure, earlier, later, required=0.0, significant=False)


def _pooled(shares: Sequence[Mean]) -> Mean:
    """Returns the share over all items of several sets."""
    n = sum(row["n"] for row in shares)
    value = sum(row["value"] * row["n"] for row in shares) / n
    return {"value": value, "se": math.sqrt(value * (1 - value) / n), "n": n}


def _losses_by_position(measured: Measurements, model: str, sources: Collection[str]) -> dict[str, Figure]:
    """Returns bits per token of the long documents of some sources, at positions within mid-training's context.

    Empty if the model was not evaluated on long documents.
    """
    rows, bits, tokens = measured.positions(model), Counter[str](), Counter[str]()
    context = measured.context() if rows else 0
    for row in rows:
        if row["source"] in sources and row["last"] < context:
            position = f"{row['first']}-{row['last']}"
            bits[position] += row["nll_bits"]
            tokens[position] += row["tokens"]
    return {position: {"value": bits[position] / tokens[position], "se": 0.0} for position in bits}


def _bits(scores: ModelScores, sources: Collection[str]) -> dict[str, Figure]:
    """Returns bits per byte of the held-out documents of some sources, one by one and together."""
    rows = {name: row for name, row in scores["bits_per_byte"].items() if name in sources}
    figures: dict[str, Figure] = {name: {"value": row["value"], "se": row["se"]} for name, row in rows.items()}
    if len(rows) > 1:
        size = sum(row["bytes"] for row in rows.values())
        value = math.fsum(row["value"] * row["bytes"] for row in rows.values()) / size
        figures[TOGETHER] = {"value": value, "se": math.hypot(*(r["se"] * r["bytes"] for r in rows.values())) / size}
    return figures


def _changes(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> dict[str, Change]:
    """Returns figures before and after, by name, the greatest rise first."""
    # A source that only one model has gives a rise that no limit allows.
    unknown: Figure = {"value": math.nan, "se": 0.0}
    changes = {name: (before.get(name, unknown), after.get(name, unknown)) for name in {*before, *after}}
    return dict(sorted(changes.items(), key=lambda change: (-_rise(change[1]), change[0])))


def _rise(change: Change) -> float:
    """Returns the rise; infinite for a value that one of the models lacks or that is NaN."""
    rise = change[1]["value"] - change[0]["value"]
    return rise if math.isfinite(rise) else math.inf


def _sure_rise(change: Change) -> float:
    """Returns the significant part of a rise.

    A small source has few held-out documents, so its figures are too uncertain for one bound for all sources.
    """
    return _rise(change) - SURE * math.hypot(change[0]["se"], change[1]["se"])


def _text(changes: Mapping[str, Change]) -> str:
    return ", ".join(
        f"{name} {before['value']:.4f} → {after['value']:.4f}" for name, (before, after) in changes.items()
    )


def rlvr_raises_pass_at_1(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether RLVR gains more on the test problems than is required.

    None without that phase, and without a model before it that converses.
    """
    accuracies = measured.pass_at_1
    if not {"sft", "rlvr"} <= accuracies.keys():
        return None
    return judge_gain("pass@1", accuracies["sft"], accuracies["rlvr"], thresholds["chat"]["min_gain"])


def rlhf_keeps_skills(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether learning from preferences loses no more on the test problems than is allowed.

    None without such phases after RLVR.
    """
    accuracies = measured.pass_at_1
    later = [name for name in accuracies if name in AFTER_RLVR]
    if "rlvr" not in accuracies or not later:
        return None
    allowed, before = thresholds["chat"]["skill_tolerance"], accuracies["rlvr"]
    losses = [
        before["value"] - accuracies[name]["value"] + SURE * math.hypot(before["se"], accuracies[name]["se"])
        for name in later
    ]
    figures = ", ".join(f"{name} {figure(accuracies[name])}" for name in ("rlvr", *later))
    text = (
        f"pass@1 {figures}; no more than {allowed:g} may be lost after rlvr, "
        f"{SURE} standard errors of the difference included"
    )
    return Judgement(max(losses) <= allowed, text)


def is_preferred(model: str, measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether the answers of a model that learned from preferences win against the previous model.

    If those of the previous model cannot be better, it is enough that they do not lose. None if the model was not
    compared.
    """
    # A model may be evaluated without having been compared.
    if model not in measured.pass_at_1 or model not in measured.preferences:
        return None
    comparison, required = measured.preferences[model], thresholds["chat"]["min_win_rate"]
    rate, reward = comparison["win_rate"], comparison["sides"]["before"]["parts"]["reward"]
    text = f"{model} wins {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f}) against the model before rlhf"
    if at_ceiling(reward):
        text += f", whose reward of {figure(reward)} leaves nothing to win: it must not lose for certain"
        return Judgement(rate["high"] >= 0.5, text)
    return Judgement(rate["low"] > required, text)


def reward_model_orders_pairs(measured: Measurements, thresholds: Thresholds) -> Judgement | None:
    """Judges whether the reward model orders held-out pairs better than chance, for certain, and than length does.

    None without a reward model.
    """
    if measured.reward_model is None:
        return None
    accuracy, baseline = measured.reward_model["heldout_accuracy"], measured.reward_model["longer_is_better"]["value"]
    (low, high), value = accuracy["interval"], accuracy["last"]
    text = (
        f"held-out pairs ordered correctly {value:.3f} ({low:.3f} to {high:.3f}); the longer answer is the better one "
        f"in {baseline:.3f}"
    )
    # What prefers the shorter answer is a rule of length as well.
    return Judgement(low > 0.5 and value > max(baseline, 1 - baseline), text)


def judge_gain(measure: str, before: Mean, after: Mean, required: float, significant: bool = True) -> Judgement:
    """Judges whether a share rose by more than is required.

    If so much is not missing, any gain is enough. At the ceiling none is demanded, only that nothing was lost for
    certain.

    Args:
        measure: What the share counts, for the sentence.
        before: The share of the earlier model.
        after: The share of the later model.
        required: The gain that must be exceeded.
        significant: Whether the gain must also exceed the uncertainty of the difference.
    """
    gain, uncertainty = after["value"] - before["value"], SURE * math.hypot(before["se"], after["se"])
    missing, chance = 1 - before["value"], _chance(before)
    text = f"{measure} {figure(before)} → {figure(after)}"
    # With so few items left to gain, even a perfect model could not show a gain beyond chance.
    if missing <= chance:
        text += (
            f"; {before['n']} items cannot show a gain above the first share, so none is demanded, and no loss{BEYOND} "
            "is allowed"
        )
        return Judgement(gain >= -uncertainty, text)
    if missing <= required + chance:
        text += f"; {required:g} more cannot be shown above the first share, so any gain is enough"
        required = 0.0
    else:
        text += f", a gain of more than {required:g} is demanded"
    if significant:
        return Judgement(gain - uncertainty > required, f"{text}{BEYOND}")
    return Judgement(gain > required, text)


def at_ceiling(before: Mean) -> bool:
    """Returns True if what a share lacks to 1 is within what chance alone moves the difference of two such shares."""
    return 1 - before["value"] <= _chance(before)


def _chance(share: Mean) -> float:
    """Returns the difference of two shares over as many items that chance makes once in 20 times.

    Two right and two wrong items are added (Agresti and Coull 1998), because the standard error of a share of 1 is 0
    however few its items are.
    """
    items = share["n"] + 4
    value = (share["value"] * share["n"] + 2) / items
    return SURE * math.sqrt(2 * value * (1 - value) / items)


def figure(row: Figure) -> str:
    return f"{row['value']:.3f} ± {row['se']:.3f}"


RULES = {
    "pretraining_lowers_bits_per_byte": Rule(
        pretraining_lowers_bits_per_byte, "pretrain", "bits per byte of base and init, by source"
    ),
    "midtraining_raises_accuracy": Rule(midtraining_raises_accuracy, "midtrain", "solved problems of mid and base"),
    "midtraining_keeps_bits_per_byte": Rule(
        midtraining_keeps_bits_per_byte, "midtrain", "bits per byte of mid and base, by source"
    ),
    "longcontext_keeps_bits_per_byte": Rule(
        longcontext_keeps_bits_per_byte, "long_context", "bits per byte of long models and mid, by source"
    ),
    "longcontext_finds_passkeys": Rule(
        longcontext_finds_passkeys, "long_context", "keys found by the last long model and mid"
    ),
    "rlvr_raises_pass_at_1": Rule(rlvr_raises_pass_at_1, "rlvr", "pass@1 of rlvr and sft"),
    "rlhf_keeps_skills": Rule(rlhf_keeps_skills, "dpo", "pass@1 of later models and rlvr"),
    "dpo_is_preferred": Rule(partial(is_preferred, "dpo"), "dpo", "answers of dpo and the model before"),
    "reward_model_orders_pairs": Rule(
        reward_model_orders_pairs, "reward_model", "held-out pairs, ordered by the reward model and by length"
    ),
    "online-rlhf_is_preferred": Rule(
        partial(is_preferred, "online-rlhf"), "online_rlhf", "answers of online-rlhf and the model before dpo"
    ),
}
"""The gates on the effect of training, in the order of training. No other gate can be waived."""


def judged_after(models: Sequence[str], has_context: bool, answers: bool, compares: bool) -> Iterator[tuple[str, str]]:
    """Yields (gate, model): the gate is judged as soon as the model is evaluated.

    Args:
        models: All exported models, in the order of training, and `reward` if there is a reward model.
        has_context: Whether they are evaluated on long texts.
        answers: Whether chat models answer the problems.
        compares: Whether the answers of chat models are compared.
    """
    long = [model for model in models if model.startswith("long")]
    after = {
        "pretraining_lowers_bits_per_byte": ["base"] if "init" in models else [],
        "midtraining_raises_accuracy": ["mid"],
        "midtraining_keeps_bits_per_byte": ["mid"],
        "longcontext_keeps_bits_per_byte": long,
        # An earlier one need not find more keys yet.
        "longcontext_finds_passkeys": long[-1:] if has_context else [],
        "rlvr_raises_pass_at_1": ["rlvr"] if answers and "sft" in models else [],
        "rlhf_keeps_skills": AFTER_RLVR if answers and "rlvr" in models else (),
    }
    # Its training measures it, before a policy learns from it.
    after["reward_model_orders_pairs"] = [REWARD]
    after |= {f"{model}_is_preferred": [model] if answers and compares else [] for model in AFTER_RLVR}
    for gate in RULES:
        yield from ((gate, model) for model in after[gate] if model in models)
