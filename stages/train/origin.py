"""The release checkpoint of an earlier run that a phase continues from, with other settings or data from there on."""

from __future__ import annotations

import torch
from safetensors import safe_open

from pipeline.errors import AtomError
from pipeline.stage import identity
from pipeline.store import Artifact
from stages.model.build import check_tensors
from stages.model.placement import cut
from stages.train import sealed
from stages.train.config import TrainConfig
from stages.train.engine import Engine, Piece


class Origin:
    """A sealed checkpoint: model.safetensors, optimizer.safetensors and state.json."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.state = sealed.load_state(artifact.path)
        self.step = int(self.state["step"])
        self.rows: dict[str, int] = self.state["data_position"]["rows"]

    def load(self, engine: Engine, config: TrainConfig, tokenizer: str) -> int:
        """Takes over weights, Adam's moments and step count. Returns the targets seen so far.

        Raises AtomError if the checkpoint is of another model or tokenizer.
        """
        key = self.artifact.key
        before, now = self.state["config"], identity(config)
        for field, value in now["model"].items():
            if before["model"].get(field) != value:
                raise AtomError(f"checkpoint {key} is of another model: its model.{field} is "
                                f"{before['model'].get(field)}, not {value}; continue from one of this model")  # fmt: skip
        if self.state["tokenizer"] != tokenizer:
            raise AtomError(f"checkpoint {key} was trained on another tokenizer's tokens; continue from one of this "
                            f"recipe's tokenizer")  # fmt: skip
        files = {"weight": safe_open(self.artifact / sealed.MODEL, framework="pt")}
        check_tensors(engine.shapes, {n: files["weight"].get_slice(n).get_shape() for n in files["weight"].keys()}, key)  # noqa: SIM118
        if self.step:
            files["moments"] = safe_open(self.artifact / sealed.OPTIMIZER, framework="pt")

        def read(kind: str, piece: Piece) -> torch.Tensor:
            full = (files["weight"].get_tensor(piece.name) if kind == "weight"
                    else files["moments"].get_tensor(f"{kind}.{piece.name}"))  # fmt: skip
            return cut(full, piece.boxes).flatten()[piece.start : piece.stop]

        engine.load_state(read, self.step)
        return int(self.state["tokens"])
