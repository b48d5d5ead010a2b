"""Runs a module of the tests with Transformer Engine's layers on the CPU, or without them.

    python -m tests.te hopper tests.fixtures.layout_fixtures ARGUMENTS...

The first argument is the device that TE is to believe in: `hopper`, or `blackwell`, which MXFP8 needs; `local` hides TE,
and has this project's layers round like TE's where a run's precision is one of FP8.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from tests.te import stand_ins

DEVICES = {"hopper": stand_ins.HOPPER, "blackwell": stand_ins.BLACKWELL}


def simulate_fp8() -> None:
    """Has the engine train runs of an FP8 precision in bf16 with layers that round: what `atom simulate-precision` does."""
    from stages.mcore.fake_quantization import RECIPES, attach
    from stages.train.engine import Engine

    initialize = Engine.__init__

    def initialize_and_attach(self: Engine, config: Any, *args: Any) -> None:
        recipe = RECIPES.get(config.phase.precision)
        if recipe is None:
            return initialize(self, config, *args)
        phase = config.phase.model_copy(update={"precision": "bf16"})
        initialize(self, config.model_copy(update={"phase": phase}), *args)
        attach(self.chunks, recipe)

    Engine.__init__ = initialize_and_attach  # type: ignore[method-assign]


if __name__ == "__main__":
    device, module = sys.argv[1:3]
    if device in DEVICES:
        stand_ins.install(DEVICES[device])
    else:
        assert device == "local", device
        stand_ins.hide()
        simulate_fp8()
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    # that no layer was TE's, or that one was, is the point
    assert bool(stand_ins.CALLS["generic_gemm"]) == (device in DEVICES), stand_ins.CALLS
