"""The graph of a release: all stages, the phases and models of a recipe, and the inputs of each node.

Only this module has their names; the engine (`pipeline/`) runs any graph.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.errors import RecipeError
from pipeline.core.store import Store
from pipeline.core.text import escaped
from pipeline.graph import checkpoints, registry
from pipeline.graph.dag import Graph, GraphBuilder, names_in_words, require_same_beginning
from pipeline.graph.recipe import Recipe
from stages import known_gates, sizes
from stages.data.recipe import DataRecipe, extension_modules
from stages.data.recipe import loads as load_data_recipe
from stages.evaluation import estimates
from stages.export import parity_tokens
from stages.export.variants import registry as variants
from stages.mcore.lora import Lora
from stages.models.base import ModelConfig
from stages.recipe import ReleaseRecipe
from stages.rl.config import DpoPhase, RewardPhase, RlPhase
from stages.text_phases import phases
from stages.train.config import PhaseConfig
from stages.train.published_base import dtype_of, require_dtype
from stages.train.published_base import section as start_from

__all__ = [
    "DATA_RECIPE",
    "RECIPE",
    "STAGES",
    "compose",
    "extension_modules",
    "load_data_recipe",
    "problems",
    "start_from",
]

RECIPE, DATA_RECIPE = ReleaseRecipe, DataRecipe
STAGES = {
    "acquire": "stages.data.acquire",
    "generate": "stages.data.generate",
    "items": "stages.evaluation.eval_set",
    "benchmarks": "stages.evaluation.benchmarks",
    "classifier": "stages.data.quality_classifier",
    "filter": "stages.data.filter",
    "duplicates": "stages.data.duplicate_search",
    "representatives": "stages.data.representative_copies",
    "dedup": "stages.data.dedup",
    "tokenizer": "stages.data.tokenizer",
    "tokenize": "stages.data.tokenization",
    "order": "stages.data.order",
    "import": "stages.train.imported_weights",
    "pretrain": "stages.train.pretrain",
    "midtrain": "stages.train.midtrain",
    "sft": "stages.train.sft",
    "size": "stages.train.smaller_model",
    "tasks": "stages.rl.rollout.tasks",
    "rlvr": "stages.rl.rlvr",
    "dpo": "stages.rl.dpo",
    "reward": "stages.rl.reward_model",
    "export": "stages.export.hf",
    "evaluate": "stages.evaluation.model_evaluation",
    "solve": "stages.evaluation.pass_at_k",
    "fresh": "stages.evaluation.generated_eval",
    "prefer": "stages.evaluation.win_rate",
    "contamination": "stages.evaluation.contamination",
    "memorization": "stages.evaluation.memorization",
    "harness": "stages.evaluation.harness",
    "variant": "stages.export.variants.stage",
}
"""{stage: its module}. Importing one is cheap: no torch, datatrove or MLflow."""

CHAT_MODELS = ("sft", "rlvr", "dpo", "online-rlhf")
Dtype = Literal["float32", "bfloat16"]
FP32_PARAMETERS = 10**9
"""Largest model that is published in fp32; a larger one is published in bf16, however it was trained."""


@dataclass(frozen=True)
class Trained:
    """The result of a phase: the config of the model after it, the type of its published weights, the format to whose
    numbers they are rounded, and, if it is an adapter, its settings and the node of its base."""

    model: ModelConfig
    dtype: Dtype
    weight_format: str | None = None
    lora: Lora | None = None
    base: str = ""


def models(config: ReleaseRecipe) -> dict[str, tuple[str, int | None]]:
    """Exported models, the final one last: name → (node of the phase, step); None is the phase's last step."""
    exported: dict[str, tuple[str, int | None]] = {"base": ("import", None)}
    if config.pretrain is not None:
        exported = {"init": ("pretrain", 0), "base": ("pretrain", None)}
    if config.midtrain is not None:
        exported["mid"] = ("midtrain", None)
    exported |= {f"long-{n + 1}": (f"longcontext-{n + 1}", None) for n in range(len(config.long_context))}
    later = {"sft": config.sft, "rlvr": config.rlvr, "dpo": config.dpo, "online-rlhf": config.online_rlhf}
    return exported | {name: (name, None) for name, section in later.items() if section is not None}


def compose(recipe: Recipe, store: Store, without_data: bool = False) -> Graph:
    """The graph of a release. Reads the digests of source trees and, if a phase continues from an earlier run, the
    sealed checkpoints. Raises RecipeError.

    without_data: source trees may be absent; keys that depend on a tree without a pinned digest are provisional.
    """
    config, data_recipe = recipe.config, recipe.data
    assert isinstance(config, ReleaseRecipe) and isinstance(data_recipe, DataRecipe)
    for problem in problems(recipe):
        raise RecipeError(f"{recipe.title}: {problem}")
    config = _resolve_start(recipe, config, store)
    graph = GraphBuilder(recipe.title)
    data, absent = data_recipe.present() if without_data else (data_recipe.resolved(), ())
    benchmarks = _benchmarks(recipe, config)
    _add_data(graph, config, data, benchmarks)
    trained, previous = _add_training(graph, recipe.title, config, store)
    trained |= _add_post_training(graph, config, data, trained[previous["init"]].model, previous)
    _add_exports(graph, config, trained, data)
    _add_chat_evaluation(graph, config, trained, data)
    _add_memorization(graph, config, trained, data)
    _add_harness(graph, config, trained, benchmarks)
    _add_variants(graph, config, trained, data)
    _add_extra_stages(graph, config)
    _add_sizes(graph, config)
    graph.check_sizes()
    return Graph(recipe, graph.nodes, absent)


def problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for each contradiction between the sections of a recipe, or with its data recipe."""
    config, data = recipe.config, recipe.data
    assert isinstance(config, ReleaseRecipe) and isinstance(data, DataRecipe)
    yield from _problems_of_mixes(config, data)
    yield from _problems_of_generated(config, data)
    yield from _problems_of_lengths(config)
    yield from _problems_of_engine(config)
    yield from _problems_of_weight_format(config)
    yield from known_gates.problems(config, data)
    vocabulary = config.tokenizer.padded_vocab_size
    yield from sizes.problems(config.sizes, config.model, config.pretrain, vocabulary, config.start_from is None)
    if config.sft and config.sft.lora and (config.rlvr or config.dpo):
        later = "rlvr" if config.rlvr else "dpo"
        yield (
            f"sft.lora trains an adapter, and {later} would train the weights that it leaves as they are; leave out "
            f"{later}, or sft.lora"
        )


def _resolve_start(recipe: Recipe, config: ReleaseRecipe, store: Store) -> ReleaseRecipe:
    """The recipe with the folder of the published model that it begins with. Raises RecipeError for one that no release
    may name, and for another precision than that of the model, if it is on this machine."""
    if config.start_from is None:
        return config
    try:
        start = config.start_from.resolve(recipe.path.parent, store.home)
    except ValueError as error:
        raise RecipeError(f"{recipe.title}: {error}") from None
    if problem := require_dtype(start.repo, dtype_of(start.place(store.home)), _dtype_of_base(config)):
        raise RecipeError(f"{recipe.title}: {problem}")
    return config.model_copy(update={"start_from": start})


def _dtype_of_base(config: ReleaseRecipe) -> Dtype | None:
    """The type in which the published model that the recipe begins with is exported; None if pre-training follows."""
    return None if config.pretrain else _dtype(config, phases(config)[0].config)


def _benchmarks(recipe: Recipe, config: ReleaseRecipe) -> dict[str, Any]:
    """The config of stage `benchmarks`; empty without task sets. Raises RecipeError."""
    section = config.evaluation.harness
    if section is None:
        return {}
    return {"sets": section.task_sets(recipe.path.parent, recipe.title), "limit": section.limit}


def _add_data(graph: GraphBuilder, config: ReleaseRecipe, data: DataRecipe, benchmarks: Mapping[str, Any]) -> None:
    """Adds the stages from sources to token shards."""
    sources = {source.name: f"acquire-{source.name}" for source in data.sources}
    for source, name in sources.items():
        if source not in data.generated:
            graph.add(name, "acquire", data.acquire_config(source, config.seed))
    for source, parent in data.generated.items():
        graph.add(sources[source], "generate", data.acquire_config(source, config.seed), parent=sources[parent])
    evaluation = config.evaluation
    items = {"problems": evaluation.problems, "seed": config.seed, "chat": evaluation.chat_items}
    graph.add("items", "items", items)
    evaluated = {"items": "items"}
    if benchmarks:
        graph.add("benchmarks", "benchmarks", benchmarks)
        evaluated["benchmarks"] = "benchmarks"
    classifiers = {f"classifier-{classifier.name}": classifier for classifier in data.classifiers}
    for node, classifier in classifiers.items():
        examples = {name: sources[name] for name in (*classifier.positive, *classifier.negative)}
        graph.add(node, "classifier", data.classifier_config(classifier.name, config.seed), **examples)
    imported: dict[str, str] = {}
    if config.start_from is not None:
        model = _imported_model(config)
        begin = {"model": model, "padded_vocab_size": config.tokenizer.padded_vocab_size}
        begin["dtype"] = _dtype_of_base(config)
        graph.add("import", "import", config.start_from.model_dump() | begin)
        imported = {"import": "import"}
    models = {node: node for node in classifiers}
    graph.add("filter", "filter", data.filter_config(config.seed), **sources, **models, **evaluated)
    graph.add("duplicates", "duplicates", data.duplicates_config(), filter="filter")
    searched = {"filter": "filter", "duplicates": "duplicates"}
    graph.add("representatives", "representatives", data.representatives_config(), **searched)
    graph.add("dedup", "dedup", data.dedup_config(), **searched, representatives="representatives")
    tokenizer = config.tokenizer.model_dump()
    left_out = (*config.tokenizer.leave_out, *data.conversations)
    graph.add("tokenizer", "tokenizer", tokenizer | {"leave_out": left_out}, dedup="dedup", **imported)
    graph.add("tokenize", "tokenize", data.tokenize_config(), dedup="dedup", tokenizer="tokenizer")


def _imported_model(config: ReleaseRecipe) -> ModelConfig:
    """The model that training begins with; the section of the first phase may say more of it."""
    return config.model.with_rope(config.pretrain.rope if config.pretrain else None, config.model.context_length)


def _add_training(
    graph: GraphBuilder, title: str, config: ReleaseRecipe, store: Store
) -> tuple[dict[str, Trained], dict[str, str]]:
    """Adds the phases that train on text, each after the previous one. Returns the result of each, by node, and the
    role and node of the last one."""
    previous = {"init": "import"} if config.start_from else {}
    model, trained = config.model, {}
    if dtype := _dtype_of_base(config):
        trained["import"] = Trained(_imported_model(config), dtype)
    for phase in phases(config):
        section, name, earlier = phase.config, phase.node, {}
        longest = section.sequence_length if phase.where.startswith("long_context") else model.context_length
        model = model.with_rope(section.rope, longest)
        base = previous.get("init", "")
        trained[name] = Trained(model, _dtype(config, section), section.weight_format, section.adapter, base)
        if section.continue_from:
            where = f"{title}: {phase.where}.continue_from"
            checkpoint = checkpoints.find(section.continue_from, name, where, store)
            keys = {role: graph.nodes[node].key for role, node in previous.items()}
            require_same_beginning(checkpoint, keys, where, store)
            section = section.model_copy(update={"continue_from": str(checkpoint)})
            earlier = {"continue": checkpoint.key}
        order = {
            "phase": name, "mix": section.mix, "sequence_length": section.sequence_length, "steps": section.steps,
            "rows": section.rows_of(section.steps), "ramp": section.row_ramp, "pack": section.pack,
            "long_documents": section.long_documents, "seed": config.seed, "first_step": section.first_step,
        }  # fmt: skip
        graph.add(f"order-{name}", "order", order, earlier, tokens="tokenize")
        training = _training(config, model, section)
        graph.add(name, phase.stage, training, earlier, tokens="tokenize", order=f"order-{name}", **previous)
        previous = {"init": name}
    return trained, previous


def _add_post_training(
    graph: GraphBuilder, config: ReleaseRecipe, data: DataRecipe, model: ModelConfig, previous: dict[str, str]
) -> dict[str, Trained]:
    """Adds the phases that learn from answers. previous: the role and node of the previous phase. Returns the result of
    each, by node."""
    trained: dict[str, Trained] = {}
    questions: dict[str, Any] = {"seed": config.seed}
    evaluated = {"items": "items"}
    if "benchmarks" in graph.nodes:
        questions["ngram"], evaluated["benchmarks"] = data.curation.decontamination.ngram, "benchmarks"

    def train(
        name: str,
        stage: str,
        section: RlPhase | DpoPhase | RewardPhase,
        tasks: Sequence[Any] = (),
        extra: Mapping[str, Any] | None = None,
        /,
        **inputs: str,
    ) -> None:
        """Adds a phase with its tasks and the order of its replayed data."""
        trained[name] = Trained(model, _dtype(config, section))
        if tasks:
            verifiers = {} if isinstance(section, RewardPhase) else section.verifiers
            graph.add(f"tasks-{name}", "tasks", {"sources": tasks, "verifiers": verifiers, **questions}, **evaluated)
            inputs |= {"tasks": f"tasks-{name}", "items": "items"}
        if isinstance(section, RlPhase) and (replay := section.replay):
            order = {"phase": name, "mix": replay.mix, "sequence_length": replay.sequence_length, "seed": config.seed}
            order |= {"steps": section.steps, "rows": replay.rows}
            graph.add(f"order-{name}", "order", order, tokens="tokenize")
            inputs |= {"tokens": "tokenize", "order": f"order-{name}"}
        if isinstance(section, RlPhase) and section.tools:
            inputs |= {role: node for tool in section.tools.offered for role, node in tool.inputs.items()}
        graph.add(name, stage, _training(config, model, section) | dict(extra or {}), tokenizer="tokenizer", **inputs)

    if config.rlvr:
        train("rlvr", "rlvr", config.rlvr, config.rlvr.tasks, {"name": "rlvr"}, **previous)
        previous = {"init": "rlvr"}
    if dpo := config.dpo:
        train("dpo", "dpo", dpo, (*dpo.preferences.tasks, *(dpo.sft_tasks.tasks if dpo.sft_tasks else ())), **previous)
    if config.reward_model:
        train("reward", "reward", config.reward_model, pairs="dpo", **previous)
        export = {"model": model, "padded_vocab_size": config.tokenizer.padded_vocab_size}
        export["parity_tolerance"] = config.evaluation.parity_tolerance
        export |= {"dtype": trained["reward"].dtype, "parity_tokens": parity_tokens(model.context_length)}
        graph.add("export-reward", "export", export, tokenizer="tokenizer", checkpoint="reward")
    if online := config.online_rlhf:
        scorer = {"reward": "reward", "reward_model": "export-reward"}
        train("online-rlhf", "rlvr", online, online.tasks, {"name": "online-rlhf"}, init="dpo", **scorer)
    return trained


def _add_exports(graph: GraphBuilder, config: ReleaseRecipe, trained: Mapping[str, Trained], data: DataRecipe) -> None:
    """Adds each exported model, and its evaluation on held-out documents and problems."""
    chat_models = _chat_models(config)
    for which, (name, step) in models(config).items():
        export: dict[str, Any] = {"model": trained[name].model, "dtype": trained[name].dtype, "step": step}
        export["converses"] = which in chat_models
        export["weight_format"] = trained[name].weight_format if step is None else None
        export["padded_vocab_size"] = config.tokenizer.padded_vocab_size
        export["parity_tolerance"] = config.evaluation.parity_tolerance
        export["parity_tokens"] = parity_tokens(trained[name].model.context_length)
        inputs = {"checkpoint": name}
        if lora := trained[name].lora:
            export["lora"], inputs["base"] = lora, trained[name].base
        if step == 0 and graph.nodes[name].external:  # a phase that continues has no step 0
            export, inputs = {**export, "seed": config.seed}, {}
        graph.add(f"export-{which}", "export", export, tokenizer="tokenizer", **inputs)
        measured = _evaluation(config, trained[name], data) | {"context": config.evaluation.context}
        graph.add(f"evaluate-{which}", "evaluate", measured, model=f"export-{which}", dedup="dedup", items="items")


def _evaluation(config: ReleaseRecipe, trained: Trained, data: DataRecipe) -> dict[str, Any]:
    """The config of the evaluation of a model on held-out documents and problems, without long texts."""
    evaluation = config.evaluation
    measured = {name: getattr(evaluation, name) for name in ("heldout_documents", "max_new_tokens", "engine")}
    measured["conversations"] = data.conversations
    vocabulary, sources = config.tokenizer.padded_vocab_size, len(data.sources)
    work = evaluation.tokens(sources), evaluation.pieces(sources)
    expected = estimates.expected(trained.model, vocabulary, *work, trained.dtype, evaluation.engine)
    return measured | {"expected": expected}


def _add_variants(graph: GraphBuilder, config: ReleaseRecipe, trained: Mapping[str, Trained], data: DataRecipe) -> None:
    """Adds the variants of the final model. Raises RecipeError for one that the model cannot have."""
    which, (node, _) = list(models(config).items())[-1]
    if lora := trained[node].lora:
        names = {model_node: name for name, (model_node, step) in models(config).items() if step is None}
        before = names[trained[node].base]
        repo = f"{config.release.namespace}/{config.name}-{before}"
        if config.start_from and trained[node].base == "import":
            repo = config.start_from.repo
        source = {"lora": lora, "model": trained[node].model, "repo": repo}
        inputs = {"model": f"export-{which}", "scores": f"evaluate-{which}", "dedup": "dedup", "items": "items"}
        inputs |= {"base": f"export-{before}", "checkpoint": node}
        settings = {"variant": variants.ADAPTER, "adapter": source}
        graph.add(
            f"variant-{variants.ADAPTER}", "variant", _evaluation(config, trained[node], data) | settings, **inputs
        )
    for name in config.release.variants:
        if problem := variants.obstacle(name, trained[node].model):
            raise RecipeError(f"{graph.title}: release.variants: {problem}")
        inputs = {"model": f"export-{which}", "scores": f"evaluate-{which}", "dedup": "dedup", "items": "items"}
        graph.add(f"variant-{name}", "variant", _evaluation(config, trained[node], data) | {"variant": name}, **inputs)


def _chat_models(config: ReleaseRecipe) -> list[str]:
    """The exported models that were trained on conversations."""
    return [name for name in models(config) if name in CHAT_MODELS]


def _add_chat_evaluation(
    graph: GraphBuilder, config: ReleaseRecipe, trained: Mapping[str, Trained], data: DataRecipe
) -> None:
    """Adds the evaluation of chat models: problems, the generated set, preferences, contamination."""
    chat = config.evaluation.chat
    if chat is None or config.sft is None:
        return
    vocabulary = config.tokenizer.padded_vocab_size
    chat_models = _chat_models(config)
    tasks = {name: name for name, node in graph.nodes.items() if node.stage.name == "tasks"}
    orders = {name: name for name, node in graph.nodes.items() if node.stage.name == "order"}
    order_configs = [graph.nodes[name].config.model_dump() for name in orders]
    mixes = {order["phase"]: sorted(order["mix"]) for order in order_configs}
    inputs = {"model": f"export-{chat_models[-1]}", "dedup": "dedup", "items": "items"}
    sources = sorted({name for mix in mixes.values() for name in mix})
    corpus = {"parts": {source: data.parts[source] for source in sources}, "expected": data.expected}
    fresh = {"problems": config.evaluation.problems, "phases": mixes} | corpus
    graph.add("fresh", "fresh", fresh, **inputs, **tasks)
    engine = config.evaluation.engine
    generation = {"max_new_tokens": chat.max_new_tokens, "seed": config.seed, "engine": engine}
    for number, which in enumerate(chat_models):
        answers, model = config.evaluation.chat_tokens(), trained[which].model
        one, several = (
            {"expected": estimates.expected(model, vocabulary, *work, trained[which].dtype, engine)}
            for work in (
                (answers, config.evaluation.preference_pieces()),
                (answers * chat.num_samples, config.evaluation.chat_pieces()),
            )
        )
        solving = generation | several | {"num_samples": chat.num_samples}
        for name, source in ((f"solve-{which}", "items"), (f"fresh-solve-{which}", "fresh")):
            graph.add(name, "solve", solving, model=f"export-{which}", items=source)
        if number and chat.items.courtesies > 1:
            # each is compared with the previous one; a model trained on preferences, with the last one that was not
            before = chat_models[number - 1] if which != "online-rlhf" else chat_models[number - 2]
            pair = {"model": f"export-{which}", "before": f"export-{before}", "items": "items"}
            graph.add(f"prefer-{which}", "prefer", generation | one | {"model": which, "before": before}, **pair)
    scored = {name: name for name, node in graph.nodes.items() if node.stage.name in ("evaluate", "solve")}
    inputs = {"dedup": "dedup", "items": "items", "fresh": "fresh"}
    if "benchmarks" in graph.nodes:
        inputs["benchmarks"] = "benchmarks"
    graph.add("contamination", "contamination", {"seed": config.seed} | corpus, **inputs, **orders, **tasks, **scored)


def _add_memorization(
    graph: GraphBuilder, config: ReleaseRecipe, trained: Mapping[str, Trained], data: DataRecipe
) -> None:
    """Adds what models give away of the data that they were trained on. Raises RecipeError if no row is long enough."""
    section = config.evaluation.memorization
    if section is None:
        return
    length = section.prefix_tokens + section.continuation_tokens
    longest = max(phase.config.sequence_length for phase in phases(config)) + 1
    if length > longest:
        raise RecipeError(
            f"{graph.title}: evaluation.memorization compares {length} tokens of a document (prefix_tokens + "
            f"continuation_tokens), and no row of training has more than {longest}; lower one of them"
        )
    exported = {which: node for which, (node, step) in models(config).items() if step is None}
    tokens = section.tokens(len(data.sources), data.canaries.values())
    for which in exported if section.every_model else list(exported)[-1:]:
        measured = section.model_dump(exclude={"every_model"}) | {"canaries": data.canaries, "seed": config.seed}
        vocabulary, model = config.tokenizer.padded_vocab_size, trained[exported[which]].model
        measured["engine"] = engine = config.evaluation.engine
        measured["expected"] = estimates.expected(
            model, vocabulary, tokens, dtype=trained[exported[which]].dtype, engine=engine
        )
        nodes = list(trained)
        orders = (f"order-{name}" for name in nodes[: nodes.index(exported[which]) + 1])
        inputs = {"model": f"export-{which}", "tokens": "tokenize"}
        inputs |= {order: order for order in orders if order in graph.nodes}
        graph.add(f"memorization-{which}", "memorization", measured, **inputs)


def _add_harness(
    graph: GraphBuilder, config: ReleaseRecipe, trained: Mapping[str, Trained], benchmarks: Mapping[str, Any]
) -> None:
    """Adds the task sets of lm-evaluation-harness, on the final model or on every one."""
    section = config.evaluation.harness
    if section is None:
        return
    exported = {which: node for which, (node, step) in models(config).items() if step is None}
    for which in exported if section.every_model else list(exported)[-1:]:
        model, vocabulary = trained[exported[which]].model, config.tokenizer.padded_vocab_size
        engine = config.evaluation.engine
        work = section.tokens(engine.kind == "vllm"), section.tasks()
        expected = estimates.expected(model, vocabulary, *work, trained[exported[which]].dtype, engine)
        inputs = {"model": f"export-{which}", "benchmarks": "benchmarks"}
        measured = {**benchmarks, "expected": expected, "engine": config.evaluation.engine}
        graph.add(f"harness-{which}", "harness", measured, **inputs)


def _add_extra_stages(graph: GraphBuilder, config: ReleaseRecipe) -> None:
    """Adds the stages that the recipe names. Raises RecipeError for a stage that cannot be added in this way."""
    for name, settings in config.extra_stages.items():
        where = f"{graph.title}: extra_stages.{escaped(name, 80)}"
        if name not in STAGES or not (reads := registry.stage(name).reads):
            raise RecipeError(
                f"{where} is no stage that a recipe can add; it needs a line in STAGES of stages/graph.py and `reads` "
                "in its STAGE"
            )
        if missing := [node for node in reads.values() if node not in graph.nodes]:
            raise RecipeError(f"{where} reads {missing[0]}, which this recipe does not have; leave the stage out")
        graph.add(name, name, settings, **reads)


def _add_sizes(graph: GraphBuilder, config: ReleaseRecipe) -> None:
    """Adds the smaller models, which read the order of pre-training; last, so that they fill what the others leave."""
    for number, size in enumerate(config.sizes):
        assert config.pretrain is not None
        name, (model, phase) = sizes.node(number), size.resolve(config.model, config.pretrain)
        training = _training(config, model, phase) | {"name": name}
        graph.add(name, sizes.NAME, training, tokens="tokenize", order="order-pretrain")


def _training(config: ReleaseRecipe, model: ModelConfig, section: Any) -> dict[str, Any]:
    """The common config fields of all training stages."""
    vocabulary = config.tokenizer.padded_vocab_size
    return {"model": model, "phase": section, "padded_vocab_size": vocabulary, "seed": config.seed}


def _dtype(config: ReleaseRecipe, section: PhaseConfig | RlPhase | DpoPhase | RewardPhase) -> Dtype:
    parameters = config.model.parameters(config.tokenizer.padded_vocab_size)["total"]
    return "float32" if section.precision == "fp32" and parameters <= FP32_PARAMETERS else "bfloat16"


def _problems_of_mixes(config: ReleaseRecipe, data: DataRecipe) -> Iterator[str]:
    names = [source.name for source in data.sources]
    mixes: dict[str, Mapping[str, float]] = {f"{phase.where}.mix": phase.config.mix for phase in phases(config)}
    mixes |= {f"{where}.mix": mix for where, mix in config.replay_mixes().items()}
    named = {
        **mixes, **config.searched_sources(), "release.maker.sources": config.release.maker.sources,
        "release.by_reference": config.release.by_reference,
    }  # fmt: skip
    for where, sources in named.items():
        for source in sources:
            if source not in names:
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
    """Generated texts repeat what they are made from, so they follow its rule, or a person says why not."""
    hidden = {name: parent for name, parent in data.generated.items() if parent in config.release.by_reference}
    for name, parent in hidden.items():
        if name not in config.release.publish_generated:
            yield (
                f"release.by_reference names {parent}, whose texts are not published, and {name} is generated from "
                f"them; state in release.publish_generated why those of {name} may be, or leave {name} out of the data "
                "recipe"
            )
    for name in sorted(set(config.release.publish_generated) - set(hidden)):
        yield (f"release.publish_generated names {name}, which is not generated from a source by reference; remove it")


def _problems_of_weight_format(config: ReleaseRecipe) -> Iterator[str]:
    """What trains after a phase with a weight format would leave the format."""
    for phase in phases(config):
        section = phase.config
        if section.weight_format and section.precision == "fp32" and _dtype(config, section) == "bfloat16":
            yield (
                f"{phase.where}.weight_format = {section.weight_format} with precision = fp32 rounds weights of fp32, "
                "and a model of this size is published in bf16; use precision: bf16"
            )
    later = {"rlvr": config.rlvr, "dpo": config.dpo, "online_rlhf": config.online_rlhf}
    sections = [(phase.where, phase.config.weight_format) for phase in phases(config)]
    sections += [(where, None) for where, section in later.items() if section is not None]
    for (where, weight_format), (after, after_format) in itertools.pairwise(sections):
        if weight_format and not after_format:
            yield (
                f"{where}.weight_format = {weight_format}, but {after} trains on without it, which leaves the format; "
                "state it in the last phases only, and none after them may be one of reinforcement or preferences"
            )


def _problems_of_engine(config: ReleaseRecipe) -> Iterator[str]:
    gpus = config.evaluation.engine.gpus
    for heads in (attention.heads for attention in config.model.attention()):
        if gpus and heads % gpus:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            yield (
                f"evaluation.engine.gpus = {gpus} does not divide the {heads} heads of the model, which vLLM "
                f"spreads over them; use one of {divisors}"
            )


def _problems_of_lengths(config: ReleaseRecipe) -> Iterator[str]:
    before = 0
    for phase in phases(config):
        length, where = phase.config.sequence_length, phase.where
        if where.startswith("long_context") and length <= before:
            yield (
                f"{where}.sequence_length = {length} is no longer than the {before} tokens of the phase "
                "before; long_context phases only lengthen"
            )
        before = length if phase.node != "sft" else before
        if length > config.model.context_length and phase.node == phase.stage:
            yield (
                f"{where}.sequence_length = {length} is longer than model.context_length = "
                f"{config.model.context_length}; shorten the sequence, raise the context length, or make it a phase of "
                "long_context"
            )
