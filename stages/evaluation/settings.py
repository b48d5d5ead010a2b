"""The section `evaluation` of a recipe: the measurements, the thresholds of the gates, and the nodes of the graph.

No stage imports this module: a threshold changes a verdict, not the result of another stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Flag, Line, Range
from pipeline.core.stage import Config, added
from pipeline.graph.dag import NodeSpec
from stages.data.recipe import DataRecipe
from stages.evaluation import estimates, pass_at_k, win_rate
from stages.evaluation.baselines import BaselinesSection
from stages.evaluation.bits_per_byte import HeldoutLimit
from stages.evaluation.estimates import DOCUMENT_TOKENS, QUESTION_TOKENS, count
from stages.evaluation.gates import RULES
from stages.evaluation.long_context import ContextSection
from stages.evaluation.model_evaluation import ROWS_PER_BATCH, TEXT_ITEMS
from stages.evaluation.pass_at_k import FurtherSamples, NumSamples
from stages.evaluation.text_items import TextItems
from stages.generation.engine import Engine
from stages.rl.config import RlPhase
from stages.rl.nodes import PASS_RATES
from stages.rl.rollout.pass_rates import expected_tasks
from stages.tasks.benchmarks import HarnessSection
from stages.tasks.eval_set import ChatItems, Problems
from stages.train.nodes import ExportedModel

if TYPE_CHECKING:
    WaivableGate = str
else:
    WaivableGate = Literal[tuple(RULES)]
# A gain that must be exceeded. A recipe that wants none waives the gate.
Gain = Annotated[float, Range(0, 1, below=True)]


# The thresholds of the gates are settings of the recipe, so that a release states them.
class ChatSection(Config):
    """Evaluation in conversations, and the thresholds of its release gates."""

    items: ChatItems
    """evaluation items"""
    max_new_tokens: Context = 64
    """maximum number of tokens of an answer"""
    num_samples: NumSamples = 8
    """answers per problem, for pass@k"""
    pass_at_k: FurtherSamples | None = added(None)
    """further answers to some problems by the models before and after RLVR, which tell learning from sharpening;
    null: none"""
    min_gain: Gain = 0.0
    """gain in pass@1 from SFT to RLVR that must be exceeded, as far as there is room for it"""
    min_win_rate: Annotated[float, Range(0.5, 1, below=True)] = 0.5
    """value that the lower confidence bound of a win rate must exceed"""
    skill_tolerance: Annotated[float, Range(0, 0.25)] = 0.05
    """maximum loss of pass@1 in phases after RLVR"""

    @model_validator(mode="after")
    def _check_further(self) -> ChatSection:
        if self.pass_at_k and self.pass_at_k.num_samples <= self.num_samples:
            raise ValueError(
                f"pass_at_k.num_samples = {self.pass_at_k.num_samples} is not more than num_samples = "
                f"{self.num_samples}, the answers to every problem; raise it, or leave pass_at_k out"
            )
        return self


class EvaluationSection(Config):
    """Measurements after each phase, and the thresholds of the release gates."""

    problems: Problems
    """number of evaluation problems by task"""
    heldout_documents: HeldoutLimit = 60
    """maximum number of held-out documents per source"""
    max_new_tokens: Context = 64
    """maximum number of tokens generated per problem"""
    parity_tolerance: Annotated[float, Range(0, 0.1, above=True)] = 1e-4
    """maximum difference of any fp32 logit between an export and the trainer; rounding grows with the logits and
    the context"""
    bits_per_byte_tolerance: Annotated[float, Range(0, 0.5)] = 0.05
    """maximum increase in bits per byte of the sources that mid-training or a long-context phase reads"""
    left_out_tolerance: Annotated[float, Range(0, 0.5)] | None = added(None)
    """maximum increase in bits per byte of each source that earlier phases read and such a phase leaves out; null:
    these are stated and not judged"""
    min_accuracy_gain: Gain = 0.0
    """gain in accuracy from mid-training that must be exceeded, as far as there is room for it"""
    waived_gates: Annotated[dict[WaivableGate, Line], Field(max_length=len(RULES))] = Field({})
    """gates on the effect of training that do not refuse the release, each with the reason, which the cards state"""
    stop_at_gates: Flag = added(False)
    """whether a gate that fails stops the run before the next phase: stages `gates-<phase>` judge each gate on the
    effect of training as soon as the phase is evaluated; otherwise, the build of the release judges all of them"""
    chat: ChatSection | None = added(None)
    """evaluation in conversations; null: none"""
    context: ContextSection | None = added(None)
    """evaluation on long texts: passkeys and loss by position; null: none"""
    text_items: TextItems | None = added(None)
    """evaluation items that are made of held-out text, with an n-gram baseline; null: none"""
    baselines: BaselinesSection = added(BaselinesSection())
    """baselines beside bits per byte"""
    harness: HarnessSection | None = added(None)
    """task sets of lm-evaluation-harness; null: none"""
    engine: Engine = Engine()
    """what computes evaluations: the stages' processes, or vLLM"""

    @model_validator(mode="after")
    def _check_further(self) -> EvaluationSection:
        further = self.chat and self.chat.pass_at_k
        task, fewest = min(self.problems.items(), key=lambda item: item[1])
        if further and further.items >= fewest:
            raise ValueError(
                f"chat.pass_at_k.items = {further.items} is not less than problems.{task} = {fewest}, of which it is a "
                "part; lower it, or raise the other"
            )
        return self

    def tokens(self, sources: int) -> int:
        """Returns the most tokens that the evaluation of one model reads and draws, with this number of sources.

        They are those of the held-out documents and the items made of them, the long texts and the problems; the other
        sections are not counted.
        """
        documents = sources * self.heldout_documents * DOCUMENT_TOKENS
        long = 0 if self.context is None else self.context.tokens
        items = 0 if self.text_items is None else self.text_items.tokens
        return documents + long + items + sum(self.problems.values()) * (QUESTION_TOKENS + self.max_new_tokens)

    def pieces(self, sources: int) -> int:
        """Returns the most pieces into which the evaluation of one model is divided, with this number of sources.

        They are those of the held-out documents and the items made of them, the long texts and the problems; the other
        sections are not counted.
        """
        documents = count(sources * self.heldout_documents, ROWS_PER_BATCH)
        long = 0 if self.context is None else self.context.pieces
        items = 0 if self.text_items is None else count(sum(self.text_items.kinds.values()), ROWS_PER_BATCH)
        return documents + count(sum(self.problems.values()), ROWS_PER_BATCH) + long + items


@dataclass(frozen=True)
class Measured:
    """The models of a recipe and what their evaluation needs."""

    section: EvaluationSection
    data: DataRecipe
    # All exported models by name, the final one last.
    models: Mapping[str, ExportedModel]
    padded_vocab_size: int
    # Seed of the recipe.
    seed: int
    # Name of the recipe, for errors.
    title: str


def item_nodes(
    section: EvaluationSection, seed: int, base: Path, title: str
) -> tuple[list[NodeSpec], dict[str, str], dict[str, Any]]:
    """Returns the nodes of evaluation items, these nodes by role, and the config of the benchmarks.

    Args:
        section: The section `evaluation`.
        seed: Seed of the recipe.
        base: Folder of the recipe, from which task sets of its own are found.
        title: Name of the recipe, for errors.

    Raises:
        RecipeError: A task set of the recipe's own is missing, or differs from its pin.
    """
    chat = None if section.chat is None else section.chat.items.model_dump()
    items = {"problems": section.problems, "seed": seed, "chat": chat}
    specs, roles = [NodeSpec("items", "items", items)], {"items": "items"}
    benchmarks: dict[str, Any] = {}
    if harness := section.harness:
        benchmarks = {"sets": harness.task_sets(base, title), "limit": harness.limit}
        specs.append(NodeSpec("benchmarks", "benchmarks", benchmarks))
        roles["benchmarks"] = "benchmarks"
    return specs, roles, benchmarks


def heldout_config(measured: Measured, model: ExportedModel) -> dict[str, Any]:
    """Returns the settings of a model's evaluation on held-out documents and problems, without long texts."""
    section, sources = measured.section, len(measured.data.sources)
    return {
        "heldout_documents": section.heldout_documents,
        "max_new_tokens": section.max_new_tokens,
        "engine": section.engine,
        "conversations": measured.data.conversations,
        "works": measured.data.works,
        "expected": _expected(measured, model, section.tokens(sources), section.pieces(sources)),
    }


def heldout_node(measured: Measured, model: ExportedModel) -> NodeSpec:
    """Returns the node that evaluates a model on held-out documents, problems and long texts."""
    config = heldout_config(measured, model)
    inputs = {"model": model.export_node, "dedup": "dedup", "items": "items"}
    if not model.twin:
        config["context"] = measured.section.context
        if measured.section.text_items:
            inputs[TEXT_ITEMS] = TEXT_ITEMS
    return NodeSpec(model.scores_node, "evaluate", config, inputs)


def text_item_nodes(section: EvaluationSection, without: Sequence[str]) -> list[NodeSpec]:
    """Returns the node that makes evaluation items of held-out text, without the sources that are not published."""
    if section.text_items is None:
        return []
    # Nothing is shown of a source by reference, so nothing is asked about it.
    config = {**section.text_items.model_dump(), "without": without}
    return [NodeSpec(TEXT_ITEMS, TEXT_ITEMS, config, {"dedup": "dedup"})]


def baselines_node(measured: Measured) -> NodeSpec:
    """Returns the node of the baselines, which score the same documents as every model before them."""
    section, data = measured.section, measured.data
    config = {
        **section.baselines.model_dump(),
        "heldout_documents": section.heldout_documents,
        "parts": data.parts,
        "expected": data.expected,
    }
    inputs = {"dedup": "dedup"} | {f"evaluate-{name}": f"evaluate-{name}" for name in measured.models}
    return NodeSpec("baselines", "baselines", config, inputs)


def chat_nodes(measured: Measured, chat_models: Sequence[str], before: Sequence[NodeSpec]) -> list[NodeSpec]:
    """Returns the nodes that evaluate models in conversations, and the search for test items in training data.

    Args:
        measured: The models of the recipe.
        chat_models: Names of the models that were trained on conversations, in order.
        before: All earlier nodes of the graph, among which are the tasks, orders and evaluations to search in.
    """
    section, data = measured.section, measured.data
    chat = section.chat
    if chat is None or not chat_models:
        return []
    tasks = {spec.name: spec.name for spec in before if spec.stage in ("tasks", "preferences")}
    orders = {spec.name: spec for spec in before if spec.stage == "order"}
    # The sources of each phase are those that its order mixes.
    mixes = {order.config["phase"]: sorted(order.config["mix"]) for order in orders.values()}
    sources = sorted({name for mix in mixes.values() for name in mix})
    corpus = {"parts": {source: data.parts[source] for source in sources}, "expected": data.expected}
    fresh = {"problems": section.problems, "phases": mixes, **corpus}
    inputs = {"model": f"export-{chat_models[-1]}", "dedup": "dedup", "items": "items"}
    specs = [NodeSpec("fresh", "fresh", fresh, inputs | tasks)]
    for number, which in enumerate(chat_models):
        # Reinforcement learning is judged by the model before it and the one after.
        further = chat.pass_at_k if "rlvr" in chat_models[number : number + 2] else None
        specs += _solving_nodes(measured, chat, which, further)
        if number and chat.items.courtesies > 1:
            # Each model is compared with the one before; one of online RLHF with the last before preferences.
            previous = chat_models[number - 2 if which == "online-rlhf" else number - 1]
            specs.append(_preference_node(measured, chat, which, previous))
    # Last, since the search compares all scores before it with what it finds.
    scored = {spec.name: spec.name for spec in (*before, *specs) if spec.stage in ("evaluate", "solve")}
    inputs = {"dedup": "dedup", "items": "items", "fresh": "fresh"}
    if section.harness:
        inputs["benchmarks"] = "benchmarks"
    inputs |= {name: name for name in orders} | tasks | scored
    specs.append(NodeSpec("contamination", "contamination", corpus, inputs))
    return specs


def _solving_nodes(measured: Measured, chat: ChatSection, which: str, further: FurtherSamples | None) -> list[NodeSpec]:
    """Returns the nodes in which a model answers the items, and the items drawn after training."""
    items = sum(measured.section.problems.values()) + chat.items.courtesies
    answers = items * chat.num_samples
    if further:
        answers += further.num_samples * sum(min(further.items, n) for n in measured.section.problems.values())
    tokens = answers * (QUESTION_TOKENS + chat.max_new_tokens)
    expected = _expected(measured, measured.models[which], tokens, count(items, pass_at_k.ITEMS_PER_BATCH))
    config = _generation(measured, chat) | {"expected": expected, "num_samples": chat.num_samples}
    model = f"export-{which}"
    return [
        NodeSpec(f"solve-{which}", "solve", config | {"pass_at_k": further}, {"model": model, "items": "items"}),
        NodeSpec(f"fresh-solve-{which}", "solve", config, {"model": model, "items": "fresh"}),
    ]


def pass_rates_nodes(measured: Measured, base: str, phase: RlPhase | None, seed: int) -> list[NodeSpec]:
    """Returns the node that measures the tasks of RLVR under the model that the node `base` leaves, if it filters them.

    Args:
        measured: The models of the recipe.
        base: The node of the phase before it.
        phase: The section `rlvr`; None without one.
        seed: Seed of training.
    """
    if phase is None or phase.pass_rates is None:
        return []
    model = next(model for model in measured.models.values() if model.node == base and model.step is None)
    tasks, length = expected_tasks(phase.tasks), phase.sampling.max_new_tokens
    tokens = tasks * phase.pass_rates.num_samples * (QUESTION_TOKENS + length)
    config = {
        "num_samples": phase.pass_rates.num_samples,
        "max_new_tokens": length,
        "seed": seed,
        "engine": measured.section.engine,
        "verifiers": phase.verifiers,
        "expected": _expected(measured, model, tokens, count(tasks, pass_at_k.ITEMS_PER_BATCH)),
    }
    return [NodeSpec(PASS_RATES, "pass-rates", config, {"model": model.export_node, "tasks": "tasks-rlvr"})]


def _preference_node(measured: Measured, chat: ChatSection, which: str, previous: str) -> NodeSpec:
    """Returns the node that compares the answers of two models."""
    items = sum(measured.section.problems.values()) + chat.items.courtesies
    tokens = items * (QUESTION_TOKENS + chat.max_new_tokens)
    pieces = max(1, len(win_rate.SIDES) * count(chat.items.courtesies, win_rate.ITEMS_PER_BATCH))
    expected = _expected(measured, measured.models[which], tokens, pieces)
    config = _generation(measured, chat) | {"expected": expected, "model": which, "before": previous}
    inputs = {"model": f"export-{which}", "before": f"export-{previous}", "items": "items"}
    return NodeSpec(f"prefer-{which}", "prefer", config, inputs)


def _generation(measured: Measured, chat: ChatSection) -> dict[str, Any]:
    return {"max_new_tokens": chat.max_new_tokens, "seed": measured.seed, "engine": measured.section.engine}


def harness_nodes(measured: Measured, benchmarks: Mapping[str, Any], chat_models: Sequence[str]) -> list[NodeSpec]:
    """Returns the nodes that run the task sets on the final model or on each; their config is `benchmarks`."""
    section, engine = measured.section.harness, measured.section.engine
    if section is None:
        return []
    # A model with a step is a checkpoint from within a phase; what merging gave is measured on held-out text.
    models = [m for m in measured.models.values() if m.step is None and not m.name.startswith("unmerged-")]
    specs: list[NodeSpec] = []
    for model in models if section.every_model else models[-1:]:
        converses = model.name in chat_models
        if not (pieces := section.pieces(converses)):
            # Its sets are asked in conversation alone.
            continue
        config = {
            **benchmarks,
            "forms": section.forms(converses),
            "max_new_tokens": section.max_new_tokens,
            "expected": _expected(measured, model, section.tokens(converses), pieces),
            "engine": engine,
        }
        inputs = {"model": model.export_node, "benchmarks": "benchmarks"}
        specs.append(NodeSpec(f"harness-{model.name}", "harness", config, inputs))
    if len(specs) > 1:
        names = [spec.name for spec in specs]
        config = {"models": [name.removeprefix("harness-") for name in names]}
        specs.append(NodeSpec("benchmark-changes", "benchmark-changes", config, {name: name for name in names}))
    return specs


def _expected(measured: Measured, model: ExportedModel, tokens: int, pieces: int = 1) -> estimates.Expected:
    """Returns what `atom plan` expects of a measurement of so many tokens in so many pieces."""
    trained, engine = model.trained, measured.section.engine
    return estimates.expected(trained.model, measured.padded_vocab_size, tokens, pieces, trained.dtype, engine)
