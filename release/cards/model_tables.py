"""The cards' tables about a model: prediction, task sets, variants, experts, spikes and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.core.text import escaped
from release.cards.tables import PHASES, count, explained_table, table, title, with_error
from release.facts.forecast import FOLDER, NAMES
from release.facts.model_facts import ModelFacts
from release.facts.score_facts import HarnessFacts, settings_of
from release.facts.variant_facts import VariantFacts
from stages.mcore.optimizer import card_rows

Facts = dict[str, Any]
"""A measurement of the experts, as the log has it."""
SETTINGS = {
    "steps": "steps",
    "sequence length": "sequence_length",
    "global batch, tokens": "batch.global_tokens",
    # Each kind of optimizer has further settings, which `card_rows` adds.
    "optimizer": "optimizer.kind",
    "peak learning rate": "optimizer.lr",
    "final learning rate": "optimizer.final_lr",
    "warm-up steps": "optimizer.warmup_steps",
    "weight decay": "optimizer.weight_decay",
    **card_rows(),
    "gradient clipping, norm": "optimizer.clip",
    "prompts of a step": "prompts_per_step",
    "generations of a prompt": "num_generations",
    "max new tokens": "sampling.max_new_tokens",
    "β of the preference loss": "beta",
}
"""{title: the place of a setting in the section of a phase}"""


def prediction(model: ModelFacts) -> list[str]:
    """Returns what was predicted before training, and what was measured; none for a model without a prediction."""
    if model.prediction is None:
        return []
    sealed = model.prediction
    # Points are sorted by their compute.
    smallest, largest = sealed.points[0], sealed.points[-1]
    body = []
    for row in model.outcomes:
        forecast, within = row.forecast, "yes" if row.within else "no"
        band = f"{forecast.low:.4f} to {forecast.high:.4f}"
        body.append([NAMES[forecast.figure], f"{forecast.value:.4f}", band, f"{row.measured:.4f}", within])
    return [
        f"Sealed before pre-training, from {count(len(sealed.points))} runs of {smallest.flops:.3g} to "
        f"{largest.flops:.3g} training FLOPs; this model has {sealed.target.flops:.3g}. Nine of ten such runs "
        f"should fall into a band. The evidence repository has the prediction and its statement in `{FOLDER}/`.",
        "",
        *table(["figure", "predicted", "band of 90 %", "measured", "in the band"], body),
    ]


def task_sets(facts: HarnessFacts | None) -> list[str]:
    """Returns the scores of task sets of lm-evaluation-harness; none if the recipe has no task sets."""
    if facts is None:
        return []
    body = [
        [task_set, task, metric.removesuffix(",none"), count(figure["n"]), with_error(figure, 3)]
        for task_set, tasks in facts.scores.items()
        for task, metrics in tasks.items()
        for metric, figure in metrics.items()
    ]
    licenses = []
    for name, stated in facts.task_sets.items():
        revision = f"; revision {stated['revision']}" if stated["revision"] else ""
        licenses.append(f"{name}: {stated['license']} ({stated['license_evidence']}{revision})")
    return [
        "Means over items, ± standard error. Decontamination searched the training data for these items.",
        "",
        *table(["set", "task", "metric", "items", "score"], body),
        "",
        f"Licenses of the data: {'; '.join(licenses)}.",
    ]


def variant_loss(facts: VariantFacts) -> list[str]:
    """Returns the loss of a variant, measured on the same documents and problems as the original."""
    loss = facts.loss
    divergence, greedy, bits, accuracy = loss["divergence"], loss["greedy"], loss["bits_per_byte"], loss["accuracy"]
    positions = f"{divergence['same_likeliest']:.4f} of {count(divergence['positions'])} positions"
    body = [
        ["bytes of the weights", count(loss["bytes"]["original"]), count(loss["bytes"]["variant"])],
        ["bits per byte", with_error(bits["original"], 4), with_error(bits["variant"], 4)],
        ["exact match", with_error(accuracy["original"], 3), with_error(accuracy["variant"], 3)],
        ["divergence, mean in nats", "", f"{divergence['value']:.2e} ± {divergence['se']:.1e}"],
        ["divergence, largest in nats", "", f"{divergence['max']:.2e}"],
        ["same likeliest token", "", positions],
        ["same greedy answer", "", f"{greedy['equal']} of {greedy['n']} problems"],
    ]
    return [*table(["measure", "original", "variant"], body), "", f"Measured by {loss['measured_by']}."]


def variants(by_suffix: Mapping[str, VariantFacts]) -> list[str]:
    """Returns the variants of a model, by the end of their repository's name; nothing without any."""
    body = []
    for name, facts in by_suffix.items():
        loss = facts.loss
        figures = [f"{loss['divergence']['value']:.2e}", with_error(loss["accuracy"]["variant"], 3)]
        equal = f"{loss['greedy']['equal']} of {loss['greedy']['n']}"
        body.append([f"`…{name}`", loss["title"], count(loss["bytes"]["variant"]), *figures, equal])
    sentence = (
        "Each is a repository of its own, whose name is this one's with the ending; its card says how it was measured."
    )
    head = ["repository", "weights", "bytes", "mean divergence in nats", "exact match", "same greedy answers"]
    return explained_table(sentence, head, body)


def variant_serving(facts: VariantFacts) -> list[str]:
    return [facts.variant.serving]


def experts_by_phase(model: ModelFacts) -> list[str]:
    """Returns one row for each phase: the balance of its tokens over experts at its end."""
    if not model.has_experts:
        return []
    body = []
    for phase, log in model.training.items():
        measurement = log.experts
        if measurement is None:
            body.append([title(phase, PHASES), "never", *[""] * 5])
            continue
        # Violation: the load of the busiest expert over a fair share, less 1.
        busiest = max(max(row) for row in _loads(measurement))
        entropy = sum(measurement["entropy"]) / len(measurement["entropy"])
        counts = map(count, (len(measurement["dead"]), log.measurements, log.dropped))
        step = count(measurement["step"])
        body.append([title(phase, PHASES), step, f"{busiest - 1:.3f}", f"{entropy:.3f}", *counts])
    head = ["phase", "last at step", "max violation", "mean entropy, nats", "dead experts", "times", "dropped"]
    return table(head, body) if body else []


def experts(model: ModelFacts) -> list[str]:
    """Returns one row for each layer, from the very last measurement."""
    measurement = last_measurement(model) if model.has_experts else None
    if measurement is None:
        return []
    body = []
    for layer, loads, entropy in zip(measurement["layers"], _loads(measurement), measurement["entropy"], strict=True):
        dead = [str(expert) for dead_layer, expert in measurement["dead"] if dead_layer == layer]
        # A router without any preference has the entropy ln n.
        share = entropy / math.log(len(loads))
        figures = [f"{value:.3f}" for value in (min(loads), max(loads), entropy, share)]
        body.append([str(layer), *figures, ", ".join(dead) or "none"])
    head = ["layer", "least busy expert, of a fair share", "busiest expert, of a fair share", "router entropy, nats"]
    return table([*head, "entropy, of its maximum", "dead experts"], body)


def verdict(model: ModelFacts) -> list[str]:
    """Returns one sentence: a warning if the last measurement has a dead expert."""
    if not model.has_experts:
        return []
    measurement = last_measurement(model)
    if measurement is None:
        return ["Where the routers sent the tokens was not measured."] if model.training else []
    # A dead expert gets hardly any token, and its weights do nothing.
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
    """Returns the last measurement of the last phase that has one, with its `phase`."""
    # Not every phase has measured its experts.
    measurements = [{"phase": phase, **log.experts} for phase, log in model.training.items() if log.experts]
    return measurements[-1] if measurements else None


def spikes(model: ModelFacts) -> list[str]:
    """Returns a line for each spike, one for the steps that the recipe excludes, and one for phases without either."""
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
    if without:
        lines.append(f"- No step was skipped in: {', '.join(without)}.")
    return lines


def _skipped_steps(numbers: list[int]) -> str:
    """Returns words on the skipped steps: `steps 3 to 5, 9 moved no weight`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    steps = ", ".join(" to ".join(map(count, span)) for span in spans)
    return f"step{'s' if len(numbers) > 1 else ''} {steps} moved no weight"


def _loads(measurement: Facts) -> list[list[float]]:
    """Returns the load of each expert by layer; 1 is a fair share."""
    return [[share * len(row) for share in row] for row in measurement["share"]]


def settings(recipe: Mapping[str, Any], model: ModelFacts) -> list[str]:
    """Returns the hyper-parameters of the phases of a model: one row for each setting that any of them has."""
    sections = {phase: settings_of(recipe, phase) for phase in model.training}
    body = [[name, *(_setting(section, path) for section in sections.values())] for name, path in SETTINGS.items()]
    body = [row for row in body if any(row[1:])]
    return table(["setting", *(title(phase, PHASES) for phase in sections)], body) if body else []


def _setting(section: Any, path: str) -> str:
    value = section
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    # A phase need not have a setting, and a group of settings is no value.
    if value is None or isinstance(value, (Mapping, list)):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return count(value) if type(value) is int else str(value)


def start(model: ModelFacts) -> list[str]:
    """Returns the published model that training began with; none without one."""
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
