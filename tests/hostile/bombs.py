"""Small files made to hurt: each stands for far more than it is, or leads somewhere else.

Made with the libraries that read them wherever those can. Invariant: none is larger than 2 MiB.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile import seeds, thrift

MANY = 2**28


def npz_member(header: str, content: bytes = b"", *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """rMD17's arrays, but with these positions."""
    head = header.encode().ljust(118) + b"\n"
    positions = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + content
    return seeds.zipped({"R": positions, "z": seeds.npy(np.array([1, 6, 8]))}, method)


def npz_zeros(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A hundred megabytes of positions that are all zero, in a hundred kilobytes."""
    n = 1_400_000
    sink = io.BytesIO()
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({n}, 3, 3), }}".ljust(118) + "\n"
    with zipfile.ZipFile(sink, "w", method, compresslevel=9) as archive:
        archive.writestr("z.npy", seeds.npy(np.array([1, 6, 8])))
        with archive.open("R.npy", "w") as member:
            member.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode())
            for _ in range(n * 72 // 2**24):
                member.write(bytes(2**24))
    return sink.getvalue()


def header(descr: str = "<f8", shape: str = "(2, 3, 3)", order: str = "False") -> str:
    """Of an npy member."""
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"


def npz_objects() -> bytes:
    """Positions as Python objects, as `np.save` pickles them."""
    sink = io.BytesIO()
    np.savez(sink, z=np.array([1]), R=np.array([{}], object), allow_pickle=True)
    return sink.getvalue()


def hdf5(fill: Callable[[h5py.File], object]) -> bytes:
    """A file with one group "m", filled."""
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        fill(file)
    return sink.getvalue()


def hdf5_with(*, shape: tuple[int, ...] = (2, 3, 3), **how: Any) -> bytes:
    """Numbers and positions in a group, the positions made as told and never written."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("m")
        group["species"] = np.array([1, 6, 8])
        group.create_dataset("coordinates", shape, "f8", **how)

    return hdf5(fill)


def hdf5_zeros() -> bytes:
    """Gigabytes of zeros that are there, compressed a thousandfold."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("m")
        group["species"] = np.array([1, 6, 8])
        made = group.create_dataset(
            "coordinates", (2**24, 3, 3), "f8", chunks=(2**18, 3, 3), compression="gzip",
            compression_opts=9,
        )  # fmt: skip
        packed = None
        for k in range(64):
            if packed is None:
                made[: 2**18] = 0.0
                packed = made.id.read_direct_chunk((0, 0, 0))[1]
            else:
                made.id.write_direct_chunk((k * 2**18, 0, 0), packed)

    return hdf5(fill)


def hdf5_filter(number: int) -> bytes:
    """Positions packed by a filter that HDF5 has not."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("m")
        group["species"] = np.array([1, 6, 8])
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_chunk((2, 3, 3))
        settings.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((2, 3, 3))
        h5py.h5d.create(group.id, b"coordinates", h5py.h5t.IEEE_F64LE, space, settings)

    return hdf5(fill)


def hdf5_linked(kind: str, elsewhere: Path) -> bytes:
    """Positions that are in another file, or in a circle."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("m")
        group["species"] = np.array([1, 6, 8])
        if kind == "external link":
            group["coordinates"] = h5py.ExternalLink(str(elsewhere), "/m/coordinates")
        elif kind == "soft link":
            file["elsewhere"] = h5py.ExternalLink(str(elsewhere), "/m")
            group["coordinates"] = h5py.SoftLink("/elsewhere/coordinates")
        elif kind == "virtual dataset":
            layout = h5py.VirtualLayout((2, 3, 3), "f8")
            layout[:] = h5py.VirtualSource(str(elsewhere), "m/coordinates", shape=(2, 3, 3))
            group.create_virtual_dataset("coordinates", layout)
        elif kind == "external storage":
            group.create_dataset(
                "coordinates", (2, 3, 3), "f8", external=[(str(elsewhere), 0, 144)]
            )
        else:
            group["again"] = file["/"]

    return hdf5(fill)


def hdf5_typed(dtype: Any) -> bytes:
    """Positions of another type."""

    def fill(file: h5py.File) -> None:
        group = file.create_group("m")
        group["species"] = np.array([1, 6, 8])
        group.create_dataset("coordinates", (2, 3, 3), dtype)

    return hdf5(fill)


def hdf5_deep(depth: int = 3000) -> bytes:
    """Groups in groups in groups."""

    def fill(file: h5py.File) -> None:
        group = file
        for _ in range(depth):
            group = group.create_group("g")

    return hdf5(fill)


def xyz_packed(packed: str, text: str = "line") -> bytes:
    """Tens of megabytes of text: one line, or atoms that are all alike."""
    piece = b"A" * 2**22 if text == "line" else b"H 0 0 0\n" * 2**19
    whole = (b"" if text == "line" else b"9999999\n\n") + piece * 16
    if packed == "gz":
        return gzip.compress(whole)
    return bz2.compress(whole) if packed == "bz2" else lzma.compress(whole)


def parquet_row(compression: str = "none", n: int = MANY // 8) -> bytes:
    """One row whose list has very many equal numbers, kept as one run."""
    ones = pa.array(np.ones(n // 8))
    lists = pa.ListArray.from_arrays(pa.array([0, len(ones)], pa.int32()), ones)
    table = pa.table({"atomic_numbers": pa.array([[1]]), "positions": lists})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression=compression, data_page_size=2**30)
    return sink.getvalue()


def parquet_text(encoding: str, n: int = 20_000) -> bytes:
    """A long id that every row repeats."""
    text = "A" * 200_000
    table = pa.table(
        {
            "atomic_numbers": pa.array([[1]] * n),
            "positions": pa.array([[0.0, 0.0, 0.0]] * n),
            "group": pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), pa.array([text])),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none")
    data = sink.getvalue()
    return data if encoding == "dictionary" else parquet_delta(n, text)


def parquet_delta(n: int, text: str) -> bytes:
    """The same as DELTA_BYTE_ARRAY: every text is all of the one before it."""
    table = pa.table(
        {
            "atomic_numbers": pa.array([[1]] * 200),
            "positions": pa.array([[0.0, 0.0, 0.0]] * 200),
            "group": pa.array([text] * 200),
        }
    )
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="none", use_dictionary=False,
        column_encoding={"group": "DELTA_BYTE_ARRAY"},
    )  # fmt: skip
    return sink.getvalue()


def parquet_page(number: int, value: int, data: bytes) -> bytes:
    """A file whose first page says another number in its header: 2 bytes unpacked, 3 packed, or
    how many values (1, of the inner header)."""
    footer_start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer, _ = thrift.read(data, footer_start)
    chunk = thrift.get(thrift.get(thrift.get(footer, 4).values[0], 1).values[0], 3)
    start = thrift.get(chunk, 9)
    page, end = thrift.read(data, start)
    inner = thrift.get(page, 5) or thrift.get(page, 8)
    thrift.put(inner if number == 1 else page, number, value)
    written = thrift.write(page)
    moved = len(written) - (end - start)
    thrift.put(chunk, 7, thrift.get(chunk, 7) + moved)
    for column in thrift.get(thrift.get(footer, 4).values[0], 1).values[1:]:
        meta = thrift.get(column, 3)
        for offset in (9, 11):
            if thrift.get(meta, offset):
                thrift.put(meta, offset, thrift.get(meta, offset) + moved)
    body = data[:start] + written + data[end:footer_start]
    written = thrift.write(footer)
    return body + written + len(written).to_bytes(4, "little") + b"PAR1"


def parquet_footer(change: Callable[[thrift.Struct], object], data: bytes) -> bytes:
    """A file with its footer changed."""
    footer_start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    footer, _ = thrift.read(data, footer_start)
    change(footer)
    written = thrift.write(footer)
    return data[:footer_start] + written + len(written).to_bytes(4, "little") + b"PAR1"


def first_chunk(footer: thrift.Struct) -> thrift.Struct:
    """Metadata of the first column."""
    found: thrift.Struct = thrift.get(thrift.get(thrift.get(footer, 4).values[0], 1).values[0], 3)
    return found
