"""The gates of a release whose model converses: what reinforcement learning and preferences must have given, and the
evidence that goes with the scores."""

from __future__ import annotations

import math

from release.assembly import metrics
from release.checks import registry
from release.checks.gate_context import BEYOND, Context, Gate
from release.layout import when
from stages.evaluation.settings import SURE

LEAST_RECALL, LEAST_PLANTED = 0.9, 4
"""Of items planted into a copy of the corpus, what a detector must find to be believed, and how many there must be."""
MOST_CONTAMINATED = 0.05
"""Share of the items of a split that may stand in what was trained on."""


def post_training(c: Context) -> list[Gate]:
    """Asked of a release with models that converse only."""
    chat = c.data["chat"]
    if not chat:
        return []
    advice = "; change the recipe's {} section, choosing on the validation split alone, and run again"
    limits, gates = c.evaluation["chat"], []
    accuracies = {name: scores["problems_all"]["samples"]["accuracy"] for name, scores in chat["test"].items()}
    figures = {name: f"{row['value']:.3f} ± {row['se']:.3f}" for name, row in accuracies.items()}
    if "rlvr" in accuracies:
        gain = accuracies["rlvr"]["value"] - accuracies["sft"]["value"]
        ok = gain - SURE * math.hypot(accuracies["rlvr"]["se"], accuracies["sft"]["se"]) > limits["min_gain"]
        text = f"pass@1 {figures['sft']} → {figures['rlvr']}, a gain of more than {limits['min_gain']:g} is demanded"
        text += BEYOND
        gates.append(Gate("rlvr_raises_pass_at_1", ok, text if ok else text + advice.format("rlvr")))
    later = [name for name in accuracies if when(name) > when("rlvr")]
    if "rlvr" in accuracies and later:
        rlvr_accuracy = accuracies["rlvr"]
        losses = [
            rlvr_accuracy["value"]
            - accuracies[name]["value"]
            + SURE * math.hypot(rlvr_accuracy["se"], accuracies[name]["se"])
            for name in later
        ]
        ok = max(losses) <= limits["skill_tolerance"]
        text = f"pass@1 {', '.join(f'{name} {figures[name]}' for name in ('rlvr', *later))}; no more than "
        text += (
            f"{limits['skill_tolerance']:g} may be lost after rlvr, {SURE} standard errors of the difference included"
        )
        gates.append(Gate("rlhf_keeps_skills", ok, text if ok else text + advice.format("dpo")))
    for name in (name for name in later if name in chat.get("preferences", {})):
        rate = chat["preferences"][name]["win_rate"]
        text = (
            f"{name} wins {rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f}) against the model before rlhf"
        )
        ok = rate["low"] > limits["min_win_rate"]
        gates.append(Gate(f"{name}_is_preferred", ok, text if ok else text + advice.format("dpo")))
    return [*gates, _fresh_set_gate(c), _contamination_gate(c)]


def _fresh_set_gate(c: Context) -> Gate:
    problems = registry.fresh_set(c.folder)
    meta = c.folder / "dataset/evaluation/fresh/meta.json"
    text = f"{metrics.read_json(meta)['kept']} items drawn from the digest of the weights" if meta.exists() else ""
    return Gate("fresh_set", not problems, f"{problems[0]}; run the stage fresh again" if problems else text)


def _contamination_gate(c: Context) -> Gate:
    path = c.folder / "dataset" / metrics.CONTAMINATION
    if not path.exists():
        return Gate("contamination_report", False, "there is no contamination report; run the stage contamination")
    report = metrics.read_json(path)
    planted = report["detector"]["recall"]
    verdicts = {split: dict(counts) for split, counts in report["items"].items()}
    text = f"{planted['found']} of {planted['planted']} planted items found; verdicts {verdicts}"
    problems = ""
    if planted["planted"] < LEAST_PLANTED:
        problems = (
            "too few items could be planted to know how good the detector is; ask for more items, or cleaner ones"
        )
    elif planted["found"] < LEAST_RECALL * planted["planted"]:
        problems = "the detector misses too much, look at its settings"
    for split, counts in verdicts.items():
        if counts["contaminated"] > MOST_CONTAMINATED * sum(counts.values()):
            problems = (
                problems or f"the {split} items stand in what was trained on; draw others, or decontaminate the data"
            )
    return Gate("contamination_report", not problems, f"{text}; {problems}" if problems else text)
