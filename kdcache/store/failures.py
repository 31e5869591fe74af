"""failures.parquet of a teacher: the structures it gave nothing for, and why.

The teacher's part of the index: its fields hold NaN in the rows of these structures (zeros where
the dtype has no NaN). Invariant: rows are ascending, each once, and name the index's structures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import StoreError, printable, reason_of
from kdcache.store.index import (
    MAX_TEXT,
    StoreIndex,
    StringArray,
    read_table,
    texts_of,
)
from kdcache.structures import IntArray

FAILURES = "failures.parquet"
MAX_REASON = 200

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("structure_id", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Failures:
    """Structures a teacher failed on.

    Attributes:
        row: [n] in store order, ascending.
        structure_id, reason: [n] str.
    """

    row: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    structure_id: StringArray = field(default_factory=lambda: np.zeros(0, object))
    reason: StringArray = field(default_factory=lambda: np.zeros(0, object))

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, reasons: Mapping[int, str], index: StoreIndex) -> Failures:
        """Reasons by store row, as the teacher's writer collected them."""
        row = np.array(sorted(reasons), np.int64)
        said = np.empty(len(row), object)
        said[:] = [reasons[int(one)] for one in row]
        return cls(row, index.structure_id[row], said)

    def to_bytes(self) -> bytes:
        """The Parquet file."""
        sink = io.BytesIO()
        columns = {name: pa.array(getattr(self, name)) for name in SCHEMA.names}
        # Uncompressed: the size of the file bounds what reading it allocates.
        table = pa.table(columns, schema=SCHEMA)
        pq.write_table(table, sink, compression="none", use_dictionary=["reason"])
        return sink.getvalue()


def one_line(reason: str) -> str:
    """What somebody's code said, fit for a store that strangers read: short, and without paths."""
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "")
    shown = re.sub(r"(?:[A-Za-z]:)?[^\s'\",;:()]*[\\/~][^\s'\",;:)]*", "…", printable(first[:2000]))
    return shown if len(shown) <= MAX_REASON else shown[: MAX_REASON - 1] + "…"


def largest_failures(n_failed: int) -> int:
    """Bytes that no file of so many failures exceeds."""
    return 2**16 + n_failed * (8 + 4 * MAX_TEXT + 4 * MAX_REASON)


def parse_failures(content: bytes, where: str, n_failed: int, index: StoreIndex) -> Failures:
    """Failures from the bytes of their file.

    Raises:
        StoreError: no such table, another number of rows than the manifest says, or rows that are
            none of the index's.
    """
    try:
        table = read_table(content, SCHEMA, n_failed, where)
        row = table["row"].to_numpy()
        ids, reasons = (texts_of(table[name], name, where) for name in ("structure_id", "reason"))
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        raise StoreError(
            f"{where} is no Parquet file ({reason_of(error)}). Fetch it again."
        ) from None
    # Not by differences: those of numbers far apart do not fit an int64.
    rising = bool((row[1:] > row[:-1]).all())
    known = len(row) == 0 or (row[0] >= 0 and row[-1] < len(index) and rising)
    if not known or (index.structure_id[row] != ids).any():
        raise StoreError(
            f"{where} names structures that are not those of the index: good features would be "
            f"left out and missing ones used. Fetch the store again."
        )
    return Failures(row.astype(np.int64), ids, reasons)
