"""A policy's weights on their way to vLLM servers by broadcast: each rank of the trainer sends the tensors that it puts
together, over gloo on CPU and over NCCL on GPU.

Each server has a group of its own with the ranks of the trainer (stages/rl/samplers/vllm_worker/atom_group.py), so a
server that is lost breaks its own group alone; all servers receive at the same time. A group lasts until it breaks. A
rank holds the tensors of a packet, never the model.

Rank 0 holds the sampler, which talks to the servers; the other ranks follow what it does with the groups.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from stages.rl import weights
from stages.rl.protocols import Sampler
from stages.rl.samplers.vllm_worker.atom_group import WORKERS, Group, Packet, connect, packets, view
from stages.rl.samplers.vllm_worker.atom_index import policy_digest
from stages.rl.weights import Sender, Tensors, Weights
from stages.train.parallel import Ranks

SECONDS = 120.0
"""Within which a group must form, and each of its broadcasts end."""


class Broadcast(Sender):
    """One on each rank. `load` is collective; what a `Sender` does, rank 0's sampler asks for meanwhile."""

    def __init__(self, tensors: Callable[[], Tensors], ranks: Ranks) -> None:
        """tensors: yields the policy's `hf_tensors`."""
        self.tensors, self.ranks = tensors, ranks
        self.groups: dict[str, Group] = {}
        self.stores: dict[str, dist.TCPStore] = {}
        """On rank 0, by server: that of the group which is to form."""
        self.names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.roots: list[int] = []
        """Of each tensor of the policy: name, entry of the index, and the rank that sends it."""

    def load(self, sampler: Sampler | None) -> str:
        """Hands the policy to the sampler, which rank 0 has. Returns the policy's digest, on every rank. Collective.

        Raises AtomError if the tensors of the ranks do not add up to the model, and on rank 0 what `sampler` raises.
        """
        self.names, shares = weights.describe(self.tensors(), self.ranks)
        rows = weights.merge(self.names, shares)
        root_of = {name: rank for rank, share in enumerate(shares) for name in share}
        self.rows, self.roots = [rows[name] for name in self.names], [root_of[name] for name in self.names]
        digest = policy_digest(rows)
        if sampler is None:
            while (command := self.ranks.from_first(None)) is not None:
                self._run(*command)
            return digest
        try:
            sampler.load(Weights(digest, {}, sender=self))
        finally:
            self.ranks.from_first(None)
        return digest

    def has_group(self, server: str) -> bool:
        return server in self.groups

    @property
    def content(self) -> dict[str, Any]:
        return {"names": self.names, "rows": self.rows, "roots": self.roots}

    def invite(self, server: str) -> dict[str, Any]:
        parts = urlsplit(server)
        with socket.create_connection((parts.hostname or "", parts.port or 80), SECONDS) as line:
            host = str(line.getsockname()[0])
        if self.ranks.world > 1 and ip_address(host).is_loopback:  # other ranks may be elsewhere
            host = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
        self.stores[server] = store
        address, device = f"{host}:{store.port}", self.ranks.device.type
        return {"store": address, "ranks": self.ranks.world, "seconds": SECONDS, "device": device}

    def give_up(self, invitation: Mapping[str, Any]) -> None:
        with suppress(RuntimeError):  # the store is gone: nobody waits any more
            connect(invitation["store"], SECONDS).set(WORKERS, "0")

    def join(self, invitations: Mapping[str, Mapping[str, Any]]) -> set[str]:
        return self._lead("join", {server: invitation["store"] for server, invitation in invitations.items()})

    def send(self, servers: Sequence[str]) -> set[str]:
        return self._lead("send", list(servers))

    def close(self) -> None:
        """Leaves all groups. Not collective."""
        for server in list(self.groups):
            self._leave(server)

    def _lead(self, action: str, argument: Any) -> set[str]:
        self.ranks.from_first((action, argument))
        return self._run(action, argument)

    def _run(self, action: str, argument: Any) -> set[str]:
        """Runs an action of all ranks. Returns the servers for which it succeeded on all of them."""
        succeeded = self._join(argument) if action == "join" else self._send(argument)
        servers = set.intersection(*self.ranks.gather(succeeded))
        for server in set(argument) - servers:
            self._leave(server)
        return servers

    def _leave(self, server: str) -> None:
        if (group := self.groups.pop(server, None)) is not None:
            group.close()

    def _join(self, addresses: Mapping[str, str]) -> set[str]:
        for server, address in addresses.items():
            self._leave(server)
            try:
                store = self.stores.pop(server) if self.ranks.first else connect(address, SECONDS)
                if workers := int(store.get(WORKERS)):
                    size = self.ranks.world + workers
                    self.groups[server] = Group(store, self.ranks.rank, size, SECONDS, self.ranks.device)
            except RuntimeError:  # too late, or unreachable: the sampler says so of a server that is not in the result
                continue
        return addresses.keys() & self.groups.keys()

    def _send(self, servers: Sequence[str]) -> set[str]:
        remaining = {server: self.groups[server] for server in servers}
        tensors = self.tensors()
        for together in packets(self.rows, self.roots):
            local_tensors: dict[int, torch.Tensor] = {}
            for number in sorted(number for packet in together for number in packet.numbers):
                name, tensor = next(tensors)  # collective
                assert name == self.names[number], "the order of tensors is fixed"
                if not tensor.is_meta:
                    local_tensors[number] = tensor
            failed = self._send_packets(together, local_tensors, remaining)
            for server in set().union(*self.ranks.gather(failed)):
                self._leave(server)
                del remaining[server]
        return set(remaining)

    def _send_packets(
        self, together: Sequence[Packet], local_tensors: Mapping[int, torch.Tensor], groups: Mapping[str, Group]
    ) -> set[str]:
        """local_tensors: this rank's tensors by their numbers. Returns the servers to which it fails."""
        works, failed = [], set()
        for packet in together:
            buffer = torch.empty(packet.size, dtype=torch.uint8, device=self.ranks.device)
            if packet.root == self.ranks.rank:
                for number, offset in zip(packet.numbers, packet.offsets, strict=True):
                    view(buffer, offset, self.rows[number]).copy_(local_tensors[number])
            # what another rank sends arrives here once in each group, with the same bytes
            works += [(server, buffer, packet.root) for server in groups]
        started = []
        for server, buffer, root in works:
            try:
                started.append((server, groups[server].start(buffer, root)))
            except RuntimeError:
                failed.add(server)
        for server, work in started:
            try:
                if server not in failed:
                    groups[server].end(work)
            except RuntimeError:
                failed.add(server)
        return failed
