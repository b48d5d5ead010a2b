"""Stage `variant`: another form of an exported model, and what it loses.

    atom run RECIPE --only variant-gguf-q8_0

The files follow from those of the export alone (conversion.py), so `atom verify --deep` writes them again. On the
weights as the variant stores them, in fp32, transformers measures the Kullback-Leibler divergence of next-token
distributions from the original's, and `evaluation.engine` bits per byte, exact match and equal greedy answers, on the
documents and problems of the stage `evaluate`. How a program rounds activations while it computes is no part of this;
the gate `runtimes` of a release compares programs.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pipeline.core.bounds import Line
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Published, Report, Stage, added
from stages.confidence import Figure, Mean, Ratio, ratio
from stages.evaluation import estimates
from stages.evaluation.bits_per_byte import heldout_documents, token_ids
from stages.evaluation.estimates import Piece, compute, compute_shard
from stages.evaluation.model_evaluation import EvaluateConfig, ProblemAnswer, load_tokenizer, measure, measure_shard
from stages.evaluation.scores import ModelScores
from stages.export.variants.registry import DISTILLED, VARIANTS, VariantName
from stages.formats.table import Double, Int32, String, columns_of, read_table, write_json, write_rows
from stages.mcore.lora import Lora
from stages.models.registry import Model
from stages.train.checkpoint import SHARD_BYTES

if TYPE_CHECKING:
    from stages.generation.transformers_model import TransformersModel

VERSION = 2
MODEL, LOSS = "model", "loss.json"
TEXTS, TOKENS = 64, 512
"""Largest number of problems, and of documents of a source, whose distributions are compared; and tokens of each."""
MODELS = 2
"""The original and the variant, in fp32: both are in memory together while their distributions are compared."""
FILES = 12
"""Files of an artifact beside its weights, which are tables, loss, tokenizer, index and manifest."""
WEIGHTS = ("*.safetensors", "*.gguf")
IN_PROCESS = "transformers in fp32, on the weights as the variant stores them"


class AdapterSource(Config):
    """The settings from which the variant `adapter` is written, in addition to the inputs."""

    lora: Lora
    """settings of the adapter"""
    model: Model
    """model section, with the rotary embedding of the phase"""
    repo: Line
    """repository of the base on the Hub, for adapter_config.json"""


class VariantConfig(EvaluateConfig):
    """A variant, and what it is measured on."""

    variant: VariantName
    """form of the weights"""
    adapter: AdapterSource | None = added(None)
    """of the variant adapter; null: another variant"""


def run(config: VariantConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Makes a variant of an exported model and measures what it loses.

    inputs["model"] is an export, inputs["scores"] its evaluation; inputs["dedup"] and inputs["items"] are those that it
    was evaluated on. The variant adapter has more: inputs["base"], the export of its base, and inputs["checkpoint"],
    the phase that trained it. The variant distilled has inputs["student"], the export of the smaller model.

    Seals `model/`, the tables `documents.parquet`, `items.parquet` and `divergence.parquet`, and `loss.json`. Raises
    AtomError if the model has no such variant, CheckFailed if base and adapter are not the model.
    """
    original, folder, dequantized = inputs["model"] / "model", out / MODEL, work / "dequantized"
    _convert(config, inputs, folder, dequantized)
    scores = measure(config, dequantized, inputs, work, out, report)
    rows = list(compute(list(_pieces(config, inputs)), work, partial(_load, original, dequantized)))
    write_rows(out / "divergence.parquet", DIVERGENCES, rows)
    shutil.rmtree(dequantized)
    answers = read_table(out / "items.parquet").to_pylist()
    original_answers = read_table(inputs["scores"] / "items.parquet", ["id", "output"]).to_pylist()
    sizes = {name: weight_bytes(path) for name, path in {"variant": folder, "original": original}.items()}
    loss = summary(
        config.variant,
        sizes,
        rows,
        scores,
        inputs["scores"].json("scores.json"),
        answers,
        {row["id"]: row["output"] for row in original_answers},
        measured_by(config.engine.stated().get("engine", "")),
    )
    write_json(out / LOSS, loss)
    divergence, greedy = loss["divergence"], loss["greedy"]
    report.metric(0, divergence=divergence["value"], largest_divergence=divergence["max"])
    report.note(
        f"{config.variant}: divergence {divergence['value']:.3g} ± {divergence['se']:.2g} nats, at most "
        f"{divergence['max']:.3g}; {greedy['equal']} of {greedy['n']} greedy answers are the original's"
    )


def run_shard(config: VariantConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Measures one shard's documents, problems and texts, on weights that it converts for itself."""
    shards = estimates.shards(config.expected, MODELS, config.engine)
    original, place = inputs["model"] / "model", work / f"shard-{shard}"
    _convert(config, inputs, place / MODEL, place / "dequantized")
    measure_shard(config, place / "dequantized", inputs, work, shard, shards)
    compute_shard(list(_pieces(config, inputs)), work, partial(_load, original, place / "dequantized"), shard, shards)
    shutil.rmtree(place)


def _convert(config: VariantConfig, inputs: Inputs, folder: Path, dequantized: Path) -> None:
    """Writes the variant into one folder, and its weights in fp32 as a model into another."""
    from stages.export.variants import adapter_files, conversion

    original = inputs["model"] / "model"
    if config.variant == DISTILLED:
        student = inputs["student"] / "model"
        shutil.copytree(student, folder, dirs_exist_ok=True)
        conversion.write_dequantized(config.variant, student, folder, dequantized)
        return
    if (source := config.adapter) is None:
        conversion.write(config.variant, original, folder)
        conversion.write_dequantized(config.variant, original, folder, dequantized)
        return
    base = inputs["base"] / "model"
    adapter_files.write_trained(inputs["checkpoint"], source.lora, source.model, base, source.repo, folder)
    conversion.copy_tokenizer(original, folder)
    adapter_files.require_sum(base, folder, original)
    conversion.write_dequantized(config.variant, original, folder, dequantized, base)


def weight_bytes(folder: Path) -> int:
    """Bytes of the files of weights in a folder."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


Models = tuple["TransformersModel", "TransformersModel"]


def _load(original: Path, dequantized: Path) -> Models:
    from stages.generation.transformers_model import TransformersModel

    first, second = (TransformersModel.load(folder, load_tokenizer(folder)) for folder in (original, dequantized))
    return first, second


def _pieces(config: VariantConfig, inputs: Inputs) -> Iterator[Piece[Models]]:
    """A piece for each text whose distributions are compared: problems with the original's answers, and documents."""
    tokenizer = load_tokenizer(inputs["model"] / "model")
    problems = read_table(inputs["scores"] / "items.parquet", ["id", "prompt", "output"]).to_pylist()
    texts = [(row["id"], row["prompt"] + row["output"], False) for row in problems[:TEXTS]]
    documents = heldout_documents(inputs["dedup"] / "kept", min(TEXTS, config.heldout_documents))
    texts += [(row["id"], row["text"], row["source"] in config.conversations) for row in documents]
    rows = [(name, token_ids(tokenizer, text, chat)[:TOKENS]) for name, text, chat in texts]
    for number, (name, ids) in enumerate(rows):
        if ids:
            yield Piece(f"divergence-{number:05d}", partial(_divergence, name=name, ids=ids))


def _divergence(models: Models, name: str, ids: Sequence[int]) -> DivergenceRow:
    ids = ids[: models[0].context]
    row: DivergenceRow = {"id": name, "positions": len(ids), "sum": 0.0, "largest": 0.0, "same_likeliest": 0}
    for original, variant in zip(*(model.log_probabilities(ids) for model in models), strict=True):
        divergence = (original.exp() * (original - variant)).sum(-1)
        row["sum"] += float(divergence.sum())
        row["largest"] = max(row["largest"], float(divergence.max()))
        row["same_likeliest"] += int((original.argmax(-1) == variant.argmax(-1)).sum())
    return row


def measured_by(engine: str = "") -> str:
    """The sentence on what measured a variant.

    engine: of scores and answers, the package of vLLM with its version; "" for transformers. Distributions are
    compared by transformers in any case.
    """
    return f"vLLM ({engine}) in fp32, and its divergence by {IN_PROCESS}" if engine else IN_PROCESS


class DivergenceRow(TypedDict):
    """The next-token distributions of original and variant at all positions of a text."""

    id: String
    """id of the problem, with the original's answer, or of the held-out document"""
    positions: Int32
    """compared positions"""
    sum: Double
    """sum of the Kullback-Leibler divergence D(original ‖ variant) over the positions, in nats"""
    largest: Double
    """largest divergence at one position"""
    same_likeliest: Int32
    """positions at which both have the same likeliest token"""


DIVERGENCES = columns_of(DivergenceRow)


class Divergence(Figure):
    """Kullback-Leibler divergence in nats: mean over positions, with the standard error of a ratio over texts."""

    max: float
    """largest divergence at one position"""
    positions: int
    """number of positions"""
    texts: int
    """number of texts"""
    same_likeliest: float
    """share of positions with the same likeliest token"""


class Compared(TypedDict):
    """A score of the variant beside that of the original."""

    variant: Mean | Ratio
    original: Mean | Ratio


class GreedyAgreement(TypedDict):
    """Problems to which variant and original give the same answer, token for token."""

    equal: int
    n: int


class VariantLoss(TypedDict):
    """The content of `loss.json`."""

    variant: str
    """name of the variant"""
    title: str
    """its name for people"""
    bytes: Mapping[str, int]
    """bytes of the files of weights of `variant` and `original`"""
    divergence: Divergence
    """the divergence of all texts"""
    bits_per_byte: Compared
    """`bits_per_byte_all` of both"""
    accuracy: Compared
    """`accuracy_all` of both"""
    greedy: GreedyAgreement
    """number of problems with the original's answer, character for character, and of all problems"""
    measured_by: str
    """what computed the figures, in words"""


def summary(
    name: VariantName,
    sizes: Mapping[str, int],
    divergences: Sequence[DivergenceRow],
    scores: ModelScores,
    original: ModelScores,
    answers: Sequence[ProblemAnswer],
    original_answers: Mapping[str, str],
    stated_by: str,
) -> VariantLoss:
    """The content of `loss.json`.

    `sizes` are the bytes of `variant` and `original`. `scores` are those of the variant, and `original` those of the
    exported model. `original_answers` has the exported model's text by problem. `stated_by` becomes `measured_by`.

    Raises AtomError if the exported model has no answer to a problem.
    """
    if missing := [row["id"] for row in answers if row["id"] not in original_answers]:
        raise AtomError(f"the original has no answer to problem {missing[0]}; evaluate it on the same problems")
    mean = ratio([(row["sum"], row["positions"]) for row in divergences], "tokens")
    positions = sum(row["positions"] for row in divergences)
    return {
        "variant": name,
        "title": VARIANTS[name].title,
        "bytes": dict(sizes),
        "divergence": {
            "value": mean["value"],
            "se": mean["se"],
            "max": max(row["largest"] for row in divergences),
            "positions": positions,
            "texts": len(divergences),
            "same_likeliest": math.fsum(row["same_likeliest"] for row in divergences) / positions,
        },
        "bits_per_byte": {"variant": scores["bits_per_byte_all"], "original": original["bits_per_byte_all"]},
        "accuracy": {"variant": scores["accuracy_all"], "original": original["accuracy_all"]},
        "greedy": {"equal": sum(row["output"] == original_answers[row["id"]] for row in answers), "n": len(answers)},
        "measured_by": stated_by,
    }


def estimate(config: VariantConfig) -> Estimate:
    """Memory for two models in fp32, and disk for the variant and its fp32 values.

    The memory is the host's beside an engine with GPUs. The disk is needed for as long as the stage runs, for each
    shard.
    """
    if (expected := config.expected) is None:
        return estimates.estimate(None, MODELS, config.engine)
    variant = VARIANTS[config.variant]
    size, whole = round(expected.parameters * variant.bits / 8), 4 * expected.parameters
    if config.adapter:
        shapes = config.adapter.lora.shapes(config.adapter.model.shapes(1))
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
    remedy = "" if config.adapter else f"leave {config.variant} out of release.variants"
    base = estimates.estimate(expected, MODELS, config.engine)
    count = estimates.shards(expected, MODELS, config.engine)
    shards = 1 if variant.writer == "gguf" else -(-size // SHARD_BYTES)
    compared = estimates.BASE_BYTES + MODELS * whole
    if config.engine.gpus:
        base = replace(base, host_bytes=max(base.host_bytes, compared))
    else:
        base = replace(base, memory_bytes=max(base.memory_bytes or 0, compared))
    return replace(
        base,
        disk_bytes=(base.disk_bytes or 0) + size,
        # Of several shards, each converts the variant for itself, beside the stage.
        work_bytes=whole if count == 1 else (count + 1) * whole + count * size,
        files=FILES + shards,
        published=(Published("model", "", shards, size, remedy),),
    )


STAGE = Stage(
    "variant", VERSION, VariantConfig, run, **estimates.of_engine(MODELS) | {"estimate": estimate}, run_shard=run_shard
)
