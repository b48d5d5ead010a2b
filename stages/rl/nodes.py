"""The nodes of a recipe's graph that learn from answers: RLVR, DPO, the reward model, online RLHF and distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.graph.dag import NodeSpec
from stages.models.base import ModelConfig
from stages.rl.config import Distillation, DpoPhase, RewardPhase, RlPhase
from stages.rl.preference_pairs import PreferenceSection
from stages.train.nodes import TrainedModel, published_dtype, training_config

# The node that measures the tasks of RLVR before it.
PASS_RATES = "pass-rates-rlvr"


@dataclass(frozen=True)
class PostTraining:
    """The sections of a recipe that learn from answers, and what their nodes share.

    Attributes:
        rlvr: Section of RLVR; None, as of the next four, if the recipe has none.
        preferences: Section of pairs from files.
        dpo: Section of DPO.
        reward_model: Section of the reward model.
        online_rlhf: Section of online RLHF.
        model: Model that the last phase on text leaves.
        base: Node of that phase.
        padded_vocab_size: Rows of the embedding.
        seed: Seed of the recipe.
        benchmark_ngram: Words of an n-gram by which tasks that occur in benchmarks are found; None without benchmarks.
    """

    rlvr: RlPhase | None
    preferences: PreferenceSection | None
    dpo: DpoPhase | None
    reward_model: RewardPhase | None
    online_rlhf: RlPhase | None
    model: ModelConfig
    base: str
    padded_vocab_size: int
    seed: int
    benchmark_ngram: int | None


def trained_models(sections: PostTraining) -> dict[str, TrainedModel]:
    """Returns the model after each phase, by node."""
    phases = {
        "rlvr": sections.rlvr,
        "dpo": sections.dpo,
        "reward": sections.reward_model,
        "online-rlhf": sections.online_rlhf,
    }
    model, vocabulary = sections.model, sections.padded_vocab_size
    return {
        name: TrainedModel(model, published_dtype(model, vocabulary, section.precision))
        for name, section in phases.items()
        if section is not None
    }


def offline_nodes(sections: PostTraining) -> list[NodeSpec]:
    """Returns the nodes of RLVR, DPO and the reward model, with their tasks and replayed data."""
    specs: list[NodeSpec] = []
    base = sections.base
    if rlvr := sections.rlvr:
        specs += _phase_nodes(sections, "rlvr", "rlvr", rlvr, {"init": base}, rlvr.tasks, {"name": "rlvr"})
        base = "rlvr"
    if preferences := sections.preferences:
        config = {name: getattr(preferences, name) for name in PreferenceSection.model_fields}
        inputs = {"tokenizer": "tokenizer", "items": "items"}
        if sections.benchmark_ngram is not None:
            config, inputs = config | {"ngram": sections.benchmark_ngram}, inputs | {"benchmarks": "benchmarks"}
        specs.append(NodeSpec("preferences", "preferences", config | {"seed": sections.seed}, inputs))
    if dpo := sections.dpo:
        tasks = (*dpo.preferences.tasks, *(dpo.sft_tasks.tasks if dpo.sft_tasks else ()))
        stored = {"preferences": "preferences"} if dpo.stored_pairs else {}
        specs += _phase_nodes(sections, "dpo", "dpo", dpo, {"init": base, **stored}, tasks)
    if reward := sections.reward_model:
        pairs = {"preferences": "preferences"} if preferences else {"pairs": "dpo"}
        specs += _phase_nodes(sections, "reward", "reward", reward, {**pairs, "init": base})
    return specs


def online_nodes(sections: PostTraining) -> list[NodeSpec]:
    """Returns the nodes of online RLHF, which reads the exported reward model."""
    online = sections.online_rlhf
    if online is None:
        return []
    inputs = {"init": "dpo", "reward": "reward", "reward_model": "export-reward"}
    # The stage is that of rlvr; the name tells the two apart in keys and seeds.
    return _phase_nodes(sections, "online-rlhf", "rlvr", online, inputs, online.tasks, {"name": "online-rlhf"})


def distillation_nodes(
    sections: PostTraining, section: Distillation, student: ModelConfig, init: str, teacher: str, model: ModelConfig
) -> list[NodeSpec]:
    """Returns the nodes of on-policy distillation.

    Args:
        sections: What the phases of the recipe's own model share.
        section: Section of distillation.
        student: Model of the student.
        init: Node that fine-tuned the student.
        teacher: Node that trained the teacher.
        model: Model of the teacher.
    """
    name, start_inputs = "distillation", {"init": init, "teacher": teacher}
    of_student, settings = replace(sections, model=student), {"name": name, "teacher": model}
    return _phase_nodes(of_student, name, name, section, start_inputs, section.tasks, settings)


def _phase_nodes(
    sections: PostTraining,
    name: str,
    stage: str,
    section: RlPhase | DpoPhase | RewardPhase,
    start_inputs: Mapping[str, str],
    tasks: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[NodeSpec]:
    """Returns the node of a phase, after those of its tasks and of the order of the data that it replays.

    Args:
        sections: What the phases share.
        name: Name of the phase and its node.
        stage: Stage that runs it.
        section: Its section of the recipe.
        start_inputs: The nodes that it begins with, by role.
        tasks: Sources of its tasks, if it draws answers.
        settings: Settings of the stage beside the common ones.
    """
    specs = []
    inputs = {"tokenizer": "tokenizer", **start_inputs}
    if tasks:
        # A reward phase has no tasks; the case is for the type checker.
        verifiers = {} if isinstance(section, RewardPhase) else section.verifiers
        config: dict[str, Any] = {"sources": tasks, "verifiers": verifiers, "seed": sections.seed}
        task_inputs = {"items": "items"}
        if sections.benchmark_ngram is not None:
            config["ngram"] = sections.benchmark_ngram
            task_inputs["benchmarks"] = "benchmarks"
        specs.append(NodeSpec(f"tasks-{name}", "tasks", config, task_inputs))
        inputs |= {"tasks": f"tasks-{name}", "items": "items"}
        if isinstance(section, RlPhase) and section.pass_rates:
            inputs["pass_rates"] = PASS_RATES
    if isinstance(section, RlPhase) and (replay := section.replay):
        order = {
            "phase": name,
            "mix": replay.mix,
            "sequence_length": replay.sequence_length,
            "steps": section.steps,
            "rows": replay.rows,
            "seed": sections.seed,
        }
        specs.append(NodeSpec(f"order-{name}", "order", order, {"tokens": "tokenize"}))
        inputs |= {"tokens": "tokenize", "order": f"order-{name}"}
    training = training_config(sections.model, section, sections.padded_vocab_size, sections.seed)
    specs.append(NodeSpec(name, stage, training | dict(settings or {}), inputs))
    return specs
