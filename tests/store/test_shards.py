"""A shard's bytes, by the words of FORMAT.md, and indexes no honest writer makes."""

from __future__ import annotations

import errno
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest

from kdcache.errors import StoreError
from kdcache.store.shards import (
    PARTS_AHEAD,
    partial_path,
    publish_file,
    read_chunk_bounds,
    write_file,
    write_shard_file,
)


def test_a_raw_shard_is_chunks_and_an_index(tmp_path: Path) -> None:
    blocks = [[np.array([[1, 2]], "<f2"), np.array([[3, 4]], "<f2")], [np.array([[5, 6]], "<f2")]]
    path = tmp_path / "c" / "0" / "0"
    written = write_shard_file(path, "first", blocks, 3, 4, compressed=False)
    # Another attempt at the same shard, which never ends.
    write_shard_file(path, "second", blocks[:1], 3, 4, compressed=False)
    assert not path.exists()
    publish_file(path, "first")

    def chunk(*values: float) -> bytes:
        body = np.array(values, "<f2").tobytes()
        return body + struct.pack("<I", google_crc32c.value(body))

    missing = 2**64 - 1
    index = struct.pack("<8Q", 0, 16, 16, 16, missing, missing, missing, missing)
    index += struct.pack("<I", google_crc32c.value(index))
    expected = chunk(1, 2, 3, 4, 0, 0) + chunk(5, 6, 0, 0, 0, 0) + index
    assert path.read_bytes() == expected
    assert written.size == len(expected)
    assert sorted(file.name for file in path.parent.iterdir()) == ["0", "0.second.partial"]
    with pytest.raises(FileNotFoundError):
        publish_file(path, "first")


@pytest.mark.parametrize("compressed", [False, True])
def test_the_parts_of_a_block_leave_no_trace(tmp_path: Path, compressed: bool) -> None:
    rows = np.arange(21, dtype="<f4").reshape(7, 3)
    whole = write_shard_file(tmp_path / "0", "whole", [[rows]], 9, 2, compressed)
    cut = write_shard_file(
        tmp_path / "0", "cut", [[rows[:1], rows[1:1], rows[1:]]], 9, 2, compressed
    )
    assert cut == whole


def few_alive(n_parts: int, most: list[int]) -> Iterator[npt.NDArray[Any]]:
    """Parts of a block, counting how many of those before are still held."""
    seen: list[weakref.ref[npt.NDArray[Any]]] = []
    for _ in range(n_parts):
        most.append(sum(ref() is not None for ref in seen))
        part = np.ones((1000, 100), "<f2")
        seen.append(weakref.ref(part))
        yield part
        del part


def test_few_parts_are_held_however_large_a_block_is(tmp_path: Path) -> None:
    held: list[int] = []
    write_shard_file(tmp_path / "0", "attempt", [few_alive(50, held)], 50_000, 1, False)
    assert len(held) == 50
    # One more: the thread that writes may not have let go of a part it has just finished.
    assert max(held) <= PARTS_AHEAD + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_fills_is_reported_by_whoever_writes(tmp_path: Path) -> None:
    path = tmp_path / "0"
    partial_path(path, "attempt").symlink_to("/dev/full")
    held: list[int] = []
    with pytest.raises(OSError, match="No space left") as raised:
        write_shard_file(path, "attempt", [few_alive(50, held)], 50_000, 1, False)
    assert raised.value.errno == errno.ENOSPC
    assert str(path) in str(raised.value)
    assert len(held) < 50  # nothing further is encoded
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kdcache-write")]


def test_the_checksum_is_castagnolis() -> None:
    # RFC 3720, B.4: 32 bytes of zeros, and 0x00 … 0x1f.
    assert google_crc32c.value(bytes(32)) == 0x8A9136AA
    assert google_crc32c.value(bytes(range(32))) == 0x46DD794E


def shard_with(path: Path, entries: list[tuple[int, int]], body: int = 40) -> int:
    index = b"".join(struct.pack("<2Q", *entry) for entry in entries)
    path.write_bytes(bytes(body) + index + struct.pack("<I", google_crc32c.value(index)))
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize(
    "entries",
    [
        [(0, 20), (0, 20)],  # both blocks at one place
        [(20, 20), (0, 20)],  # exchanged
        [(0, 20), (24, 16)],  # a gap
        [(0, 20), (20, 2**63)],  # past the end
        [(0, 2**64 - 1), (2**64 - 1, 41)],  # sizes that wrap around
        [(0, 40), (40, 0)],  # nothing in it
        [(0, 20), (2**64 - 1, 2**64 - 1)],  # missing
        [(0, 20), (20, 24)],  # reaching into the index
    ],
)
def test_indexes_that_do_not_cover_their_file_are_refused(
    tmp_path: Path, entries: list[tuple[int, int]]
) -> None:
    descriptor = shard_with(tmp_path / "shard", entries)
    try:
        with pytest.raises(StoreError, match="an index that does not cover it"):
            read_chunk_bounds(descriptor, "shard", 2, 2, None)
    finally:
        os.close(descriptor)


def test_an_honest_index_is_read(tmp_path: Path) -> None:
    descriptor = shard_with(tmp_path / "shard", [(0, 15), (15, 25)])
    try:
        assert read_chunk_bounds(descriptor, "shard", 2, 2, None).tolist() == [0, 15, 40]
        with pytest.raises(StoreError, match="are expected"):
            read_chunk_bounds(descriptor, "shard", 2, 2, 24)
    finally:
        os.close(descriptor)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "f", b"one")
    write_file(tmp_path / "a" / "f", b"two")
    assert [(f.name, f.read_bytes()) for f in (tmp_path / "a").iterdir()] == [("f", b"two")]
