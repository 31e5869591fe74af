"""Real small files of every format that is read, made by the libraries that write them.

Invariant: what is here is accepted; `test_fuzz` says so.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

YAML = b"""model: {name: painn, hidden_channels: 16}
training:
  max_steps: 100
  device: cpu
schedule: {name: multi_step, milestones: [0.3, 0.6]}
loss:
  energy_weight: 1e-3
  forces_weight: {kind: linear, points: [[0, 1], [1, 100]]}
terms:
  - {name: n2n, student: node, teacher: node, student_projection: linear}
"""
XYZ = b"""3
Lattice="10 0 0 0 11 0 0 0 12" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5 pbc="T T F"
H 0.0 0.0 0.0 0.1 0.2 0.3
C 1.0 0.0 0.5 0.1 0.2 0.3
O 0.0 1.0 0.0 -0.2 -0.4 -0.6
1
Properties=species:S:1:pos:R:3:forces:R:3 energy=-3 pbc="F F F" config_type="a b" note=_JSON[1,2]
O 0.0 1.0 0.0 -0.2 -0.4 -0.6
"""
XYZ_MASKED = b"""2
Properties=Z:I:1:pos:R:3:move_mask:L:3:REF_forces:R:3 REF_energy=2.5 pbc=[F,F,F]
1 0.0 0.0 0.0 T F F 1 2 3
8 0.0 0.9 0.0 F F F 1 2 3
"""


def npz(*, stacked: bool) -> bytes:
    """As rMD17, or with numbers of each structure and a cell."""
    arrays: dict[str, Any] = {
        "R": np.arange(18.0).reshape(2, 3, 3) ** 0.5,
        "z": np.array([1, 6, 8]),
        "E": np.arange(2.0),
        "F": np.zeros((2, 3, 3)),
    }
    if stacked:
        arrays["z"] = np.array([[1, 6, 8], [1, 6, 0]])
        arrays |= {"cell": np.eye(3) * 9, "pbc": np.array([True, True, False])}
        arrays["R"] = np.asfortranarray(arrays["R"])
    sink = io.BytesIO()
    (np.savez_compressed if stacked else np.savez)(sink, **arrays)
    return sink.getvalue()


def hdf5(*, packed: bool) -> bytes:
    """As ANI: groups in a group; chunked and compressed, or plain."""
    how: dict[str, Any] = {"chunks": True, "compression": "gzip", "shuffle": True} if packed else {}
    sink = io.BytesIO()
    with h5py.File(sink, "w") as file:
        for k in range(2):
            group = file.create_group(f"molecules/m{k}")
            positions = np.arange(2 * 9.0).reshape(2, 3, 3) ** 0.5 + k
            group.create_dataset("coordinates", data=positions, **how)
            group.create_dataset("energies", data=np.arange(2.0), **how)
            group.create_dataset("forces", data=positions, **how)
            species = np.array([b"H", b"C", b"O"]) if k else np.array([1, 6, 8])
            group.create_dataset("species", data=species)
    return sink.getvalue()


def parquet() -> list[bytes]:
    """Plain, and with dictionaries, compression and small pages."""
    n_rows = 6
    vectors = [[[0.1 * i, a, 1.5] for a in range(1 + i % 3)] for i in range(n_rows)]
    table = pa.table(
        {
            "atomic_numbers": pa.array([[1, 6, 8][: 1 + i % 3] for i in range(n_rows)]),
            "positions": pa.array(vectors),
            "forces": pa.array(vectors),
            "energy": pa.array([0.5 * i for i in range(n_rows)]),
            "cell": pa.array([[9.0, 0, 0, 0, 9, 0, 0, 0, 9]] * n_rows, pa.list_(pa.float64(), 9)),
            "group": pa.array(["a", "b", None, "a", "a", "b"]),
        }
    )  # fmt: skip
    ways: list[dict[str, Any]] = [
        {"compression": "none", "use_dictionary": False},
        {"compression": "snappy", "row_group_size": 3},
        {"compression": "zstd", "data_page_version": "2.0", "data_page_size": 64},
        {"compression": "gzip"},
    ]  # fmt: skip
    files = []
    for way in ways:
        sink = io.BytesIO()
        pq.write_table(table, sink, **way)
        files.append(sink.getvalue())
    return files


def npy(array: Any) -> bytes:
    """An array as a member of an npz archive."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def zipped(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An npz archive of members as they are."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return sink.getvalue()
