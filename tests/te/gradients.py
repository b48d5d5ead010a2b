"""The gradients of a model's first step in one process, as the optimizer's first moments hold them: OUT.safetensors.

    python -m tests.te hopper tests.te.gradients CORPUS '{...settings...}' OUT.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.core.store import Artifact
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.data import Order, RankBatch, Shards
from stages.train.engine import Engine


def main(corpus: Path, settings: dict[str, Any], out: Path) -> None:
    config, tokens = TrainConfig.model_validate(settings), Artifact.open(corpus / "tokens")
    order, shards = Order(Artifact.open(corpus / "order"), config.phase), Shards(tokens, "train")
    with parallel.session(config.seed) as ranks:
        engine = Engine(config, ranks, tokens.json("meta.json")["vocab_size"])
        engine.initialize()
        batch = RankBatch.read(order.rows(1), shards, config.phase.micro_rows, ranks, config.phase.pack)
        engine.step(batch, 1e-3, lambda loss, norm: None)
        save_file({piece.name: state["exp_avg"].clone() for piece, state in engine.state() if "exp_avg" in state}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
