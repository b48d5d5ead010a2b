"""The group in which the trainer's ranks broadcast a policy's weights to the workers of one vLLM server.

Both sides use this file. It imports no module of this project, because the workers have none.

The trainer's ranks come first. A broadcast moves a packet: tensors of one rank as bytes, one after the other.
"""

from __future__ import annotations

import ctypes
import hmac
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist

# The purpose for which the key of a group is made of the run's secret and of the nonce in the invitation.
GROUP = "group"
# The store's entry with the number of the server's workers, which they set; 0 if they refuse or are given up.
WORKERS = "workers"
# Bytes of the tensors, of all ranks together, that are started at once, unless one is larger. The next ones are started
# before these have ended and been loaded, so up to three times as many are in memory.
PACKET_BYTES = 256_000_000
# Bytes to which tensors are aligned in a packet, so that each can be viewed as its own type.
ALIGNMENT = 16
# PyTorch's variable, at 1 when a group of NCCL is made: the thread that waits finds errors, and no watchdog does.
BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
# The limit that PyTorch gets for NCCL's collectives: far above the own one, at which this project leaves the group.
FAR = timedelta(days=1)
POLL_SECONDS = 0.001
# Seconds that leaving a group may take; then a thread goes on with it.
ABORT_SECONDS = 10.0
# Times that a server waits longer for a broadcast than the ranks, which may wait for another server first.
PATIENCE = 4


class SignedStore(dist.Store):
    """A store with a signature on each entry: what somebody else writes into it raises RuntimeError when it is read.

    Args:
        store: The store that holds the entries.
        key: Key of the group, in hex.
    """

    def __init__(self, store: dist.Store, key: str) -> None:
        super().__init__()
        self.store, self.key = store, bytes.fromhex(key)

    def _signature(self, name: str, value: bytes) -> bytes:
        # With the length of the name, so that no other division into name and value has this signature.
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

    def wait(self, names: list[str], timeout: timedelta | None = None) -> None:
        if timeout is None:
            self.store.wait(names)
        else:
            self.store.wait(names, timeout)

    def check(self, names: list[str]) -> bool:
        return bool(self.store.check(names))


class Group:
    """A process's end of a group. A group that fails, of NCCL too, raises an error in this process and does not end it.

    A process that is lost, or that stops, must not hold up the others for ever. So nothing waits without a deadline:
    what NCCL or gloo might never finish runs in a thread of its own, which is left behind then.
    """

    def __init__(
        self, store: SignedStore, rank: int, size: int, seconds: float, device: torch.device, patience: int = 1
    ) -> None:
        """Forms the group.

        Args:
            store: Place where the processes meet; the group needs it as long as it lives.
            rank: Number of this process in the group.
            size: Number of processes.
            seconds: Time in which it must form, and each broadcast end, `patience` times over.
            device: Device of its tensors, on which the backend depends.
            patience: Factor of `seconds` for a broadcast.

        Raises:
            RuntimeError: It does not form.
        """
        self.store, self.seconds = store, patience * seconds
        # An operation of gloo that waits cannot be interrupted. It ends at its own limit, which is our deadline.
        # One of NCCL can be aborted at our deadline, so its own limit must be later.
        self.limit = FAR if device.type == "cuda" else timedelta(seconds=self.seconds)
        self.group: Any = None
        buffer = torch.zeros(1, dtype=torch.uint8, device=device)

        def form() -> None:
            # NCCL's own threads use its store, and must not wait for Python; its entries are not signed
            place = dist.PrefixStore("group", store.store if device.type == "cuda" else store)
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins with the first one
                with _without_watchdog():
                    options = dist.ProcessGroupNCCL.Options()
                    options._timeout = FAR
                    self.group = dist.ProcessGroupNCCL(place, rank, size, options)
            else:
                self.group = dist.ProcessGroupGloo(place, rank, size, timedelta(seconds=seconds))
            self.end(self.start(buffer, 0))  # at which NCCL connects

        try:
            _within(seconds, form)
        except BaseException:
            self.close()
            raise

    def start(self, buffer: torch.Tensor, root: int) -> tuple[Any, float]:
        """Starts a broadcast of bytes; returns what `end` takes."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = root, 0, self.limit
        return self.group.broadcast([buffer], options), time.monotonic() + self.seconds

    def end(self, started: tuple[Any, float]) -> None:
        """Waits until a broadcast has ended, on the device too.

        Raises:
            RuntimeError: It fails or takes too long.
        """
        work, deadline = started
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"a broadcast did not end within {self.seconds:g} s")
            time.sleep(POLL_SECONDS)
        work.wait()  # raises its error, and orders this thread's stream after it

    def close(self) -> None:
        """Leaves the group at once; a process that waits for this one there fails."""
        group, self.group = self.group, None  # without which gloo keeps its connections
        if group is not None:
            with suppress(RuntimeError):
                _within(ABORT_SECONDS, group.abort)


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """Makes groups of NCCL without a watchdog in this block.

    PyTorch's watchdog ends the process when a collective fails or times out, whoever handles the error. Without it, the
    thread that waits finds the error. PyTorch has no such option of a group: it reads a variable when it makes one.
    """
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BLOCKING]
        else:
            os.environ[BLOCKING] = before


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Runs an action in a thread of its own.

    Raises:
        RuntimeError: It takes longer, and what it raises.
    """
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            action()
            results.put(None)
        except BaseException as error:
            results.put(error)

    threading.Thread(target=run, name="group", daemon=True).start()
    try:
        error = results.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"it did not end within {seconds:g} s") from None
    if error is not None:
        raise error


def nccl_version(device: torch.device) -> str:
    """Returns the release of the NCCL that this process has loaded, such as 2.30.4; empty if the device is no GPU.

    `torch.cuda.nccl.version()` is that with which PyTorch was built.
    """
    if device.type != "cuda":
        return ""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return f"{version.value // 10_000}.{version.value // 100 % 100}.{version.value % 100}"


def other_nccl(of_trainer: str, device: torch.device) -> str | None:
    """Returns a sentence if this process has another NCCL than the trainer, with which it would not connect."""
    if (own := nccl_version(device)) == of_trainer:
        return None
    return (
        f"it has NCCL {own}, and the trainer has {of_trainer}; NCCL connects equal releases only, so install one for "
        "both, or set sampling.transfer = folder"
    )


def connect(address: str, key: str, seconds: float) -> SignedStore:
    """Returns the store at host:port.

    Args:
        address: Host and port of the store.
        key: Key of the group, in hex.
        seconds: Time that a request to the store may take.
    """
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
    """Returns the bytes of a tensor by its entry of the index."""
    size: int = prod(row["shape"]) * getattr(torch, row["dtype"]).itemsize
    return size


def packets(rows: Sequence[Mapping[str, Any]], roots: Sequence[int]) -> Iterator[tuple[Packet, ...]]:
    """Yields all tensors in order, as the packets that are started at once.

    Args:
        rows: Entry of each tensor in the index.
        roots: Rank that holds each tensor.
    """
    first = 0
    while first < len(rows):
        last, total = first, 0
        # At least one tensor, however large it is.
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
    """Returns the tensor at an offset of a packet's bytes."""
    part = buffer[offset : offset + bytes_of(row)]
    return part.view(getattr(torch, row["dtype"])).view(row["shape"])
