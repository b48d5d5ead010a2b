"""Export: convert a sealed checkpoint to a Hugging Face folder, and verify that it is the same model.

    atom run atom-tiny --until export-base

Tensors are mapped and written one after the other; no process holds more of a large model than one file, or
the tables and one layer.
The parity gate (comparison.py) has two halves, and a failure of either stops the release:
- the written files are read back and mapped to Megatron's tensors; each must equal the checkpoint's, bit for bit;
- transformers loads the folder in a fresh interpreter without Megatron or the CPU patches, and its logits must agree
with Megatron's on rows of random tokens. One of them is as long as the context; above 8,192 tokens it has 4,096 whose
positions are spread evenly over the context, so that the rotary embedding is compared at all distances.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from pipeline.core.bounds import Context, Flag, Range, Seed
from pipeline.core.errors import AtomError
from pipeline.core.stage import TRANSFORMERS, Config, Estimate, Inputs, Published, Report, Stage, added
from pipeline.core.store import Artifact
from stages.export import SLICE_BYTES, WHOLE_BYTES, parity_lengths
from stages.formats.tokenizer import CONFIG_FILE, PAD, STOPS, TOKENIZER_FILES
from stages.mcore.gpu_environment import variables
from stages.mcore.lora import Lora
from stages.models.base import PositiveInt, Rows
from stages.models.parallel_layout import Layout
from stages.models.param_names import BUFFERS
from stages.models.registry import Model
from stages.train.checkpoint import SHARD_BYTES

if TYPE_CHECKING:
    import torch

VERSION = 3
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""The distribution of the model itself, from which post-training and pass@k draw.

Without `top_k` transformers cuts it to 50 tokens.
"""
BASE_BYTES = 700_000_000
"""Memory of a process that has loaded Megatron or transformers, without a model (bench/export.py)."""


class ExportConfig(Config):
    model: Model
    """model section, with the rotary embedding of the phase"""
    padded_vocab_size: PositiveInt
    """rows of the embedding matrix"""
    step: Annotated[int, Range(0, 1e8)] | None = None
    """step of the sealed checkpoint; null: the last one"""
    seed: Seed | None = added(None)
    """seed of random weights that are exported instead of a checkpoint; null: none"""
    parity_tolerance: Annotated[float, Range(0, 1, above=True)] = 1e-4
    """maximum difference of any fp32 logit"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """data type of the exported weights"""
    converses: Flag = added(False)
    """sample by default, as chat models do; else decode greedily"""
    parity_tokens: Context | None = added(None)
    """tokens of the longest compared row, spread over the context; null: as many as the context"""

    lora: Lora | None = added(None)
    """adapter that the checkpoint is, on the weights of the input `base`; null: none"""

    @property
    def longest_row(self) -> int:
        return min(self.parity_tokens or self.model.context_length, self.model.context_length)

    @property
    def position_steps(self) -> dict[int, int]:
        """{tokens of a row: distance of its neighbors' positions}, of the row that is spread over the context."""
        step = self.model.context_length // self.longest_row
        return {self.longest_row: step} if step > 1 else {}


def run(config: ExportConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Exports a checkpoint as a model of transformers, and checks that both compute the same.

    inputs["checkpoint"] is a pretrain or midtrain artifact, and is absent if the config has a seed. inputs["tokenizer"]
    is the tokenizer artifact. If the checkpoint is an adapter, inputs["base"] is the phase before it, into whose last
    weights the adapter is merged.

    Fills `out` with model/ (config.json, generation_config.json, the tokenizer's files, and model.safetensors or, above
    5 GB, shards with an index) and parity.json. Raises CheckFailed if the export is not the checkpoint's model,
    AtomError if the step is missing.
    """
    import torch

    from stages.export import comparison
    from stages.mcore.hf_mapping import hf_config, to_hf
    from stages.train.checkpoint import release_checkpoint

    folder = out / "model"
    folder.mkdir(exist_ok=True)
    ids = write_tokenizer(inputs["tokenizer"], folder, config.model.context_length, config.converses)
    vocab_size = ids["vocab_size"]
    if vocab_size > config.padded_vocab_size:
        raise AtomError(
            f"the tokenizer has {vocab_size} tokens, more than padded_vocab_size = "
            f"{config.padded_vocab_size}; raise it in the recipe"
        )
    # Rounded before both uses: Megatron's model computes with the weights that are exported, so no tolerance has to
    # allow for the rounding.
    tensors = Rounded(_weights(config, inputs), getattr(torch, config.dtype))
    mapped = to_hf(tensors, config.model, vocab_size)
    release_checkpoint.write_shards(folder, release_checkpoint.MODEL, mapped)
    _write(folder / "config.json", hf_config(config.model, vocab_size, ids[STOPS[0]], ids[PAD], config.dtype))
    (folder / "generation_config.json").write_bytes(generation_config(config.converses, ids))

    report.note("export written; comparing it with Megatron")
    tensors_compared = comparison.compare_files(folder, tensors, config.model, vocab_size)
    rows, steps = comparison.parity_rows(vocab_size, config.longest_row), config.position_steps
    by_layer = 4 * config.model.parameters(config.padded_vocab_size)["total"] > WHOLE_BYTES
    ties: list[set[int]] = [set() for _ in rows]
    with contextlib.closing(
        comparison.megatron_logits(tensors, config.model, config.padded_vocab_size, rows, vocab_size, steps, ties)
    ) as logits:
        delta, tokens = comparison.compare_logits(
            folder, rows, logits, config.parity_tolerance, work, by_layer, steps, ties
        )
    parity: Parity = {
        "max_abs_logit_delta": delta,
        "tolerance": config.parity_tolerance,
        "tokens_compared": tokens,
        "longest_row": max(len(row) for row in rows),
        "tensors_compared": tensors_compared,
        "dtype": config.dtype,
    }
    for tokens, step in steps.items():
        parity["spread_over"] = (tokens - 1) * step + 1
    _write(out / "parity.json", parity)
    report.metric(0, max_abs_logit_delta=delta)


class Parity(TypedDict):
    """The comparison of an export with the trainer's model: `parity.json`."""

    max_abs_logit_delta: float
    """largest absolute difference of two logits"""
    tolerance: float
    """allowed difference"""
    tokens_compared: int
    """tokens of all rows, but for those from a near tie of two experts on at which the models differ; half of these
    differ by at most 100 tolerances"""
    longest_row: int
    """tokens of the longest row"""
    tensors_compared: int
    """tensors that are equal exactly, by the inverse mapping"""
    dtype: str
    """data type of the export"""
    spread_over: NotRequired[int]
    """above a context of 8,192 tokens: positions over which the 4,096 tokens of the longest row are spread"""


class Rounded(Mapping[str, "torch.Tensor"]):
    """Tensors of another mapping in the data type of the export, each made on access.

    Biases that choose experts stay fp32, as in training and in the classes of transformers: a step changes them by
    less than bf16 can hold.
    """

    def __init__(self, full: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.full, self.dtype = full, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.full[name]
        return tensor if name.endswith(BUFFERS) else tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.full)

    def __len__(self) -> int:
        return len(self.full)


def _weights(config: ExportConfig, inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """The fp32 tensors of the checkpoint, or the initial ones of the seed, each read or drawn on access.

    Raises AtomError if the checkpoint is missing or damaged, or not of the model.
    """
    from stages.mcore.lora_layers import Merged
    from stages.mcore.model import Initial, check_tensors
    from stages.train.checkpoint import release_checkpoint

    shapes = config.model.shapes(config.padded_vocab_size)
    if config.seed is not None:
        return Initial(shapes, config.model, config.seed)
    tensors = release_checkpoint.weights_of(inputs["checkpoint"], config.step)
    if config.lora is None:
        check_tensors(shapes, tensors.shapes(), "the checkpoint")
        return tensors
    base = release_checkpoint.weights_of(inputs["base"])
    check_tensors(shapes, base.shapes(), "the base of the adapter")
    check_tensors(config.lora.shapes(shapes), tensors.shapes(), "the adapter")
    return Merged(base, tensors, config.lora)


def generation_config(converses: bool, ids: Mapping[str, int]) -> bytes:
    """The content of generation_config.json. ids: of the special tokens by name."""
    stops = {"eos_token_id": [ids[token] for token in STOPS], "pad_token_id": ids[PAD]}
    return _json({**(SAMPLED if converses else GREEDY), **stops}).encode()


def model_tokenizer_config(config: Mapping[str, Any], context_length: int, converses: bool) -> dict[str, Any]:
    """Returns the content of a model's tokenizer_config.json.

    A model that does not converse gets no `response_template`: with one, transformers' pipeline leaves special tokens
    and padding in plain text.

    Args:
        config: The content of the tokenizer's own file.
        context_length: In tokens.
        converses: Whether the model was trained to converse.
    """
    settings = {**config, "model_max_length": context_length}
    if not converses:
        settings.pop("response_template", None)
    return settings


def write_tokenizer(tokenizer: Artifact, folder: Path, context_length: int, converses: bool = False) -> dict[str, int]:
    """Copies the tokenizer's files, and adds the length of the context, in tokens.

    transformers would save the extra special tokens as a list, which its version 4 refuses, so nothing is loaded and
    saved.

    Returns:
        {"vocab_size": ..., special token: its id, ...}.
    """
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    settings = model_tokenizer_config(tokenizer.json(CONFIG_FILE), context_length, converses)
    _write(folder / CONFIG_FILE, settings)
    content = tokenizer.json("tokenizer.json")
    special = {t["content"]: int(t["id"]) for t in content["added_tokens"]}
    missing = [token for token in (PAD, *STOPS) if token not in special]
    if missing:
        raise AtomError(f"tokenizer artifact {tokenizer.key} has no special token {missing[0]}")
    return {**special, "vocab_size": max(max(content["model"]["vocab"].values()), *special.values()) + 1}


def estimate(config: ExportConfig) -> Estimate:
    parameters = config.model.parameters(config.padded_vocab_size)
    per_token = partial(config.model.flops_per_token, config.padded_vocab_size)  # of a step, three times a forward pass
    flops = 2 * sum(n * per_token(n) / 3 for n in parity_lengths(config.longest_row))  # two models read the rows
    weights = (4 if config.dtype == "float32" else 2) * parameters["total"]
    shards = -(-weights // SHARD_BYTES)
    files = 8 + shards + (1 if shards > 1 else 0)  # an index of several
    return Estimate(
        cpu_seconds=10 + flops / 4e10 + parameters["total"] / 1e8,  # imports, two forward passes, five of reading
        flops=flops,
        memory_bytes=memory(config),
        disk_bytes=weights,
        published=(Published("model", "", files, weights),),
        files=files,
        parameters=parameters,
    )


def memory(config: ExportConfig) -> int:
    """Largest bytes of the stage's processes together.

    Three moments compete: a file is written; Megatron's model computes beside an interpreter with transformers; that
    interpreter's model computes beside the hidden states that wait for its logits.
    """
    model, layout = config.model, Layout()
    width = 4 if config.dtype == "float32" else 2
    parameters = model.parameters(config.padded_vocab_size)
    total, table = 4 * parameters["total"], 4 * parameters["embedding"]
    layer = max(4 * model.layer_memory(layout, n).all for n in range(model.layers))
    # One row at a time passes through a layer.
    rows = Rows(1, config.longest_row)
    kept = max(sum(model.layer_activations(layout, "fp32", rows, n).values()) for n in range(model.layers))
    hidden = 4 * model.hidden_size * 2 * config.longest_row  # all rows are together less than twice the longest
    computing = hidden + round(kept) * config.longest_row + 2 * SLICE_BYTES
    writing = min(SHARD_BYTES, width * parameters["total"]) + (4 + width) * table // 4
    # a layer's tensors as they are in the file, in fp32, and experts a second time while they are stacked
    loaded = 2 * total if total <= WHOLE_BYTES else 2 * table + (8 + width) * layer // 4
    return max(
        BASE_BYTES + writing,
        2 * BASE_BYTES + table + 2 * layer + computing,
        2 * BASE_BYTES + hidden + table + loaded + computing,
    )


def _write(path: Path, value: Any) -> None:
    path.write_text(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


STAGE = Stage(
    "export",
    VERSION,
    ExportConfig,
    run,
    estimate=estimate,
    obstacle=lambda config: config.model.export_obstacle(),
    environment=lambda config: variables(),
    libraries=TRANSFORMERS,
)
