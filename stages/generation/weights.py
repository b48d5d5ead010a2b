"""A policy's weights on their way to a sampler: each rank of the trainer hands over the tensors that it puts together.

The ranks write safetensors files with transformers' names into a folder that all see, each its own, and rank 0 writes
the index last (stages/generation/vllm_worker/atom_index.py). A rank holds the tensor that it puts together and those
of a file. The policy's digest follows from the digests of the tensors, so every rank reads its own only.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from pipeline.core.errors import AtomError
from stages.generation.vllm_worker.atom_index import policy_digest, row_of
from stages.mcore.tensor_sharding import FullTensors
from stages.models.base import ModelConfig
from stages.train.checkpoint import release_checkpoint
from stages.train.parallel import Ranks

FILE_BYTES = 250_000_000
"""Largest file, unless one tensor is larger."""

PARTIAL = "partial"
"""The subfolder of files that are being written."""
Tensors = Iterator[tuple[str, torch.Tensor]]
Rows = dict[str, dict[str, Any]]
"""The index's entry of each tensor."""
Share = tuple[Rows, dict[str, str]]
"""The tensors of a rank: their entries, and their files."""


class Sender(Protocol):
    """What rank 0's sampler does with all ranks to have them send a policy to servers, which it names by their URLs."""

    def has_group(self, server: str) -> bool:
        """Whether the ranks are in a group with a server."""

    @property
    def content(self) -> dict[str, Any]:
        """What a server is told of the tensors that it receives."""

    def invite(self, server: str, secret: bytes) -> dict[str, Any]:
        """What a server is told of a new group, which `join` then forms. secret: what it shares with the server. Raises
        OSError if it cannot be reached."""

    def give_up(self, server: str, invitation: Mapping[str, Any]) -> None:
        """Ends the waiting for a server that does not join. Another thread may wait in `join`."""

    def join(self, invitations: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Forms the groups of invited servers. Returns those that have one."""

    def send(self, servers: Sequence[str]) -> set[str]:
        """Sends the policy to these servers, which must be receiving. Returns those that got all of it."""


class Weights(Mapping[str, torch.Tensor]):
    """A policy's tensors by transformers' names. digest: of the policy; folder: of the files with them, of which each
    tensor is then read on access, or None for the trainer's live tensors. sender: sends them instead; there are then
    no tensors here."""

    def __init__(
        self, digest: str, tensors: Mapping[str, torch.Tensor], folder: Path | None = None,
        sender: Sender | None = None,
    ) -> None:  # fmt: skip
        self.digest, self.tensors, self.folder, self.sender = digest, tensors, folder, sender

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def hf_tensors(full: FullTensors, model: ModelConfig, vocab_size: int) -> Tensors:
    """transformers' names and tensors; those that another rank hands over are on `meta`. Collective."""
    return model.spec().to_hf(full, model, vocab_size)


def digest_of(tensors: Tensors, ranks: Ranks) -> str:
    """The digest of the policy with these `hf_tensors`, on every rank. Collective."""
    return policy_digest(merge(*describe(tensors, ranks)))


def describe(tensors: Tensors, ranks: Ranks) -> tuple[list[str], list[Rows]]:
    """The names of all of a policy's `hf_tensors`, in order, and the entries of those of each rank. Collective."""
    names: list[str] = []
    rows = {name: row_of(tensor) for name, tensor in _held_tensors(tensors, names)}
    return names, ranks.gather(rows)


def write(tensors: Tensors, ranks: Ranks, folder: Path) -> tuple[str, Path]:
    """Writes the `hf_tensors` of a policy to a subfolder. Returns the policy's digest and, once it is there, the
    subfolder, on every rank. folder: which all ranks see. Collective.

    Raises AtomError if the tensors of the ranks do not add up to the model, MachineError if a write fails.
    """
    if ranks.first:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir(parents=True)
    ranks.barrier()
    names: list[str] = []
    shares = ranks.gather(write_share(folder, ranks.rank, _held_tensors(tensors, names)))
    return ranks.from_first(seal(folder, names, shares) if ranks.first else ("", folder))


def write_share(folder: Path, rank: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Share:
    """Writes the tensors of a rank, one file after the other, into the folder's `partial`."""
    rows: Rows = {}

    def described() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            rows[name] = row_of(tensor)
            yield name, tensor

    return rows, release_checkpoint.write_files(folder / PARTIAL, f"rank-{rank:05d}", described(), FILE_BYTES)


def seal(folder: Path, names: Sequence[str], shares: Sequence[Share]) -> tuple[str, Path]:
    """Writes the index of all shares and makes `partial` the subfolder of the policy. Returns the policy's digest and
    that subfolder."""
    tensors = merge(names, [rows for rows, _ in shares])
    files = {name: file for _, share in shares for name, file in share.items()}
    digest = policy_digest(tensors)
    release_checkpoint.write_index(
        folder / PARTIAL, release_checkpoint.MODEL, files, {"policy": digest}, tensors=tensors
    )
    place = folder / f"weights-{digest.rpartition(':')[2][:16]}"
    replaced = folder / "replaced"
    if place.exists():  # the policy is as before, and a sampler may read its files anew
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    (folder / PARTIAL).rename(place)
    shutil.rmtree(replaced, ignore_errors=True)
    return digest, place


def remove_earlier(place: Path) -> None:
    """Removes the subfolders of other policies than that of `place`."""
    for folder in place.parent.glob("weights-*"):
        if folder != place:
            shutil.rmtree(folder)


def _held_tensors(tensors: Tensors, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's tensors, on CPU. Fills `names` with the names of all."""
    for name, tensor in tensors:
        names.append(name)
        if not tensor.is_meta:
            yield name, tensor.cpu()


def merge(names: Sequence[str], shares: Sequence[Rows]) -> Rows:
    """The tensors of all ranks. names: of the whole model. Raises AtomError if no rank has one, or more than one."""
    merged: Rows = {}
    for rank, share in enumerate(shares):
        if repeated := sorted(share.keys() & merged.keys()):
            raise AtomError(f"the trainer's shards do not add up: rank {rank} hands over {repeated[0]} a second time")
        merged |= share
    if missing := sorted(set(names) - merged.keys()):
        raise AtomError(f"the trainer's shards do not add up: no rank hands over {missing[0]}")
    return merged
