"""index.parquet: a row per structure, in store order.

Owns the columns and their consistency with the layout. Invariant: the places in an index are those
the plan gives for its counts, and its dataset places are a permutation.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import StoreError, reason_of
from kdcache.store.files import LocalFiles, StoreFiles
from kdcache.store.layout import BlockPlan
from kdcache.store.parquet_pages import PLAIN_ENCODINGS, check_parquet
from kdcache.structures import CONTENT_HASH_BYTES, FloatArray, IntArray, dataset_digest

INDEX = "index.parquet"
MAX_TEXT = 4096

StringArray = npt.NDArray[np.object_]

SCHEMA = pa.schema(
    [
        pa.field("structure_id", pa.string(), nullable=False),
        pa.field("content_hash", pa.binary(CONTENT_HASH_BYTES), nullable=False),
        *(
            pa.field(name, pa.int64(), nullable=False)
            for name in (
                "source_index",
                "block",
                "structure_row",
                "atom_start",
                "n_atoms",
                "edge_start",
                "n_edges",
            )
        ),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
PLACES = ("block", "structure_row", "atom_start", "n_atoms", "edge_start", "n_edges")
TEXTS = ("structure_id", "origin", "split", "group")


@dataclass(frozen=True)
class StoreIndex:
    """Columns of the index, [n_structures] each, in store order.

    Attributes:
        structure_id: str.
        content_hash: [n_structures, 16] uint8.
        source_index: place in the dataset; a permutation.
        block, structure_row, atom_start, n_atoms, edge_start, n_edges: as in `BlockPlan`.
        origin, split, group: str, as in `Structure`.
        weight: float64.
    """

    structure_id: StringArray
    content_hash: npt.NDArray[np.uint8]
    source_index: IntArray
    block: IntArray
    structure_row: IntArray
    atom_start: IntArray
    n_atoms: IntArray
    edge_start: IntArray
    n_edges: IntArray
    origin: StringArray
    split: StringArray
    group: StringArray
    weight: FloatArray

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def source_order(self) -> IntArray:
        """[n_structures] store rows in dataset order."""
        return np.argsort(self.source_index, kind="stable")

    def dataset_digest(self) -> str:
        """Identity of the dataset, from the content hashes in dataset order."""
        return dataset_digest([self.content_hash[self.source_order].tobytes()])

    def to_bytes(self) -> bytes:
        """The Parquet file."""
        n = len(self)
        columns: dict[str, pa.Array] = {}
        for field in SCHEMA:
            column = getattr(self, field.name)
            if field.name == "content_hash":
                data = pa.py_buffer(np.ascontiguousarray(column).tobytes())
                columns[field.name] = pa.Array.from_buffers(field.type, n, [None, data])
            else:
                columns[field.name] = pa.array(column, field.type)
        sink = io.BytesIO()
        # Uncompressed, hashes plain: the size of the file then bounds what reading it allocates.
        pq.write_table(
            pa.table(columns, schema=SCHEMA),
            sink,
            compression="none",
            use_dictionary=["origin", "split", "group"],
        )
        return sink.getvalue()


def index_from_plan(
    plan: BlockPlan,
    *,
    structure_id: Sequence[str] | StringArray,
    content_hash: npt.NDArray[np.uint8] | Sequence[bytes],
    source_index: npt.ArrayLike,
    origin: Sequence[str] | StringArray | None = None,
    split: Sequence[str] | StringArray | None = None,
    group: Sequence[str] | StringArray | None = None,
    weight: npt.ArrayLike | None = None,
) -> StoreIndex:
    """The index of structures laid out by `plan`; every column in store order.

    Raises:
        StoreError: columns of another length, a text too long, or `source_index` is no permutation.
    """
    n = plan.n_structures

    def texts(values: Sequence[str] | StringArray | None, default: str) -> StringArray:
        column = np.empty(n if values is None else len(values), object)
        column[:] = default if values is None else values
        return column

    hashes = content_hash if isinstance(content_hash, np.ndarray) else b"".join(content_hash)
    index = StoreIndex(
        structure_id=texts(structure_id, ""),
        content_hash=np.frombuffer(hashes, np.uint8).reshape(-1, CONTENT_HASH_BYTES),
        source_index=np.asarray(source_index, np.int64),
        origin=texts(origin, "data"),
        split=texts(split, ""),
        group=texts(group, ""),
        weight=np.ones(n) if weight is None else np.asarray(weight, np.float64),
        **_places(plan),
    )
    for field in SCHEMA:
        if len(getattr(index, field.name)) != n:
            raise StoreError(
                f"Index column {field.name} has {len(getattr(index, field.name))} rows for {n} "
                f"structures. Every column has one row per structure."
            )
    for name in TEXTS:
        longest = max((len(text) for text in getattr(index, name)), default=0)
        if longest > MAX_TEXT:
            raise StoreError(f"A {name} has {longest} characters; the index keeps {MAX_TEXT}.")
    _check_permutation(index, "the index")
    return index


def largest_index(n_structures: int) -> int:
    """Bytes that no index of so many structures exceeds."""
    places, texts = 8 * len(SCHEMA), 4 * MAX_TEXT * len(TEXTS)
    return 2**20 + n_structures * (CONTENT_HASH_BYTES + places + texts)


def read_index(store: Path | StoreFiles, n_structures: int) -> StoreIndex:
    """The index of a store, bounded before it is read.

    Args:
        store: its path or its files.
        n_structures: as the manifest says.

    Raises:
        StoreError: other columns, another number of rows, or sizes no honest index has.
    """
    files = LocalFiles(store) if isinstance(store, Path) else store
    return parse_index(
        files.read(INDEX, largest_index(n_structures)), files.where(INDEX), n_structures
    )


def parse_index(content: bytes, file: str, n_structures: int) -> StoreIndex:
    """The index that `content` is; `file` is for messages. Otherwise as `read_index`."""
    columns: dict[str, npt.NDArray[np.generic]] = {}
    try:
        table = read_table(content, SCHEMA, n_structures, file)
        for field in SCHEMA:
            columns[field.name] = _column(table[field.name], field.name, file)
    # A damaged page gives indices beyond its dictionary and texts that are not UTF-8.
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise StoreError(
            f"{file} cannot be read as Parquet: {reason_of(error)}. {_AGAIN}"
        ) from None
    index = StoreIndex(**columns)  # type: ignore[arg-type]
    _check_permutation(index, file)
    return index


def read_table(content: bytes, schema: pa.Schema, n_rows: int, file: str) -> pa.Table:
    """A table of a store, its texts as dictionaries; nothing of it takes more than it says.

    Raises:
        StoreError: other columns, another number of rows, or empty entries.
        ValueError: sizes that no honest table has. pyarrow raises errors of its own.
    """
    found = check_parquet(io.BytesIO(content), codecs=("none",), encodings=PLAIN_ENCODINGS)
    # Hashes stand as they are: a row is no smaller than its own.
    least = CONTENT_HASH_BYTES if "content_hash" in schema.names else 1
    if found.n_rows != n_rows or least * n_rows > len(content):
        raise StoreError(
            f"{file} ({len(content)} bytes) has {found.n_rows} rows, the manifest says {n_rows}. "
            f"{_AGAIN}"
        )
    if not pq.read_schema(pa.BufferReader(content)).equals(schema):
        raise StoreError(f"{file} has other columns than {', '.join(schema.names)}. {_AGAIN}")
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    with pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts) as parquet:
        # A thread of pyarrow's that lets go of these bytes while Python ends would abort it.
        table = parquet.read(use_threads=False)
    for name in schema.names:
        if table[name].null_count or len(table[name]) != n_rows:
            raise StoreError(f"{file} has empty entries in column {name}. {_AGAIN}")
    return table


def texts_of(column: pa.ChunkedArray, name: str, file: str) -> StringArray:
    """[n] str of a column that came as a dictionary.

    Raises:
        StoreError: a text that is too long.
    """
    parts = []
    for chunk in column.chunks:
        # A long text repeated a billion times is met here, once.
        words = np.array([*chunk.dictionary.to_pylist(), ""], object)
        if max(len(word or "") for word in words) > MAX_TEXT:
            raise StoreError(f"{file}: a {name} has more than {MAX_TEXT} characters. {_AGAIN}")
        parts.append(words[:-1][np.asarray(chunk.indices)])
    return np.concatenate(parts) if parts else np.empty(0, object)


def check_places(index: StoreIndex, plan: BlockPlan, where: str) -> None:
    """Every place in the index is the one its counts give.

    Raises:
        StoreError: naming the first structure that lies elsewhere.
    """
    for name, expected in _places(plan).items():
        found = getattr(index, name)
        if not np.array_equal(found, expected):
            row = int(np.argmax(found != expected))
            raise StoreError(
                f"{where}: structure {index.structure_id[row]!r} (row {row}) has {name} "
                f"{int(found[row])}, the layout gives {int(expected[row])}. {_AGAIN}"
            )


_AGAIN = "Rows would be taken for those of another structure. Fetch the store again."


def _places(plan: BlockPlan) -> dict[str, IntArray]:
    return {name: getattr(plan, name) for name in PLACES}


def _check_permutation(index: StoreIndex, where: str) -> None:
    n = len(index)
    seen = np.zeros(n, bool)
    valid = index.source_index[(index.source_index >= 0) & (index.source_index < n)]
    seen[valid] = True
    if not seen.all():
        raise StoreError(
            f"{where}: source_index is no permutation of 0…{n - 1}; place {int(np.argmin(seen))} "
            f"is missing. Structures would meet the wrong labels."
        )


def _column(column: pa.ChunkedArray, name: str, file: str) -> npt.NDArray[np.generic]:
    if name == "content_hash":
        # to_pylist is a second per million rows; buffers of fixed-size binary have an offset.
        data = b"".join(
            memoryview(chunk.buffers()[1])[
                chunk.offset * CONTENT_HASH_BYTES : (chunk.offset + len(chunk)) * CONTENT_HASH_BYTES
            ]
            for chunk in column.chunks
        )
        return np.frombuffer(data, np.uint8).reshape(-1, CONTENT_HASH_BYTES)
    return texts_of(column, name, file) if name in TEXTS else np.asarray(column.to_numpy())
