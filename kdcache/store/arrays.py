"""Read blocks of one Zarr array of a store into memory.

Owns the way from shard bytes to stored values: one scattered read per run of adjacent blocks,
checksum, decompression. Safe to use from several threads.
Invariant: no size from a file is believed before it agrees with the layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.errors import ShapeError, StoreError
from kdcache.store.codecs import decompress
from kdcache.store.files import OpenFile, Range, StoreFiles
from kdcache.store.shards import (
    CRC_BYTES,
    FETCH_AGAIN,
    Bytes,
    as_bytes,
    checksum,
    chunk_bounds,
    index_size,
)
from kdcache.structures import IntArray

T = TypeVar("T")
Array = npt.NDArray[Any]

# LZ4 stores at best 255 bytes in one: a chunk that claims more is not honest.
LARGEST_RATIO = 256


@dataclass(frozen=True)
class ArrayReader:
    """One array of a store.

    Attributes:
        files: of the store.
        names: of every shard among them.
        used: [n_blocks] rows of each block that are no padding.
        capacity: rows of a whole block.
        row_shape: shape of one row.
        dtype: as stored.
        blocks_per_shard: entries in the index of a shard.
        compressed: chunks are Blosc frames, else raw bytes.
    """

    files: StoreFiles
    names: list[str]
    used: IntArray
    capacity: int
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks_per_shard: int
    compressed: bool
    _bounds: dict[int, IntArray] = field(default_factory=dict, compare=False)

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block, decoded."""
        row = self.dtype.itemsize
        for extent in self.row_shape:
            row *= extent
        return self.capacity * row

    def check_files(self) -> None:
        """Every shard is there, and as large as it must be where that is known.

        Raises:
            StoreError: naming the shard.
        """
        for shard, name in enumerate(self.names):
            try:
                size = self.files.size(name)
            except FileNotFoundError:
                raise self._missing(shard) from None
            raw = self._n_blocks(shard) * (self.block_bytes + CRC_BYTES)
            expected = raw + index_size(self.blocks_per_shard)
            if not self.compressed and size != expected:
                raise StoreError(
                    f"{self._where(shard)} has {size} bytes, {expected} are expected: it is "
                    f"truncated or of another store. {FETCH_AGAIN}"
                )

    def allocate(self, blocks: IntArray, out: Array | None = None) -> Array:
        """Room for the used rows of blocks, once the shards are known to hold them.

        Args:
            blocks: [k] block numbers.
            out: memory to use again, [at least as many rows, ...] contiguous, stored dtype.

        Raises:
            StoreError: a shard is missing, truncated, or its index is damaged.
            ShapeError: `out` does not fit.
        """
        for shard in np.unique(blocks // self.blocks_per_shard):
            self.bounds(int(shard))
        rows = int(self.used[blocks].sum())
        return fitting((rows, *self.row_shape), self.dtype, out)

    def read(self, blocks: IntArray, out: Array, check: bool) -> None:
        """Fill `out` with the used rows of blocks, in the order given.

        Args:
            blocks: [k] block numbers.
            out: [rows, ...] contiguous, in the stored dtype.
            check: compare checksums.

        Raises:
            StoreError: a shard is missing or damaged, naming it and the block.
        """
        used = self.used[blocks].tolist()
        place = row = 0
        for shard, runs in _by_shard(blocks, self.blocks_per_shard):
            n_blocks = sum(count for _, count in runs)
            rows = used[place : place + n_blocks]
            room = out[row:]  # what lies past the rows of this shard is still to be filled
            self._with_file(shard, partial(self._read_runs, shard, runs, rows, room, check))
            place += n_blocks
            row += sum(rows)

    def bounds(self, shard: int) -> IntArray:
        """[blocks of the shard + 1] offsets of its blocks, read once.

        Raises:
            StoreError: the shard is missing, truncated, or its index is damaged.
        """
        if shard not in self._bounds:
            self._bounds[shard] = self._with_file(shard, partial(self._read_bounds, shard))
        return self._bounds[shard]

    def unread_shards(self, blocks: IntArray) -> list[int]:
        """Shards of these blocks whose `bounds` are not known yet."""
        shards = np.unique(blocks // self.blocks_per_shard).tolist()
        return [shard for shard in shards if shard not in self._bounds]

    def ranges(self, blocks: IntArray) -> list[Range]:
        """What `read` reads, run by run."""
        found = []
        for shard, first, count in _runs(blocks, self.blocks_per_shard):
            offsets = self._offsets(shard, first, count)
            found.append(Range(self.names[shard], offsets[0], offsets[-1]))
        return found

    def _offsets(self, shard: int, first: int, count: int) -> list[int]:
        start = first - shard * self.blocks_per_shard
        offsets: list[int] = self.bounds(shard)[start : start + count + 1].tolist()
        return offsets

    def _read_runs(
        self,
        shard: int,
        runs: Sequence[tuple[int, int]],
        used: list[int],
        out: Array,
        check: bool,
        file: OpenFile,
    ) -> None:
        read = self._read_compressed if self.compressed else self._read_raw
        place = row = 0
        for first, count in runs:
            rows = used[place : place + count]
            read(file, shard, first, rows, self._offsets(shard, first, count), out[row:], check)
            place += count
            row += sum(rows)

    def _read_raw(
        self,
        file: OpenFile,
        shard: int,
        first: int,
        used: list[int],
        offsets: list[int],
        out: Array,
        check: bool,
    ) -> None:
        # Rows go to where they are wanted, padding and checksums beside them: nothing is copied.
        row_bytes = self.block_bytes // self.capacity
        room = as_bytes(out)
        buffers: list[Bytes] = []
        start = 0
        for count in used:
            end = start + count * row_bytes
            rest = np.empty((self.capacity - count) * row_bytes + CRC_BYTES, np.uint8)
            buffers += [room[start:end], rest]
            start = end
        file.read_into(buffers, offsets[0])
        if check:
            for i in range(len(used)):
                rows, rest = buffers[2 * i : 2 * i + 2]
                crc = checksum(rest[:-CRC_BYTES], checksum(rows))
                self._check(crc, rest[-CRC_BYTES:], shard, first + i)

    def _read_compressed(
        self,
        file: OpenFile,
        shard: int,
        first: int,
        used: list[int],
        offsets: list[int],
        out: Array,
        check: bool,
    ) -> None:
        data = np.empty(offsets[-1] - offsets[0], np.uint8)
        file.read_into([data], offsets[0])
        row = 0
        for i, count in enumerate(used):
            start, end = offsets[i] - offsets[0], offsets[i + 1] - offsets[0] - CRC_BYTES
            frame = data[start:end]
            if check:
                self._check(checksum(frame), data[end : end + CRC_BYTES], shard, first + i)
            # Padding may lie where the rows of later blocks will, but not past the last.
            whole = out[row : row + self.capacity]
            fits = len(whole) == self.capacity
            if not fits:
                whole = np.empty((self.capacity, *self.row_shape), self.dtype)
            if not decompress(frame, whole):
                raise StoreError(
                    f"{self._where(shard)}, block {first + i}: the compressed bytes do not hold a "
                    f"block of {self.block_bytes} bytes. {FETCH_AGAIN}"
                )
            if not fits:
                out[row : row + count] = whole[:count]
            row += count

    def _check(self, computed: int, stored: Bytes, shard: int, block: int) -> None:
        expected = int.from_bytes(stored.tobytes(), "little")
        if computed != expected:
            raise StoreError(
                f"{self._where(shard)}, block {block}: its bytes have checksum {computed:08x}, "
                f"{expected:08x} was written with them. {FETCH_AGAIN}"
            )

    def _n_blocks(self, shard: int) -> int:
        return min(self.blocks_per_shard, len(self.used) - shard * self.blocks_per_shard)

    def _with_file(self, shard: int, work: Callable[[OpenFile], T]) -> T:
        try:
            return self._once(shard, work)
        except StoreError:
            # A damaged copy of a remote file is fetched again; a damaged file is not.
            if not self.files.forget(self.names[shard]):
                raise
            self._bounds.pop(shard, None)
            return self._once(shard, work)

    def _once(self, shard: int, work: Callable[[OpenFile], T]) -> T:
        try:
            file = self.files.open(self.names[shard])
        except FileNotFoundError:
            raise self._missing(shard) from None
        try:
            return work(file)
        except FileNotFoundError:  # nothing is opened on a server before it is read
            raise self._missing(shard) from None
        finally:
            file.close()

    def _where(self, shard: int) -> str:
        return self.files.where(self.names[shard])

    def _read_bounds(self, shard: int, file: OpenFile) -> IntArray:
        size, data = file.tail(index_size(self.blocks_per_shard))
        bounds = chunk_bounds(
            size,
            data,
            self._where(shard),
            self._n_blocks(shard),
            self.blocks_per_shard,
            None if self.compressed else self.block_bytes + CRC_BYTES,
        )
        if int(np.diff(bounds).min()) * LARGEST_RATIO < self.block_bytes:
            raise StoreError(
                f"{self._where(shard)} cannot hold blocks of {self.block_bytes} bytes in chunks of "
                f"{int(np.diff(bounds).min())}. It is not read. {FETCH_AGAIN}"
            )
        return bounds

    def _missing(self, shard: int) -> StoreError:
        return StoreError(
            f"{self._where(shard)} is missing (shard {shard} of {len(self.names)}). {FETCH_AGAIN}"
        )


def fitting(shape: tuple[int, ...], dtype: np.dtype[Any], out: Array | None) -> Array:
    """A new array, or the first rows of `out`.

    Raises:
        ShapeError: `out` is too small, of another shape or dtype, or not contiguous.
    """
    if out is None:
        return np.empty(shape, dtype)
    if out.dtype != dtype or out.shape[1:] != shape[1:] or len(out) < shape[0]:
        raise ShapeError(
            f"out must be at least {list(shape)} {dtype.name}, got {list(out.shape)} "
            f"{out.dtype.name}."
        )
    if not out.flags.c_contiguous:
        raise ShapeError("out must be contiguous: bytes are read straight into it.")
    return out[: shape[0]]


def _by_shard(
    blocks: IntArray, blocks_per_shard: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Every shard with its runs of adjacent blocks, as first block and length, in their order."""
    runs = _runs(blocks, blocks_per_shard)
    for shard, group in itertools.groupby(runs, key=lambda run: run[0]):
        yield shard, [(first, count) for _, first, count in group]


def _runs(blocks: IntArray, blocks_per_shard: int) -> Iterator[tuple[int, int, int]]:
    """Shard, first block and length of every run of adjacent blocks."""
    shards = blocks // blocks_per_shard
    breaks = np.flatnonzero((np.diff(blocks) != 1) | (np.diff(shards) != 0)) + 1
    starts = np.concatenate([[0], breaks])
    for start, end in zip(starts.tolist(), [*breaks.tolist(), len(blocks)], strict=True):
        if end > start:
            yield int(shards[start]), int(blocks[start]), end - start
