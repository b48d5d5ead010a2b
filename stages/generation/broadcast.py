"""A policy's weights on their way to vLLM servers by broadcast: the first of the trainer's ranks that hold a tensor
sends it, over gloo on CPU and over NCCL on GPU.

Each server has a group of its own with the ranks that send (stages/generation/vllm_worker/atom_group.py), so a server
that is lost breaks its own group alone; all servers receive at the same time. A group lasts until it breaks. Data ranks
after the first only compute digests, for which all take turns: the processes of a group are all connected with each
other, so its connections grow with the square of its ranks. A rank holds the tensors of a packet, never the model.

Rank 0 holds the sampler, which talks to the servers; the other ranks follow what it does with the groups.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from pipeline.core.environment import own_address
from pipeline.run_secret.atom_secret import sign
from stages.generation import weights
from stages.generation.protocols import Sampler
from stages.generation.vllm_worker.atom_group import (
    GROUP,
    WORKERS,
    Group,
    Packet,
    SignedStore,
    connect,
    nccl_version,
    packets,
    view,
)
from stages.generation.vllm_worker.atom_index import policy_digest
from stages.generation.weights import Sender, Tensors, Weights
from stages.train.parallel import Ranks

SECONDS = 120.0
"""Within which a group must form, and each of its broadcasts end."""


class Broadcast(Sender):
    """One on each rank. `load` is collective; what a `Sender` does, rank 0's sampler asks for meanwhile."""

    def __init__(self, tensors: Callable[[bool], Tensors], ranks: Ranks) -> None:
        """tensors(by_turns): yields the policy's `hf_tensors`, of data ranks by turns or of the first alone."""
        self.tensors, self.ranks = tensors, ranks
        self.senders: list[int] = []
        """The ranks in the groups, in their order there."""
        self.groups: dict[str, Group] = {}
        self.stores: dict[str, dist.TCPStore] = {}
        """On rank 0, by server: that of the group which is to form."""
        self.keys: dict[str, str] = {}
        """On rank 0, by server: the key of the entries of that store, in hex."""
        self.names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.roots: list[int] = []
        """Of each tensor of the policy: name, entry of the index, and the place of its rank among `senders`."""

    def load(self, sampler: Sampler | None) -> str:
        """Hands the policy to the sampler, which rank 0 has. Returns the policy's digest, on every rank. Collective.

        Raises AtomError if the tensors of the ranks do not add up to the model, and on rank 0 what `sampler` raises.
        """
        names, shares = weights.describe(self.tensors(True), self.ranks)
        rows = weights.merge(names, shares)
        self.rows, digest = [rows[name] for name in names], policy_digest(rows)
        if names != self.names:
            self.names = names
            self._choose_senders()
        if sampler is None:
            while (command := self.ranks.from_first(None)) is not None:
                self._run(*command)
            return digest
        try:
            sampler.load(Weights(digest, {}, sender=self))
        finally:
            self.ranks.from_first(None)
        return digest

    def _choose_senders(self) -> None:
        """The ranks that send the tensors of these names. Collective."""
        held = [name for name, tensor in self.tensors(False) if not tensor.is_meta]
        root_of = {name: rank for rank, names in enumerate(self.ranks.gather(held)) for name in names}
        if (senders := sorted({0, *root_of.values()})) != self.senders:
            self.close()
            self.senders = senders
        self.roots = [senders.index(root_of[name]) for name in self.names]

    def has_group(self, server: str) -> bool:
        return server in self.groups

    @property
    def content(self) -> dict[str, Any]:
        return {"names": self.names, "rows": self.rows, "roots": self.roots}

    def invite(self, server: str, secret: bytes) -> dict[str, Any]:
        parts = urlsplit(server)
        with socket.create_connection((parts.hostname or "", parts.port or 80), SECONDS) as line:
            host = str(line.getsockname()[0])
        if self.ranks.world > 1 and ip_address(host).is_loopback:  # other ranks may be elsewhere
            host = own_address()[0] if os.environ["MASTER_ADDR"] != "127.0.0.1" else "127.0.0.1"
        # by itself the store would listen on all interfaces
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        address, nonce = f"{host}:{listener.getsockname()[1]}", secrets.token_hex(16)
        self.stores[server] = dist.TCPStore(
            host, listener.getsockname()[1], is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=SECONDS), master_listen_fd=listener.detach(),
        )  # fmt: skip
        self.keys[server] = sign(secret, GROUP, nonce)
        device = self.ranks.device
        return {
            "store": address, "nonce": nonce, "ranks": len(self.senders), "seconds": SECONDS, "device": device.type,
            "nccl": nccl_version(device),
        }  # fmt: skip

    def give_up(self, server: str, invitation: Mapping[str, Any]) -> None:
        with suppress(RuntimeError):  # the store is gone: nobody waits any more
            connect(invitation["store"], self.keys[server], SECONDS).set(WORKERS, "0")

    def join(self, invitations: Mapping[str, Mapping[str, Any]]) -> set[str]:
        # to the other ranks in plain, as all within a job
        places = {server: (invitation["store"], self.keys[server]) for server, invitation in invitations.items()}
        return self._lead("join", places)

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

    def _join(self, places: Mapping[str, tuple[str, str]]) -> set[str]:
        """places: address and key of each server's store."""
        if self.ranks.rank not in self.senders:
            return set(places)
        for server, (address, key) in places.items():
            self._leave(server)
            try:
                own = self.stores.pop(server) if self.ranks.first else None
                store = SignedStore(own, key) if own else connect(address, key, SECONDS)
                if workers := int(store.get(WORKERS)):
                    place, size = self.senders.index(self.ranks.rank), len(self.senders) + workers
                    self.groups[server] = Group(store, place, size, SECONDS, self.ranks.device)
            except RuntimeError:  # too late, or unreachable: the sampler says so of a server that is not in the result
                continue
        return places.keys() & self.groups.keys()

    def _send(self, servers: Sequence[str]) -> set[str]:
        groups = {server: self.groups[server] for server in servers if server in self.groups}  # none, if it sends none
        remaining, tensors = set(servers), self.tensors(False)
        for together in packets(self.rows, self.roots):
            local_tensors: dict[int, torch.Tensor] = {}
            for number in sorted(number for packet in together for number in packet.numbers):
                name, tensor = next(tensors)  # collective
                assert name == self.names[number], "the order of tensors is fixed"
                if not tensor.is_meta:
                    local_tensors[number] = tensor
            failed = self._send_packets(together, local_tensors, groups)
            for server in set().union(*self.ranks.gather(failed)):
                self._leave(server)
                groups.pop(server, None)
                remaining.discard(server)
        return remaining

    def _send_packets(
        self, together: Sequence[Packet], local_tensors: Mapping[int, torch.Tensor], groups: Mapping[str, Group]
    ) -> set[str]:
        """local_tensors: this rank's tensors by their numbers. Returns the servers to which it fails."""
        works, failed = [], set()
        for packet in together if groups else ():
            buffer = torch.empty(packet.size, dtype=torch.uint8, device=self.ranks.device)
            if self.senders[packet.root] == self.ranks.rank:
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
