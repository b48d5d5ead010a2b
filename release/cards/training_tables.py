"""The card's tables and sentences about training: experts, and skipped steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.text import escaped
from release.cards.tables import PHASES, count, table, title
from release.facts.model_facts import ModelFacts
from release.facts.score_facts import settings_of

Facts = dict[str, Any]


def experts_by_phase(model: ModelFacts) -> list[str]:
    """One row for each phase: the balance of its tokens over experts at its end."""
    if not model.has_experts:
        return []
    body = []
    for phase, log in model.training.items():
        measurement = log.experts
        if measurement is None:
            body.append([title(phase, PHASES), "never", *[""] * 5])
            continue
        busiest = max(max(row) for row in _loads(measurement))
        body.append([
            title(phase, PHASES), count(measurement["step"]), f"{busiest - 1:.3f}",
            f"{sum(measurement['entropy']) / len(measurement['entropy']):.3f}",
            count(len(measurement["dead"])), count(log.measurements), count(log.dropped),
        ])  # fmt: skip
    head = ["phase", "last at step", "max violation", "mean entropy, nats", "dead experts", "times", "dropped"]
    return table(head, body) if body else []


def experts(model: ModelFacts) -> list[str]:
    """One row for each layer, from the very last measurement."""
    if not model.has_experts:
        return []
    measurement = last_measurement(model)
    if measurement is None:
        return []
    body = []
    for row, layer in enumerate(measurement["layers"]):
        loads, entropy = _loads(measurement)[row], measurement["entropy"][row]
        dead = [str(expert) for dead_layer, expert in measurement["dead"] if dead_layer == layer]
        body.append([
            str(layer), f"{min(loads):.3f}", f"{max(loads):.3f}", f"{entropy:.3f}",
            f"{entropy / math.log(len(loads)):.3f}", ", ".join(dead) or "none",
        ])  # fmt: skip
    head = ["layer", "least busy expert, of a fair share", "busiest expert, of a fair share", "router entropy, nats"]
    return table([*head, "entropy, of its maximum", "dead experts"], body)


def verdict(model: ModelFacts) -> list[str]:
    """One sentence: a warning if the last measurement has a dead expert."""
    if not model.has_experts:
        return []
    measurement = last_measurement(model)
    if measurement is None:
        return ["Where the routers sent the tokens was not measured."] if model.training else []
    total, dead = sum(len(row) for row in measurement["share"]), len(measurement["dead"])
    if not dead:
        return [f"None of the {count(total)} experts was dead at the last measurement."]
    verb, pronoun = ("is", "it") if dead == 1 else ("are", "them")
    return [
        f"**Alarm: {count(dead)} of {count(total)} experts {verb} dead.** At step {count(measurement['step'])} of "
        f"{title(measurement['phase'], PHASES)}, the last one measured, hardly any token was sent to {pronoun}; the "
        f"table by layer names {pronoun}. These weights take memory and do next to nothing."
    ]


def last_measurement(model: ModelFacts) -> Facts | None:
    """The last measurement of the last phase that has one, with its `phase`."""
    measurements = [{"phase": phase, **log.experts} for phase, log in model.training.items() if log.experts]
    return measurements[-1] if measurements else None


def spikes(model: ModelFacts) -> list[str]:
    """One line for each spike, one for the steps that the recipe excludes, and one for all phases without either."""
    lines, without = [], []
    for phase, log in model.training.items():
        name = title(phase, PHASES)
        for spike in log.spikes:
            documents = len(spike["documents"])
            batch_size = f"{count(documents)} document{'s' if documents != 1 else ''}"
            lines.append(
                f"- {name}, step {count(spike['step'])}: {spike['reason']}; action {spike['action']}: "
                f"{_skipped_steps(spike['excluded'])}; the batch that spiked held {batch_size}."
            )
        if log.excluded:
            lines.append(f"- {name}: {_skipped_steps(log.excluded)}, because the recipe says so.")
        if not log.spikes and not log.excluded:
            without.append(f"{name} ({count(log.first)} to {count(log.last)})")
    return [*lines, *([f"- No step was skipped in: {', '.join(without)}."] if without else [])]


def _skipped_steps(numbers: list[int]) -> str:
    """The skipped steps: `steps 3 to 5, 9 moved no weight`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    steps = ", ".join(" to ".join(map(count, span)) for span in spans)
    return f"step{'s' if len(numbers) > 1 else ''} {steps} moved no weight"


def _loads(measurement: Facts) -> list[list[float]]:
    """The load of each expert by layer; 1 is a fair share."""
    return [[share * len(row) for share in row] for row in measurement["share"]]


SETTINGS = {
    "steps": ("steps",),
    "sequence length": ("sequence_length",),
    "global batch, tokens": ("batch", "global_tokens"),
    "peak learning rate": ("optimizer", "lr"),
    "final learning rate": ("optimizer", "final_lr"),
    "warm-up steps": ("optimizer", "warmup_steps"),
    "weight decay": ("optimizer", "weight_decay"),
    "Adam β1": ("optimizer", "beta1"),
    "Adam β2": ("optimizer", "beta2"),
    "gradient clipping, norm": ("optimizer", "clip"),
    "prompts of a step": ("prompts_per_step",),
    "generations of a prompt": ("num_generations",),
    "max new tokens": ("sampling", "max_new_tokens"),
    "β of the preference loss": ("beta",),
}
"""{title: the place of a setting in the section of a phase}"""


def settings(recipe: Mapping[str, Any], model: ModelFacts) -> list[str]:
    """The hyper-parameters of the phases of a model: one row for each setting that any of them has."""
    sections = {phase: settings_of(recipe, phase) for phase in model.training}
    body = [[name, *(_setting(section, path) for section in sections.values())] for name, path in SETTINGS.items()]
    body = [row for row in body if any(row[1:])]
    return table(["setting", *(title(phase, PHASES) for phase in sections)], body) if body else []


def _setting(section: Any, path: Sequence[str]) -> str:
    for name in path:
        section = section.get(name) if isinstance(section, Mapping) else None
    if section is None or isinstance(section, (Mapping, list)):
        return ""
    return count(section) if type(section) is int else f"{section:g}" if isinstance(section, float) else str(section)


def start(model: ModelFacts) -> list[str]:
    """The published model that training began with; none without one."""
    if model.base is None:
        return []
    first = "Training" if model.on_published else "Pre-training"
    sentence = f"{first} began with the weights and the tokenizer of a published model, with a fresh optimizer:"
    if model.is_copy:
        sentence = "These are the weights and the tokenizer of a published model:"
    base = {name: escaped(model.base[name]) for name in ("repo", "license", "digest")}
    return [
        sentence,
        "",
        f"- model: `{base['repo']}`",
        f"- license of its weights: {base['license']}",
        f"- digest of its `SHA256SUMS`: `{base['digest']}`",
    ]
