"""The same results, whether this process works or two others do, and in whatever order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdcache.cluster import Cluster, ClusterOptions, Here, open_cluster
from kdcache.store import Store, open_store, verify_store
from kdcache.store.choosing import Choice, choose_rows
from kdcache.store.combining import plan_merge, plan_subset
from kdcache.store.rewrite import write_rewrite
from kdcache.store.scan import labelled
from kdcache.store.statistics import store_statistics
from tests.store.several import Backwards, part, write_part


@pytest.fixture(scope="module")
def clusters() -> Iterator[list[Cluster]]:
    with open_cluster(ClusterOptions(workers=2)) as processes:
        yield [Here(), Here(threads=3), Backwards(), processes]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    directory = tmp_path_factory.mktemp("parts")
    second = part(range(30, 44), 3, atom_capacity=20, blocks_per_shard=1)
    return [
        write_part(directory / "first.zarr", part(range(20), 2)),
        write_part(directory / "second.zarr", second),
    ]


def test_a_new_store_does_not_depend_on_who_writes_it(
    stores: list[Store], clusters: list[Cluster], tmp_path: Path
) -> None:
    digests = set()
    for k, cluster in enumerate(clusters):
        rows = choose_rows(stores[0], Choice(elements=range(1, 60)), cluster)
        for name, rewrite in (
            ("merged", plan_merge(stores, cluster, seed=4, atom_capacity=16, blocks_per_shard=2)),
            ("subset", plan_subset(stores[0], rows, "light", cluster, blocks_per_shard=2)),
        ):
            report = write_rewrite(tmp_path / f"{name}{k}.zarr", rewrite, cluster)
            digests.add((name, report.manifest.root_digest))
    assert len(digests) == 2


def test_statistics_do_not_depend_on_who_counts(
    stores: list[Store], clusters: list[Cluster]
) -> None:
    for store in stores:
        texts = {
            json.dumps(store_statistics(store, cluster, by_channel=True).to_json())
            for cluster in clusters
        }
        assert len(texts) == 1


def test_labels_are_found_by_anybody(stores: list[Store], clusters: list[Cluster]) -> None:
    expected = [s.energy is not None for s in stores[0].structures("store")]
    assert 0 < sum(expected) < 20
    for cluster in clusters:
        assert labelled(stores[0], cluster).tolist() == expected


def test_problems_are_the_same_whoever_looks(clusters: list[Cluster], tmp_path: Path) -> None:
    """Damaged values, digests, edges and contents, in several shards."""
    path = tmp_path / "damaged.zarr"
    write_part(path, part(range(20), 2))
    generator = np.random.default_rng(0)
    for name in ("structures/positions", "teachers/painn/node", "teachers/edges/edge_index"):
        for file in sorted((path / name / "c").rglob("*"))[:6]:
            if file.is_file():
                content = bytearray(file.read_bytes())
                content[generator.integers(len(content) // 2)] ^= 4
                file.write_bytes(content)
    (path / "structures" / "pbc" / "c" / "1" / "0").write_bytes(b"short")
    reports = []
    for cluster in clusters:
        report = verify_store(path, cluster=cluster)
        reports.append((report.problems, report.n_files, report.n_bytes, report.n_blocks))
    assert len(reports[0][0]) > 8
    assert all(report == reports[0] for report in reports)
    whole = [verify_store(open_store_path(tmp_path), cluster=cluster) for cluster in clusters]
    assert all(report == whole[0] for report in whole)
    assert whole[0].problems == []


def open_store_path(directory: Path) -> Path:
    path = directory / "whole.zarr"
    if not path.exists():
        write_part(path, part(range(8), 2))
    assert len(open_store(path)) == 8
    return path
