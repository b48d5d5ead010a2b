"""XXH64 of many short runs of bytes at once, by https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

UInts = NDArray[np.uint64]
Ints = NDArray[np.int64]

_P1, _P2, _P3, _P4, _P5 = np.array(
    [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5], np.uint64
)
_SUMS = np.array([(int(_P1) + int(_P2)) % 2**64, int(_P2), 0, -int(_P1) % 2**64], np.uint64)
_LONG = 1024  # bytes from which a run is hashed by itself: a step for all runs would be one for a few


def xxh64(data: bytes, starts: Ints, ends: Ints) -> UInts:
    """The hash, with seed 0, of data[start:end] for each start and end."""
    eight: UInts = np.ascontiguousarray(
        np.ndarray((len(data) + 1,), "<u8", data + bytes(8), strides=(1,))
    )  # at each byte
    at, left = starts.copy(), ends - starts
    hashes: UInts = np.full(len(starts), _P5)
    _mix_stripes(hashes, eight, at, left)
    hashes += (ends - starts).astype(np.uint64)
    while len(rows := np.flatnonzero(left >= 8)):
        hashes[rows] = _rotate(hashes[rows] ^ _round(np.uint64(0), eight[at[rows]]), 27) * _P1 + _P4
        _advance(at, left, rows, 8)
    if len(rows := np.flatnonzero(left >= 4)):
        lane = (eight[at[rows]] & np.uint64(0xFFFFFFFF)) * _P1
        hashes[rows] = _rotate(hashes[rows] ^ lane, 23) * _P2 + _P3
        _advance(at, left, rows, 4)
    while len(rows := np.flatnonzero(left)):
        hashes[rows] = _rotate(hashes[rows] ^ (eight[at[rows]] & np.uint64(0xFF)) * _P5, 11) * _P1
        _advance(at, left, rows, 1)
    hashes = (hashes ^ hashes >> np.uint64(33)) * _P2
    hashes = (hashes ^ hashes >> np.uint64(29)) * _P3
    hashes ^= hashes >> np.uint64(32)
    for row in np.flatnonzero(ends - starts >= _LONG).tolist():
        hashes[row] = xxh64_intdigest(data[starts[row] : ends[row]])
    return hashes


def _mix_stripes(hashes: UInts, eight: UInts, at: Ints, left: Ints) -> None:
    """Hashes the whole stripes of 32 bytes of each run that has some, and moves past them."""
    left[left >= _LONG] = 0
    striped = np.flatnonzero(left >= 32)
    sums = [np.full(len(striped), start) for start in _SUMS]
    while len(rows := np.flatnonzero(left[striped] >= 32)):
        places = at[striped[rows]]
        for lane, each in enumerate(sums):
            each[rows] = _round(each[rows], eight[places + 8 * lane])
        _advance(at, left, striped[rows], 32)
    total = sum((_rotate(each, bits) for each, bits in zip(sums, (1, 7, 12, 18), strict=True)), np.uint64(0))
    for each in sums:
        total = (total ^ _round(np.uint64(0), each)) * _P1 + _P4
    hashes[striped] = total


def _round(value: UInts | np.uint64, lane: UInts) -> UInts:
    mixed: UInts = _rotate(value + lane * _P2, 31) * _P1
    return mixed


def _rotate(values: UInts, bits: int) -> UInts:
    rotated: UInts = values << np.uint64(bits) | values >> np.uint64(64 - bits)
    return rotated


def _advance(at: Ints, left: Ints, rows: Ints, count: int) -> None:
    at[rows] += count
    left[rows] -= count
