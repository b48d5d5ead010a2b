"""vLLM's weight transfer engine `atom`: a policy's weights from a folder that the trainer's ranks have written.

An update has two requests. The first checks the folder: every tensor that the index lists is in its file, the digests
are right, and their digest is that of the policy. The workers of a server share this reading. The second loads; until
then a refusal leaves the old weights as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atom_index import Refused, check, tensors  # type: ignore[import-not-found]
from vllm.distributed.weight_transfer.base import (  # type: ignore[import-not-found]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

NAME = "atom"


@dataclass
class Model(WeightTransferInitInfo):  # type: ignore[misc]
    """sizes: entries of the trainer's config.json that the server's model must have too."""

    sizes: dict[str, Any]


@dataclass
class Weights(WeightTransferUpdateInfo):  # type: ignore[misc]
    """digest: of the policy, whose weights are in `folder`. load: False to check the folder only."""

    digest: str
    folder: str
    load: bool = True


class Engine(WeightTransferEngine):  # type: ignore[misc]
    init_info_cls, update_info_cls = Model, Weights
    checked = ""
    """The digest of the weights that this update has checked."""
    begun = False
    """Whether the model takes weights, until `finish_weight_update`."""

    def init_transfer_engine(self, info: Model) -> None:
        config = self.model_config.hf_text_config
        for name, value in sorted(info.sizes.items()):
            if getattr(config, name, value) != value:
                raise Refused(
                    f"its model has {name} = {getattr(config, name)}, and the trainer's has {value}; start it with the "
                    "trainer's config.json"
                )

    def start_weight_update(self) -> None:
        self.checked, self.begun = "", False

    def receive_weights(self, info: Weights) -> None:
        if not info.load:
            check(Path(info.folder), info.digest, self.parallel_config.rank, self.parallel_config.world_size)
            self.checked = info.digest
        elif self.checked != info.digest:
            raise Refused(f"the weights of {info.digest} were not checked before")
        else:
            self._load(info.folder)

    def _load(self, folder: str) -> None:
        from vllm.model_executor.model_loader.reload import (  # type: ignore[import-not-found]
            initialize_layerwise_reload,
        )
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        missing = {name for name, _ in self.model.named_parameters()}
        if current_platform.is_cpu():
            # 0.32 packs the experts for its kernel when it makes one, and reads weights of a reload as packed ones
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if hasattr(method, "moe_kernel"):
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)
        self.begun = True
        try:
            missing -= self.model.load_weights(tensors(Path(folder)))
        except BaseException:
            self._end()
            raise
        if missing:
            self._end()
            raise Refused(f"no tensor of {folder} is {min(missing)} of its model; start it with the trainer's model")

    def finish_weight_update(self) -> None:
        if not self.begun:
            raise Refused("no weights came with this update")
        self._end()

    def _end(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self.checked, self.begun = "", False

    def shutdown(self) -> None:
        """Holds nothing."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.weight_transfer.factory import (  # type: ignore[import-not-found]
        WeightTransferEngineFactory as Factory,
    )

    if NAME not in Factory._registry:
        Factory.register_engine(NAME, Engine)
