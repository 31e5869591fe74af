"""Values to bytes and back: exact where it must be, bounded where it may not."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kdcache.errors import StoreError
from kdcache.fields import FieldSpec
from kdcache.store.codecs import (
    PIECE_VALUES,
    EncodingError,
    UnstorableValue,
    channels,
    compress,
    decompress,
    from_compact,
    guard,
    pieces,
    stored_dtype,
    to_compact,
    to_half,
)
from kdcache.store.halves import TILE_VALUES, convert

# The ends of float32 have a test of their own.
FLOATS = st.floats(-60000, 60000, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)
ROWS = st.integers(0, 20).flatmap(lambda n: arrays(np.float32, (n, 3, 4), elements=FLOATS))


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_half_is_the_nearest_float16_and_its_error_is_recorded(
    values: npt.NDArray[np.float32],
) -> None:
    error = EncodingError()
    stored = to_half(values, error)
    assert stored.tobytes() == values.astype(np.float16).tobytes()
    wide = values.astype(np.float64)
    assert error.square_error == pytest.approx(((wide - stored) ** 2).sum(), rel=1e-4)
    assert error.square_value == pytest.approx((wide**2).sum(), rel=1e-4)


BITS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=50)
@given(st.lists(BITS, min_size=1, max_size=200))
def test_any_float32_becomes_the_same_half_with_and_without_torch(bits: list[int]) -> None:
    import torch

    assert torch.__name__ in sys.modules
    values = np.array(bits, np.uint32).view(np.float32)
    values = values[np.abs(values) < 65504]  # what a guard lets through; NaN is not below
    borrowed, own = np.empty(len(values), np.float16), values.astype(np.float16)
    convert(values, borrowed)
    assert borrowed.tobytes() == own.tobytes()
    widened = np.empty(len(values), np.float32)
    convert(own, widened)
    assert widened.tobytes() == own.astype(np.float32).tobytes()


def test_float64_is_rounded_once() -> None:
    # Just above the middle of two halves; float32 would drop what tells it from the middle.
    value = np.array([1 + 2**-11 + 2**-40])
    out = np.empty(1, np.float16)
    convert(value, out)
    assert out[0] == np.float16(1 + 2**-10)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2000), st.integers(0, 2**20))
def test_pieces_hold_every_row_once(n_rows: int, row_size: int) -> None:
    cuts = pieces(n_rows, row_size)
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(n_rows))
    assert all((cut.stop - cut.start) * row_size <= max(PIECE_VALUES, row_size) for cut in cuts)
    assert len(cuts) >= 1


def test_many_rows_are_rounded_in_tiles_as_a_whole() -> None:
    values = np.random.default_rng(0).standard_normal((300, 3, 128), dtype=np.float32)
    assert values.size > 2 * TILE_VALUES
    assert values.size % TILE_VALUES
    error = EncodingError()
    assert to_half(values, error).tobytes() == values.astype(np.float16).tobytes()
    wide = values.astype(np.float64)
    assert error.square_error == pytest.approx(
        ((wide - values.astype(np.float16)) ** 2).sum(), rel=1e-5
    )


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_a_half_that_is_not_finite_is_seen(wrong: float) -> None:
    values = np.array([[0.0, -65504.0], [wrong, 65504.0]], np.float16)
    with pytest.raises(UnstorableValue) as caught:
        guard(values, "half", "stop", "stop", EncodingError())
    assert caught.value.row == 1
    assert guard(values[:1], "half", "stop", "stop", EncodingError()) is not None


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_compact_is_off_by_at_most_half_a_step_of_its_channel(
    values: npt.NDArray[np.float32],
) -> None:
    stored, scale = to_compact(values, 4, EncodingError())
    decoded = from_compact(stored, scale)
    assert stored.dtype == np.int8
    assert scale.shape == (4,)
    assert decoded.dtype == np.float32
    assert (np.abs(decoded - values) <= 0.5001 * scale).all()
    if len(values):
        largest = np.abs(values).reshape(-1, 4).max(axis=0)
        assert np.abs(stored.reshape(-1, 4)).max(axis=0)[largest > 0].tolist() == [127] * int(
            (largest > 0).sum()
        )


@pytest.mark.parametrize("tiny", [1e-45, 1e-39, 1e-37, 1e30])
def test_compact_survives_the_ends_of_float32(tiny: float) -> None:
    values = np.array([[tiny], [-tiny], [0.0]], np.float32)
    error = EncodingError()
    stored, scale = to_compact(values, 1, error)
    decoded = from_compact(stored, scale)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - values).max() <= max(float(scale[0]), 1.5e-36)
    assert np.isfinite(error.relative)


@pytest.mark.parametrize(
    ("shape", "symmetry", "expected"),
    [
        ((), "invariant", 1),
        ((8,), "invariant", 8),
        ((3,), "vector", 1),
        ((3, 8), "vector", 8),
        ((3,), "invariant", 3),
    ],
)
def test_x_y_and_z_share_a_scale(shape: tuple[int, ...], symmetry: str, expected: int) -> None:
    spec = FieldSpec("f", "atom", shape, symmetry=symmetry, codec="compact")  # type: ignore[arg-type]
    assert channels(spec) == expected


def test_values_within_the_limit_pass_untouched() -> None:
    values = np.array([[65504.0, -65504.0]], np.float32)
    assert guard(values, "half", "stop", "stop", EncodingError()) is values


@pytest.mark.parametrize(("value", "overflow"), [(65505.0, True), (-1e9, True), (np.nan, False)])
def test_an_offending_value_is_found_where_it_is(value: float, overflow: bool) -> None:
    values = np.zeros((7, 3, 2), np.float32)
    values[5, 1, 1] = value
    with pytest.raises(UnstorableValue) as raised:
        guard(values, "half", "stop", "stop", EncodingError())
    assert (raised.value.row, raised.value.overflow) == (5, overflow)


def test_replaced_values_are_counted_and_the_rest_is_kept() -> None:
    values = np.array([np.inf, -np.inf, np.nan, 7e4, -7e4, 2.5], np.float32)
    error = EncodingError()
    guarded = guard(values, "half", "clip", "zero", error)
    assert guarded.tolist() == [0, 0, 0, 65504, -65504, 2.5]
    assert (error.nonfinite, error.clipped) == (3, 2)
    exact = guard(values, "exact", "stop", "zero", EncodingError())
    assert exact.tolist() == [0, 0, 0, 7e4, -7e4, 2.5]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "int64", "float32"])
def test_a_blosc_frame_gives_back_its_bits(dtype: str) -> None:
    values = (np.arange(600).reshape(200, 3) % 7).astype(dtype)
    out = np.empty_like(values)
    assert decompress(np.frombuffer(compress(values), np.uint8), out)
    assert out.tobytes() == values.tobytes()


def test_a_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    frame = np.frombuffer(compress(np.arange(1000.0)), np.uint8)
    assert not decompress(frame, np.empty(999))
    assert not decompress(frame, np.empty(1001))
    assert not decompress(frame[:-1], np.empty(1000))
    assert not decompress(frame[:10], np.empty(1000))


def test_bytes_do_not_depend_on_the_thread() -> None:
    # Large enough for Blosc to cut it up, where its own threads would finish in any order.
    values = np.random.default_rng(0).normal(size=(4096, 256)).astype(np.float32)
    here = compress(values)
    with ThreadPoolExecutor(2) as pool:
        elsewhere = [pool.submit(compress, values) for _ in range(3)]
    assert {future.result() for future in elsewhere} == {here}


@pytest.mark.parametrize(("dtype", "codec"), [("int32", "half"), ("bool", "compact")])
def test_whole_numbers_are_kept_exactly_or_not_at_all(dtype: str, codec: str) -> None:
    spec = FieldSpec("edge_index", "edge", (2,), dtype, codec=codec)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="Use codec 'exact'"):
        stored_dtype(spec)


def test_dtypes_are_a_closed_list() -> None:
    with pytest.raises(StoreError, match="has dtype complex64"):
        stored_dtype(FieldSpec("f", "atom", dtype="complex64"))
