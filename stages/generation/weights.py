"""A policy's weights on their way to a sampler: each rank of the trainer hands over the tensors that it puts together.

By files, the ranks write safetensors with transformers' names into a folder that all see, each its own, and rank 0
writes the index last (stages/generation/vllm_worker/atom_index.py). A rank holds the tensor that it puts together and
those of a file. The policy's digest follows from the digests of the tensors, so every rank reads its own only.

By broadcast, the first of the ranks that hold a tensor sends it to vLLM servers, over gloo on CPU and over NCCL on GPU.
Each server has a group of its own with the ranks that send (stages/generation/vllm_worker/atom_group.py), so a server
that is lost breaks its own group alone; all servers receive at the same time. A group lasts until it breaks. Data ranks
after the first only compute digests, for which all take turns: the processes of a group are all connected with each
other, so its connections grow with the square of its ranks. A rank holds the tensors of a packet, never the model.
Rank 0 holds the sampler, which talks to the servers; the other ranks follow what it does with the groups.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from pipeline.core.environment import own_address
from pipeline.core.errors import AtomError
from pipeline.run_secret.atom_secret import sign
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
from stages.generation.vllm_worker.atom_index import policy_digest, row_of
from stages.mcore.hf_mapping import to_hf
from stages.mcore.tensor_sharding import FullTensors
from stages.models.base import ModelConfig
from stages.train.checkpoint import release_checkpoint
from stages.train.parallel import Ranks

# Largest file, unless one tensor is larger.
FILE_BYTES = 250_000_000

# The subfolder of files that are being written.
PARTIAL = "partial"
# Names and tensors.
Tensors = Iterator[tuple[str, torch.Tensor]]
# The index's entry of each tensor, by its name.
Rows = dict[str, dict[str, Any]]
# The tensors of a rank: their entries, and the file of each.
Share = tuple[Rows, dict[str, str]]
# A server, the bytes that its group broadcasts, and what `Group.end` takes.
Sending = tuple[str, torch.Tensor, Any]
# Seconds in which a group must form, and each of its broadcasts end.
GROUP_SECONDS = 120.0


class Receiver(Protocol):
    """A sampler, as far as it takes weights."""

    def load(self, weights: Weights) -> None:
        """Loads a policy's weights, as `Sampler.load` does."""


class Weights(Mapping[str, torch.Tensor]):
    """A policy's tensors by transformers' names.

    Args:
        digest: Digest of the policy.
        tensors: The tensors by name.
        folder: Folder of their files, from which each is read on access; None for the trainer's live tensors.
        sender: Sends them instead; there are then no tensors here.
    """

    def __init__(
        self,
        digest: str,
        tensors: Mapping[str, torch.Tensor],
        folder: Path | None = None,
        sender: Broadcast | None = None,
    ) -> None:
        self.digest, self.tensors, self.folder, self.sender = digest, tensors, folder, sender

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def hf_tensors(full: FullTensors, model: ModelConfig, vocab_size: int) -> Tensors:
    """Yields transformers' names and tensors; those that another rank hands over are on `meta`. Collective."""
    return to_hf(full, model, vocab_size)


def digest_of(tensors: Tensors, ranks: Ranks) -> str:
    """Returns the digest of the policy with these `hf_tensors`, on every rank. Collective."""
    return policy_digest(merge(*describe(tensors, ranks)))


def describe(tensors: Tensors, ranks: Ranks) -> tuple[list[str], list[Rows]]:
    """Returns the names of all of a policy's `hf_tensors`, in order, and the entries of those of each rank.

    Collective.
    """
    names: list[str] = []
    rows = {name: row_of(tensor) for name, tensor in _held_tensors(tensors, names)}
    return names, ranks.gather(rows)


def write(tensors: Tensors, ranks: Ranks, folder: Path) -> tuple[str, Path]:
    """Writes the `hf_tensors` of a policy to a subfolder.

    Returns the policy's digest and, once it is there, the subfolder, on every rank. Collective.

    Args:
        tensors: The policy's `hf_tensors`.
        ranks: The ranks of the trainer.
        folder: A folder that all ranks see.

    Raises:
        AtomError: The tensors of the ranks do not add up to the model.
        MachineError: A write fails.
    """
    if ranks.first:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir(parents=True)
    # No rank may write before rank 0 has emptied the folder.
    ranks.barrier()
    names: list[str] = []
    shares = ranks.gather(write_share(folder, ranks.rank, _held_tensors(tensors, names)))
    return ranks.from_first(seal(folder, names, shares) if ranks.first else ("", folder))


def write_share(folder: Path, rank: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Share:
    """Writes the tensors of a rank, one file after the other, into the folder's `partial`."""
    rows: Rows = {}

    def noted_tensors() -> Tensors:
        for name, tensor in tensors:
            rows[name] = row_of(tensor)
            yield name, tensor

    # A tensor's entry is made as it is written, since the tensors are not kept.
    files = release_checkpoint.write_files(folder / PARTIAL, f"rank-{rank:05d}", noted_tensors(), FILE_BYTES)
    return rows, files


def seal(folder: Path, names: Sequence[str], shares: Sequence[Share]) -> tuple[str, Path]:
    """Writes the index of all shares and makes `partial` the subfolder of the policy.

    Returns the policy's digest and that subfolder.
    """
    tensors = merge(names, [rows for rows, _ in shares])
    files: dict[str, str] = {}
    for _, files_of_rank in shares:
        files |= files_of_rank
    digest = policy_digest(tensors)
    release_checkpoint.write_index(
        folder / PARTIAL, release_checkpoint.MODEL, files, {"policy": digest}, tensors=tensors
    )

    place = folder / f"weights-{digest.rpartition(':')[2][:16]}"
    replaced = folder / "replaced"
    if place.exists():  # the policy is as before, and a sampler may read its files anew
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    # A rename is atomic: a folder with its final name is complete.
    (folder / PARTIAL).rename(place)
    shutil.rmtree(replaced, ignore_errors=True)
    return digest, place


def remove_earlier(place: Path) -> None:
    """Removes the subfolders of other policies than that of `place`."""
    for folder in place.parent.glob("weights-*"):
        if folder != place:
            shutil.rmtree(folder)


def _held_tensors(tensors: Tensors, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields this rank's tensors, on CPU. Fills `names` with the names of all."""
    for name, tensor in tensors:
        names.append(name)
        if not tensor.is_meta:
            yield name, tensor.cpu()


def merge(names: Sequence[str], shares: Sequence[Rows]) -> Rows:
    """Returns the tensors of all ranks.

    Args:
        names: Names of all tensors of the model.
        shares: Tensors of each rank.

    Raises:
        AtomError: A tensor is of no rank, or of more than one.
    """
    merged: Rows = {}
    for rank, share in enumerate(shares):
        if repeated := sorted(share.keys() & merged.keys()):
            raise AtomError(f"the trainer's shards do not add up: rank {rank} hands over {repeated[0]} a second time")
        merged |= share
    if missing := sorted(set(names) - merged.keys()):
        raise AtomError(f"the trainer's shards do not add up: no rank hands over {missing[0]}")
    return merged


class Broadcast:
    """The groups of the ranks with vLLM servers. Each rank has one.

    `load` is collective. Meanwhile rank 0's sampler invites servers, and has all ranks join groups and send; it names
    servers by their URLs.
    """

    def __init__(self, tensors: Callable[[bool], Tensors], ranks: Ranks) -> None:
        """Makes a broadcast without groups.

        Args:
            tensors: tensors(by_turns) yields the policy's `hf_tensors`, of data ranks by turns or of the first alone.
            ranks: The ranks of the trainer.
        """
        self.tensors, self.ranks = tensors, ranks
        # The ranks in the groups, in their order there.
        self.senders: list[int] = []
        # By server: this rank's end of the group with it.
        self.groups: dict[str, Group] = {}
        # On rank 0, by server: the store of the group that is to form.
        self.stores: dict[str, dist.TCPStore] = {}
        # On rank 0, by server: the key by which the entries of that store are signed, in hex.
        self.keys: dict[str, str] = {}
        # For each tensor of the policy: name, entry of the index, and the place of the rank that sends it in `senders`.
        self.names: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.roots: list[int] = []

    def load(self, sampler: Receiver | None) -> str:
        """Hands the policy to the sampler, which rank 0 has.

        Returns the policy's digest, on every rank. Collective.

        Raises:
            AtomError: The tensors of the ranks do not add up to the model, and on rank 0 what `sampler` raises.
        """
        names, shares = describe(self.tensors(True), self.ranks)
        rows = merge(names, shares)
        digest = policy_digest(rows)
        # All ranks know all entries, so that each can tell which tensors a packet has.
        self.rows = [rows[name] for name in names]
        # The senders follow from the names and the layout, so they are chosen once.
        if names != self.names:
            self.names = names
            self._choose_senders()
        if sampler is None:
            # The sampler on rank 0 decides what happens with the groups; None ends the loop.
            while (command := self.ranks.from_first(None)) is not None:
                self._run(*command)
            return digest
        try:
            sampler.load(Weights(digest, {}, sender=self))
        finally:
            # After an error too, or the other ranks would wait for ever.
            self.ranks.from_first(None)
        return digest

    def _choose_senders(self) -> None:
        """Chooses the ranks that send the policy's tensors. Collective."""
        # Without turns the first data ranks alone have the tensors, and they send.
        local_names = [name for name, tensor in self.tensors(False) if not tensor.is_meta]
        root_of: dict[str, int] = {}
        for rank, names_of_rank in enumerate(self.ranks.gather(local_names)):
            root_of |= dict.fromkeys(names_of_rank, rank)

        # Rank 0 is among them in any case, since the members of a group meet at its store.
        senders = sorted({0, *root_of.values()})
        if senders != self.senders:
            self.close()
            self.senders = senders
        self.roots = [senders.index(root_of[name]) for name in self.names]

    def has_group(self, server: str) -> bool:
        """Returns True if the ranks are in a group with a server."""
        return server in self.groups

    @property
    def content(self) -> dict[str, Any]:
        """The description of the tensors that a server receives."""
        return {"names": self.names, "rows": self.rows, "roots": self.roots}

    def invite(self, server: str, secret: bytes) -> dict[str, Any]:
        """Returns the invitation of a server to a new group, which `join` then forms.

        Args:
            server: URL of the server.
            secret: The secret that this process shares with it.

        Raises:
            OSError: It cannot be reached.
        """
        parts = urlsplit(server)
        # This host's address on the way to the server is that of a connection to it.
        with socket.create_connection((parts.hostname or "", parts.port or 80), GROUP_SECONDS) as connection:
            host = str(connection.getsockname()[0])
        if self.ranks.world > 1 and ip_address(host).is_loopback:
            # Ranks on other nodes cannot reach that address.
            host = own_address()[0] if os.environ["MASTER_ADDR"] != "127.0.0.1" else "127.0.0.1"

        # By itself the store would listen on all interfaces.
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        nonce = secrets.token_hex(16)
        self.stores[server] = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=GROUP_SECONDS),
            master_listen_fd=listener.detach(),
        )
        self.keys[server] = sign(secret, GROUP, nonce)
        device = self.ranks.device
        return {
            "store": f"{host}:{port}",
            "nonce": nonce,
            "ranks": len(self.senders),
            "seconds": GROUP_SECONDS,
            "device": device.type,
            "nccl": nccl_version(device),
        }

    def give_up(self, server: str, invitation: Mapping[str, Any]) -> None:
        """Ends the waiting for a server that does not join. Another thread may wait in `join`."""
        with suppress(RuntimeError):  # the store is gone: nobody waits any more
            connect(invitation["store"], self.keys[server], GROUP_SECONDS).set(WORKERS, "0")

    def join(self, invitations: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Forms the groups of invited servers. Returns those that have one."""
        # The keys go to the other ranks in plain, as all within a job.
        places = {server: (invitation["store"], self.keys[server]) for server, invitation in invitations.items()}
        return self._lead("join", places)

    def send(self, servers: Sequence[str]) -> set[str]:
        """Sends the policy to these servers, which must be receiving. Returns those that got all of it."""
        return self._lead("send", list(servers))

    def close(self) -> None:
        """Leaves all groups. Not collective."""
        for server in list(self.groups):
            self._leave(server)

    def _lead(self, action: str, argument: Any) -> set[str]:
        """Has all ranks run an action, from rank 0. Returns what `_run` returns."""
        self.ranks.from_first((action, argument))
        return self._run(action, argument)

    def _run(self, action: str, argument: Any) -> set[str]:
        """Runs an action of all ranks. Returns the servers for which it succeeded on all of them."""
        succeeded = self._join(argument) if action == "join" else self._send(argument)
        # A group works if all ranks are in it; the others leave a broken one.
        servers = set.intersection(*self.ranks.gather(succeeded))
        for server in set(argument) - servers:
            self._leave(server)
        return servers

    def _leave(self, server: str) -> None:
        if (group := self.groups.pop(server, None)) is not None:
            group.close()

    def _join(self, places: Mapping[str, tuple[str, str]]) -> set[str]:
        """Joins groups, given address and key of each server's store.

        Returns the servers with which this rank is in a group; of a rank that sends nothing, all.
        """
        # A rank that sends nothing agrees to everything, since the results of all ranks are intersected.
        if self.ranks.rank not in self.senders:
            return set(places)
        for server, (address, key) in places.items():
            self._leave(server)
            try:
                if self.ranks.first:  # its store listens in this process
                    store = SignedStore(self.stores.pop(server), key)
                else:
                    store = connect(address, key, GROUP_SECONDS)
                if workers := int(store.get(WORKERS)):
                    place, size = self.senders.index(self.ranks.rank), len(self.senders) + workers
                    self.groups[server] = Group(store, place, size, GROUP_SECONDS, self.ranks.device)
            except RuntimeError:  # too late, or unreachable: the sampler says so of a server that is not in the result
                continue
        return places.keys() & self.groups.keys()

    def _send(self, servers: Sequence[str]) -> set[str]:
        """Sends this rank's tensors. Returns the servers with which this rank did not fail.

        The next packets are filled and started before those under way are awaited. A rank leaves the group of a server
        with which it fails at once, so that the others fail there too, and goes on with the other servers.
        """
        # A rank that sends nothing is in no group.
        groups = {server: self.groups[server] for server in servers if server in self.groups}
        remaining, tensors = set(servers), self.tensors(False)
        under_way: list[Sending] = []
        for together in packets(self.rows, self.roots):
            local_tensors: dict[int, torch.Tensor] = {}
            for number in sorted(number for packet in together for number in packet.numbers):
                name, tensor = next(tensors)  # collective
                assert name == self.names[number], "the order of tensors is fixed"
                if not tensor.is_meta:
                    local_tensors[number] = tensor
            started, failed = self._start_packets(together, local_tensors, groups)
            failed |= self._end_packets([each for each in under_way if each[0] not in failed], groups)
            under_way = [sending for sending in started if sending[0] not in failed]
            remaining -= self._drop(failed, groups)
        return remaining - self._drop(self._end_packets(under_way, groups), groups)

    def _drop(self, failed: set[str], groups: dict[str, Group]) -> set[str]:
        """Leaves the groups of servers, and returns the servers."""
        for server in failed:
            self._leave(server)
            del groups[server]
        return failed

    def _start_packets(
        self, together: Sequence[Packet], local_tensors: Mapping[int, torch.Tensor], groups: Mapping[str, Group]
    ) -> tuple[list[Sending], set[str]]:
        """Starts to send and receive packets.

        Args:
            together: The packets that are started at once.
            local_tensors: This rank's tensors by their numbers.
            groups: Groups with the servers, by their URLs.

        Returns:
            The broadcasts that have begun, and the servers with whose groups this rank failed.
        """
        started: list[Sending] = []
        failed: set[str] = set()
        if not groups:
            return started, failed
        for packet in together:
            buffer = torch.empty(packet.size, dtype=torch.uint8, device=self.ranks.device)
            if self.senders[packet.root] == self.ranks.rank:
                for number, offset in zip(packet.numbers, packet.offsets, strict=True):
                    view(buffer, offset, self.rows[number]).copy_(local_tensors[number])
            # What another rank sends arrives here once in each group, with the same bytes. All broadcasts are started
            # before one is awaited, so that a slow server delays no other; in one order on all ranks, as NCCL needs.
            for server, group in groups.items():
                try:
                    started.append((server, buffer, group.start(buffer, packet.root)))
                except RuntimeError:
                    failed.add(server)
        return started, failed

    def _end_packets(self, under_way: Sequence[Sending], groups: Mapping[str, Group]) -> set[str]:
        """Waits for broadcasts. Returns the servers with whose groups this rank failed."""
        failed: set[str] = set()
        for server, _, work in under_way:
            if server not in failed:
                try:
                    groups[server].end(work)
                except RuntimeError:
                    failed.add(server)
        return failed
