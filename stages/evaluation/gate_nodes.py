"""The gates of a recipe on the effect of training: when each is judged, and the nodes that do it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.graph.dag import NodeSpec
from pipeline.graph.plan import PlannedGate
from stages.evaluation.gates import REWARD, RULES, judged_after
from stages.evaluation.gates_stage import NAME
from stages.evaluation.settings import EvaluationSection, Measured
from stages.train import merge

THRESHOLDS = ("bits_per_byte_tolerance", "left_out_tolerance", "min_accuracy_gain")
CHAT_THRESHOLDS = ("min_gain", "min_win_rate", "skill_tolerance")


def planned_gates(section: EvaluationSection, phases: Mapping[str, str], converses: bool) -> Iterator[PlannedGate]:
    """Yields the gates on the effect of training, one line for each phase after which one is judged.

    Args:
        section: The section `evaluation`.
        phases: What `phases_of` returns.
        converses: Whether models are trained on conversations.
    """
    for gate, model in _judged_after(section, phases, converses):
        judged = f"{NAME}-{phases[model]}" if section.stop_at_gates else "atom build"
        yield PlannedGate(gate, RULES[gate].compares, phases[model], judged, section.waived_gates.get(gate))


def phases_of(exported: Mapping[str, str], has_reward_model: bool) -> dict[str, str]:
    """Returns {model: phase that trained it} in the order of training, from {exported model: its node}.

    Models that a release measures beside the one that it goes on with are left out. A reward model is among them,
    before the policy that learns from it.
    """
    models = {name: node for name, node in exported.items() if not name.startswith("unmerged-")}
    phases = {name: node.removeprefix(f"{merge.NAME}-") for name, node in models.items()}
    online = {name: phases.pop(name) for name in ("online-rlhf",) if name in phases}
    return phases | ({REWARD: REWARD} if has_reward_model else {}) | online


def with_gates(
    specs: Sequence[NodeSpec], measured: Measured, training: Iterable[str], context: int, converses: bool
) -> list[NodeSpec]:
    """Returns the nodes of a graph and those of the gates, for which the phases after them wait.

    Args:
        specs: All other nodes.
        measured: The models of the recipe.
        training: The nodes of the training phases, in order.
        context: Context of mid-training, in tokens.
        converses: Whether models are trained on conversations.
    """
    section, names = measured.section, {spec.name for spec in specs}
    phases = phases_of({name: model.node for name, model in measured.models.items()}, REWARD in names)
    order, judged = list(phases), list(_judged_after(section, phases, converses))
    thresholds = {name: getattr(section, name) for name in THRESHOLDS}
    thresholds["chat"] = section.chat and {name: getattr(section.chat, name) for name in CHAT_THRESHOLDS}
    gates: dict[str, NodeSpec] = {}
    for model in dict.fromkeys(model for _, model in judged):
        models = order[: order.index(model) + 1]
        of_text = [phase for phase in dict.fromkeys(phases[name] for name in models) if f"order-{phase}" in names]
        here = [gate for gate, name in judged if name == model]
        decided = {gate for gate, name in judged if name in models}
        later: dict[str, str] = {}
        for gate, name in judged:
            if gate not in decided:
                later.setdefault(gate, phases[name])
        config = {
            "phase": phases[model],
            "gates": here,
            "later": later,
            "models": models,
            "phases": of_text,
            "context": context,
            "thresholds": thresholds,
            "waived": {gate: reason for gate, reason in section.waived_gates.items() if gate in here},
        }
        scores = [f"{kind}-{name}" for kind in ("evaluate", "solve", "prefer") for name in models]
        inputs = {name: name for name in (*scores, *(f"order-{phase}" for phase in of_text)) if name in names}
        if model == REWARD:
            inputs[REWARD] = REWARD
        gates[phases[model]] = NodeSpec(f"{NAME}-{phases[model]}", NAME, config, inputs)
    after: dict[str, tuple[str, ...]] = {}
    latest: tuple[str, ...] = ()
    for phase in training:
        after[phase] = latest
        latest = (gates[phase].name,) if phase in gates else latest
    return [*(replace(spec, after=after.get(spec.name, ())) for spec in specs), *gates.values()]


def _judged_after(section: EvaluationSection, phases: Mapping[str, str], converses: bool) -> Iterator[tuple[str, str]]:
    """Yields (gate, model) as `judged_after` does, of the models that these phases leave."""
    chat = section.chat if converses else None
    compares = chat is not None and chat.items.courtesies > 1
    return judged_after(list(phases), section.context is not None, chat is not None, compares)
