"""Tables of rows that all layers of a forward pass share: positions, rotary tables, documents and masks of attention.

They are made once for a forward pass, from numbers on the host: no layer waits for the GPU.

Position p turns the pair (i, i + dim/2) of a head by p * frequency[i] (Su et al., 2021; the halves of a head turn),
with YaRN's scaling (Peng et al., 2023) where the recipe asks for it.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.mcore import gpu
from stages.mcore.megatron_imports import parallel_state
from stages.models.base import SLICE, ModelConfig


class Documents(NamedTuple):
    """The documents of a rank's rows side by side, as kernels for rows of variable length take them (`varlen`, `thd`).

    Document n has the queries from queries[n] on and the keys from keys[n] on, both up to the next number; its last
    query sees its last key. longest: an upper bound of both lengths. gathered: the keys of all documents as positions
    in all rows side by side, a prefix of several documents with each of them; None if these are all keys in order.
    """

    queries: Tensor
    keys: Tensor
    longest: int
    gathered: Tensor | None


class Bucket(NamedTuple):
    """Documents of like length as a batch, padded.

    queries, keys: positions in all rows side by side, [documents, longest]; mask: what to add to the scores,
    [documents or 1, 1, queries, keys], or None if it is plainly causal.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


def on_a_gpu(device: torch.device) -> bool:
    """Returns True if attention on this device takes a whole row. The simulation of a rank replaces this function."""
    return bool(device.type != "cpu")


class Tables:
    """The tables of one batch of rows, each made when a layer first asks for it."""

    def __init__(
        self,
        starts: Tensor | None,
        length: int,
        context: int,
        device: torch.device,
        rope: tuple[Tensor, float],
        step: int = 1,
    ) -> None:
        """Tables of rows of which this context rank has a share.

        Args:
            starts: The first position of the document of each position, int64 [batch, complete row], on any device. Or
                [3, batch, complete row] with the first position and the end of what the document continues, its prefix
                in the same row. None if each row is one document.
            length: Of this context rank's share of a row.
            context: Context ranks, over which a row is cut.
            device: Where the tables are made.
            rope: Frequencies and factor.
            step: The distance of neighbors' positions for the rotary embedding.
        """
        self.starts, self.length, self.context, self.device, self.rope = starts, length, context, device, rope
        self.step = step
        self.positions = context_positions(length * context) if context > 1 else torch.arange(length)
        self.local_starts = None if starts is None else starts.cpu()[..., self.positions]
        """[batch, length], on the host."""
        self.prefixes: Tensor | None = None
        """[2, batch, length], on the host; None if no document continues another."""
        if self.local_starts is not None and self.local_starts.dim() == 3:
            assert context == 1, "context ranks hold parts of rows"
            self.local_starts, self.prefixes = self.local_starts[0], self.local_starts[1:]
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self._documents: dict[int, Documents] = {}
        self._buckets: dict[torch.dtype, tuple[list[Bucket], Tensor]] = {}

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor | None]:
        starts = None if self.local_starts is None else gpu.upload(self.local_starts, self.device)
        return gpu.upload(self.positions, self.device), starts

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [length, dim], or [batch, 1, 1, length, dim] if rows hold several documents.

        Each of these documents counts from 0.
        """
        positions, starts = self._on_device
        if starts is not None:
            if self.prefixes is not None:  # a document counts on from its prefix
                starts = starts - gpu.upload(self.prefixes[1] - self.prefixes[0], self.device)
            positions = (positions - starts)[:, None, None]
        frequencies, factor = self.rope
        angles = (positions * self.step)[..., None].float() * gpu.upload(frequencies, self.device)
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    @cached_property
    def slices(self) -> list[tuple[int, int, int]]:
        """(queries, first key, end of keys) of each slice of queries.

        It sees no keys beyond its last position, and none before its first document. The CPU's kernel also computes
        masked scores, so this saves almost half of the work of long rows; a GPU's kernel does not compute them, and
        takes a row that is one document whole.
        """
        whole = on_a_gpu(self.device) and self.local_starts is None and self.context == 1
        parts = self.positions.split(self.length if whole else SLICE)
        starts = [None] * len(parts) if self.local_starts is None else self.local_starts.split(SLICE, 1)
        return [
            (len(part), 0 if start is None else int(start.min()), int(part.max()) + 1)
            for part, start in zip(parts, starts, strict=True)
        ]

    def mask(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """Returns the numbers to add to the scores of a slice, 0 or minus infinity; None if it is plainly causal.

        The shape is [queries, keys] or [batch, 1, queries, keys]. Autograd keeps masks: with it all layers share them.
        """
        count, first, end = self.slices[number]
        # As many keys as queries, so the kernel's own causal order is right without a mask.
        if self.local_starts is None and end == count:
            return None
        if (number, dtype) in self._masks:
            return self._masks[number, dtype]
        positions, starts = self._on_device
        begin = sum(queries for queries, _, _ in self.slices[:number])
        key = torch.arange(first, end, device=self.device)
        seen = positions[begin : begin + count, None] >= key
        if starts is not None:
            seen = (seen & (starts[:, begin : begin + count, None] <= key))[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, -torch.inf)
        # Without gradients nothing keeps a mask, so neither do the tables.
        if torch.is_grad_enabled():
            self._masks[number, dtype] = mask
        return mask

    def documents(self, batch: int) -> Documents:
        """The documents of `batch` rows; parts of one in distant slices of a context rank are two."""
        if batch not in self._documents:
            self._documents[batch] = self._find_documents(batch)
        return self._documents[batch]

    def _find_documents(self, batch: int) -> Documents:
        starts = torch.zeros(batch, self.length, dtype=torch.long) if self.local_starts is None else self.local_starts
        begins = torch.ones_like(starts, dtype=torch.bool)
        # A document begins where its start changes, and a context rank's second slice begins anew.
        begins[:, 1:] = (starts[:, 1:] != starts[:, :-1]) | (self.positions[1:] != self.positions[:-1] + 1)
        row, column = begins.nonzero(as_tuple=True)
        bounds = torch.cat([row * self.length + column, torch.tensor([batch * self.length])])
        first_key = starts[row, column]
        # Up to the last position of a part, also the keys that other context ranks hold.
        sizes = self.positions[(bounds[1:] - 1) % self.length] + 1 - first_key
        gathered = None
        if self.prefixes is not None:
            # The keys of a document are those of its prefix, and then its own.
            shared = [torch.arange(*ends) for ends in (self.prefixes[:, row, column] + row * self.length).T.tolist()]
            rest = torch.arange(batch * self.length).split(sizes.tolist())
            gathered = gpu.upload(torch.cat([x for pair in zip(shared, rest, strict=True) for x in pair]), self.device)
            sizes = sizes + self.prefixes[1, row, column] - self.prefixes[0, row, column]
        keys = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        if self.context > 1:
            # Keys lie in complete rows, and the queries of this rank in its share of them.
            shift = row * self.length * self.context + first_key - keys[:-1]
            gathered = gpu.upload(torch.arange(int(keys[-1])) + shift.repeat_interleave(sizes), self.device)
        # a power of two, as cuDNN builds a plan for each value
        longest = min(1 << (int(sizes.max()) - 1).bit_length(), self.length * self.context)
        # Kernels for rows of variable length take int32.
        queries, keys = (gpu.upload(x.int(), self.device) for x in (bounds, keys))
        return Documents(queries, keys, longest, gathered)

    def buckets(self, batch: int, dtype: torch.dtype) -> tuple[list[Bucket], Tensor]:
        """The documents of `batch` rows by length, for kernels that take rows of one length.

        The second result is the place of each position in the queries of all buckets side by side.
        """
        if dtype not in self._buckets:
            self._buckets[dtype] = self._make_buckets(self.documents(batch), dtype)
        return self._buckets[dtype]

    def _make_buckets(self, documents: Documents, dtype: torch.dtype) -> tuple[list[Bucket], Tensor]:
        assert documents.gathered is not None, "the documents have prefixes"
        count, total = (x.cpu().long().diff() for x in (documents.queries, documents.keys))
        prefix = total - count
        # Documents with and without a prefix stay apart, as the latter need no mask.
        kinds: dict[tuple[bool, int], list[int]] = {}
        for document, (before, length) in enumerate(zip(prefix.tolist(), count.tolist(), strict=True)):
            kinds.setdefault((before > 0, (length - 1).bit_length()), []).append(document)
        first, first_key = documents.queries.cpu().long(), documents.keys.cpu().long()
        gathered, buckets, offset = documents.gathered.cpu(), [], 0
        place = torch.empty(int(first[-1]), dtype=torch.long)
        for members in kinds.values():
            n = torch.tensor(members)
            longest, before = int(count[n].max()), int(prefix[n].max())
            query, key = torch.arange(longest), torch.arange(before + longest)
            # keys: padding, the prefix, the document, padding. The causal order hides what is behind the document.
            ahead = (before - prefix[n])[:, None]
            queries = first[n, None] + query.clamp(max=(count[n] - 1)[:, None])
            keys = gathered[first_key[n, None] + (key - ahead).clamp(min=0).clamp(max=(total[n] - 1)[:, None])]
            real = query < count[n, None]
            place[queries[real]] = (offset + torch.arange(real.numel()).view(real.shape))[real]
            offset += real.numel()
            mask = None
            if before:
                # One mask serves the whole bucket if all its prefixes have one length.
                if bool((ahead == ahead[0]).all()):
                    ahead = ahead[:1]
                seen = (key <= before + query[:, None]) & (key >= ahead[:, :, None])
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]
                mask = gpu.upload(mask, self.device)
            buckets.append(Bucket(gpu.upload(queries, self.device), gpu.upload(keys, self.device), mask))
        return buckets, gpu.upload(place, self.device)


class RowTables:
    """The tables of the latest rows.

    A layer finds them by the tensor of starts, of which it may get another view: the recomputation of a layer
    unpacks it anew.
    """

    def __init__(self, rope: tuple[Tensor, float], context: int) -> None:
        self.rope, self.context = rope, context
        self.steps: dict[int, int] = {}
        """{tokens of a row: distance of its neighbors' positions}, where it is not 1: to compute at far positions."""
        self.key: Any = None
        self.tables: Tables | None = None

    def of(self, starts: Tensor | None, length: int, device: torch.device) -> Tables:
        """The tables of these rows, which are kept until others come.

        `starts` is as in `Tables`, and `length` that of this context rank's share of a row. The tables keep `starts`,
        so its memory is not used again while they are the latest.
        """
        # By its memory: recomputation and pipeline stages hand over other views of the same tensor.
        place = None if starts is None else (starts.untyped_storage()._cdata, starts.storage_offset(), starts.shape)
        key = place, length, device
        if self.tables is None or key != self.key:
            step = self.steps.get(length, 1)
            self.key = key
            self.tables = Tables(starts, length, self.context, device, self.rope, step)
        return self.tables


def context_positions(length: int) -> Tensor:
    """The positions of a row of `length` tokens that this context rank holds, in the order in which it holds them.

    Of 2C slices for C ranks, it holds the one with its number, and the one as far from the end.
    """
    rank = parallel_state.get_context_parallel_rank()
    # The first slices see few keys and the last ones many: a pair of both has the same work on every rank.
    slices = torch.arange(length).chunk(2 * parallel_state.get_context_parallel_world_size())
    return torch.cat([slices[rank], slices[-1 - rank]])


def frequencies(model: ModelConfig) -> tuple[Tensor, float]:
    """Radians by position, [rotary_dim / 2] in fp32, and the factor of cosines and sines."""
    dim = model.rotary_dim
    base = 1.0 / (model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if model.yarn is None:
        return base, 1.0
    yarn = model.yarn

    def pair_index(rotations: float) -> float:
        """The (fractional) pair whose frequency makes that many turns within the original length."""
        return dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(model.rope_theta))

    low, high = max(math.floor(pair_index(yarn.beta_fast)), 0), min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
    width = high - low or 0.001  # equal ends turn the ramp into a step
    # 0 keeps a frequency, 1 divides it, and between them both are mixed.
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / width, 0, 1)
    factor = 1.0 if model.yarn_scales_heads else yarn_factor(model)
    return base / yarn.factor * ramp + base * (1 - ramp), factor


def yarn_factor(model: ModelConfig) -> float:
    """The factor of queries and of keys."""
    return 0.1 * math.log(model.yarn.factor) + 1.0 if model.yarn else 1.0


def megatron_yarn(model: ModelConfig) -> dict[str, Any]:
    """Attributes of Megatron's configuration with which its own attention layers scale in the same way."""
    if model.yarn is None:
        return {}
    return {
        "yarn_rotary_scaling_factor": model.yarn.factor,
        "yarn_original_max_position_embeddings": model.yarn.original_length,
        "yarn_beta_fast": model.yarn.beta_fast,
        "yarn_beta_slow": model.yarn.beta_slow,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": True,
    }
