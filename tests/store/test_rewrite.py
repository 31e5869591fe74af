"""Rows of stores become a new store: the same rows, whoever writes it and however often killed."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.cluster import Cluster, Here
from kdcache.errors import StoreError
from kdcache.store import Store, create_store, open_store, verify_store
from kdcache.store.choosing import Choice, choose_rows
from kdcache.store.combining import plan_merge, plan_subset
from kdcache.store.converting import plan_conversion
from kdcache.store.copy_shards import CopyShards
from kdcache.store.rewrite import UNFINISHED_SUFFIX, Rewrite, write_rewrite
from tests.store.sample import files_of
from tests.store.several import Backwards, assert_same_rows, by_id, part, write_part


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Two stores of different structures, in different layouts."""
    directory = tmp_path_factory.mktemp("parts")
    second = part(range(30, 44), 3, atom_capacity=20, blocks_per_shard=1)
    return [
        write_part(directory / "first.zarr", part(range(30), 2)),
        write_part(directory / "second.zarr", second),
    ]


def subset(store: Store) -> Rewrite:
    rows = choose_rows(store, Choice(splits=["train"]), Here())
    return plan_subset(store, rows, "train", Here(), blocks_per_shard=2)


def merge(stores: list[Store]) -> Rewrite:
    return plan_merge(stores, Here(), seed=4, atom_capacity=16, blocks_per_shard=2)


def write(path: Path, rewrite: Rewrite, cluster: Cluster | None = None) -> Store:
    write_rewrite(path, rewrite, cluster or Here())
    return open_store(path)


def lossless(store: Store) -> list[str]:
    """Fields whose values do not depend on blocks."""
    return [
        f"{group}/{name}"
        for group in store.plans
        for name, spec in store.fields(group).items()
        if spec.codec != "compact"
    ]


def test_every_row_of_a_merge_is_that_of_its_source(stores: list[Store], tmp_path: Path) -> None:
    merged = write(tmp_path / "merged.zarr", merge(stores))
    assert len(merged) == 44
    for name in lossless(merged):
        wanted = by_id(stores[0].path, name) | by_id(stores[1].path, name)  # type: ignore[arg-type]
        found = by_id(tmp_path / "merged.zarr", name)
        assert len(found) == 44
        assert_same_rows(found, wanted)
    for name in ("vector", "bare", "pooled"):
        found = by_id(tmp_path / "merged.zarr", f"teachers/painn/{name}")
        for store in stores:
            for structure_id, rows in by_id(store.path, f"teachers/painn/{name}").items():  # type: ignore[arg-type]
                assert np.abs(found[structure_id] - rows).max(initial=0) < 45 / 127
    assert verify_store(tmp_path / "merged.zarr").problems == []


def test_every_row_of_a_subset_is_that_of_its_source(stores: list[Store], tmp_path: Path) -> None:
    found = write(tmp_path / "subset.zarr", subset(stores[0]))
    kept = [s for s in stores[0].index.structure_id if int(s.rpartition(":")[2]) % 4]
    assert found.index.structure_id.tolist() == kept
    for name in lossless(found):
        assert_same_rows(by_id(tmp_path / "subset.zarr", name), by_id(stores[0].path, name))  # type: ignore[arg-type]
    assert verify_store(tmp_path / "subset.zarr").problems == []


def test_structures_a_teacher_failed_on_stay_failed(stores: list[Store], tmp_path: Path) -> None:
    merged = write(tmp_path / "merged.zarr", merge(stores))
    wanted = {
        (str(i), str(why))
        for store in stores
        for i, why in zip(
            store.failures("edges").structure_id, store.failures("edges").reason, strict=True
        )
    }
    failures = merged.failures("edges")
    assert len(wanted) == merged.teachers["edges"].n_failed > 3
    assert set(zip(failures.structure_id, failures.reason, strict=True)) == wanted
    node = by_id(tmp_path / "merged.zarr", "teachers/edges/node")
    assert all(np.isnan(node[structure_id]).all() for structure_id, _ in wanted)
    assert sum(np.isnan(rows).any() for rows in node.values()) == len(wanted)


@pytest.mark.parametrize(("groups", "more"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)])
def test_a_killed_rewrite_is_gone_on_with(
    stores: list[Store], tmp_path: Path, groups: int, more: int
) -> None:
    """Within each of the three groups, and between them."""
    rewrite, target = subset(stores[0]), tmp_path / "subset.zarr"
    lives = groups * rewrite.plan.n_shards + more
    assert more < rewrite.plan.n_shards
    with pytest.raises(KeyboardInterrupt):
        write_rewrite(target, rewrite, Backwards(lives))
    assert not target.exists()
    left = files_of(tmp_path / f"subset.zarr{UNFINISHED_SUFFIX}")
    found = write(target, subset(stores[0]))
    undisturbed = write(tmp_path / "undisturbed.zarr", subset(stores[0]))
    assert found.manifest.root_digest == undisturbed.manifest.root_digest
    # What was finished was not written again.
    shards = [name for name in left if "/c/" in name and not name.endswith(".partial")]
    assert bool(shards) == (lives > 0)
    assert all(files_of(target)[name] == left[name] for name in shards)
    assert not (tmp_path / f"subset.zarr{UNFINISHED_SUFFIX}").exists()
    assert not (target / ".work").exists()


@pytest.mark.parametrize(("groups", "more"), [(0, 1), (1, 1), (2, 1)])
def test_an_unfinished_store_is_not_gone_on_with_as_another(
    stores: list[Store], tmp_path: Path, groups: int, more: int
) -> None:
    rewrite, target = subset(stores[0]), tmp_path / "subset.zarr"
    rows = choose_rows(stores[0], Choice(splits=["train"]), Here())
    with pytest.raises(KeyboardInterrupt):
        write_rewrite(target, rewrite, Backwards(groups * rewrite.plan.n_shards + more))
    left = files_of(tmp_path / f"subset.zarr{UNFINISHED_SUFFIX}")
    others = [
        plan_subset(stores[0], np.arange(9), "train", Here(), blocks_per_shard=2),
        plan_subset(stores[0], rows, "train", Here(), blocks_per_shard=2, atom_capacity=40),
    ]
    if groups:
        # The manifest lists teachers by name: "edges" is written first.
        fewer = replace(rewrite, teachers={"painn": rewrite.teachers["painn"]})
        named = replace(rewrite, teachers={"other": rewrite.teachers["edges"]})
        others += [fewer, named]
    if groups == 2:
        fields = plan_subset(stores[0], rows, "train", Here(), blocks_per_shard=2, fields=["node"])
        others.append(fields)
    for other in others:
        with pytest.raises(StoreError, match=r"another (dataset|teacher|index|layout)"):
            write_rewrite(target, other, Here())
    assert files_of(tmp_path / f"subset.zarr{UNFINISHED_SUFFIX}").keys() == left.keys()
    assert len(write(target, rewrite)) == len(rows)


def test_nothing_that_is_there_is_overwritten(stores: list[Store], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (stores[1].path, tmp_path / "file"):
        with pytest.raises(StoreError, match="exists, and nothing is overwritten"):
            write_rewrite(target, subset(stores[0]), Here())
    with pytest.raises(StoreError, match="is on a server"):
        write_rewrite("s3://bucket/new.zarr", subset(stores[0]), Here())


def test_a_damaged_source_stops_a_copy_of_its_files(stores: list[Store], tmp_path: Path) -> None:
    sample = part(range(30), 2)
    source = write_part(tmp_path / "source.zarr", sample)
    file = tmp_path / "source.zarr" / "teachers" / "painn" / "atomic_energy" / "c" / "1"
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    rewrite = plan_conversion(source, {"node": "exact"})
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match="Its copy would be wrong"):
        write_rewrite(tmp_path / "copy.zarr", rewrite, Here())
    assert not (tmp_path / "copy.zarr").exists()
    left = tmp_path / f"copy.zarr{UNFINISHED_SUFFIX}"
    assert not list((left / "teachers" / "painn").rglob("*.partial"))
    with pytest.raises(StoreError, match=r"checksum|damaged"):
        write_rewrite(tmp_path / "moved.zarr", plan_subset(source, np.arange(30)[1:], "", Here()),
                      Here())  # fmt: skip


def test_sources_may_be_on_a_server(url: str, finished: Path, tmp_path: Path) -> None:
    here, there = open_store(finished), open_store(url)
    rows = np.arange(1, len(here), 2)
    for k, (near, far) in enumerate((
        (plan_conversion(here, {"node": "exact"}), plan_conversion(there, {"node": "exact"})),
        (plan_subset(here, rows, "odd", Here()), plan_subset(there, rows, "odd", Here())),
    )):  # fmt: skip
        digests = [
            write(tmp_path / f"{side}{k}.zarr", rewrite).manifest.root_digest
            for side, rewrite in (("near", near), ("far", far))
        ]
        assert digests[0] == digests[1]


def test_work_that_travels_does_not_grow_with_the_stores(tmp_path: Path) -> None:
    """Shards are handed out one by one, each with the work to be done."""
    sizes = []
    for n in (20, 200):
        sample = part(range(n), 2, atom_capacity=2000)
        store = write_part(tmp_path / f"{n}.zarr", sample, edges=False)
        rewrite = plan_subset(store, np.arange(n // 2), "half", Here())
        path = tmp_path / f"new{n}.zarr"
        writer = create_store(
            path, index=rewrite.index, plan=rewrite.plan, fields=rewrite.structures.fields,
            dataset=rewrite.dataset, graph=rewrite.graph,
        )  # fmt: skip
        with writer:
            sizes.append(len(pickle.dumps(CopyShards.begin(writer, rewrite.structures))))
    assert sizes[1] < 1.05 * sizes[0]
