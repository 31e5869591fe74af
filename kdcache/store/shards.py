"""One shard file: its blocks as chunks with checksums, and the index of them at its end.

Owns bytes and checksums; which values belong in which block is the plan's, what they mean the
codecs'. Invariant: a shard file stands under its name only when it is whole and on disk, and two
attempts at one shard never write to the same file.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from kdcache.errors import StoreError, naming
from kdcache.store.codecs import compress

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

CRC_BYTES = 4
MISSING = 2**64 - 1
PARTIAL_SUFFIX = ".partial"
# Parts of a file that wait for the disk while further ones are encoded.
PARTS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Written:
    """A shard on disk: SHA-256 in hex, and bytes."""

    sha256: str
    size: int


def as_bytes(array: Array) -> Bytes:
    """The memory of a contiguous array as [n_bytes] uint8, no copy."""
    return array.reshape(-1).view(np.uint8)


def checksum(data: Bytes, before: int = 0) -> int:
    """CRC-32C of bytes that follow others whose checksum is `before`."""
    return crc32c(data.data, before)


def index_size(blocks_per_shard: int) -> int:
    """Bytes of the index at the end of a shard."""
    return 16 * blocks_per_shard + CRC_BYTES


def new_attempt() -> str:
    """A name no other attempt has, in this process or another, on this machine or another."""
    return secrets.token_hex(6)


def partial_path(path: Path, attempt: str) -> Path:
    """Where an attempt at a file is written, until it takes its name."""
    return path.with_name(f"{path.name}.{attempt}{PARTIAL_SUFFIX}")


def write_shard_file(
    path: Path,
    attempt: str,
    blocks: Iterable[Iterable[Array]],
    capacity: int,
    blocks_per_shard: int,
    compressed: bool,
) -> Written:
    """Write blocks one after another to disk, under the name of an attempt.

    Asked for parts here; what came before is digested and written by a thread of its own, with at
    most `PARTS_AHEAD` parts between them.

    Args:
        path: of the shard; its folder is made.
        attempt: whose file it is until `publish_file`.
        blocks: each in parts of at least one, [some rows, ...] contiguous, in the stored dtype;
            padded here with zeros.
        capacity: rows of a whole block.
        blocks_per_shard: entries of the index; those past the last block count as missing.
        compressed: Blosc before the checksum, else raw bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    index = np.full((blocks_per_shard, 2), MISSING, "<u8")
    offset = 0
    with (
        naming(str(path)),
        open(partial_path(path, attempt), "wb", buffering=0) as file,
        _Behind(file.fileno()) as behind,
    ):
        for i, block in enumerate(blocks):
            crc = size = 0
            for part in _chunk(block, capacity, compressed):
                crc = checksum(part, crc)
                size += part.nbytes
                behind.write(part)
            behind.write(_number(crc))
            index[i] = offset, size + CRC_BYTES
            offset += size + CRC_BYTES
        end = as_bytes(index)
        behind.write(end)
        behind.write(_number(checksum(end)))
        sha256 = behind.finish()
    return Written(sha256, offset + index_size(blocks_per_shard))


def publish_file(path: Path, attempt: str) -> None:
    """Give the file of an attempt its name, for good.

    Raises:
        FileNotFoundError: the attempt wrote none, or has published it already.
    """
    os.replace(partial_path(path, attempt), path)
    sync_directory(path.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file whole, or not at all, so that it survives a power cut."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write small files that belong together: all are on disk before the first takes its name.

    A disk that fills then spoils none of them; a kill may still fall between two names.
    """
    attempt = new_attempt()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(str(path)), open(partial_path(path, attempt), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for path in contents:
            partial_path(path, attempt).unlink(missing_ok=True)
        raise
    for path in contents:
        publish_file(path, attempt)


def sync_directory(path: Path) -> None:
    """Make renames within a folder last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(str(path)):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_chunk_bounds(
    descriptor: int, where: str, n_blocks: int, blocks_per_shard: int, chunk_bytes: int | None
) -> npt.NDArray[np.int64]:
    """Where each block of an open shard lies: [n_blocks + 1] offsets.

    Args:
        descriptor: of the shard file.
        where: its path within the store, for messages.
        n_blocks: blocks the plan puts in it.
        blocks_per_shard: entries its index must have.
        chunk_bytes: size of every chunk with its checksum where chunks are raw, else None.

    Raises:
        StoreError: the file is shorter or longer than its index says, or the index is damaged.
    """
    size, tail = os.fstat(descriptor).st_size, index_size(blocks_per_shard)
    data = os.pread(descriptor, tail, max(0, size - tail))
    return chunk_bounds(size, data, where, n_blocks, blocks_per_shard, chunk_bytes)


def chunk_bounds(
    size: int,
    data: bytes,
    where: str,
    n_blocks: int,
    blocks_per_shard: int,
    chunk_bytes: int | None,
) -> npt.NDArray[np.int64]:
    """As `read_chunk_bounds`, of a shard of `size` bytes whose last ones are `data`."""
    tail = index_size(blocks_per_shard)
    if chunk_bytes is not None and size != n_blocks * chunk_bytes + tail:
        raise StoreError(
            f"{where} has {size} bytes, {n_blocks * chunk_bytes + tail} are expected: it is "
            f"truncated or of another store. {FETCH_AGAIN}"
        )
    body = data[:-CRC_BYTES]
    if len(data) != tail or crc32c(body) != int.from_bytes(data[-4:], "little"):
        raise StoreError(
            f"{where} ({size} bytes) does not end in a valid index of {blocks_per_shard} blocks: "
            f"it is truncated or damaged. {FETCH_AGAIN}"
        )
    entries = np.frombuffer(body, "<u8").reshape(-1, 2)
    bounds = np.zeros(n_blocks + 1, np.int64)
    # Sizes are held below the file's before they are summed: 2^64 - 1 must not wrap around.
    sizes = np.minimum(entries[:n_blocks, 1], size + 1).astype(np.int64)
    np.cumsum(sizes, out=bounds[1:])
    contiguous = (entries[:n_blocks, 0] == bounds[:-1].astype("<u8")).all()
    unused = (entries[n_blocks:] == MISSING).all()
    fits = sizes.min() > CRC_BYTES and bounds[-1] + tail == size
    if chunk_bytes is not None:
        fits = fits and bool((sizes == chunk_bytes).all())
    if not (contiguous and unused and fits):
        raise StoreError(
            f"{where} ({size} bytes) has an index that does not cover it with {n_blocks} blocks "
            f"one after another: it is damaged or of another store. {FETCH_AGAIN}"
        )
    return bounds


FETCH_AGAIN = "Its rows would be wrong. Fetch the file again, or dump again."


def read_into(descriptor: int, where: str, buffers: Sequence[Bytes], offset: int) -> None:
    """Fill buffers one after another from a file, in as few system calls as it takes.

    Raises:
        StoreError: the file ends before they are full.
    """
    pending = [buffer for buffer in buffers if buffer.nbytes]
    while pending:
        # At most 512 at once, below IOV_MAX (1,024) of Linux.
        done = os.preadv(descriptor, [buffer.data for buffer in pending[:512]], offset)
        if done <= 0:
            raise StoreError(f"{where} ends at byte {offset}, more are expected. {FETCH_AGAIN}")
        offset += done
        while pending and done >= pending[0].nbytes:
            done -= pending.pop(0).nbytes
        if done:
            pending[0] = pending[0][done:]


def _chunk(block: Iterable[Array], capacity: int, compressed: bool) -> Iterator[Bytes]:
    """The bytes of a block, padded, without their checksum."""
    if compressed:
        yield np.frombuffer(compress(_padded(list(block), capacity)), np.uint8)
        return
    n_rows = row_bytes = 0
    for part in block:
        n_rows += len(part)
        row_bytes = part.dtype.itemsize * math.prod(part.shape[1:])
        yield as_bytes(part)
    yield np.zeros((capacity - n_rows) * row_bytes, np.uint8)


def _padded(parts: list[Array], capacity: int) -> Array:
    if len(parts) == 1 and len(parts[0]) == capacity:
        return parts[0]
    whole = np.zeros((capacity, *parts[0].shape[1:]), parts[0].dtype)
    np.concatenate(parts, out=whole[: sum(len(part) for part in parts)])
    return whole


def _number(crc: int) -> Bytes:
    return np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)


class _Behind:
    """Digests and writes a file on a thread of its own, part after part."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdcache-write")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def write(self, part: Bytes) -> None:
        """Hand over a part; raises what went wrong with an earlier one."""
        if len(self._waiting) == PARTS_AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, part))

    def finish(self) -> str:
        """SHA-256 in hex, when everything is on disk."""
        self._waiting.append(self._pool.submit(os.fsync, self._descriptor))
        for task in self._waiting:
            task.result()
        return self._sha256.hexdigest()

    def _write(self, part: Bytes) -> None:
        self._sha256.update(part.data)
        view = part.data
        while view:
            view = view[os.write(self._descriptor, view) :]
