"""How the values of one block become bytes, and back.

Owns the closed list of dtypes and codecs, the guards against overflow and non-finite values and the
error that is recorded. Files and Zarr metadata are the business of `shards` and `metadata`.
Invariant: the same values give the same bytes, whatever the thread or the number of threads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from kdcache.errors import StoreError, printable
from kdcache.fields import FieldSpec
from kdcache.store.halves import convert

Array = npt.NDArray[Any]

DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
FLOATS = ("float16", "float32", "float64")
FLOAT16_MAX = 65504.0
FLOAT16_INFINITY = 0x7C00  # as bits, without the sign; NaN lies above
INT8_MAX = 127
BLOSC_LEVEL = 5
# What one call of blosc can take; a chunk of a field must stay below it.
MAX_CHUNK_BYTES = 2**31 - 2**16
# Values that are rounded at a time: small enough for the cache, of which each is read four times,
# large enough that the interpreter hardly counts (a third less time than with 2**15).
PIECE_VALUES = 2**19

HEADER_SIZES = struct.Struct("<4xI4xI")  # of a Blosc frame: decoded bytes, bytes of the frame

# With threads, Blosc appends its parts in the order they finish: six runs gave six different files.
blosc.use_threads = False

OnOverflow = Literal["stop", "clip"]
OnNonfinite = Literal["stop", "zero"]


@dataclass(slots=True)
class EncodingError:
    """What an encoding changed, summed over values.

    Attributes:
        square_error: sum of (value - stored)².
        square_value: sum of value².
        clipped: values cut to the largest float16.
        nonfinite: NaN and infinities set to zero.
    """

    square_error: float = 0.0
    square_value: float = 0.0
    clipped: int = 0
    nonfinite: int = 0

    def add(self, other: EncodingError) -> None:
        self.square_error += other.square_error
        self.square_value += other.square_value
        self.clipped += other.clipped
        self.nonfinite += other.nonfinite

    @property
    def relative(self) -> float:
        """Root of the summed squared error over the summed squares; 0 for a field of zeros.

        Three digits: enough to judge by, and the same on machines that sum in another order.
        """
        if self.square_value == 0.0:
            return 0.0
        return float(f"{np.sqrt(self.square_error / self.square_value):.3g}")


class UnstorableValue(Exception):
    """A value no policy allows to store: its row in the array, and the value."""

    def __init__(self, row: int, value: float, overflow: bool) -> None:
        super().__init__(row, value, overflow)
        self.row = row
        self.value = value
        self.overflow = overflow


def stored_dtype(spec: FieldSpec) -> np.dtype[Any]:
    """The dtype on disk, little-endian.

    Raises:
        StoreError: a dtype outside the closed list, or a lossy codec for whole numbers.
    """
    if spec.dtype not in DTYPES:
        # What it says comes from a file.
        said = printable(spec.dtype[:40])
        raise StoreError(f"Field {spec.name} has dtype {said}; a store keeps {', '.join(DTYPES)}.")
    if spec.codec == "exact":
        return np.dtype(spec.dtype).newbyteorder("<")
    if spec.dtype not in FLOATS:
        raise StoreError(
            f"Field {spec.name} is {spec.dtype}, which codec {spec.codec!r} cannot keep: it is for "
            f"floating-point features. Use codec 'exact'."
        )
    return np.dtype("<f2") if spec.codec == "half" else np.dtype("i1")


def read_dtype(spec: FieldSpec) -> np.dtype[Any]:
    """The dtype a reader hands out: compact values come back as float32."""
    return np.dtype(np.float32) if spec.codec == "compact" else stored_dtype(spec)


def channels(spec: FieldSpec) -> int:
    """Scales per block of a compact field: extent of the last axis, 1 for a scalar.

    A vector field [3, C] has one scale per channel, shared by x, y and z, so that rounding does not
    prefer a direction. A bare vector [3] has a single scale for the same reason.
    """
    if not spec.shape or (spec.symmetry == "vector" and len(spec.shape) == 1):
        return 1
    return spec.shape[-1]


def guard(
    values: Array,
    codec: str,
    on_overflow: OnOverflow,
    on_nonfinite: OnNonfinite,
    error: EncodingError,
) -> Array:
    """Values that the codec can hold: unchanged, or with offending ones replaced and counted.

    Args:
        values: [n_rows, ...] floating.
        codec: of the field.
        on_overflow: "clip" to ±65504, codec "half" only.
        on_nonfinite: "zero" for NaN and infinities.
        error: counts what was replaced.

    Raises:
        UnstorableValue: an offending value whose policy is "stop".
    """
    limit = FLOAT16_MAX if codec == "half" else np.finfo(np.float64).max
    if codec == "compact":
        limit = float(np.finfo(np.float32).max)
    if values.size == 0:
        return values
    if values.dtype == np.float16 and (values.view(np.uint16) & 0x7FFF).max() < FLOAT16_INFINITY:
        return values  # by its bits: numpy compares halves one by one
    # Smallest and largest alone: 20 GB/s, and a NaN anywhere makes both NaN.
    if -limit <= float(values.min()) and float(values.max()) <= limit:
        return values
    finite = np.isfinite(values)
    over = finite & (np.abs(values) > limit)
    for wrong, stop in ((~finite, on_nonfinite == "stop"), (over, on_overflow == "stop")):
        if stop and wrong.any():
            place = int(np.argmax(wrong))
            row = place // (values.size // len(values))
            raise UnstorableValue(row, float(values.reshape(-1)[place]), wrong is over)
    error.nonfinite += int((~finite).sum())
    error.clipped += int(over.sum())
    return np.clip(np.where(finite, values, 0), -limit, limit).astype(values.dtype)


def to_half(values: Array, error: EncodingError) -> Array:
    """float16 of guarded values, [n_rows, ...] contiguous, rounded to nearest even."""
    stored = np.empty(values.shape, "<f2")
    convert(values, stored)
    _sum_error(values, stored, error)
    return stored


def pieces(n_rows: int, row_size: int) -> list[slice]:
    """Runs of rows of at most `PIECE_VALUES` values, one at least; a longer row stands alone.

    Example:
        >>> pieces(5, PIECE_VALUES // 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
        >>> pieces(0, 3)
        [slice(0, 0, None)]
    """
    step = max(1, PIECE_VALUES // max(1, row_size))
    firsts = range(0, max(1, n_rows), step)
    return [slice(first, min(first + step, n_rows)) for first in firsts]


def to_compact(values: Array, n_channels: int, error: EncodingError) -> tuple[Array, Array]:
    """int8 of one block's guarded values, and the scale of each channel.

    Returns:
        stored [n_rows, ...] int8 in [-127, 127], and scale [n_channels] float32, so that
        value = stored * scale with the product taken in float32.

    Source: ours; symmetric max-abs quantisation.
    """
    flat = values.reshape(-1, n_channels).astype(np.float32, copy=False)
    scale = np.zeros(n_channels, "<f4")
    if len(flat):
        scale[:] = np.abs(flat).max(axis=0) / INT8_MAX
    # Below the smallest normal number 1/scale overflows: such a channel comes back as zeros.
    scale[scale < np.finfo(np.float32).tiny] = 0.0
    inverse = np.divide(1.0, scale, out=np.zeros(n_channels, np.float32), where=scale > 0)
    scaled = np.rint(flat * inverse)
    np.clip(scaled, -INT8_MAX, INT8_MAX, out=scaled)
    stored = scaled.astype("i1").reshape(values.shape)
    _sum_error(values, from_compact(stored, scale), error)
    return stored, scale


def from_compact(stored: Array, scale: Array, out: Array | None = None) -> Array:
    """float32 values of one block: stored [n_rows, ...] int8 times scale [n_channels] float32."""
    if out is None:
        out = np.empty(stored.shape, np.float32)
    flat = out.reshape(-1, len(scale))
    np.multiply(stored.reshape(flat.shape), scale, out=flat)
    return out


def compress(chunk: Array) -> bytes:
    """Blosc frame of a whole chunk: LZ4, level 5, byte shuffle where an item has several bytes."""
    shuffle = blosc.SHUFFLE if chunk.dtype.itemsize > 1 else blosc.NOSHUFFLE
    return bytes(blosc.compress(chunk, b"lz4", BLOSC_LEVEL, shuffle, 0))


def decompress(frame: Array, out: Array) -> bool:
    """Fill `out` from a Blosc frame; False where the frame does not hold exactly its bytes.

    Args:
        frame: [n_bytes] uint8.
        out: contiguous, of the size the chunk must have.
    """
    # Blosc trusts the sizes in its header, so they are held against the real ones first.
    if frame.nbytes < 16:
        return False
    n_bytes, compressed = HEADER_SIZES.unpack_from(frame.data)
    if n_bytes != out.nbytes or compressed != frame.nbytes:
        return False
    try:
        blosc.decompress(frame, out)
    except RuntimeError:
        return False
    return True


def _sum_error(values: Array, decoded: Array, error: EncodingError) -> None:
    """Add the squares of `values` and of what `decoded` lacks."""
    if values.size == 0:
        return
    if values.dtype.itemsize <= 4:
        sums = _square_sums(values, decoded, np.empty(values.shape, np.float32))
        if np.isfinite(sums).all():
            error.square_error += sums[0]
            error.square_value += sums[1]
            return
    # float64 values, or squares of values beyond 1e19, which do not fit float32.
    sums = _square_sums(values, decoded, np.empty(values.shape, np.float64))
    error.square_error += sums[0]
    error.square_value += sums[1]


def _square_sums(values: Array, decoded: Array, room: Array) -> tuple[float, float]:
    exact = values
    if values.dtype != room.dtype:
        exact = np.empty(values.shape, room.dtype)
        convert(values, exact)
    if decoded.dtype != room.dtype:
        convert(decoded, room)
        decoded = room
    np.subtract(exact, decoded, out=room)
    with np.errstate(over="ignore"):
        return _square_sum(room), _square_sum(exact)


def _square_sum(values: Array) -> float:
    # Row by row in the dtype of the values (16 GB/s), the rows' sums in float64.
    rows = values.reshape(len(values), -1)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
