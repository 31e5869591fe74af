"""The index file: what goes in comes out, and hostile ones are met at the door."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import StoreError
from kdcache.store import StoreIndex, index_from_plan, plan_blocks, read_index
from kdcache.store.index import MAX_TEXT, SCHEMA, check_places
from kdcache.structures import dataset_digest
from tests.store.sample import Sample

COLUMNS = [field.name for field in SCHEMA]


def rewrite(path: Path, table: pa.Table, compression: str = "none") -> Path:
    pq.write_table(table, path / "index.parquet", compression=compression)
    return path


def test_columns_come_back(finished: Path, sample: Sample) -> None:
    read = read_index(finished, len(sample.dataset))
    for name in COLUMNS:
        assert np.array_equal(getattr(read, name), getattr(sample.index, name)), name
    hashes = [s.content_hash() for s in sample.dataset]
    assert read.dataset_digest() == dataset_digest(hashes)
    assert [read.structure_id[i] for i in read.source_order] == [
        s.structure_id for s in sample.dataset
    ]


def test_pyarrow_reads_it_plainly(finished: Path, sample: Sample) -> None:
    table = pq.read_table(finished / "index.parquet")
    assert table.column_names == COLUMNS
    assert table["content_hash"][3].as_py() == sample.index.content_hash[3].tobytes()
    assert table["group"].to_pylist() == sample.index.group.tolist()


def test_many_structures_alike_are_still_an_honest_index(tmp_path: Path) -> None:
    n = 3000
    plan = plan_blocks(np.ones(n, np.int64))
    index = index_from_plan(
        plan,
        structure_id=[f"s{i}" for i in range(n)],
        content_hash=np.zeros((n, 16), np.uint8),
        source_index=np.arange(n),
    )
    (tmp_path / "index.parquet").write_bytes(index.to_bytes())
    assert len(read_index(tmp_path, n)) == n


def test_a_place_that_is_not_its_own_is_found(sample: Sample) -> None:
    starts = sample.index.atom_start.copy()
    starts[4] += 1
    index: StoreIndex = replace(sample.index, atom_start=starts)
    name = str(sample.index.structure_id[4])
    with pytest.raises(StoreError, match=f"'{name}' .row 4. has atom_start"):
        check_places(index, sample.plan, "here")


def test_hostile_files_are_refused(tmp_path: Path, sample: Sample) -> None:
    n = len(sample.dataset)
    (tmp_path / "index.parquet").write_bytes(sample.index.to_bytes())
    table = pq.read_table(tmp_path / "index.parquet")
    source = table["source_index"].to_numpy().copy()
    source[0] = source[1]
    long = pa.array(["x" * (MAX_TEXT + 1)] * n, pa.string())

    def changed(name: str, column: pa.Array) -> pa.Table:
        place = COLUMNS.index(name)
        return table.set_column(place, SCHEMA.field(name), column)

    for hostile, message in (
        (rewrite(tmp_path / "a", table.drop_columns("weight")), "other columns"),
        (rewrite(tmp_path / "b", table.slice(1)), f"has {n - 1} rows"),
        (rewrite(tmp_path / "c", changed("source_index", pa.array(source))), "no permutation"),
        (rewrite(tmp_path / "d", changed("group", long)), "more than 4096 characters"),
        (rewrite(tmp_path / "e", table, "zstd"), "is compressed"),
    ):
        with pytest.raises(StoreError, match=message):
            read_index(hostile, n)
    (tmp_path / "index.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(StoreError, match="cannot be read as Parquet"):
        read_index(tmp_path, n)


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).mkdir()


def test_columns_of_another_length_are_refused(sample: Sample) -> None:
    with pytest.raises(StoreError, match="Index column split has 1 rows for 20"):
        index_from_plan(
            sample.plan,
            structure_id=sample.index.structure_id,
            content_hash=sample.index.content_hash,
            source_index=sample.index.source_index,
            split=["train"],
        )
