"""The graph of a release: all stages, the phases and models of a recipe, and the inputs of each node.

Only this module has their names; the engine (`pipeline/`) runs any graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.core.text import escaped
from pipeline.graph import dag
from pipeline.graph.dag import Checkpoint, Graph, build_graph, names_in_words, require_same_beginning
from pipeline.graph.plan import PlannedGate
from pipeline.graph.recipe import Recipe
from pipeline.graph.supply import SourceSupply
from stages.data.recipe import DataRecipe, extension_modules
from stages.data.recipe import loads as load_data_recipe
from stages.data.supply import supplies
from stages.evaluation.gate_nodes import phases_of, planned_gates, with_gates
from stages.evaluation.settings import (
    Measured,
    baselines_node,
    chat_nodes,
    harness_nodes,
    heldout_config,
    heldout_node,
    item_nodes,
    pass_rates_nodes,
    text_item_nodes,
)
from stages.export.nodes import export_node, reward_node, variant_nodes
from stages.miniature import miniature
from stages.recipe import ReleaseRecipe
from stages.rl.nodes import (
    PASS_RATES,
    PostTraining,
    distillation_nodes,
    offline_nodes,
    online_nodes,
    trained_models,
)
from stages.rl.protocols import TRAINED
from stages.train import nodes, smaller_model
from stages.train.imported_weights import StartFrom, dtype_of, require_dtype
from stages.train.imported_weights import start_from_section as start_from
from stages.train.nodes import (
    ExportedModel,
    TextPhase,
    TrainedModel,
    import_node,
    phase_nodes,
    published_dtype,
    size_nodes,
    student_node,
)
from stages.train.rehearsal import is_unrehearsed, with_rehearsals

__all__ = [
    "DATA_RECIPE",
    "RECIPE",
    "STAGES",
    "compose",
    "extension_modules",
    "gates",
    "load_data_recipe",
    "miniature",
    "problems",
    "start_from",
    "supply",
]

RECIPE, DATA_RECIPE = ReleaseRecipe, DataRecipe
STAGES = {
    "acquire": "stages.data.acquire.acquire_stage",
    "generate": "stages.data.acquire.generate_stage",
    "items": "stages.tasks.eval_set",
    "benchmarks": "stages.tasks.benchmarks",
    "classifier": "stages.data.curate.classifier_stage",
    "filter": "stages.data.curate.filter_stage",
    "duplicates": "stages.data.curate.duplicates_stage",
    "representatives": "stages.data.curate.representatives_stage",
    "dedup": "stages.data.curate.dedup_stage",
    "tokenizer": "stages.formats.tokenizer",
    "tokenize": "stages.data.order.tokenize_stage",
    "order": "stages.data.order.order_stage",
    "import": "stages.train.imported_weights",
    "pretrain": "stages.train.pretrain",
    "midtrain": "stages.train.pretrain:MIDTRAIN",
    "sft": "stages.train.pretrain:SFT",
    "merge": "stages.train.merge",
    "rehearsal": "stages.train.rehearsal_stage",
    "size": "stages.train.smaller_model",
    "tasks": "stages.rl.rollout.tasks",
    "preferences": "stages.rl.preference_pairs",
    "rlvr": "stages.rl.rlvr",
    "dpo": "stages.rl.dpo",
    "distillation": "stages.rl.distillation",
    "reward": "stages.rl.reward_model",
    "export": "stages.export.hf",
    "text-items": "stages.evaluation.text_items",
    "evaluate": "stages.evaluation.model_evaluation",
    "gates": "stages.evaluation.gates_stage",
    "solve": "stages.evaluation.pass_at_k",
    "pass-rates": "stages.evaluation.pass_rates",
    "fresh": "stages.evaluation.generated_eval",
    "prefer": "stages.evaluation.win_rate",
    "contamination": "stages.evaluation.contamination",
    "baselines": "stages.evaluation.baselines",
    "harness": "stages.evaluation.harness",
    "benchmark-changes": "stages.evaluation.benchmark_changes",
    "variant": "stages.export.variants.stage",
}
"""{stage: its module, and after a colon its name there if that is not STAGE}.

Importing one is cheap: no torch, datatrove or MLflow.
"""

CHAT_MODELS = ("sft", "rlvr", "dpo", "online-rlhf")
"""Models that are trained on conversations, in the order of training."""


def compose(recipe: Recipe, store: Store, without_data: bool = False) -> Graph:
    """Composes the graph of a release: each section of the recipe returns its nodes, which are added once.

    Reads the digests of source trees and, if a phase continues from an earlier run, the sealed checkpoints.

    Args:
        recipe: The recipe.
        store: The artifacts of this machine.
        without_data: True if source trees may be absent. Keys that depend on a tree without a pinned digest are then
            provisional.

    Raises:
        RecipeError: Sections contradict each other, or a file that the recipe names is missing or differs.
    """
    config, data_recipe = recipe.config, recipe.data
    assert isinstance(config, ReleaseRecipe) and isinstance(data_recipe, DataRecipe)
    if problem := next(problems(recipe), None):
        raise RecipeError(f"{recipe.title}: {problem}")
    data, absent = data_recipe.present() if without_data else (data_recipe.resolved(), ())
    seed, vocabulary, evaluation = config.seed, config.tokenizer.padded_vocab_size, config.evaluation
    training_seed = seed if config.training_seed is None else config.training_seed
    phases = config.text_phases
    start, imported = _imported(recipe, config, store)
    continued = _continued_checkpoints(phases, recipe.title, store)

    # From sources to token shards, and the items that no training document may contain.
    items, evaluated, benchmarks = item_nodes(evaluation, seed, recipe.path.parent, recipe.title)
    specs = data.acquisition_nodes(seed) + items
    import_inputs = {}
    if start and imported:
        specs.append(import_node(start, imported, vocabulary, is_published=config.pretrain is None))
        import_inputs = {"import": "import"}
    specs += data.curation_nodes(seed, config.tokenizer, evaluated, import_inputs)

    # Training.
    text_specs, trained = phase_nodes(phases, config.model, imported, continued, vocabulary, training_seed)
    smaller, twins = size_nodes(config.sizes, config.model, config.pretrain, vocabulary, training_seed)
    base = phases[-1].result
    post_training = PostTraining(
        rlvr=config.rlvr,
        preferences=config.preferences,
        dpo=config.dpo,
        reward_model=config.reward_model,
        online_rlhf=config.online_rlhf,
        model=trained[base].model,
        base=base,
        padded_vocab_size=vocabulary,
        seed=training_seed,
        benchmark_ngram=data.curation.decontamination.ngram if benchmarks else None,
    )
    trained |= trained_models(post_training)
    specs += text_specs + offline_nodes(post_training)
    if reward := trained.get("reward"):
        specs.append(reward_node(reward, vocabulary, evaluation.parity_tolerance))
    specs += online_nodes(post_training)

    # Exports and what is measured of them.
    models = {name: ExportedModel(name, node, step, trained[node]) for name, (node, step) in config.exported.items()}
    final = list(models.values())[-1]
    student: ExportedModel | None = None
    if distillation := config.distillation:
        assert config.pretrain and config.sft  # `problems` refuses distillation without them
        number = distillation.size - 1
        tuning, tuned = student_node(
            config.sizes[number], number, config.model, config.pretrain, config.sft, distillation.sft_optimizer,
            vocabulary, training_seed,
        )  # fmt: skip
        student = ExportedModel("distillation", "distillation", None, tuned, twin=True)
        tasks, *taught = distillation_nodes(
            post_training, distillation, tuned.model, tuning.name, final.node, final.trained.model
        )
        # Among the first nodes, so that the tasks are searched for evaluation items.
        specs.append(tasks)
        smaller += [tuning, *taught, export_node(student, True, vocabulary, evaluation.parity_tolerance, training_seed)]
    chat_models = [name for name in models if name in CHAT_MODELS]
    measured = Measured(evaluation, data, models, vocabulary, seed, recipe.title)
    specs += text_item_nodes(evaluation, config.release.by_reference)
    for model in (*models.values(), *twins):
        nodes_of_kind = smaller if model.twin else specs
        converses = model.name in chat_models
        nodes_of_kind.append(export_node(model, converses, vocabulary, evaluation.parity_tolerance, training_seed))
        nodes_of_kind.append(heldout_node(measured, model))
    specs.append(baselines_node(measured))
    if config.sft:
        specs += chat_nodes(measured, chat_models, specs)
    specs += harness_nodes(measured, benchmarks, chat_models)
    specs += pass_rates_nodes(measured, base, config.rlvr, training_seed)
    repositories = {name: f"{config.release.namespace}/{config.name}-{name}" for name in models}
    if start and not config.pretrain:
        repositories["base"] = start.repo
    evaluated_final = heldout_config(measured, final)
    specs += variant_nodes(models, repositories, config.release.variants, evaluated_final, recipe.title, student)
    # Last, so that smaller models fill what the others leave of a cluster.
    specs += smaller
    if evaluation.stop_at_gates:
        training = [*(phase.node for phase in phases), PASS_RATES, *trained_models(post_training)]
        specs = with_gates(specs, measured, training, config.model.context_length, config.sft is not None)

    def rehearsed(phases: Sequence[TextPhase]) -> Graph:
        return build_graph(recipe, with_rehearsals(specs, config.rehearsal, phases, config.model, vocabulary), absent)

    graph = rehearsed(phases)
    # A phase that is sealed needs no rehearsal any more; one that it had stays.
    if finished := [phase.node for phase in phases if is_unrehearsed(graph, phase.node, store)]:
        graph = rehearsed([phase for phase in phases if phase.node not in finished])
    for phase in phases:
        if checkpoint := continued.get(phase.node):
            node = graph.nodes[phase.node]
            init_key = {role: graph.nodes[name].key for role, name in node.inputs.items() if role == "init"}
            require_same_beginning(checkpoint, init_key, f"{recipe.title}: {phase.where}.continue_from", store)
    return graph


def _imported(recipe: Recipe, config: ReleaseRecipe, store: Store) -> tuple[StartFrom | None, TrainedModel | None]:
    """Returns the section `start_from` with the path of its folder, and the model that it names; None without one.

    Raises:
        RecipeError: The folder is one that a published recipe may not name, or the model is on this machine in another
            type than the release would export it in.
    """
    if config.start_from is None:
        return None, None
    pretrain, vocabulary = config.pretrain, config.tokenizer.padded_vocab_size
    model = config.model.with_rope(pretrain.rope if pretrain else None, config.model.context_length)
    dtype = published_dtype(model, vocabulary, config.text_phases[0].config.precision)
    try:
        start = config.start_from.resolve(recipe.path.parent, store.home)
    except ValueError as error:
        raise RecipeError(f"{recipe.title}: {error}") from None
    if problem := require_dtype(start.repo, dtype_of(start.place(store.home)), None if pretrain else dtype):
        raise RecipeError(f"{recipe.title}: {problem}")
    return start, TrainedModel(model, dtype)


def _continued_checkpoints(phases: Sequence[TextPhase], title: str, store: Store) -> dict[str, Checkpoint]:
    """Returns the checkpoint of an earlier run from which a phase continues, by the node of the phase."""
    return {
        phase.node: dag.find(phase.config.continue_from, phase.node, f"{title}: {phase.where}.continue_from", store)
        for phase in phases
        if phase.config.continue_from
    }


def supply(recipe: Recipe) -> tuple[SourceSupply, ...]:
    """Returns the supply of each source of a recipe that a phase reads."""
    config, data = recipe.config, recipe.data
    assert isinstance(config, ReleaseRecipe) and isinstance(data, DataRecipe)
    return supplies(config.supply, data, config.asked_tokens())


def gates(recipe: Recipe) -> Iterator[PlannedGate]:
    """Yields the gates of a recipe on the effect of training, and the phase after which each is judged."""
    config = recipe.config
    assert isinstance(config, ReleaseRecipe)
    nodes_of_models = {name: node for name, (node, _) in config.exported.items()}
    phases = phases_of(nodes_of_models, config.reward_model is not None)
    return planned_gates(config.evaluation, phases, config.sft is not None)


def problems(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence for each contradiction between the sections of a recipe, or with its data recipe."""
    config, data = recipe.config, recipe.data
    assert isinstance(config, ReleaseRecipe) and isinstance(data, DataRecipe)
    yield from _problems_of_mixes(config, data)
    yield from _problems_of_generated(config, data)
    yield from _problems_of_lengths(config)
    yield from nodes.problems(config.text_phases)
    yield from _problems_of_engine(config)
    yield from _problems_of_gates(config, data)
    vocabulary = config.tokenizer.padded_vocab_size
    yield from smaller_model.problems(
        config.sizes, config.model, config.pretrain, vocabulary, config.start_from is None
    )
    yield from _problems_of_distillation(config)
    yield from _problems_of_the_reward_model(config)
    if config.rlvr and config.rlvr.pass_rates and not config.sft:
        yield (
            "rlvr.pass_rates measures the model that sft leaves, in conversation, and the recipe has no section sft; "
            "add it, or leave pass_rates out"
        )
    if config.online_rlhf and config.online_rlhf.pass_rates:
        yield "online_rlhf.pass_rates is not possible, since its tasks were learnt by earlier phases; set it in rlvr"
    if config.distillation and config.distillation.pass_rates:
        yield "distillation.pass_rates is not possible, since the teacher corrects every answer; set it in rlvr"
    if config.sft and config.sft.lora and (config.rlvr or config.dpo):
        later = "rlvr" if config.rlvr else "dpo"
        yield (
            f"sft.lora trains an adapter, and {later} would train the weights that it leaves as they are; leave out "
            f"{later}, or sft.lora"
        )


def _problems_of_the_reward_model(config: ReleaseRecipe) -> Iterator[str]:
    """Phases that ask for the reward model and have none: it is trained for online_rlhf, after all others."""
    for name, section in (("rlvr", config.rlvr), ("distillation", config.distillation)):
        if section and any(source.verifier == TRAINED for source in section.tasks):
            yield f"{name}.tasks name the verifier {TRAINED}, which only online_rlhf has; name another one"
    for name, phase in (("rlvr", config.rlvr), ("dpo", config.dpo), ("distillation", config.distillation)):
        if phase and phase.scoring_servers:
            yield f"{name}.verifiers.{TRAINED}.servers would score nothing; leave it out, or set it in online_rlhf"


def _problems_of_distillation(config: ReleaseRecipe) -> Iterator[str]:
    """A student or a teacher that the recipe does not have, and rows that the student cannot read."""
    section = config.distillation
    if section is None:
        return
    if section.size > len(config.sizes):
        yield (
            f"distillation.size = {section.size} names a smaller model, and sizes has {len(config.sizes)}; add it "
            "there, or name another"
        )
    elif config.sft and config.pretrain:
        context = config.sizes[section.size - 1].resolve(config.model, config.pretrain)[0].context_length
        if config.sft.sequence_length > context:
            yield (
                f"sft.sequence_length = {config.sft.sequence_length} is longer than the context of {context} tokens "
                f"that sizes.{section.size - 1}, the student of distillation, is pre-trained with; shorten the "
                "sequence, or leave out distillation"
            )
    if config.sft is None:
        yield "distillation begins with a student that was fine-tuned on the rows of sft; add the section sft"
    elif config.sft.lora or config.sft.continue_from:
        name, reason = "lora", "trains an adapter, and a teacher is a whole model"
        if config.sft.continue_from:
            name, reason = "continue_from", "leaves out rows that the student of distillation needs from the first on"
        yield f"sft.{name} {reason}; leave out distillation, or sft.{name}"


def _problems_of_mixes(config: ReleaseRecipe, data: DataRecipe) -> Iterator[str]:
    """Sources that the data recipe does not have, and shares that do not sum to 1."""
    names = [source.name for source in data.sources]
    mixes: dict[str, Mapping[str, float]] = {f"{phase.where}.mix": phase.config.mix for phase in config.text_phases}
    mixes |= {f"{where}.mix": mix for where, mix in config.replay_mixes().items()}
    named_sources = {
        **mixes,
        "release.maker.sources": config.release.maker.sources,
        "release.by_reference": config.release.by_reference,
        "supply.acknowledged_epochs": config.supply.acknowledged_epochs,
        "supply.acknowledged_unprobed": config.supply.acknowledged_unprobed,
    }
    for where, sources in named_sources.items():
        for source in sources:
            if source in names:
                continue
            near = difflib.get_close_matches(source, names, 1)
            hint = f"did you mean {near[0]}? It has" if near else "it has"
            yield (
                f"{where} names {source}, which data recipe {escaped(config.data, 80)} does not have; "
                f"{hint} {names_in_words(names)}"
            )
    for where, mix in mixes.items():
        if abs(sum(mix.values()) - 1) > 1e-6:
            yield f"{where} sums to {sum(mix.values()):g}; the shares must sum to 1"


def _problems_of_generated(config: ReleaseRecipe, data: DataRecipe) -> Iterator[str]:
    """Sources that a model wrote from one by reference, whose texts they may repeat, without a reason to publish them.

    Reasons for other sources are problems too.
    """
    by_reference = {name: parent for name, parent in data.generated.items() if parent in config.release.by_reference}
    for name, parent in by_reference.items():
        if name not in config.release.publish_generated:
            yield (
                f"release.by_reference names {parent}, whose texts are not published, and {name} is generated from "
                f"them; state in release.publish_generated why those of {name} may be, or leave {name} out of the data "
                "recipe"
            )
    for name in sorted(set(config.release.publish_generated) - set(by_reference)):
        yield f"release.publish_generated names {name}, which is not generated from a source by reference; remove it"


def _problems_of_engine(config: ReleaseRecipe) -> Iterator[str]:
    """Heads that vLLM cannot spread over the GPUs of the evaluation."""
    gpus = config.evaluation.engine.gpus
    heads = config.model.heads
    if gpus and heads % gpus:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        yield (
            f"evaluation.engine.gpus = {gpus} does not divide the {heads} heads of the model, which vLLM spreads over "
            f"them; use one of {divisors}"
        )


def _problems_of_lengths(config: ReleaseRecipe) -> Iterator[str]:
    """Phases of long_context that lengthen nothing, and rows of other phases beyond the model's context."""
    length_before, context = 0, config.model.context_length
    for phase in config.text_phases:
        length, where = phase.config.sequence_length, phase.where
        if where.startswith("long_context") and length <= length_before:
            yield (
                f"{where}.sequence_length = {length} is no longer than the {length_before} tokens of the phase "
                "before; long_context phases only lengthen"
            )
        length_before = length
        # Only the phases of long_context have another node than their stage.
        if phase.node != phase.stage:
            context = max(context, length)
        elif length > context:
            yield (
                f"{where}.sequence_length = {length} is longer than model.context_length = {context}; shorten the "
                "sequence, raise the context length, or make it a phase of long_context"
            )


def _problems_of_gates(config: ReleaseRecipe, data: DataRecipe) -> Iterator[str]:
    """Reasons known now for which a gate would refuse the release after its training."""
    gates = {"pretrain": "pretraining_lowers_bits_per_byte", "midtrain": "midtraining_keeps_bits_per_byte"}
    evaluation = config.evaluation
    heldout_sources = {source.name for source in data.sources if data.heldout_fraction_of(source)}
    for phase in config.text_phases:
        gate = gates.get(phase.node, "longcontext_keeps_bits_per_byte")
        if phase.node == "sft" or gate in evaluation.waived_gates or heldout_sources & phase.config.mix.keys():
            continue
        yield (
            f"{phase.where}.mix has no source with held-out documents, by which the gate {gate} judges the phase; set "
            "heldout_fraction of one in the data recipe"
        )

    if evaluation.chat and evaluation.chat.pass_at_k and not (config.sft and config.rlvr):
        yield (
            "evaluation.chat.pass_at_k compares the models before and after reinforcement learning; add the sections "
            "sft and rlvr, or leave it out"
        )

    gate, context = "longcontext_finds_passkeys", config.model.context_length
    texts = evaluation.context
    if config.long_context and texts and texts.lengths[-1] <= context and gate not in evaluation.waived_gates:
        yield (
            f"evaluation.context.lengths end with {texts.lengths[-1]}, and the gate {gate} asks for keys in more than "
            f"model.context_length = {context} tokens; add a longer text"
        )
