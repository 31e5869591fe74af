"""What a Parquet file says of its own sizes, read before a library believes any of it.

pyarrow ends the whole process on some damaged footers and fills the memory from a few bytes on
others. Here footer and page headers are walked; values are left to pyarrow.
Invariant: a file that passes decodes to at most `RATIO` times its bytes, column by column.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, Any

MAGIC = b"PAR1"
MAX_FOOTER_BYTES = 64 * 2**20
MAX_DEPTH = 24
# Decoded bytes for one of the file. A value is counted with eight of them; what is below
# `SMALL_BYTES` decoded is nobody's harm.
RATIO = 256
SMALL_BYTES = 2**20
VALUE_BYTES = 8

BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY = 6, 7
MAX_FIXED_BYTES = 64
CODECS = dict(enumerate(("none", "snappy", "gzip", "lzo", "brotli", "lz4", "zstd", "lz4_raw")))
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = range(4)
PAGE_FIELDS = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}
# All of Parquet's but DELTA_BYTE_ARRAY (7), in which a few bytes stand for any number of texts.
ENCODINGS = frozenset({0, 2, 3, 4, 5, 6, 8, 9})
PLAIN_ENCODINGS = frozenset({0, 2, 3, 4, 8})

Struct = dict[int, Any]


@dataclass(frozen=True)
class Column:
    """One column of one row group.

    Attributes:
        name: its path in the schema, joined by dots.
        is_text: of variable length.
        n_rows: of the group.
        n_values: leaves and nulls.
        codec: of `CODECS`.
        start, stop: where its pages lie.
    """

    name: str
    is_text: bool
    n_rows: int
    n_values: int
    codec: str
    start: int
    stop: int


@dataclass(frozen=True)
class Footer:
    """What is kept of a footer."""

    n_rows: int
    columns: list[Column]


def check_parquet(
    file: IO[bytes],
    *,
    columns: Collection[str] | None = None,
    codecs: Collection[str] = tuple(CODECS.values()),
    encodings: Collection[int] = ENCODINGS,
) -> Footer:
    """Walk a Parquet file.

    Args:
        file: open for reading at random; its place is left anywhere.
        columns: first parts of the names of those that will be read; None for all.
        codecs: that may be met.
        encodings: that may be met.

    Raises:
        ValueError: saying what is wrong with it.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        footer_start, footer = _footer(file, size)
    except IndexError:
        raise ValueError("a footer that is cut off") from None
    found = _columns(footer, footer_start)
    for column in found.columns:
        if columns is not None and column.name.partition(".")[0] not in columns:
            continue
        if column.codec not in codecs:
            allowed = ", ".join(codecs)
            raise ValueError(f"{column.name!r} is compressed ({column.codec}), not {allowed}")
        _check_pages(file, column, encodings, max(RATIO * size, SMALL_BYTES))
    return found


def _footer(file: IO[bytes], size: int) -> tuple[int, Struct]:
    file.seek(0)
    head = file.read(4)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    if size < 12 or head != MAGIC or tail[4:] != MAGIC:
        raise ValueError("it does not begin and end as Parquet does")
    n_bytes = int.from_bytes(tail[:4], "little")
    if n_bytes > min(size - 12, MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {n_bytes} bytes in a file of {size}")
    start = size - 8 - n_bytes
    file.seek(start)
    return start, _Compact(file.read(n_bytes)).struct()


def _columns(footer: Struct, footer_start: int) -> Footer:
    texts = _check_schema(_structs(footer, 2))
    columns = []
    n_rows = 0
    for group in _structs(footer, 4):
        rows = _count(group, 3, "rows of a group")
        n_rows += rows
        chunks = _structs(group, 1)
        if len(chunks) != len(texts):
            raise ValueError(f"{len(chunks)} columns in a row group, {len(texts)} in the schema")
        for chunk, is_text in zip(chunks, texts, strict=True):
            columns.append(_column(chunk, is_text, rows, footer_start))
    if n_rows != _count(footer, 3, "rows"):
        raise ValueError(f"{_count(footer, 3, 'rows')} rows, {n_rows} in its row groups")
    return Footer(n_rows, columns)


def _column(chunk: Struct, is_text: bool, n_rows: int, footer_start: int) -> Column:
    meta = chunk.get(3)
    if 1 in chunk or not isinstance(meta, dict):
        raise ValueError("a column in another file, or encrypted")
    path = meta.get(3)
    if not isinstance(path, list) or not all(isinstance(part, bytes) for part in path):
        raise ValueError("a column without a name")
    name = b".".join(path).decode("utf-8", "replace")
    number = meta.get(4)
    codec = CODECS.get(number) if isinstance(number, int) else None
    if codec is None:
        raise ValueError(f"{name!r} has the unknown codec {number}")
    start = _count(meta, 9, "offset")
    if meta.get(11):  # some writers say 0 where there is no dictionary
        start = min(start, _count(meta, 11, "offset"))
    stop = start + _count(meta, 7, "compressed bytes")
    if start < len(MAGIC) or stop > footer_start:
        raise ValueError(f"{name!r} lies at bytes {start}…{stop}, outside the file")
    return Column(name, is_text, n_rows, _count(meta, 5, "values"), codec, start, stop)


def _check_schema(elements: list[Struct]) -> list[bool]:
    """Of every leaf: whether it is text."""
    texts: list[bool] = []
    # Children still to come, from the root down.
    pending = [1]
    for element in elements:
        while pending and not pending[-1]:
            pending.pop()
        if not pending or len(pending) > MAX_DEPTH:
            raise ValueError("a schema that is no tree, or too deep")
        pending[-1] -= 1
        name = element.get(4)
        if not isinstance(name, bytes):
            raise ValueError("a column without a name")
        name.decode()  # pyarrow fails on others at odd places
        children = element.get(5, 0)
        if not isinstance(children, int) or not 0 <= children <= len(elements):
            raise ValueError(f"a column of {children} columns")
        if children:
            pending.append(children)
            continue
        kind, width = element.get(1), element.get(2, 0)
        if len(pending) > 1 or len(elements) > 1:
            if not isinstance(kind, int) or not 0 <= kind < 8:
                raise ValueError(f"a column of the unknown type {kind}")
            if kind == FIXED_LEN_BYTE_ARRAY and width not in range(1, MAX_FIXED_BYTES + 1):
                raise ValueError(f"values of {width} bytes each")
            texts.append(kind == BYTE_ARRAY)
    if any(pending):
        raise ValueError("a schema that is cut off")
    return texts


def _check_pages(file: IO[bytes], column: Column, encodings: Collection[int], largest: int) -> None:
    n_values = n_bytes = 0
    for header in _pages(file, column):
        kind = header.get(1)
        data = header.get(PAGE_FIELDS.get(kind, 0)) if isinstance(kind, int) else None
        unpacked, packed = _count(header, 2, "bytes"), _count(header, 3, "bytes")
        n_bytes += unpacked
        if kind == INDEX_PAGE:
            continue
        if not isinstance(data, dict):
            raise ValueError(f"{column.name!r} has a page of the unknown type {kind}")
        if column.codec == "none" and unpacked != packed:
            raise ValueError(f"{column.name!r} has a page of {packed} bytes that says {unpacked}")
        values = _count(data, 1, "values")
        encoding = _count(data, 4 if kind == DATA_PAGE_V2 else 2, "as an encoding")
        if encoding not in encodings:
            raise ValueError(f"{column.name!r} has encoding {encoding}, which is not read")
        if kind == DICTIONARY_PAGE:
            if values > 8 * unpacked:
                raise ValueError(f"a dictionary of {values} values in {unpacked} bytes")
            continue
        n_values += values
        if n_values > column.n_values:
            break
    if n_values != column.n_values:
        raise ValueError(
            f"{column.name!r} says {column.n_values} values and has pages of {n_values}"
        )
    if max(n_bytes, VALUE_BYTES * n_values) > largest:
        raise ValueError(
            f"{column.name!r} would take {max(n_bytes, VALUE_BYTES * n_values)} bytes, at most "
            f"{largest} are expected of such a file"
        )


def _pages(file: IO[bytes], column: Column) -> Iterator[Struct]:
    place = column.start
    while place < column.stop:
        header, n_bytes = _page_header(file, place, column.stop)
        place += n_bytes + _count(header, 3, "bytes")
        if place > column.stop:
            raise ValueError(f"{column.name!r} has a page that reaches beyond it")
        yield header


def _page_header(file: IO[bytes], place: int, stop: int) -> tuple[Struct, int]:
    # Mostly some 30 bytes; with the extremes of long texts, more.
    for window in (512, 2**16, 2**24):
        file.seek(place)
        compact = _Compact(file.read(min(window, stop - place)))
        try:
            return compact.struct(), compact.place
        except IndexError:
            continue
    raise ValueError("a page header that is cut off")


def _structs(fields: Struct, number: int) -> list[Struct]:
    found = fields.get(number)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("a footer that is none of Parquet's")
    return found


def _count(fields: Struct, number: int, what: str) -> int:
    value = fields.get(number)
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{value!r} {what}")
    return value


class _Compact:
    """Thrift's compact protocol: structs as fields by number.

    Past the end is an IndexError, what is no such struct a ValueError.
    """

    def __init__(self, data: bytes) -> None:
        self.place = 0
        self._data = data

    def struct(self, depth: int = 0) -> Struct:
        if depth > MAX_DEPTH:
            raise ValueError("a footer that is too deep")
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> Any:
        if kind in (1, 2):
            return self._byte() == 1 if in_list else kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            return self._bytes(8 if kind == 7 else self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = self._unsigned() if head >> 4 == 15 else head >> 4
            if size > len(self._data):  # an item has a byte at least
                raise ValueError(f"a list of {size} items in {len(self._data)} bytes")
            return [self._value(head & 15, depth + 1, in_list=True) for _ in range(size)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"type {kind} is none that Parquet has")

    def _byte(self) -> int:
        self.place += 1
        return self._data[self.place - 1]

    def _bytes(self, size: int) -> bytes:
        if size > len(self._data) - self.place:
            raise IndexError
        self.place += size
        return self._data[self.place - size : self.place]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("an integer of more than 64 bits")

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
