"""Other codecs and blocks: what stays to the bit, what is lost, and that it is said."""

from __future__ import annotations

import doctest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import ConfigError, StoreError, TeacherError
from kdcache.fields import FieldSpec
from kdcache.store import Store, add_teacher, converting, open_store, verify_store
from kdcache.store.converting import parse_codecs, plan_conversion
from kdcache.store.rewrite import write_rewrite
from tests.store.sample import Sample, begin_structures, files_of, teacher_entry, write_all
from tests.store.several import assert_same_rows, by_id, part, write_part

HERE = Here()


@pytest.fixture(scope="module")
def sample() -> Sample:
    return part(range(14), 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> Store:
    return write_part(tmp_path_factory.mktemp("convert") / "store.zarr", sample)


def converted(store: Store, path: Path, *arguments: Any, **layout: Any) -> Store:
    write_rewrite(path, plan_conversion(store, *arguments, **layout), HERE)
    return open_store(path)


def errors(store: Store, teacher: str = "painn") -> Mapping[str, float]:
    return {name: error.relative for name, error in store.teachers[teacher].errors.items()}


def test_examples_worked_by_hand() -> None:
    assert doctest.testmod(converting).failed == 0


def test_only_the_named_field_changes_its_files(
    store: Store, sample: Sample, tmp_path: Path
) -> None:
    found = converted(store, tmp_path / "new.zarr", {"node": "exact"})
    before, after = files_of(store.path), files_of(found.path)  # type: ignore[arg-type]
    changed = {name.rpartition("/c/")[0] for name in after if after[name] != before.get(name)}
    # Both teachers have a node; that of "edges" was exact.
    assert changed - {""} == {"teachers/painn/node"}
    assert found.spec("teachers/painn/node").codec == "exact"
    wanted = by_id(store.path, "teachers/painn/node")  # type: ignore[arg-type]
    widened = {i: rows.astype(np.float32) for i, rows in wanted.items()}
    assert_same_rows(by_id(found.path, "teachers/painn/node"), widened)  # type: ignore[arg-type]
    assert errors(found) == errors(store)
    assert found.manifest.order == store.manifest.order
    assert found.manifest.dataset.digest == store.manifest.dataset.digest
    assert found.manifest.dataset.notes[-1] == f"converted from {store.manifest.root_digest}"
    assert verify_store(found.path, data=sample.dataset).problems == []


def test_a_teacher_is_named_where_only_its_field_shall_change(store: Store, tmp_path: Path) -> None:
    found = converted(store, tmp_path / "new.zarr", {"edges/node": "half"})
    assert found.spec("teachers/edges/node").codec == "half"
    assert found.spec("teachers/painn/node").codec == "half"
    wanted = by_id(store.path, "teachers/edges/node")  # type: ignore[arg-type]
    rounded = {i: rows.astype(np.float16) for i, rows in wanted.items()}
    assert_same_rows(by_id(found.path, "teachers/edges/node"), rounded)  # type: ignore[arg-type]
    assert len(found.failures("edges")) == len(store.failures("edges")) > 0


def test_all_features_change_but_nothing_with_a_unit(store: Store, tmp_path: Path) -> None:
    found = converted(store, tmp_path / "new.zarr", None, "compact")
    codecs = {n: s.codec for n, s in found.fields("teachers/painn").items()}
    assert codecs == {
        "node": "compact", "vector": "compact", "bare": "compact", "pooled": "compact",
        "message": "compact", "atomic_energy": "exact", "energy": "exact", "flag": "exact",
    }  # fmt: skip
    # Compact fields that stay in their blocks keep their bytes.
    assert errors(found)["vector"] == errors(store)["vector"]
    assert verify_store(found.path).problems == []


def test_other_blocks_hold_the_same_rows(store: Store, tmp_path: Path) -> None:
    rewrite = plan_conversion(store, atom_capacity=30, blocks_per_shard=2)
    assert any("bare, pooled, vector of teacher 'painn'" in note for note in rewrite.notes) or any(
        "rounded once more" in note for note in rewrite.notes
    )
    found = converted(store, tmp_path / "new.zarr", atom_capacity=30, blocks_per_shard=2)
    assert found.plan.blocks_per_shard == 2
    assert found.plan.n_blocks < store.plan.n_blocks
    for group in store.plans:
        for name, spec in store.fields(group).items():
            if spec.codec != "compact":
                path = f"{group}/{name}"
                assert_same_rows(by_id(found.path, path), by_id(store.path, path))  # type: ignore[arg-type]
    assert np.array_equal(found.index.structure_id, store.index.structure_id)
    assert verify_store(found.path).problems == []


@pytest.fixture(scope="module")
def features(sample: Sample) -> tuple[FieldSpec, ...]:
    return (FieldSpec("noise", "atom", (6,)), FieldSpec("huge", "atom", (2,)))


@pytest.fixture(scope="module")
def noisy(
    tmp_path_factory: pytest.TempPathFactory, sample: Sample, features: tuple[FieldSpec, ...]
) -> tuple[Store, np.ndarray[Any, Any]]:
    """A store of random numbers, kept exactly, and the numbers."""
    path = tmp_path_factory.mktemp("noisy") / "noisy.zarr"
    write_all(begin_structures(path, sample), sample)
    n_atoms = int(sample.plan.n_atoms.sum())
    noise = np.random.default_rng(0).normal(size=(n_atoms, 6)).astype(np.float32)
    huge = np.full((n_atoms, 2), 1e5, np.float32)
    ends = np.cumsum(sample.plan.n_atoms)
    with add_teacher(path, "noisy", teacher_entry(), features) as writer:
        for shard in writer.pending_shards():
            here = sample.plan.shard_structures(shard)
            rows = slice(int(ends[here.start] - sample.plan.n_atoms[here.start]),
                         int(ends[here.stop - 1]))  # fmt: skip
            writer.write_shard(shard, {"noise": noise[rows], "huge": huge[rows]})
        writer.commit()
    return open_store(path), noise


def test_the_recorded_error_is_that_of_the_values_first_stored(
    noisy: tuple[Store, Any], tmp_path: Path
) -> None:
    """exact, half, compact, exact: against the values themselves, which no later store holds."""
    store, noise = noisy
    field = "teachers/noisy/noise"
    assert errors(store, "noisy")["noise"] == 0.0
    for k, codec in enumerate(("half", "compact", "half", "exact")):
        store = converted(store, tmp_path / f"{k}.zarr", {"noise": codec})
        kept = store.read(field).astype(np.float64)
        true = np.linalg.norm(kept - noise) / np.linalg.norm(noise)
        assert errors(store, "noisy")["noise"] == pytest.approx(true, rel=0.02)
    assert store.spec(field).codec == "exact"
    assert true > 4e-3


def test_values_beyond_half_precision_are_refused_or_cut_and_counted(
    noisy: tuple[Store, Any], tmp_path: Path
) -> None:
    store, _ = noisy
    with pytest.raises(TeacherError, match=r"huge at atom 0 is 100000, beyond .*--on-overflow"):
        converted(store, tmp_path / "stop.zarr", {"huge": "half"})
    clipped = converted(store, tmp_path / "clip.zarr", {"huge": "half"}, on_overflow="clip")
    count = clipped.teachers["noisy"].errors["huge"].clipped
    assert count == 2 * store.manifest.n_atoms
    # Clipped once is clipped for good: the count goes with the field.
    again = converted(clipped, tmp_path / "again.zarr", {"noise": "half"}, atom_capacity=40)
    assert again.teachers["noisy"].errors["huge"].clipped == count
    exact = converted(clipped, tmp_path / "exact.zarr", {"huge": "exact"})
    assert exact.teachers["noisy"].errors["huge"].clipped == count
    assert exact.read("teachers/noisy/huge").max() == 65504


@pytest.mark.parametrize(
    ("arguments", "layout", "error", "message"),
    [
        (({},), {}, ConfigError, "is stored like this already"),
        (({"node": "half"},), {"atom_capacity": 12}, ConfigError, "is stored like this already"),
        (({"nod": "half"},), {}, ConfigError, "no teacher's field 'nod': did you mean node"),
        (({"flag": "half"},), {}, ConfigError, "flag is bool, which codec 'half' cannot keep"),
        (({"edge_shift": "compact"},), {}, ConfigError, "edge_shift is int16"),
        (({},), {"atom_capacity": 5}, StoreError, "atom_capacity is 5, the largest structure"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    store: Store, arguments: Any, layout: Any, error: type[Exception], message: str
) -> None:
    only_painn = arguments[0].get("node") == "half"
    codecs: Any = {"painn/node": "half"} if only_painn else arguments[0]
    with pytest.raises(error, match=message):
        plan_conversion(store, codecs, **layout)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["node=hlaf"], "'hlaf' is no codec: did you mean half"),
        (["node=half,node=exact"], "node is named twice"),
        (["half", "exact"], "all is named twice"),
    ],
)
def test_codecs_that_cannot_be_meant_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_codecs(texts)
