"""A few steps of one model that rounds to FP8, in several layouts, in one set of processes; as tests/layouts.py.

python tests/fp8_layouts.py CORPUS TASK.json OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import layouts

from pipeline.launch.ranks import free_port

# Cuts over two tensor ranks fall between blocks of 128: QKV has 2 x 256 rows, the others 2 x 128 columns, or rows of
# gate and of up.
SIZES = {"layers": 2, "hidden_size": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "expert_ffn_size": 256}
# Weights all but stand still, so that each step is a case of its own. They would not stay together for long: a sum that
# is taken in another order, a bit apart, now and then rounds to the other side, and a router then chooses another expert.
STILL = {"lr": 1e-12, "final_lr": 1e-12, "warmup_steps": 0, "weight_decay": 0.05}

Case = tuple[str, str, dict[str, Any]]
"""Recipe, name and settings of a layout. A kind of tensor after the recipe: of these, no rank hears of the others'
largest values."""


def compare(corpus: Path, cases: list[Case], ranks: int, out: Path) -> dict[str, list[dict[str, float]]]:
    """The figures of each case, by "RECIPE NAME". Raises AssertionError with the log of a rank that failed."""
    ports: set[int] = set()
    while len(ports) < len(cases):
        ports.add(free_port())
    task = out.with_suffix(".task")
    task.write_text(json.dumps({"cases": cases, "ports": sorted(ports)}))
    codes, logs = layouts.end(layouts.spawn([__file__, str(corpus), str(task), str(out)], ranks), timeout=500)
    assert not any(codes), [log[-2000:] for code, log in zip(codes, logs, strict=True) if code]
    found: dict[str, list[dict[str, float]]] = json.loads(out.read_text())
    return found


def main(corpus: Path, task: dict[str, Any], out: Path) -> None:
    from stages.model import fake_fp8
    from stages.model.quantize import RECIPES
    from stages.train.engine import Engine

    ranks, found = int(os.environ.get("WORLD_SIZE", "1")), {}
    make, quantise, how = Engine.__init__, fake_fp8.quantise, [""]

    def rounding(self: Engine, *args: Any) -> None:
        make(self, *args)
        fake_fp8.attach(self.chunks, RECIPES[how[0].split()[0]])

    def perhaps_alone(x: Any, recipe: Any, kind: Any, summed: int, group: Any) -> Any:
        return quantise(x, recipe, kind, summed, None if how[0].endswith(kind) else group)

    Engine.__init__ = rounding  # type: ignore[method-assign]
    fake_fp8.quantise = perhaps_alone  # type: ignore[assignment]
    for port, (recipe, name, layout) in zip(task["ports"], task["cases"], strict=True):
        os.environ["MASTER_PORT"], how[0] = str(port), recipe
        settings = layouts.settings_of(layout, ranks, optimizer=STILL)
        settings["model"] = {**layouts.MODEL, **SIZES}
        try:
            found[f"{recipe} {name}"] = layouts.train(corpus, settings, 3)
        except Exception as error:
            raise RuntimeError(f"{recipe}, layout {name}") from error
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
