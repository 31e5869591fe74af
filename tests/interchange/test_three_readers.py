"""Every value and every odd name of an export, by ASE, pyarrow and zarr-python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict
from hypothesis import example, given
from hypothesis import strategies as st

from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.interchange import select, write_extxyz, write_nvalchemi, write_parquet
from kdcache.interchange.extxyz import _text
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import Store, add_teacher, open_store
from kdcache.store.index import INDEX, read_index
from tests.store.sample import TEACHER, make_sample, teacher_entry, write_all, write_store
from tests.store.test_verify import reseal

ODD = (
    'a"b', "a'b", "a=b", "a\\b", "a\\", '\\"', "ü≠😀", "007", "T", "None", "[1, 2]", "{1 2}",
    "1 2 3", "a  b", " lead", "energy=5 forces=x", "x\ty", "a\nb", '_JSON {"a": 1}', "_JSON x",
)  # fmt: skip
# No float32 holds its values.
PRECISE = FieldSpec("precise", "atom", (3,), "float64", "eV")
FIELDS = ("precise", "node", "vector", "bare", "atomic_energy", "energy", "pooled")
SIGNALS = {
    "node": "teacher_node_embeddings",
    "atomic_energy": "teacher_atomic_energies",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Single atoms, cells without and with periodic axes, missing labels; ids and groups of ODD."""
    sample, fields = make_sample(), (*TEACHER, PRECISE)
    path = write_store(tmp_path_factory.mktemp("odd") / "odd.zarr", sample, ())
    write_all(add_teacher(path, "painn", teacher_entry(fields=fields), fields), sample)
    index = read_index(path, 20)
    ids = np.array(ODD, object)[index.source_index]
    groups = np.roll(np.array(ODD, object), 1)[index.source_index]
    (path / INDEX).write_bytes(replace(index, structure_id=ids, group=groups).to_bytes())
    reseal(path)
    return open_store(path)


def expected(store: Store, field: str, row: int) -> np.ndarray:
    """Rows of a structure as the store decodes them."""
    name, block = f"teachers/painn/{field}", int(store.index.block[row])
    index, plan = store.index, store.plan
    first, n = int(index.structure_row[row]) - block * plan.structure_capacity, 1
    if store.spec(name).level == "atom":
        first = int(index.atom_start[row]) - block * plan.atom_capacity
        n = int(index.n_atoms[row])
    return np.asarray(store.read(name, [block])[first : first + n])


def same(found: Any, values: np.ndarray) -> None:
    """Equal as numbers of the type the store gives; float16 widens without loss."""
    wide = values.astype(np.float32) if values.dtype == np.float16 else values
    np.testing.assert_array_equal(np.reshape(found, wide.shape).astype(wide.dtype), wide)


def test_three_readers_get_what_the_store_holds(
    odd: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written in several runs, as more atoms would be.
    monkeypatch.setattr("kdcache.interchange.nvalchemi.ATOMS_AT_ONCE", 10)
    monkeypatch.setattr("kdcache.interchange.parquet.ROWS_AT_ONCE", 3)
    selection = select(odd, teacher="painn", fields=FIELDS)
    frames = ase.io.read(write_extxyz(selection, tmp_path / "a.extxyz"), ":")
    rows = pq.read_table(write_parquet(selection, tmp_path / "a.parquet")).to_pylist()
    group = zarr.open_group(write_nvalchemi(selection, tmp_path / "a.zarr"), mode="r")
    arrays: dict[str, Any] = {name: np.asarray(array) for name, array in group["core"].arrays()}  # type: ignore[union-attr]
    ends = np.asarray(group["meta/atoms_ptr"])
    assert len(frames) == len(rows) == len(ends) - 1 == len(odd)
    for k, (atoms, row) in enumerate(zip(frames, rows, strict=True)):
        place = int(odd.index.source_order[k])
        structure, own = odd.structure(place), slice(ends[k], ends[k + 1])
        assert row["structure_id"] == atoms.info["structure_id"] == ODD[k]
        assert row["config_type"] == atoms.info["config_type"] == ODD[k - 1]
        for found in (atoms.numbers, row["atomic_numbers"], arrays["atomic_numbers"][own]):
            np.testing.assert_array_equal(found, structure.atomic_numbers)
        for found in (atoms.positions, row["positions"], arrays["positions"][own]):
            same(found, structure.positions)
        for found in (atoms.cell[:], row["cell"], arrays["cell"][k]):
            same(found, structure.cell)
        for found in (atoms.pbc, row["pbc"], arrays["pbc"][k]):
            same(found, structure.pbc)
        if structure.energy is None or structure.forces is None:
            assert atoms.calc is row["energy"] is row["forces"] is None
            assert np.isnan(arrays["energy"][k]).all()
            assert np.isnan(arrays["forces"][own]).all()
        else:
            for found in (atoms.get_potential_energy(), row["energy"], arrays["energy"][k, 0]):
                assert found == structure.energy
            for found in (atoms.get_forces(), row["forces"], arrays["forces"][own]):
                same(found, structure.forces)
        for field in FIELDS:
            values, name = expected(odd, field, place), f"painn_{field}"
            signal = SIGNALS.get(field, f"teacher_{field}")
            of_atoms = odd.spec(f"teachers/painn/{field}").level == "atom"
            same(atoms.arrays[name] if of_atoms else atoms.info[name], values)
            same(row[name], values)
            same(arrays[signal][own if of_atoms else k], values)


def test_our_reader_gets_the_names(odd: Store, tmp_path: Path) -> None:
    path = write_extxyz(select(odd), tmp_path / "a.extxyz")
    read = ReadOptions(id_key="structure_id", group_key="config_type", unlabelled=True)
    found = list(read_structures(path, read))
    assert [one.structure_id for one in found] == list(ODD)
    assert [one.group for one in found] == [ODD[k - 1] for k in range(20)]


@given(st.text(min_size=1))
@example("1e5")
@example("nan")
@example("-")
@example("\u2028")
@example("a\x00")
@example("_JSON")
@example("[1 2]")
def test_any_text_stays_itself_and_in_its_line(text: str) -> None:
    line: str = key_val_dict_to_str({"structure_id": _text(text)})  # type: ignore[no-untyped-call]
    assert len(line.splitlines()) == 1
    found = key_val_str_to_dict(line)  # type: ignore[no-untyped-call]
    assert set(found) == {"structure_id"}
    # Numbers that are written like the text may stay numbers.
    assert str(found["structure_id"]) == text


def test_a_field_that_would_take_anothers_name_is_refused(tmp_path: Path) -> None:
    sample = make_sample()
    path = write_store(tmp_path / "s.zarr", sample, ())
    fields = (FieldSpec("id", "atom", (2,)), FieldSpec("node", "atom", (2,)))
    write_all(add_teacher(path, "structure", teacher_entry(fields=fields), fields), sample)
    store = open_store(path)
    with pytest.raises(ConfigError, match="structure/id would be called structure_id"):
        select(store, teacher="structure", fields=["id", "node"])
    assert len(select(store, teacher="structure", fields=["node"])) == 20
