"""Distributions of a store against numpy on all its values at once."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import StoreError
from kdcache.fields import FieldSpec
from kdcache.store import Store, add_teacher, moments, open_store
from kdcache.store.histograms import bars_of, draw_statistics
from kdcache.store.moments import N_BINS, Moments, count_bins, quantiles_of
from kdcache.store.statistics import (
    CountMoments,
    StoreStatistics,
    quantities_of,
    store_statistics,
)
from tests.store.sample import Sample, begin_structures, teacher_entry, write_all
from tests.store.several import part, write_part


@pytest.fixture(scope="module")
def frames() -> Sample:
    return part(range(20), 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, frames: Sample) -> Store:
    return write_part(tmp_path_factory.mktemp("stats") / "store.zarr", frames)


@pytest.fixture(scope="module")
def found(store: Store) -> StoreStatistics:
    return store_statistics(store, by_channel=True)


def test_examples_worked_by_hand() -> None:
    assert doctest.testmod(moments).failed == 0


def test_every_field_of_floats_is_as_numpy_says(store: Store, found: StoreStatistics) -> None:
    assert len(quantities_of(store)) > 15
    for quantity in quantities_of(store):
        values = store.read(quantity.field).astype(np.float64)
        if quantity.kind == "norm":
            values = np.linalg.norm(values, axis=-1)
        elif quantity.kind == "per atom":
            values = values / store.index.n_atoms
        one = found.quantities[quantity.name]
        finite = values[np.isfinite(values)]
        assert one.count == len(finite)
        assert one.zeros == pytest.approx((finite == 0).mean(), abs=1e-15)
        for name, expected in (
            ("mean", finite.mean()), ("std", finite.std()), ("least", finite.min()),
            ("largest", finite.max()), ("rms", np.sqrt(np.mean(finite**2))),
        ):  # fmt: skip
            assert getattr(one, name) == pytest.approx(expected, rel=1e-12, abs=1e-13), name
        width = (one.largest - one.least) / N_BINS
        between = np.quantile(finite, list(one.quantiles), method="inverted_cdf")
        assert np.abs(np.array(list(one.quantiles.values())) - between).max() <= width * 1.001
        assert int(one.bins.sum()) == len(finite)
        assert one.unit == store.spec(quantity.field).unit


def test_labels_that_are_missing_are_counted(found: StoreStatistics, frames: Sample) -> None:
    unlabelled = [s for s in frames.dataset if s.energy is None]
    assert found.quantities["energy"].n_nan == len(unlabelled) == 4
    assert found.quantities["forces"].n_nan == 3 * sum(s.n_atoms for s in unlabelled)


def test_structures_a_teacher_failed_on_are_left_out(store: Store, found: StoreStatistics) -> None:
    failed = store.failures("edges").row
    assert len(failed) > 2
    one = found.quantities["edges/node"]
    kept = np.delete(store.index.n_atoms, failed)
    assert (one.count, one.n_nan) == (3 * int(kept.sum()), 0)
    edges = np.delete(store.plans["teachers/edges"].n_edges, failed)
    assert found.quantities["edges/edge"].count == 2 * int(edges.sum())


def test_channels_are_as_numpy_says(store: Store, found: StoreStatistics) -> None:
    for name in ("painn/node", "painn/vector", "painn/pooled"):
        values = store.read(f"teachers/{name}").astype(np.float64)
        by_channel = values.reshape(-1, values.shape[-1])
        one = found.quantities[name]
        assert one.channel_mean == pytest.approx(by_channel.mean(axis=0), rel=1e-12, abs=1e-12)
        assert one.channel_std == pytest.approx(by_channel.std(axis=0), rel=1e-12, abs=1e-12)
    # x, y and z of a bare vector are no channels.
    assert found.quantities["painn/bare"].channel_mean == ()
    assert found.quantities["painn/energy"].channel_mean == ()


def test_elements_and_counts_are_those_of_the_dataset(
    found: StoreStatistics, frames: Sample
) -> None:
    numbers = np.concatenate([s.atomic_numbers for s in frames.dataset])
    for number, (atoms, structures) in found.elements.items():
        assert atoms == (numbers == number).sum()
        assert structures == sum(number in s.atomic_numbers for s in frames.dataset)
    assert sorted(found.elements) == np.unique(numbers).tolist()
    sizes = np.array([s.n_atoms for s in frames.dataset])
    assert found.quantities["atoms per structure"].mean == pytest.approx(sizes.mean())
    assert found.quantities["edges per atom"].mean == pytest.approx(2 * (sizes > 1).mean())


def test_the_report_is_json_without_nan(found: StoreStatistics) -> None:
    text = json.dumps(found.to_json(), allow_nan=False)
    node = json.loads(text)["quantities"]["painn/node"]
    assert sum(node["histogram"]) == node["count"]
    assert len(node["channel_mean"]) == 5
    assert list(node["quantiles"]) == ["0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99"]


def test_the_picture_has_a_panel_of_bars_for_every_quantity(
    found: StoreStatistics, tmp_path: Path
) -> None:
    draw_statistics(found, tmp_path / "new" / "stats.png")
    assert (tmp_path / "new" / "stats.png").read_bytes().startswith(b"\x89PNG")
    for one in found.quantities.values():
        edges, counts = bars_of(one)
        assert (len(edges), int(counts.sum())) == (51, one.count)
    with pytest.raises(StoreError, match="nothing to draw"):
        draw_statistics(StoreStatistics("", 0, 0, 0, {}, {}), tmp_path / "none.png")


VALUES = st.lists(
    st.one_of(st.floats(-1e6, 1e6), st.sampled_from([np.nan, np.inf, -np.inf, 0.0])), max_size=30
)


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_parts_make_the_moments_of_the_whole(parts: list[list[float]]) -> None:
    total = Moments()
    for part_of in parts:
        total = total.merged(Moments.of(np.array(part_of), 1))
    values = np.array([value for part_of in parts for value in part_of])
    finite = values[np.isfinite(values)]
    assert total.n_nan == np.isnan(values).sum()
    assert total.n_infinite == np.isinf(values).sum()
    assert total.n_zero == (values == 0).sum()
    if len(finite):
        assert int(total.n[0]) == len(finite)
        assert (total.least, total.largest) == (finite.min(), finite.max())
        assert total.mean[0] == pytest.approx(finite.mean(), rel=1e-9, abs=1e-6)
        assert total.std[0] == pytest.approx(finite.std(), rel=1e-9, abs=1e-6)
        bins = count_bins(values, total.least, total.largest)
        assert int(bins.sum()) == len(finite)
        (median,) = quantiles_of(bins, total.least, total.largest, [0.5])
        assert total.least <= median <= total.largest


def test_a_large_offset_does_not_swallow_the_spread() -> None:
    """Total energies: -1e6 eV, a few meV apart."""
    values = -1e6 + np.random.default_rng(0).normal(scale=1e-3, size=4096)
    total = Moments()
    for tile in np.split(values, 64):
        total = total.merged(Moments.of(tile, 1))
    assert total.std[0] == pytest.approx(values.std(), rel=1e-6)


def test_whole_numbers_have_no_moments_and_channels_only_where_asked_for(store: Store) -> None:
    quantities = store_statistics(store).quantities
    assert not {"painn/flag", "atomic_numbers", "edge_index"} & quantities.keys()
    assert quantities["painn/node"].channel_mean == ()


@pytest.mark.filterwarnings("error")
def test_values_at_the_end_of_float64_are_counted(tmp_path: Path, sample: Sample) -> None:
    """Their squares are beyond it: what cannot be told is null, and all else is there."""
    path, spec = tmp_path / "store.zarr", FieldSpec("huge", "atom", (2,), "float64")
    write_all(begin_structures(path, sample), sample)
    with add_teacher(path, "huge", teacher_entry(), [spec]) as writer:
        for shard in range(sample.plan.n_shards):
            rows = int(sample.plan.n_atoms[sample.plan.shard_structures(shard)].sum())
            values = np.where(np.arange(2 * rows).reshape(rows, 2) % 4 < 2, 1.7e308, -1.7e308)
            writer.write_shard(shard, {"huge": values})
        writer.commit()
    found = store_statistics(open_store(path), by_channel=True).to_json()
    told = json.loads(json.dumps(found, allow_nan=False))["quantities"]["huge/huge"]
    assert (told["min"], told["max"]) == (-1.7e308, 1.7e308)
    assert (told["std"], told["rms"]) == (None, None)
    assert told["quantiles"]["0.05"] == pytest.approx(-1.7e308, rel=3e-3)
    assert told["quantiles"]["0.95"] == pytest.approx(1.7e308, rel=3e-3)
    assert sum(told["histogram"]) == told["count"] == 2 * sample.plan.n_atoms.sum()
    # As a worker counts, which is another process.
    counted = CountMoments(open_store(path))()(0).moments["huge/huge"]
    assert counted.n.sum() == 2 * sample.plan.n_atoms[sample.plan.shard_structures(0)].sum()


def test_a_quantile_of_the_whole_range_of_float64_is_where_it_is() -> None:
    least, largest = -1.7e308, 1.7e308
    counts = count_bins(np.array([least, 0.9e308, largest]), least, largest)
    (middle,) = quantiles_of(counts, least, largest, (0.5,))
    assert middle == pytest.approx(0.9e308, rel=5e-3)
