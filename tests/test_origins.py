"""Shares and weights of origins, against the equations they come from."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import ConfigError
from kdcache.origins import batch_parts, child_id, origin_weights, parent_ids

SHARES = st.floats(0.0, 1.0)
RATIOS = st.floats(1e-3, 1e3)


@pytest.mark.proof
@given(SHARES, RATIOS)
def test_weights_are_those_of_equations_9_to_11(alpha: float, ratio: float) -> None:
    w_dft, w_s = origin_weights([1.0 - alpha, alpha], [1.0, ratio])
    # Ekström Kelvinius et al. 2023, Eqs. 9, 10 and 11, as they stand.
    assert w_s * alpha + w_dft * (1.0 - alpha) == pytest.approx(1.0, rel=1e-12)
    assert w_dft == pytest.approx(1.0 / (1.0 - alpha + alpha * ratio), rel=1e-12)
    assert w_s == pytest.approx(ratio * w_dft, rel=1e-12)


@pytest.mark.proof
@given(RATIOS)
def test_one_origin_alone_weighs_1(ratio: float) -> None:
    assert origin_weights([1.0, 0.0], [1.0, ratio])[0] == 1.0
    assert origin_weights([0.0, 1.0], [1.0, ratio])[1] == pytest.approx(1.0, rel=1e-12)


@given(st.lists(st.tuples(st.floats(0.01, 1.0), RATIOS), min_size=1, max_size=5))
def test_weights_of_several_overlays_average_to_1(origins: list[tuple[float, float]]) -> None:
    total = sum(share for share, _ in origins)
    shares = [share / total for share, _ in origins]
    ratios = [1.0, *(ratio for _, ratio in origins[1:])]
    weights = origin_weights(shares, ratios)
    mean = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    assert mean == pytest.approx(1.0, rel=1e-9)
    for weight, ratio in zip(weights, ratios, strict=True):
        assert weight / weights[0] == pytest.approx(ratio, rel=1e-9)


@given(st.integers(8, 300), st.lists(st.floats(0.15, 1.0), max_size=5), st.floats(0.1, 0.85))
def test_parts_fill_a_batch_and_follow_the_shares(
    size: int, weights: list[float], together: float
) -> None:
    shares = [together * weight / sum(weights) for weight in weights]
    if any(share * size < 1 for share in shares):
        return
    own, *parts = batch_parts(size, shares)
    assert own + sum(parts) == size
    assert own > 0
    for share, part in zip(shares, parts, strict=True):
        assert abs(part - share * size) <= 1.0


def test_shares_may_take_a_whole_batch_and_no_more() -> None:
    assert batch_parts(10, []) == [10]
    assert batch_parts(10, [0.1, 0.2, 0.7]) == [0, 1, 2, 7]
    assert batch_parts(10, [0.0]) == [10, 0]
    with pytest.raises(ConfigError, match=r"sum to 1\.1"):
        batch_parts(10, [0.6, 0.5])


@pytest.mark.parametrize(("size", "share"), [(4, 0.1), (4, 0.9)])
def test_a_batch_too_small_for_a_share_is_refused(size: int, share: float) -> None:
    with pytest.raises(ConfigError, match=r"batch of 4.*larger"):
        batch_parts(size, [share])


def test_ids_say_what_a_structure_was_made_from() -> None:
    assert parent_ids("train:41") == []
    made = child_id(child_id("a~b", "relaxed", 30), "rattled", 0)
    assert parent_ids(made) == ["a~b~relaxed30", "a~b", "a"]
