"""The weight transfer engine `atom` of vLLM, by which its workers get a policy's weights.

The trainer's ranks have written the weights to a folder, or broadcast them.

The index of the folder, or the request of a broadcast, states the digest of each tensor, from which that of the policy
follows. The workers share the check of what arrives: a tensor is loaded after its check. An update that fails half-way
never ends, and the server answers nothing until one does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from atom_group import (  # type: ignore[import-not-found]
    GROUP,
    PATIENCE,
    WORKERS,
    Group,
    Packet,
    connect,
    other_nccl,
    packets,
    view,
)
from atom_index import (  # type: ignore[import-not-found]
    HEAD,
    TABLE,
    Refused,
    policy_digest,
    row_of,
    tensors,
)
from atom_secret import VARIABLE, read, sign  # type: ignore[import-not-found]
from vllm.distributed.weight_transfer.base import (  # type: ignore[import-not-found]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

NAME = "atom"


@dataclass
class Model(WeightTransferInitInfo):  # type: ignore[misc]
    """The trainer's model, and for broadcasts the group in which it is sent.

    Attributes:
        sizes: Entries of the trainer's config.json that the server's model must have too.
        store: Host and port of the group's store; None without broadcasts.
        nonce: Number of which, with the run's secret, the key of the store's entries is made.
        ranks: Number of the trainer's ranks in the group.
        seconds: Time in which the group must form, and each broadcast end on the ranks.
        device: Type of the trainer's device.
        nccl: Release of the trainer's NCCL.
    """

    sizes: dict[str, Any]
    store: str | None = None
    nonce: str = ""
    ranks: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    nccl: str = ""


@dataclass
class Weights(WeightTransferUpdateInfo):  # type: ignore[misc]
    """An update of the weights, by a folder or by a broadcast.

    Attributes:
        digest: Digest of the policy.
        folder: Folder with the weights; empty for a broadcast.
        names: Names of the tensors of a broadcast, in order.
        rows: Their entries, as in the index.
        roots: Rank of the trainer that holds each.
    """

    digest: str
    folder: str = ""
    names: list[str] | None = None
    rows: list[dict[str, Any]] | None = None
    roots: list[int] | None = None


class Engine(WeightTransferEngine):  # type: ignore[misc]
    """The engine in one worker. vLLM calls its methods."""

    init_info_cls, update_info_cls = Model, Weights
    # True while the model takes weights, until `finish_weight_update`.
    begun = False
    group: Group | None = None

    def init_transfer_engine(self, info: Model) -> None:
        config = self.model_config.hf_text_config
        for name, value in sorted(info.sizes.items()):
            # An entry that this model's config lacks is no contradiction.
            if getattr(config, name, value) != value:
                raise Refused(
                    f"its model has {name} = {getattr(config, name)}, and the trainer's has {value}; start it with the "
                    "trainer's config.json"
                )
        # An invitation ends the group before it.
        self.shutdown()
        if info.store is not None:
            if self.device.type != info.device:
                raise Refused(f"it computes on {self.device.type}, and the trainer on {info.device}; use the folder")
            if sentence := other_nccl(info.nccl, self.device):
                raise Refused(sentence)
            key = sign(read(Path(os.environ[VARIABLE])), GROUP, info.nonce)
            store, parallel = connect(info.store, key, info.seconds), self.parallel_config
            workers = parallel.world_size * parallel.data_parallel_size
            store.set(WORKERS, str(workers))
            # The trainer's ranks come first, then the workers of all data-parallel parts of the server.
            rank = info.ranks + parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.group = Group(store, rank, info.ranks + workers, info.seconds, self.device, PATIENCE)

    def start_weight_update(self) -> None:
        self.begun = False

    def receive_weights(self, info: Weights) -> None:
        if info.rows is not None:
            self._load(self._received(info), f"the policy {info.digest}")
        else:
            part, parts = self.parallel_config.rank, self.parallel_config.world_size
            self._load([tensors(Path(info.folder), info.digest, part, parts)], info.folder)

    def _received(self, info: Weights) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yields the tensors of a broadcast, of one packet after the other, checked."""
        assert info.rows is not None and info.names is not None and info.roots is not None, "of one request"
        if policy_digest(dict(zip(info.names, info.rows, strict=True))) != info.digest:
            raise Refused(f"the tensors of the broadcast are not the policy {info.digest}")
        if self.group is None:
            raise Refused("it is in no group with the trainer")
        part, parts = self.parallel_config.rank, self.parallel_config.world_size
        try:
            # The next packets arrive while the model loads the tensors of those before.
            under_way: list[tuple[Packet, torch.Tensor, Any]] = []
            for together in (*packets(info.rows, info.roots), ()):
                arrived, under_way = under_way, [self._receive(packet) for packet in together]
                for packet, buffer, work in arrived:
                    self.group.end(work)
                    yield [
                        (name, tensor)
                        for number, offset in zip(packet.numbers, packet.offsets, strict=True)
                        for tensor in [view(buffer, offset, info.rows[number])]
                        # Each worker checks a share of the tensors. All receive the same bytes, and one refusal is
                        # enough.
                        for name in self._check(info, number, tensor, number % parts == part)
                    ]
        except BaseException:
            self.shutdown()  # the trainer's ranks then fail at once, and form another group
            raise

    def _receive(self, packet: Packet) -> tuple[Packet, torch.Tensor, Any]:
        """Starts to receive a packet; returns it with its bytes-to-be, and what the group's `end` takes."""
        assert self.group is not None, "it is in a group with the trainer"
        buffer = torch.empty(packet.size, dtype=torch.uint8, device=self.device)
        return packet, buffer, self.group.start(buffer, packet.root)

    def _check(self, info: Weights, number: int, tensor: torch.Tensor, is_mine: bool) -> list[str]:
        """Returns the names of a received tensor in this model, which keeps two copies of tied embeddings."""
        assert info.rows is not None and info.names is not None, "of one request"
        name = info.names[number]
        if is_mine and row_of(tensor) != info.rows[number]:
            raise Refused(f"what arrived as {name} is not the trainer's tensor")
        return [name, HEAD] if name == TABLE and HEAD not in info.names else [name]

    def _load(self, parts: Iterable[Iterable[tuple[str, torch.Tensor]]], source: str) -> None:
        from vllm.model_executor.model_loader.reload import (  # type: ignore[import-not-found]
            initialize_layerwise_reload,
        )
        from vllm.platforms import current_platform  # type: ignore[import-not-found]

        # vLLM does not complain about a parameter that no tensor fills.
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
            for part in parts:
                missing -= self.model.load_weights(part)
        except BaseException:
            self._end()
            raise
        if missing:
            self._end()
            raise Refused(f"no tensor of {source} is {min(missing)} of its model; start it with the trainer's model")

    def finish_weight_update(self) -> None:
        if not self.begun:
            raise Refused("no weights came with this update")
        self._end()

    def _end(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self.begun = False

    def shutdown(self) -> None:
        if self.group is not None:
            self.group.close()
            self.group = None


def register() -> None:
    """Registers the engine. vLLM calls this in each of its processes."""
    from vllm.distributed.weight_transfer.factory import (  # type: ignore[import-not-found]
        WeightTransferEngineFactory as Factory,
    )

    # A second registration of a name is an error, and vLLM may call this again in a process.
    if NAME not in Factory._registry:
        Factory.register_engine(NAME, Engine)
