"""The release checkpoint that a phase starts from: the last one of an earlier phase, or one of an earlier run."""

from __future__ import annotations

import torch

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.stage import identity
from pipeline.core.store import Artifact
from stages.mcore.model import check_tensors
from stages.mcore.tensor_sharding import cut
from stages.train.checkpoint import release_checkpoint
from stages.train.config import TrainConfig
from stages.train.engine import Engine, Piece


class Origin:
    """A release checkpoint: the folder `subfolder` of an artifact, or the complete artifact."""

    def __init__(self, artifact: Artifact, subfolder: str = "") -> None:
        self.artifact, self.subfolder = artifact, subfolder
        self.step = 0
        """The checkpoint's step, once it is loaded."""

    def load_weights(self, engine: Engine) -> None:
        """Loads the weights, with a fresh optimizer.

        Raises AtomError if the files differ from the sealed ones, or belong to another model than the engine's.
        """
        self._require_intact(engine)
        self._load(engine, moments=False)

    def load_frozen(self, engine: Engine) -> None:
        """Loads the base of an adapter, which training leaves as it is. Raises AtomError as above."""
        self._require_intact(engine)
        weights = release_checkpoint.Tensors(self.artifact / self.subfolder)
        check_tensors(engine.model_shapes, weights.shapes(), self.artifact.key)
        engine.load_frozen(weights)

    def load(self, engine: Engine, config: TrainConfig, tokenizer: str) -> int:
        """Loads weights, Adam's moments and step count. Returns the targets seen so far.

        Raises AtomError as above, and if the checkpoint is of another model or tokenizer.
        """
        self._require_intact(engine)
        key, state = self.artifact.key, release_checkpoint.load_state(self.artifact / self.subfolder)
        saved_config, config_identity = state["config"], identity(config)
        for field, value in config_identity["model"].items():
            saved_value = saved_config["model"].get(field)
            if saved_value != value:
                raise AtomError(f"checkpoint {key} is of another model: its model.{field} is {saved_value}, not "
                                f"{value}; continue from one of this model")  # fmt: skip
        if state["tokenizer"] != tokenizer:
            raise AtomError(f"checkpoint {key} was trained on another tokenizer's tokens; continue from one of this "
                            f"recipe's tokenizer")  # fmt: skip
        self.step = int(state["step"])
        self._load(engine, moments=True)
        return int(state["tokens"])

    def _require_intact(self, engine: Engine) -> None:
        """Raises AtomError if the files are damaged: opening an artifact compares only sizes."""
        damage = self._damage() if engine.ranks.first else None
        if damage := engine.ranks.from_first(damage):
            raise AtomError(
                f"{damage}; take it from a copy, or remove {self.artifact.path} and run again to rebuild it"
            )

    def _load(self, engine: Engine, moments: bool) -> None:
        folder = self.artifact / self.subfolder
        weights = release_checkpoint.Tensors(folder)
        check_tensors(engine.shapes, weights.shapes(), self.artifact.key)
        optimizer_steps = int(release_checkpoint.load_state(folder)["optimizer_step"]) if moments else 0
        states = release_checkpoint.Tensors(folder, release_checkpoint.OPTIMIZER) if optimizer_steps else {}

        def read(kind: str, piece: Piece) -> torch.Tensor:
            full = weights[piece.name] if kind == "weight" else states[f"{kind}.{piece.name}"]
            return cut(full, piece.boxes).flatten()[piece.start : piece.stop]

        engine.load_state(read, optimizer_steps, moments)

    def _damage(self) -> str | None:
        try:
            self.artifact.verify(self.subfolder)
            return None
        except CheckFailed as error:
            return str(error)
