"""Gates of a release whose verdict is known before training."""

from __future__ import annotations

from collections.abc import Iterator

from stages.data.recipe import DataRecipe
from stages.recipe import ReleaseRecipe
from stages.text_phases import phases


def problems(config: ReleaseRecipe, data: DataRecipe) -> Iterator[str]:
    """Reasons known now for which a gate would refuse the release after its training."""
    gates = {"pretrain": "pretraining_lowers_bits_per_byte", "midtrain": "midtraining_keeps_bits_per_byte"}
    evaluation, heldout = config.evaluation, {s.name for s in data.sources if data.heldout_fraction_of(s)}
    for phase in phases(config):
        gate = gates.get(phase.node, "longcontext_keeps_bits_per_byte")
        if phase.node == "sft" or gate in evaluation.waived_gates or heldout & phase.config.mix.keys():
            continue
        yield (
            f"{phase.where}.mix has no source with held-out documents, by which the gate {gate} judges the phase; set "
            "heldout_fraction of one in the data recipe"
        )
    gate, context = "longcontext_finds_passkeys", config.model.context_length
    texts = evaluation.context
    if config.long_context and texts and texts.lengths[-1] <= context and gate not in evaluation.waived_gates:
        yield (
            f"evaluation.context.lengths end with {texts.lengths[-1]}, and the gate {gate} asks for keys in more than "
            f"model.context_length = {context} tokens; add a longer text"
        )
