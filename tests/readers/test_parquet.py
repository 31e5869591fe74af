"""Parquet with one structure per row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import DataError, UnitError
from kdcache.readers import ReadOptions, read_structures
from tests.readers.identity import assert_same, numbered_structure

EV = ReadOptions(energy_unit="eV")
N = 600


def columns(n: int, nested: bool) -> dict[str, list[Any]]:
    found = [numbered_structure(s) for s in range(n)]

    def shaped(array: Any) -> Any:
        return array.tolist() if nested else array.reshape(-1).tolist()

    return {
        "atomic_numbers": [s.atomic_numbers.tolist() for s in found],
        "positions": [shaped(s.positions) for s in found],
        "cell": [shaped(s.cell) for s in found],
        "pbc": [s.pbc.tolist() for s in found],
        "energy": [s.energy for s in found],
        "forces": [shaped(s.forces) for s in found],
        "config_type": [f"kind{s % 3}" for s in range(n)],
        "name": [f"n{s}" for s in range(n)],
    }


def write(path: Path, table: dict[str, list[Any]], **types: pa.DataType) -> Path:
    arrays = {name: pa.array(values, types.get(name)) for name, values in table.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=100)
    return path


@pytest.mark.parametrize("nested", [True, False])
def test_nested_and_flat_lists_are_read_in_order(tmp_path: Path, nested: bool) -> None:
    path = write(tmp_path / "a.parquet", columns(N, nested))
    options = ReadOptions(energy_unit="eV", id_key="name")
    found = list(read_structures(path, options))
    assert len(found) == N
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(s))
        assert (structure.structure_id, structure.group) == (f"n{s}", f"kind{s % 3}")


def test_lists_of_fixed_and_large_kind_are_read(tmp_path: Path) -> None:
    three = pa.list_(pa.float64(), 3)
    path = write(
        tmp_path / "a.parquet",
        columns(20, nested=True),
        positions=pa.large_list(three),
        forces=pa.list_(three),
        cell=pa.list_(three, 3),
        atomic_numbers=pa.large_list(pa.uint8()),
    )
    for s, structure in enumerate(read_structures(path, EV)):
        assert_same(structure, numbered_structure(s))


def test_a_null_is_a_missing_label_when_asked_and_an_error_otherwise(tmp_path: Path) -> None:
    table = columns(6, nested=True)
    table["forces"][2] = None
    table["energy"][4] = None
    path = write(tmp_path / "a.parquet", table)
    with pytest.raises(DataError, match=r"a.parquet, structure 2 has no forces"):
        list(read_structures(path, EV))
    found = list(read_structures(path, ReadOptions(energy_unit="eV", unlabelled=True)))
    assert [s.forces is None for s in found] == [s == 2 for s in range(6)]
    assert [s.energy is None for s in found] == [s == 4 for s in range(6)]
    for s in (0, 1, 3, 5):
        assert_same(found[s], numbered_structure(s))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("positions", [[0.0, 0.0, 0.0]], r"structure 3: positions has 3 values for 2 atoms"),
        ("atomic_numbers", [], r"structure 3: positions has 6 values for 0 atoms"),
        ("atomic_numbers", None, r"structure 3 has no numbers"),
        ("energy", float("nan"), r"structure 3: energy is nan"),
        ("cell", [[1.0, 2.0, 3.0], [1.0]], r"structure 3: cell must be three vectors"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, column: str, value: Any, said: str) -> None:
    table = columns(6, nested=True)
    table[column][3] = value
    with pytest.raises(DataError, match=f"a.parquet, {said}"):
        list(read_structures(write(tmp_path / "a.parquet", table), EV))


def test_units_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match=r"a.parquet does not say its units"):
        list(read_structures(write(tmp_path / "a.parquet", columns(2, nested=True))))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet"):
        list(read_structures(tmp_path / "a.parquet", EV))
