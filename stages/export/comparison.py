"""The parity gate of an export: the written files are the checkpoint's tensors, and transformers computes its logits.

The models of the second half have one layer in memory at a time, beside the tables; transformers loads a small one
whole. The rows' hidden states pass through it, so the operations and their results are those of the whole model.

Where two experts of a router nearly tie, rounding may choose another one in each model. The logits of that token then
differ, and those of later tokens a little, by attention to it. From such a token on, a row is compared by its median.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import AtomError, CheckFailed
from stages.export import SLICE_BYTES, parity_lengths
from stages.mcore import gpu
from stages.mcore.hf_mapping import from_hf
from stages.mcore.model import build, check_tensors
from stages.models.base import ModelConfig
from stages.models.param_names import BUFFERS, global_name
from stages.train import parallel
from stages.train.checkpoint import release_checkpoint

TABLES = ("word_embeddings.weight", "output_layer.weight")


def compare_files(folder: Path, tensors: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> int:
    """Compares the exported files, mapped back, with the checkpoint. Returns the number of tensors compared.

    Raises CheckFailed with the first tensor that differs.
    """
    remaining = set(tensors)
    try:
        for name, actual in from_hf(release_checkpoint.Tensors(folder), model):
            # Exports leave out the rows that pad the vocabulary.
            expected = tensors[name][:vocab_size] if name.endswith(TABLES) else tensors[name]
            if expected.dtype != actual.dtype or not torch.equal(expected, actual):
                raise CheckFailed(
                    f"export parity: tensor {name} of {folder} is not the checkpoint's; the export is refused"
                )
            remaining.discard(name)
    except (KeyError, ValueError, RuntimeError, AtomError) as error:
        if isinstance(error, CheckFailed):
            raise
        raise CheckFailed(f"export parity: {folder} cannot be mapped back to Megatron: {error}") from None
    # A tensor that no file holds would pass the loop above.
    if remaining:
        raise CheckFailed(f"export parity: tensor {min(remaining)} is not in {folder}; the export is refused")
    return len(tensors)


def parity_rows(vocab_size: int, longest: int) -> list[list[int]]:
    """Rows of random token ids: one of so many, and some shorter ones."""
    lengths = parity_lengths(longest)
    # The same rows in every export, so that its tolerance can be compared.
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def slice_positions(vocab_size: int) -> int:
    """Positions whose logits are compared at one time."""
    return max(1, SLICE_BYTES // (4 * vocab_size))


NEAR_TIE = 1e-5
"""Difference of two router scores below which rounding may choose either of their experts."""


def near_ties(router: Any, hidden: Tensor) -> list[int]:
    """Returns the positions at which the last expert that a router chooses nearly ties with the first that it leaves.

    Args:
        router: Megatron's router.
        hidden: Its input, [positions, 1, hidden].
    """
    scores = router.gating(hidden)[:, 0].float()
    if scores.shape[-1] == router.topk:
        return []
    if router.score_function == "sigmoid":
        scores = scores.sigmoid() + (0 if router.expert_bias is None else router.expert_bias)
    top = scores.topk(router.topk + 1).values
    positions: list[int] = (top[:, -2] - top[:, -1] < NEAR_TIE).nonzero().flatten().tolist()
    return positions


class _FirstLayer(Exception):
    """The arguments of the first layer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


@torch.no_grad()
def megatron_logits(
    tensors: Mapping[str, Tensor],
    model: ModelConfig,
    padded_vocab_size: int,
    rows: list[list[int]],
    vocab_size: int,
    steps: Mapping[int, int] | None = None,
    ties: Sequence[set[int]] = (),
) -> Generator[Tensor, None, None]:
    """The fp32 logits of Megatron's model, [positions, vocab_size], of each row one slice after the other.

    steps: the distance of neighbors' positions in rows of that length, if it is not 1. ties: of each row a set, which
    gets the positions of near ties before the first slice.

    Raises AtomError if a tensor does not have the model's shape.
    """
    shapes = model.shapes(padded_vocab_size)
    device = gpu.device()

    def fill(module: torch.nn.Module, at: str) -> None:
        """Gives a module of the model, which is `at` that place in it, its weights."""
        module.to_empty(device=device)
        for local, tensor in [*module.named_parameters(), *module.named_buffers()]:
            name = global_name(f"{at}.{local}")
            if isinstance(tensor, torch.nn.Parameter) or name.endswith(BUFFERS):
                full = tensors[name]
                check_tensors({name: shapes[name]}, {name: full.shape}, "the checkpoint")
                tensor.data.copy_(full)

    with parallel.session(0):
        (gpt,) = build(model, padded_vocab_size, on_meta=True)
        gpt.eval()
        gpt.config.rows.steps = dict(steps or {})
        fill(gpt.embedding, "embedding")
        # The model itself computes embeddings and masks, up to its first layer, whose arguments are all that is kept.
        hook = gpt.decoder.layers[0].register_forward_pre_hook(_stop, with_kwargs=True)
        calls = []
        for row in rows:
            try:
                gpt(torch.tensor([row], device=device), torch.arange(len(row), device=device).unsqueeze(0), None)
            except _FirstLayer as reached:
                calls.append(reached.arguments)
        hook.remove()
        for layer in gpt.decoder.layers:
            fill(layer, f"decoder.layers.{layer.model_layer}")
            found: list[list[int]] = []
            if ties and hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_pre_hook(
                    lambda router, inputs, found=found: found.append(near_ties(router, inputs[0]))
                )
            for call in calls:
                call["hidden_states"] = layer(**call)[0]
            for near, positions in zip(ties, found, strict=False):  # none of a layer without a router
                near.update(positions)
            # One layer in memory at a time.
            layer.to("meta")
        fill(gpt.decoder.final_layernorm, "decoder.final_layernorm")
        table = None
        if model.tie_embeddings:
            table = gpt.shared_embedding_or_output_weight()
        else:
            gpt.embedding.to("meta")
            fill(gpt.output_layer, "output_layer")
        # Taken out one by one, so that the states of a row are freed when its logits are done.
        while calls:
            hidden = gpt.decoder.final_layernorm(calls.pop(0)["hidden_states"])
            for part in hidden.split(slice_positions(vocab_size)):
                yield gpt.output_layer(part, weight=table)[0][:, 0, :vocab_size].float().cpu()


def _stop(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _FirstLayer(kwargs)


def compare_logits(
    folder: Path,
    rows: list[list[int]],
    logits: Iterable[Tensor],
    tolerance: float,
    work: Path,
    by_layer: bool,
    steps: Mapping[int, int] | None = None,
    ties: Sequence[set[int]] = (),
) -> tuple[float, int]:
    """Loads the folder with transformers in a fresh interpreter.

    logits, steps, ties: as `megatron_logits` gives them. by_layer: the interpreter loads one layer at a time.
    Returns the largest difference of a logit, and the number of tokens that are compared by it: all but those from a
    near tie on at which the models differ.
    Raises CheckFailed if it does not load completely, or if a logit differs by the tolerance or more.
    """
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # One thread, as Megatron's model has: the order of sums then does not depend on the machine.
        "OMP_NUM_THREADS": "1",
    }
    # -P keeps this package's folder off the module path, where its file names could hide the libraries'
    command = [sys.executable, "-P", str(Path(__file__).with_name("streamed_model.py")), str(folder)]
    with tempfile.TemporaryFile(dir=work) as out, tempfile.TemporaryFile(dir=work) as errors:
        # It imports its libraries while Megatron's model computes, and loads its own when that one's layers are gone.
        with subprocess.Popen(
            [*command, "--by-layer"] if by_layer else command,
            env={**os.environ, **offline},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
        ) as process:
            assert process.stdin is not None
            slices = iter(logits)
            try:
                # Before the request, which states how many positions a slice has.
                part = next(slices)
                row_steps = [(steps or {}).get(len(row), 1) for row in rows]
                request = {
                    "rows": rows,
                    "steps": row_steps,
                    "positions": slice_positions(part.shape[-1]),
                    "tolerance": tolerance,
                    "ties": [sorted(row) for row in ties] or [[]] * len(rows),
                }
                process.stdin.write(json.dumps(request).encode() + b"\n")
                while True:
                    process.stdin.write(part.contiguous().numpy().data)
                    if (following := next(slices, None)) is None:
                        break
                    part = following
            except BrokenPipeError:
                pass  # it has ended with a verdict of its own, which follows
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        out.seek(0)
        errors.seek(0)
        stdout, stderr = out.read().decode(), errors.read().decode(errors="replace")
    if process.returncode:
        # The last line of a traceback is the error.
        message = (stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise CheckFailed(f"export parity: transformers cannot load {folder}: {message}")
    result: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    if result["keys"]:
        raise CheckFailed(f"export parity: transformers finds {result['keys'][0]} in {folder}; the export is refused")
    delta, row, position = result["delta"], result["row"], result["position"]
    if not delta < tolerance:  # NaN fails too
        raise CheckFailed(
            f"export parity: the logits of {folder} differ from Megatron's by {delta:.3g} at position {position} of "
            f"parity row {row}, tolerance {tolerance:g}; the export is refused"
        )
    return float(delta), int(result["tokens"])
