"""Thrift's compact protocol, in which Parquet writes its headers and footer: read and written.

Knows no field by name. Invariant: what `read` gives, `write` turns into the bytes it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


@dataclass
class Field:
    """A field of a struct: its number, the type on the wire, and a value of `read`."""

    number: int
    kind: int
    value: Any


Struct = list[Field]


@dataclass
class Items:
    """A list, its elements of one type."""

    kind: int
    values: list[Any]


def read(data: bytes, start: int = 0) -> tuple[Struct, int]:
    """The struct at `start`, and where it ends."""
    fields: Struct = []
    number, place = 0, start
    while data[place]:
        head = data[place]
        place += 1
        if head >> 4:
            number += head >> 4
        else:
            value, place = _varint(data, place)
            number = _signed(value)
        read_value, place = _read(data, place, head & 15)
        fields.append(Field(number, head & 15, read_value))
    return fields, place + 1


def write(fields: Struct) -> bytes:
    """The bytes of a struct."""
    out, before = bytearray(), 0
    for field in fields:
        step = field.number - before
        if 0 < step < 16:
            out.append(step << 4 | field.kind)
        else:
            out.append(field.kind)
            out += _from_varint(_zigzag(field.number))
        before = field.number
        out += _write(field.value, field.kind)
    return bytes(out + b"\0")


def get(fields: Struct, number: int) -> Any:
    """The value of a field, or None."""
    return next((field.value for field in fields if field.number == number), None)


def put(fields: Struct, number: int, value: Any) -> None:
    """Another value for a field that is there."""
    next(field for field in fields if field.number == number).value = value


def _read(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, place
    if kind == BYTE:
        return data[place], place + 1
    if kind in (I16, I32, I64):
        value, place = _varint(data, place)
        return _signed(value), place
    if kind == DOUBLE:
        return data[place : place + 8], place + 8
    if kind == BINARY:
        size, place = _varint(data, place)
        return data[place : place + size], place + size
    if kind in (LIST, SET):
        head = data[place]
        size, place = head >> 4, place + 1
        if size == 15:
            size, place = _varint(data, place)
        items = Items(head & 15, [])
        for _ in range(size):
            if items.kind in (TRUE, FALSE):
                value, place = data[place], place + 1
            else:
                value, place = _read(data, place, items.kind)
            items.values.append(value)
        return items, place
    if kind == STRUCT:
        return read(data, place)
    raise ValueError(f"type {kind} at byte {place}")


def _write(value: Any, kind: int) -> bytes:
    if kind in (TRUE, FALSE):
        return b""
    if kind == BYTE:
        return bytes([value])
    if kind in (I16, I32, I64):
        return _from_varint(_zigzag(value))
    if kind == DOUBLE:
        return bytes(value)
    if kind == BINARY:
        return _from_varint(len(value)) + bytes(value)
    if kind in (LIST, SET):
        size = len(value.values)
        head = bytes([min(size, 15) << 4 | value.kind])
        head += _from_varint(size) if size >= 15 else b""
        flags = value.kind in (TRUE, FALSE)
        return head + b"".join(
            bytes([item]) if flags else _write(item, value.kind) for item in value.values
        )
    return write(value)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        shift, place = shift + 7, place + 1
        if data[place - 1] < 128:
            return value, place


def _from_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1
