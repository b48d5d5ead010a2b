"""Export: convert a sealed checkpoint to a Hugging Face folder, and verify that it is the same model.

    atom run atom-tiny --until export-base

The parity gate has two halves, and a failure of either stops the release:
- the written file is read back and mapped to Megatron's tensors; each must equal the checkpoint's, bit for bit;
- transformers loads the folder in a fresh interpreter without Megatron or the CPU patches, and its logits must agree
with Megatron's on rows of random tokens, one of them as long as the context.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.core.bounds import Range, Seed
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added
from pipeline.core.store import Artifact
from stages.models.base import ModelConfig, PositiveInt
from stages.models.registry import Model

if TYPE_CHECKING:
    import torch

VERSION = 1
WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
STOPS = ("<|endoftext|>", "<|im_end|>")
PAD = "<|pad|>"


class ExportConfig(Config):
    model: Model = Field(description="model section, with the rotary embedding of the phase")
    padded_vocab_size: PositiveInt = Field(description="rows of the embedding matrix")
    step: Annotated[int, Range(0, 1e8)] | None = Field(
        None, description="step of the sealed checkpoint; null: the last one"
    )
    seed: Seed | None = added(None, "seed of random weights that are exported instead of a checkpoint; null: none")
    parity_tolerance: Annotated[float, Range(0, 1, above=True)] = Field(
        1e-4, description="maximum difference of any fp32 logit"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="data type of the exported weights")


def run(config: ExportConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """inputs["checkpoint"]: a pretrain or midtrain artifact, unless the config has a seed; inputs["tokenizer"]: the
    tokenizer artifact.

    Fills `out` with model/ (config.json, model.safetensors, generation_config.json, the tokenizer's files) and
    parity.json. Raises CheckFailed if the export is not the checkpoint's model, AtomError if the step is missing.
    """
    import torch

    from stages.mcore.weight_init import full_tensor
    from stages.models.hf import hf_config
    from stages.train.checkpoint import release_checkpoint

    folder = out / "model"
    folder.mkdir(exist_ok=True)
    ids = write_tokenizer(inputs["tokenizer"], folder)
    vocab_size = ids["vocab_size"]
    if vocab_size > config.padded_vocab_size:
        raise AtomError(f"the tokenizer has {vocab_size} tokens, more than padded_vocab_size = "
                        f"{config.padded_vocab_size}; raise it in the recipe")  # fmt: skip
    if config.seed is None:
        full_tensors = dict(release_checkpoint.Tensors(_checkpoint(inputs["checkpoint"], config.step)))
    else:
        shapes, seed = config.model.shapes(config.padded_vocab_size), config.seed
        full_tensors = {name: full_tensor(name, shape, config.model, seed) for name, shape in shapes.items()}
    tensors = {name: t.to(getattr(torch, config.dtype)) for name, t in full_tensors.items()}
    release_checkpoint.save_tensors(folder / WEIGHTS, config.model.spec().to_hf(tensors, config.model, vocab_size))
    stops = [ids[token] for token in STOPS]
    _write(folder / "config.json", hf_config(config.model, vocab_size, stops[0], ids[PAD], config.dtype))
    _write(folder / "generation_config.json", {"do_sample": False, "eos_token_id": stops, "pad_token_id": ids[PAD]})

    report.note("export written; comparing it with Megatron")
    tensors_compared = check_tensors(folder, tensors, config.model, vocab_size)
    rows = parity_rows(vocab_size, config.model.context_length)
    logits = megatron_logits(tensors, config, rows)
    delta = check_logits(folder, rows, [x[:, :vocab_size] for x in logits], config.parity_tolerance, work)
    _write(out / "parity.json", {
        "max_abs_logit_delta": delta,
        "tolerance": config.parity_tolerance,
        "tokens_compared": sum(len(row) for row in rows),
        "longest_row": max(len(row) for row in rows),
        "tensors_compared": tensors_compared,
        "dtype": config.dtype,
    })  # fmt: skip
    report.metric(0, max_abs_logit_delta=delta)


def write_tokenizer(tokenizer: Artifact, folder: Path) -> dict[str, int]:
    """Copies the tokenizer's files. Returns {"vocab_size": ..., special token: its id, ...}."""
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    content = tokenizer.json("tokenizer.json")
    special = {t["content"]: int(t["id"]) for t in content["added_tokens"]}
    missing = [token for token in (PAD, *STOPS) if token not in special]
    if missing:
        raise AtomError(f"tokenizer artifact {tokenizer.key} has no special token {missing[0]}")
    return {**special, "vocab_size": max(max(content["model"]["vocab"].values()), *special.values()) + 1}


def check_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], model: ModelConfig, vocab_size: int) -> int:
    """Compares the exported file, mapped back, with the checkpoint. Returns the number of tensors compared.

    Raises CheckFailed with the first tensor that differs.
    """
    import torch

    from stages.train.checkpoint import release_checkpoint

    try:
        mapped = model.spec().from_hf(release_checkpoint.load_tensors(folder / WEIGHTS), model)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckFailed(f"export parity: {folder / WEIGHTS} cannot be mapped back to Megatron: {error}") from None
    for name in sorted(tensors.keys() | mapped.keys()):
        expected, actual = tensors.get(name), mapped.get(name)
        if expected is not None and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            expected = expected[:vocab_size]
        if expected is None or actual is None or expected.dtype != actual.dtype or not torch.equal(expected, actual):
            raise CheckFailed(
                f"export parity: tensor {name} of {folder / WEIGHTS} is not the checkpoint's; the export is refused"
            )
    return len(tensors)


def parity_rows(vocab_size: int, context_length: int) -> list[list[int]]:
    """Rows of random token ids: one of the full context and some short ones."""
    import torch

    lengths = [context_length, *(max(2, context_length // part) for part in (2, 5, 8, 16))]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def megatron_logits(
    tensors: Mapping[str, torch.Tensor], config: ExportConfig, rows: list[list[int]]
) -> list[torch.Tensor]:
    """fp32 logits of Megatron's model for each row, [len(row), padded_vocab_size]."""
    import torch

    from stages.mcore.model import build, load_tensors
    from stages.train import parallel

    with parallel.session(0), torch.no_grad():
        (gpt,) = build(config.model, config.padded_vocab_size)
        load_tensors([gpt], config.model, config.padded_vocab_size, tensors, "the checkpoint")
        gpt.eval()
        device = next(gpt.parameters()).device
        logits = []
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits.append(gpt(ids, torch.arange(len(row), device=device).unsqueeze(0), None)[0].float().cpu())
        return logits


def check_logits(
    folder: Path, rows: list[list[int]], logits: list[torch.Tensor], tolerance: float, work: Path
) -> float:
    """Loads the folder with transformers in a fresh interpreter. Returns the largest logit difference.

    Raises CheckFailed if it does not load completely, or if a logit differs by the tolerance or more.
    """
    import torch

    from stages.train.checkpoint import release_checkpoint

    expected = work / "parity.safetensors"
    pairs = {f"ids.{i}": torch.tensor(row) for i, row in enumerate(rows)}
    release_checkpoint.save_tensors(expected, {**pairs, **{f"logits.{i}": x for i, x in enumerate(logits)}})
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    # -P keeps this package's folder off the module path, where its file names could hide the libraries'
    command = [sys.executable, "-P", str(Path(__file__).with_name("parity.py")), str(folder), str(expected)]
    process = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    expected.unlink()
    if process.returncode:
        message = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise CheckFailed(f"export parity: transformers cannot load {folder}: {message}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if result["keys"]:
        raise CheckFailed(f"export parity: transformers finds {result['keys'][0]} in {folder}; the export is refused")
    delta, row, position = result["delta"], result["row"], result["position"]
    if not delta < tolerance:  # NaN fails too
        raise CheckFailed(
            f"export parity: the logits of {folder} differ from Megatron's by {delta:.3g} at position {position} of "
            f"parity row {row}, tolerance {tolerance:g}; the export is refused"
        )
    return float(delta)


def estimate(config: ExportConfig) -> Estimate:
    parameters = config.model.parameters(config.padded_vocab_size)
    flops = 2.0 * 2 * parameters["active"] * 2 * config.model.context_length  # two models read twice the context
    return Estimate(
        cpu_seconds=10 + flops / 4e10,  # mostly the fresh interpreter's imports
        flops=flops,
        memory_bytes=4 * 4 * parameters["total"],
        disk_bytes=(weights := (4 if config.dtype == "float32" else 2) * parameters["total"]),
        published_bytes=weights,
        files=8,
        parameters=parameters,
    )


def _checkpoint(artifact: Artifact, step: int | None) -> Path:
    from stages.train.checkpoint import release_checkpoint

    steps = release_checkpoint.steps_of(artifact.path)
    if not steps or (step is not None and step not in steps):
        raise AtomError(f"artifact {artifact.key} has no sealed checkpoint of step {step}; it has {steps}")
    return artifact / release_checkpoint.name_of(steps[-1] if step is None else step)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


STAGE = Stage(
    "export", VERSION, ExportConfig, run, estimate=estimate,
    obstacle=lambda config: config.model.export_obstacle(),
)  # fmt: skip
