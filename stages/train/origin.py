"""The release checkpoint of an earlier run that a phase continues from, with other settings or data from there on."""

from __future__ import annotations

from typing import Any

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

    def load(self, engine: Engine, config: TrainConfig, tokenizer: str) -> int:
        """Takes over weights, Adam's moments and step count. Returns the targets seen so far.

        Raises AtomError if the checkpoint is of another model or tokenizer.
        """
        key = self.artifact.key
        before, now = self.state["config"], identity(config)
        for field, value in now["model"].items():
            there = before["model"].get(field)
            if there != value:
                raise AtomError(f"checkpoint {key} is of another model: its model.{field} is {there}, not {value}; "
                                f"continue from one of this model")  # fmt: skip
        if self.state["tokenizer"] != tokenizer:
            raise AtomError(f"checkpoint {key} was trained on another tokenizer's tokens; continue from one of this "
                            f"recipe's tokenizer")  # fmt: skip
        files: dict[str, Any] = {"weight": safe_open(self.artifact / sealed.MODEL, framework="pt")}
        names = files["weight"].keys()
        check_tensors(engine.shapes, {name: files["weight"].get_slice(name).get_shape() for name in names}, key)
        if self.step:
            files["moments"] = safe_open(self.artifact / sealed.OPTIMIZER, framework="pt")

        def read(kind: str, piece: Piece) -> torch.Tensor:
            full = (files["weight"].get_tensor(piece.name) if kind == "weight"
                    else files["moments"].get_tensor(f"{kind}.{piece.name}"))  # fmt: skip
            return cut(full, piece.boxes).flatten()[piece.start : piece.stop]

        engine.load_state(read, self.step)
        return int(self.state["tokens"])
