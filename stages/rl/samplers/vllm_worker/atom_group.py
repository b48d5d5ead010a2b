"""The group in which the trainer's ranks broadcast a policy's weights to the workers of one vLLM server, for both
sides. No module of this project: the workers have none.

The trainer's ranks come first. A broadcast moves a packet: tensors of one rank as bytes, one after the other.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist

GROUP = "group"
"""The purpose for which the key of a group is made of the run's secret and of the nonce in the invitation."""
WORKERS = "workers"
"""The store's entry with the number of the server's workers, which they set; 0 if they refuse or are given up."""
PACKET_BYTES = 64_000_000
"""Bytes of the tensors, of all ranks together, that are under way at once, unless one is larger."""
ALIGNMENT = 16
PATIENCE = 4
"""How many times longer a server waits for a broadcast than the ranks, which may wait for another server first."""


class SignedStore(dist.Store):  # type: ignore[misc]
    """A store with a signature on each entry: what somebody else writes into it raises RuntimeError when it is read.
    key: of the group, in hex."""

    def __init__(self, store: dist.Store, key: str) -> None:
        super().__init__()
        self.store, self.key = store, bytes.fromhex(key)

    def _signature(self, name: str, value: bytes) -> bytes:
        return hmac.digest(self.key, f"{len(name)} {name} ".encode() + value, "sha256")

    def set(self, name: str, value: str | bytes) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self.store.set(name, (self._signature(name, value) + value).hex())

    def get(self, name: str) -> bytes:
        try:
            entry = bytes.fromhex(self.store.get(name).decode())
        except ValueError:
            entry = b""
        if not hmac.compare_digest(entry[:32], self._signature(name, entry[32:])):
            raise RuntimeError(f"the entry {name} of the group's store is not of a member")
        return entry[32:]

    def wait(self, names: Sequence[str], timeout: timedelta | None = None) -> None:
        self.store.wait(names, *([timeout] if timeout else []))

    def check(self, names: Sequence[str]) -> bool:
        return bool(self.store.check(names))


class Group:
    """A process's end of a group. device: of its tensors, on which the backend depends. Raises RuntimeError if it does
    not form within `seconds`, in which each broadcast must also end, `patience` times over."""

    def __init__(
        self, store: SignedStore, rank: int, size: int, seconds: float, device: torch.device, patience: int = 1
    ) -> None:
        self.store, self.device, self.timeout = store, device, timedelta(seconds=seconds)  # a group needs its store
        # NCCL's own threads use its store, and must not wait for Python; its entries are not signed
        place = dist.PrefixStore("group", store.store if device.type == "cuda" else store)
        self.group: Any
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = patience * self.timeout  # its watchdog ends the process
            self.group = dist.ProcessGroupNCCL(place, rank, size, options)
        else:
            self.group = dist.ProcessGroupGloo(place, rank, size, self.timeout)
        self.timeout *= patience

    def start(self, buffer: torch.Tensor, root: int) -> Any:
        """Starts a broadcast of bytes; returns what `end` takes."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, self.timeout
        return self.group.broadcast([buffer], options)

    def end(self, work: Any) -> None:
        """Waits for a broadcast. Raises RuntimeError if it fails or takes too long."""
        work.wait(self.timeout)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        """Leaves the group at once; who waits for this process there fails."""
        self.group.abort()
        self.group = None  # without which gloo keeps its connections


def connect(address: str, key: str, seconds: float) -> SignedStore:
    """The store at host:port. key: of the group, in hex."""
    host, port = address.rsplit(":", 1)
    return SignedStore(dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=seconds)), key)


@dataclass(frozen=True)
class Packet:
    """Tensors of one rank: their numbers in the list of all, and their offsets among the packet's `size` bytes."""

    root: int
    numbers: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int


def bytes_of(row: Mapping[str, Any]) -> int:
    """Bytes of a tensor by its entry of the index."""
    size: int = prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
    return size


def packets(rows: Sequence[Mapping[str, Any]], roots: Sequence[int]) -> Iterator[tuple[Packet, ...]]:
    """All tensors, in order: what is under way at once. rows: their entries of the index; roots: the rank of each."""
    first = 0
    while first < len(rows):
        last, total = first, 0
        while last < len(rows) and (last == first or total + bytes_of(rows[last]) <= PACKET_BYTES):
            total += bytes_of(rows[last])
            last += 1
        yield tuple(_packet(rows, roots, root, range(first, last)) for root in sorted(set(roots[first:last])))
        first = last


def _packet(rows: Sequence[Mapping[str, Any]], roots: Sequence[int], root: int, numbers: range) -> Packet:
    sent_here, offsets, size = tuple(number for number in numbers if roots[number] == root), [], 0
    for number in sent_here:
        offsets.append(size)
        size += -(-bytes_of(rows[number]) // ALIGNMENT) * ALIGNMENT
    return Packet(root, sent_here, tuple(offsets), size)


def view(buffer: torch.Tensor, offset: int, row: Mapping[str, Any]) -> torch.Tensor:
    """The tensor at an offset of a packet's bytes."""
    part = buffer[offset : offset + bytes_of(row)]
    return part.view(getattr(torch, row["dtype"])).view(row["shape"])
