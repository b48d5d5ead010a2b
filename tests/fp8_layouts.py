"""tests/layouts.py with the linear layers of every engine rounding to FP8.

python tests/fp8_layouts.py RECIPE CORPUS '{"layouts": ...}' OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import layouts

from pipeline.launch.ranks import free_port

# Cuts over two tensor ranks fall between blocks of 128: QKV has 2 x 256 rows, the others 2 x 128 columns, or rows of
# gate and of up.
MODEL: dict[str, Any] = {
    **layouts.MODEL, "layers": 2, "hidden_size": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "expert_ffn_size": 256,
}  # fmt: skip


def settings(layout: dict[str, Any], ranks: int) -> dict[str, Any]:
    gentle = {"lr": 1e-12, "final_lr": 1e-12, "warmup_steps": 0, "weight_decay": 0.05}
    return {**layouts.settings_of(layout, ranks, optimizer=gentle), "model": MODEL}


def compare(
    recipe: str, corpus: Path, chosen: dict[str, dict[str, Any]], ranks: int, out: Path, steps: int
) -> dict[str, list[dict[str, float]]]:
    """As layouts.compare."""
    ports: set[int] = set()
    while len(ports) < len(chosen):
        ports.add(free_port())
    task = {"layouts": chosen, "ports": sorted(ports), "config": settings({}, 1), "steps": steps}
    codes, logs = layouts.end(layouts.spawn([__file__, recipe, str(corpus), json.dumps(task), str(out)], ranks), 300)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    found: dict[str, list[dict[str, float]]] = json.loads(out.read_text())
    return found


def round_everywhere(recipe: str) -> None:
    """Every engine made from now on rounds."""
    from stages.model.fake_fp8 import attach
    from stages.model.quantize import RECIPES
    from stages.train.engine import Engine

    make = Engine.__init__

    def made(self: Engine, *args: Any) -> None:
        make(self, *args)
        attach(self.chunks, RECIPES[recipe])

    Engine.__init__ = made  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] != "none":
        round_everywhere(sys.argv[1])
    layouts.main(Path(sys.argv[2]), json.loads(sys.argv[3]), Path(sys.argv[4]))
