"""CKA judged by its definition with kernels, and by what it must not notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.distill.similarity import StreamingAlignment, linear_cka, weighted_linear_cka
from kdcache.errors import ShapeError
from tests.distill.fields import rows


def kernel_cka(x: Tensor, y: Tensor) -> float:
    """tr(KHLH) over norms, as Kornblith et al. 2019 define it (Eqs. 2 and 3)."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    of_x, of_y = ((f.flatten(1) @ f.flatten(1).T).numpy() for f in (x, y))

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ centring @ b @ centring))

    return hsic(of_x, of_y) / np.sqrt(hsic(of_x, of_x) * hsic(of_y, of_y))


def kernel_cka_unbiased(x: Tensor, y: Tensor) -> float:
    """The same with HSIC_1 of Song et al. 2012, Eq. 5, summed index by index."""
    n = len(x)

    def hsic(f: Tensor, g: Tensor) -> float:
        kernel, other = ((h.flatten(1) @ h.flatten(1).T).numpy().copy() for h in (f, g))
        np.fill_diagonal(kernel, 0)
        np.fill_diagonal(other, 0)
        ones = np.ones(n)
        first = np.trace(kernel @ other)
        second = (ones @ kernel @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
        third = 2 * (ones @ kernel @ other @ ones) / (n - 2)
        return float(first + second - third)

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def streamed(x: Tensor, y: Tensor, *sizes: int) -> StreamingAlignment:
    sums = StreamingAlignment(["x"], ["y"])
    for a, b in zip(x.split(list(sizes)), y.split(list(sizes)), strict=True):
        sums.update({"x": a}, {"y": b})
    return sums


def correlated(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = rows(n, 3, 2, seed=seed) + 5.0
    return x, x.flatten(1) @ rows(6, 4, seed=seed + 1) + rows(n, 4, seed=seed + 2)


@pytest.mark.proof
def test_equal_to_the_definition_with_kernels_in_one_batch_and_in_many() -> None:
    x, y = correlated(17)
    judged = kernel_cka(x, y)
    assert 0.1 < judged < 0.95
    assert linear_cka(x, y).item() == pytest.approx(judged, rel=1e-10)
    for sizes in ((17,), (4, 4, 4, 5), (1,) * 17, (0, 16, 1)):
        found = streamed(x, y, *sizes).result()["x", "y"]
        assert found.cka == pytest.approx(judged, rel=1e-10)
        assert found.unbiased == pytest.approx(kernel_cka_unbiased(x, y), rel=1e-9)
        assert found.n_rows == 17


@pytest.mark.proof
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_one_with_itself_and_blind_to_orthogonal_maps_scaling_and_offsets(
    seed: int, scale: float, offset: float
) -> None:
    x, y = correlated(12, seed)
    x = x.flatten(1)
    rotation, _ = torch.linalg.qr(rows(6, 6, seed=seed + 3))
    moved = scale * x @ rotation + offset
    for first in (x, moved):
        assert linear_cka(first, x).item() == pytest.approx(1, rel=1e-8)
    assert linear_cka(moved, y).item() == pytest.approx(linear_cka(x, y).item(), rel=1e-7)
    one, other = (streamed(f, y, 5, 7).result()["x", "y"] for f in (x, moved))
    assert other.cka == pytest.approx(one.cka, rel=1e-7)
    assert other.unbiased == pytest.approx(one.unbiased, rel=1e-6, abs=1e-8)
    same = streamed(moved, x, 3, 9).result()["x", "y"]
    assert same.cka == pytest.approx(1, rel=1e-8)
    assert same.unbiased == pytest.approx(1, rel=1e-8)


def test_unrelated_features_show_the_bias_that_is_stated_and_none_where_it_is_corrected() -> None:
    n, channels = 60, 30
    pairs = [(rows(n, channels, seed=s), rows(n, channels, seed=s + 500)) for s in range(0, 80, 2)]
    found = [streamed(x, y, 30, 30).result()["x", "y"] for x, y in pairs]
    mean = float(np.mean([value.cka for value in found]))
    assert mean == pytest.approx(channels / (n + channels), rel=0.05)
    assert abs(float(np.mean([value.unbiased for value in found]))) < 0.02


def test_a_row_of_weight_k_counts_as_k_rows() -> None:
    x, y = correlated(6)
    weight = torch.tensor([2, 0, 1, 3, 1, 1])
    repeated = linear_cka(x.repeat_interleave(weight, 0), y.repeat_interleave(weight, 0))
    value, defined = weighted_linear_cka(x, y, weight.double())
    assert defined
    torch.testing.assert_close(value, repeated)


def test_layers_that_never_vary_and_too_few_rows_have_no_value() -> None:
    x, y = correlated(5)
    for equal in (1.0, 0.1, 1e6 + 0.1):
        assert linear_cka(torch.full((5, 2), equal, dtype=torch.float64), y).isnan()
        assert np.isnan(streamed(torch.full((5, 2), equal), y, 2, 3).result()["x", "y"].cka)
    assert linear_cka(x[:1], y[:1]).isnan()
    few = streamed(x[:3], y[:3], 3).result()["x", "y"]
    assert np.isfinite(few.cka)
    assert np.isnan(few.unbiased)
    assert np.isnan(streamed(x[:0], y[:0], 0).result()["x", "y"].cka)


def test_other_rows_are_refused() -> None:
    x, y = correlated(5)
    with pytest.raises(ShapeError, match="same rows, got 5 and 4"):
        linear_cka(x, y[:4])
    with pytest.raises(ShapeError, match="x has 5 rows, y 4"):
        StreamingAlignment(["x"], ["y"]).update({"x": x}, {"y": y[:4]})


def test_only_wanted_pairs_are_compared() -> None:
    x, y = correlated(5)
    sums = StreamingAlignment(["a", "b"], ["c"], {("a", "c"), ("b", "c")})
    sums.update({"a": x, "b": x}, {"c": y})
    sums.drop({("b", "c")})
    sums.update({"a": x, "b": x[:2]}, {"c": y})
    assert list(sums.result()) == [("a", "c")]
