"""The release checkpoint that a phase starts from: the last one of an earlier phase, or one of an earlier run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.core.errors import AtomError
from pipeline.core.stage import identity
from pipeline.core.store import Artifact, Progress
from stages.mcore.model import check_tensors
from stages.mcore.tensor_sharding import cut
from stages.train.checkpoint import release_checkpoint
from stages.train.checkpoint.work_checkpoint import find_damage
from stages.train.config import TrainConfig
from stages.train.engine import Engine, Piece


class Origin:
    """A release checkpoint: the folder `subfolder` of an artifact, or, if that is empty, the complete artifact.

    Before anything is loaded, all ranks together hash the files that are needed. progress: gets the bytes that are
    hashed and read, from several threads.
    """

    def __init__(self, artifact: Artifact, subfolder: str, progress: Progress) -> None:
        self.artifact, self.subfolder, self.progress = artifact, subfolder, progress
        self.step = 0
        """The checkpoint's step, once it is loaded."""

    def load_weights(self, engine: Engine) -> None:
        """Loads the weights, with a fresh optimizer.

        Raises AtomError if the files differ from the sealed ones, or belong to another model than the engine's.
        """
        self._require_intact(engine, moments=False)
        self._load(engine, moments=False)

    def load_with_states(self, engine: Engine) -> None:
        """Loads weights, the optimizer's states and its count of updates. Raises AtomError as above."""
        self._require_intact(engine, moments=True)
        self._load(engine, moments=True)

    def load_frozen(self, engine: Engine) -> None:
        """Loads the base of an adapter, which training leaves as it is. Raises AtomError as above."""
        self._require_intact(engine, moments=False)
        weights = release_checkpoint.Tensors(self.artifact / self.subfolder, progress=self.progress)
        check_tensors(engine.model_shapes, weights.shapes(), self.artifact.key)
        engine.load_frozen(weights)

    def load(self, engine: Engine, config: TrainConfig, tokenizer: str) -> int:
        """Loads weights, the optimizer's states and its step count. Returns the targets seen so far.

        Raises AtomError as above, and if the checkpoint is of another model or tokenizer.
        """
        self._require_intact(engine, moments=True)
        key, state = self.artifact.key, release_checkpoint.load_state(self.artifact / self.subfolder)
        saved_config, config_identity = state["config"], identity(config)
        # Only settings that enter the key: others may differ between the runs.
        for field, value in config_identity["model"].items():
            saved_value = saved_config["model"].get(field)
            if saved_value != value:
                raise AtomError(
                    f"checkpoint {key} is of another model: its model.{field} is {saved_value}, not "
                    f"{value}; continue from one of this model"
                )
        if state["tokenizer"] != tokenizer:
            raise AtomError(
                f"checkpoint {key} was trained on another tokenizer's tokens; continue from one of this "
                f"recipe's tokenizer"
            )
        self.step = int(state["step"])
        self._load(engine, moments=True)
        return int(state["tokens"])

    def _require_intact(self, engine: Engine, moments: bool) -> None:
        """Raises AtomError if files that are loaded are damaged. Each rank hashes its share of them."""
        ranks, find = engine.ranks, release_checkpoint.damage
        share = ranks.rank, ranks.world
        # Collective, in threads: a rank whose share is large must not let the others time out.
        damage = find_damage(
            ranks,
            self.artifact / self.subfolder,
            lambda: find(self.artifact, self.subfolder, moments, share, self.progress),
        )
        if damage:
            raise AtomError(damage)

    def _load(self, engine: Engine, moments: bool) -> None:
        folder = self.artifact / self.subfolder
        weights = release_checkpoint.Tensors(folder, progress=self.progress)
        check_tensors(engine.shapes, weights.shapes(), self.artifact.key)
        state = release_checkpoint.load_state(folder) if moments else {"optimizer_step": 0}
        optimizer_steps = int(state["optimizer_step"])
        states: Mapping[str, Tensor] = {}
        if optimizer_steps:
            states = release_checkpoint.Tensors(folder, release_checkpoint.OPTIMIZER, self.progress)
            optimizer = engine.config.phase.optimizer
            if absent := sorted(optimizer.state_shapes(engine.shapes).keys() - states.keys()):
                raise AtomError(
                    f"checkpoint {self.artifact.key} is of another optimizer than optimizer.kind = {optimizer.kind}: "
                    f"it lacks {absent[0]}; continue with the kind that trained it"
                )

        def read(kind: str, piece: Piece) -> Tensor:
            full = weights[piece.name] if kind == "weight" else states[f"{kind}.{piece.name}"]
            return cut(full, piece.boxes).flatten()[piece.start : piece.stop]

        engine.load_state(read, optimizer_steps, moments, state)
