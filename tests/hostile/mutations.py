"""Damage done to bytes at random, without knowing what they mean.

What knows a format is in `structured`. Invariant: the same generator and bytes give the same
damage, and nothing grows by more than `MAX_GROWTH`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

MAX_GROWTH = 2**16
# Ends of the integer types, what lies beside them, and sizes that no small file has.
EXTREMES = tuple(
    sorted(
        {sign * 2**bits + near for bits in (7, 8, 15, 16, 31, 32, 63, 64) for near in (-1, 0, 1)
         for sign in (1, -1)}
        | {0, 1, -1, 2**20, 2**28, 2**40, 2**48}
    )
)  # fmt: skip

Generator = np.random.Generator
Mutation = Callable[[Generator, bytearray, Sequence[bytes]], bytearray]


def mutate(rng: Generator, data: bytes, others: Sequence[bytes]) -> bytes:
    """`data` with one to four things done to it; `others` are what is spliced in."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        changed = MUTATIONS[int(rng.integers(len(MUTATIONS)))](rng, changed, others)
    return bytes(changed)


def extreme(rng: Generator) -> int:
    """An integer that arithmetic forgets."""
    return EXTREMES[int(rng.integers(len(EXTREMES)))]


def place(rng: Generator, data: bytes | bytearray) -> int:
    """A place in `data`, more often near its ends, where headers and footers are."""
    if not data:
        return 0
    within = int(rng.integers(len(data)))
    side = int(rng.integers(4))
    if side == 0:
        return min(within, int(rng.integers(64)))
    if side == 1:
        return max(0, len(data) - 1 - min(len(data) - 1, int(rng.integers(256))))
    return within


def flip(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    if data:
        data[place(rng, data)] ^= 1 << int(rng.integers(8))
    return data


def set_byte(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    if data:
        data[place(rng, data)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    return data


def set_integer(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    """An extreme of 1, 2, 4 or 8 bytes, mostly where one may stand."""
    size = int(rng.choice([1, 2, 4, 8]))
    if len(data) < size:
        return data
    start = min(place(rng, data), len(data) - size)
    if rng.random() < 0.7:
        start -= start % size
    value = (extreme(rng) % 2 ** (8 * size)).to_bytes(size, "little")
    data[start : start + size] = value if rng.random() < 0.8 else value[::-1]
    return data


def add_to_integer(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    size = int(rng.choice([1, 2, 4, 8]))
    if len(data) < size:
        return data
    start = min(place(rng, data), len(data) - size)
    value = int.from_bytes(data[start : start + size], "little") + int(rng.integers(-8, 9))
    data[start : start + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return data


def delete(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start = place(rng, data)
    del data[start : start + int(rng.integers(1, 65))]
    return data


def insert(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start = place(rng, data)
    data[start:start] = rng.bytes(int(rng.integers(1, 33)))
    return data


def duplicate(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, size = place(rng, data), int(rng.integers(1, 257))
    piece = bytes(data[start : start + size])
    times = min(int(rng.choice([1, 2, 16, 256])), MAX_GROWTH // max(1, len(piece)))
    data[start:start] = piece * times
    return data


def splice(rng: Generator, data: bytearray, others: Sequence[bytes]) -> bytearray:
    """A piece of another file, over or between what is there."""
    if not others:
        return data
    other = others[int(rng.integers(len(others)))]
    start, size = place(rng, other), int(rng.integers(1, 513))
    piece = other[start : start + size]
    at = place(rng, data)
    data[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece
    return data


def truncate(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    return data[: place(rng, data)]


def fill(rng: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, size = place(rng, data), int(rng.integers(1, 65))
    size = len(data[start : start + size])
    data[start : start + size] = bytes([int(rng.choice([0, 0xFF, 0x20]))]) * size
    return data


def append(rng: Generator, data: bytearray, others: Sequence[bytes]) -> bytearray:
    tail = others[int(rng.integers(len(others)))] if others and rng.random() < 0.3 else b""
    return data + tail[:MAX_GROWTH] + rng.bytes(int(rng.integers(0, 17)))


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, set_byte, set_integer, set_integer, add_to_integer, delete, insert, duplicate,
    splice, truncate, fill, append,
)  # fmt: skip
