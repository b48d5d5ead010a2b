"""The miniature of a recipe: the same sections, stages, gates and options, small enough for the cores of one machine.

    atom init mini --from atom-30b-a3b --miniature

One rule makes it, whatever the recipe. What it keeps, it keeps as it stands: optimizers, rates, balance, precision,
recomputation, packing, ramps, spikes, mixes, verifiers, curation, and the kinds of parallelism.

- Sizes are the smaller of their own and those of CAPS.
- Tokens of rows and contexts are divided by one number, after which the rows of `pretrain` have ROW tokens.
- A phase has STEPS steps, or REHEARSED if the recipe rehearses it, and what is counted in steps keeps its share.
- Each kind of parallelism has the degree 2, a phase has the fewest ranks that this takes, and a data-parallel rank at
  most two micro-batches of at most two rows, before a ramp doubles them. The layers are dealt to the chunks of a
  pipeline as evenly, or unevenly, as in the recipe.
- What judges an effect of training is waived, and so are limits on repeated data, and on the share of a source that a
  rule removes: of few documents it says little.
- What a CPU lacks is switched to what it has, and preferences to tasks at which an untrained policy sometimes succeeds;
  tasks are measured, and none is left out that an untrained policy never solves.
  Each such setting is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from stages.evaluation.gates import RULES
from stages.recipe import ReleaseRecipe
from stages.train.rehearsal import STEPS as REHEARSED
from stages.train.rehearsal import is_costly

ROW, STEPS, LAYERS, ANSWER = 128, 6, 4, 48
HELDOUT, KEPT = 0.3, 0.75
WAIVER = "a miniature is made to see whether everything runs, and shows no effect of training"
# The largest value by the path of a setting, * for any characters; the first pattern that fits counts.
CAPS = {
    "tokenizer.*vocab_size": 512, "tokenizer.sample_bytes": 1_000_000,
    "model.hidden_size": 64, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 16, "model.experts": 4,
    "model.num_experts_per_tok": 2, "model.n_group": 2, "model.topk_group": 1, "model.*intermediate_size": 32,
    "*.validation.rows": 16, "*.replay.rows": 4, "*.tasks.*.count": 60, "dpo.preferences.count": 16, "dpo.*.count": 8,
    "*.prompts_per_step": 4, "*.num_generations": 4, "dpo.updates": 2, "reward_model.pairs": 4,
    "evaluation.problems.*": 20, "evaluation.heldout_documents": 4, "evaluation.context.per_cell": 1,
    "evaluation.context.documents": 2, "evaluation.chat.items.validation.*": 6, "evaluation.chat.items.courtesies": 20,
    "evaluation.chat.items.courtesies_validation": 6, "evaluation.chat.num_samples": 2,
    "sources.*.parts": 2, "sources.*.reader.count": 400, "sources.*.expected.documents": 100,
    "sources.*.expected.bytes": 1_000_000, "rlvr.pass_rates.num_samples": 2,
}  # fmt: skip
TOKENS = (
    "*sequence_length",
    "model.context_length",
    "*.over",
    "*.original_length",
    "evaluation.context.lengths.*",
    "evaluation.context.short",
    "*max_new_tokens",
    "*.max_tokens",
)
IN_STEPS = (
    "*.warmup_steps",
    "*.decay_steps",
    "*.rewind_steps",
    "*.until_step",
    "*.validation.every",
    "*validate_every",
    "*checkpoint_interval",
)
DEGREES = ("tp", "pp", "vpp", "cp", "ep", "etp")
# A policy that has learnt nothing earns nothing for a courtesy, and equal answers make no pairs. At times it meets a
# constraint on the form.
PREFERRED = {"source": "instructions", "levels": [1], "count": 60, "acknowledged_reward": 1.0}
# Settings of a layout that only GPUs have.
ONLY_GPU = ("dispatcher", "fusions", "cuda_graphs", "deterministic")


def miniature(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Returns the miniatures of a recipe and of its data recipe, and what was switched.

    Args:
        recipe: The fields of a recipe without mistakes.
        data: Those of the data recipe that it names.
    """
    config = ReleaseRecipe.model_validate(recipe)
    vocabulary, section = config.tokenizer.padded_vocab_size, config.rehearsal
    rehearsed = {p.where for p in config.text_phases if is_costly(p.config, section, config.model, vocabulary)}
    first = config.text_phases[0].config.sequence_length
    small, corpus = _capped(recipe, max(1, first // ROW)), _capped(data, 1)
    phases = _phases(recipe)
    small["model"]["layers"] = _layers(config.model.layers, [phase.get("parallelism", {}) for phase in phases.values()])
    switched = []
    for where, phase in _phases(small).items():
        switched += _shrink_phase(where, phase, phases[where], REHEARSED if where in rehearsed else STEPS)
    if preferences := small.get("dpo", {}).get("preferences"):
        preferences["tasks"] = [dict(PREFERRED)]
        switched.append("dpo.preferences.tasks: instructions, which a policy that has learnt nothing meets at times")
    if "preferences" in small:
        small["preferences"]["heldout_fraction"] = HELDOUT
    if rates := small.get("rlvr", {}).get("pass_rates"):
        rates |= {"above": None, "below": None}
        switched.append("rlvr.pass_rates: no bounds, since a policy that has learnt nothing solves no task")
    if "reward_model" in small:
        small["reward_model"]["heldout_fraction"] = HELDOUT
    evaluation = small["evaluation"]
    if evaluation.get("engine", {}).get("kind") == "vllm":
        evaluation.pop("engine")
        switched.append("evaluation.engine: transformers in the stage's process, not vllm")
    if "harness" in evaluation:
        evaluation["harness"]["limit"] = 2
    evaluation["waived_gates"] = {name: WAIVER for name, rule in RULES.items() if recipe.get(rule.section)}
    small["rehearsal"] = {**small.get("rehearsal", {}), "above_gpu_hours": 0 if rehearsed else None}
    small["supply"] = {**small.get("supply", {}), "max_epochs": 1_000_000}
    _shrink_corpus(corpus)
    return small, corpus, switched


def _capped(fields: Mapping[str, Any], scale: int) -> dict[str, Any]:
    """Returns a copy of the fields with smaller sizes and shorter rows."""

    def small(path: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: small(f"{path}{name}.", each) for name, each in value.items()}
        if isinstance(value, list):
            return [small(f"{path}{number}.", each) for number, each in enumerate(value)]
        path = path[:-1]
        if any(fnmatchcase(path, pattern) for pattern in TOKENS):
            return min(value, max(value // scale, ANSWER))
        cap = next((cap for pattern, cap in CAPS.items() if fnmatchcase(path, pattern)), None)
        return value if cap is None else min(value, cap)

    return {name: small(f"{name}.", value) for name, value in fields.items()}


def _phases(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sections of the phases that train, by where they stand in the recipe."""
    phases = {f"long_context.{number}": phase for number, phase in enumerate(recipe.get("long_context", []))}
    names = ("pretrain", "midtrain", "sft", "rlvr", "dpo", "reward_model", "online_rlhf", "distillation")
    return {name: recipe[name] for name in names if recipe.get(name)} | phases


def _layers(layers: int, layouts: list[dict[str, int]]) -> int:
    """Returns the fewest layers for pipelines of degree 2, dealt evenly if those of the recipe are."""
    degrees = [(layout.get("pp", 1), layout.get("vpp", 1)) for layout in layouts]
    chunks = max(min(pp, 2) * min(vpp, 2) for pp, vpp in degrees)
    # Two layers for each chunk, of which the embedding and the loss take the place of one each.
    uneven = any(layers % (pp * vpp) for pp, vpp in degrees)
    return 2 * chunks - 2 if uneven else min(layers, max(LAYERS, chunks))


def _shrink_phase(where: str, phase: dict[str, Any], full: Mapping[str, Any], steps: int) -> list[str]:
    """Gives a phase fewer steps, ranks and micro-batches. Returns what was switched because a CPU lacks it.

    Args:
        where: The place of the phase in the recipe.
        phase: The phase with smaller sizes, which is changed.
        full: The phase as the recipe has it.
        steps: The most steps.
    """
    before = full.get("parallelism", {})
    after, switched = _layout(before), []
    for name in ONLY_GPU:
        if name in after:
            switched.append(f"{where}.parallelism.{name}: its default, not {after.pop(name)}")
    if "parallelism" in phase:
        phase["parallelism"] = after
    if phase.get("precision", "fp32") not in ("fp32", "bf16"):
        switched.append(f"{where}.precision: bf16, not {phase['precision']}")
        phase["precision"] = "bf16"
    sampling = phase.get("sampling", {})
    if sampling.get("kind") == "vllm":
        switched.append(f"{where}.sampling.kind: in-process, not vllm")
        phase["sampling"] = {"max_new_tokens": sampling["max_new_tokens"]}
    if "min_margin" in phase:
        phase["min_margin"] = 0.0
    _shrink_steps(phase, min(phase["steps"], steps))
    if before_updates := full.get("updates"):
        # The warm-up counts updates, of which a step has fewer.
        optimizer = phase["optimizer"]
        optimizer["warmup_steps"] = max(1, optimizer["warmup_steps"] * phase["updates"] // before_updates)
    if "micro_batches" in phase:
        phase["micro_batches"] = _data(after) * min(2, phase["micro_batches"] // _data(before) or 1)
    if "batch" in phase:
        _shrink_batch(phase, full, _data(after))
    return switched


def _layout(layout: dict[str, Any]) -> dict[str, Any]:
    """Returns a layout with the degree 2 of each kind of parallelism that it has, and the fewest ranks."""
    small = layout | {name: min(layout[name], 2) for name in DEGREES if name in layout}
    small.pop("pp_layers", None)
    tp, pp, cp, ep = (small.get(name, 1) for name in ("tp", "pp", "cp", "ep"))
    fewest = math.lcm(tp * pp * cp, small.get("etp", tp) * ep * pp)
    return small | ({"ranks": max(fewest, min(layout["ranks"], 2))} if "ranks" in layout else {})


def _data(layout: Mapping[str, int]) -> int:
    """Returns the data-parallel ranks of a layout."""
    return layout.get("ranks", 1) // math.prod(layout.get(name, 1) for name in ("tp", "pp", "cp"))


def _shrink_steps(phase: dict[str, Any], steps: int) -> None:
    """Gives a phase so many steps; what is counted in steps keeps its share of them, and a place of its own."""
    share = steps / phase["steps"]

    def shorter(path: str, body: Any) -> None:
        for name, value in body.items() if isinstance(body, dict) else enumerate(body):
            here = f"{path}.{name}"
            if isinstance(value, (dict, list)):
                shorter(here, value)
            elif any(fnmatchcase(here, pattern) for pattern in IN_STEPS) and value:
                # What comes every so many steps comes at most four times.
                least = math.ceil(steps / 4) if here.endswith(("every", "interval")) else 1
                body[name] = max(least, round(value * share))

    shorter("", phase)
    phase["steps"] = steps
    if early := phase.get("release_checkpoint_steps"):
        phase["release_checkpoint_steps"] = [step for step in early if step <= steps]
    for number, part in enumerate(phase.get("batch", {}).get("ramp", ())):
        part["until_step"] = max(part["until_step"], number + 1)


def _shrink_batch(phase: dict[str, Any], full: Mapping[str, Any], data: int) -> None:
    """Gives a data-parallel rank of a phase on text at most two micro-batches of two rows; a ramp keeps its shape."""
    micro, data_before = full["batch"]["micro_tokens"], _data(full.get("parallelism", {}))
    parts = [*phase["batch"].get("ramp", ()), phase["batch"]]
    counts = [part["global_tokens"] // micro // data_before for part in parts]
    tokens = phase["sequence_length"] * min(2, micro // full["sequence_length"])
    phase["batch"]["micro_tokens"] = tokens
    for part, count in zip(parts, counts, strict=True):
        part["global_tokens"] = data * min(2, counts[0]) * count // counts[0] * tokens


def _shrink_corpus(data: dict[str, Any]) -> None:
    """Holds out enough of few documents, and drops what is known of the size of the full sources."""
    data["heldout_fraction"] = HELDOUT
    data["curation"] = {**data.get("curation", {}), "alarm_share": 1.0}
    for source in data["sources"]:
        source.pop("supply", None)
        source.pop("tree_digest", None)
        if "heldout_fraction" in source:
            source["heldout_fraction"] = HELDOUT
    for classifier in data.get("classifiers", ()):
        classifier |= {"keep": max(KEPT, classifier.get("keep", 0.0)), "heldout_fraction": HELDOUT}
