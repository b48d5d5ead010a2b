"""Every linear layer of a model cut over two tensor ranks, on numbers whose sums are exact in any order.

python tests/fp8_layouts.py OUT.json, with RANK and the like: what each layer gave that is not what one process gives.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import layouts
import torch
import torch.distributed as dist

from pipeline.launch.rendezvous import free_port

# Cuts over two tensor ranks fall between blocks of 128: QKV has 2 x 256 rows, the others 2 x 128 columns, or rows of
# gate and of up.
SIZES = {"layers": 2, "hidden_size": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "moe_intermediate_size": 256}
CASES = [(name, alone) for name in ("TP2+SP", "TP2 EP2 ETP1") for alone in ("", "input", "weight", "gradient")]
"""A layout of two ranks, and the kind of tensor of which no rank hears of the other's largest value."""
TOKENS = 256


def compare(out: Path) -> dict[str, list[str]]:
    """By "LAYOUT/ALONE/RECIPE": the layers and tensors that are not those of one process, on rank 0."""
    codes, logs = layouts.end(layouts.spawn([__file__, str(out)], 2, {"PORTS": json.dumps(ports())}), timeout=300)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    report: dict[str, list[str]] = json.loads(out.read_text())
    return report


def ports() -> list[int]:
    numbers: set[int] = set()
    while len(numbers) < len(CASES):
        numbers.add(free_port())
    return sorted(numbers)


def grid(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Integers up to 27, and one of 112 in the last row and column. Every recipe scales them by a power of two and
    rounds many of them; products of what it gives are whole numbers, whose sums fp32 holds exactly in any order. A
    part without the 112 would be scaled by another number if its rank did not hear of it."""
    values = torch.randint(-27, 28, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    values[-1, -1] = 112.0
    return values


def reference(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, recipe: Any) -> dict[str, torch.Tensor]:
    """The three products of the whole matrices, summed in double precision."""
    from stages.mcore.quantize import quantize_dequantize

    q = lambda t, kind, summed: quantize_dequantize(t, recipe, kind, summed)[0].double()  # noqa: E731
    return {
        "y": q(x, "input", 1) @ q(w, "weight", 1).t(),
        "dx": q(dy, "gradient", 1) @ q(w, "weight", 0),
        "dw": q(dy, "gradient", 0).t() @ q(x, "input", 0),
    }


def differences(gpt: Any, recipe: Any) -> Iterator[str]:
    """Runs each linear layer of the decoder forward and backward on this rank's part of the grids."""
    from stages.mcore.megatron_imports import tensor_parallel

    kinds = tensor_parallel.ColumnParallelLinear | tensor_parallel.RowParallelLinear
    for number, (name, module) in enumerate(m for m in gpt.decoder.named_modules() if isinstance(m[1], kinds)):
        size, rank = module.tp_group.size(), module.tp_group.rank()
        by_rows = isinstance(module, tensor_parallel.ColumnParallelLinear)
        sequence = module.sequence_parallel and not module.explicit_expert_comm
        part = lambda t, dimension, cut: t.chunk(size, dimension)[rank] if cut else t  # noqa: B023, E731
        rows, columns = (
            n * size if cut else n for n, cut in zip(module.weight.shape, (by_rows, not by_rows), strict=True)
        )
        x, w, dy = (grid(*shape, 3 * number + n) for n, shape in enumerate(
            [(TOKENS, columns), (rows, columns), (TOKENS, rows)]))  # fmt: skip
        unsplit = reference(x, w, dy, recipe)
        module.weight.data.copy_(part(w, 0 if by_rows else 1, True))
        # tokens in front, a batch of one; under sequence parallelism a rank is given, and gives, its part of them
        x_part = part(part(x, 1, not by_rows), 0, by_rows and sequence)[:, None].clone().requires_grad_()
        out, _ = module(x_part)
        scattered = out.shape[0] < TOKENS
        out.backward(part(part(dy, 1, by_rows), 0, scattered)[:, None])
        y, dx, dw = out.detach()[:, 0], x_part.grad[:, 0], module.weight.grad
        if module.explicit_expert_comm:  # Megatron's dispatcher adds up what the ranks of an expert give
            dist.all_reduce(dx if by_rows else y, group=module.tp_group)
        expected = {
            "y": part(part(unsplit["y"], 1, by_rows), 0, scattered),
            "dx": part(part(unsplit["dx"], 1, not by_rows), 0, by_rows and sequence),
            "dw": part(unsplit["dw"], 0 if by_rows else 1, True),
        }
        for product, tensor in (("y", y), ("dx", dx), ("dw", dw)):
            if not torch.equal(tensor.double(), expected[product]):
                yield f"{name} {product}"


def main(out: Path) -> None:
    from stages.mcore import fake_fp8
    from stages.mcore.parallel_layout import Layout
    from stages.mcore.quantize import RECIPES
    from stages.models.qwen3_moe.config import ModelConfig
    from stages.models.qwen3_moe.megatron_model import build
    from stages.train import parallel

    quantize, report = fake_fp8.quantize, {}

    def deaf(kind_alone: str, x: Any, recipe: Any, kind: Any, summed: int, group: Any) -> Any:
        return quantize(x, recipe, kind, summed, None if kind == kind_alone else group)

    config = ModelConfig.model_validate({**layouts.MODEL, **SIZES})
    for port, (name, alone) in zip(json.loads(os.environ["PORTS"]), CASES, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        fake_fp8.quantize = partial(deaf, alone)  # type: ignore[assignment]
        layout = Layout(ranks=2, **layouts.TWO[name])
        with parallel.session(0, layout):
            for recipe in RECIPES if not alone else ["fp8-tensorwise"]:
                (gpt,) = build(config, 64, layout)
                fake_fp8.attach([gpt], RECIPES[recipe])
                report[f"{name}/{alone}/{recipe}"] = sorted(differences(gpt, RECIPES[recipe]))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
