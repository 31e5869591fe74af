"""HDF5 in the ANI manner."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from kdcache.errors import DataError, UnitError
from kdcache.readers import ReadOptions, read_structures
from tests.readers.identity import assert_same, numbered_structure

EV = ReadOptions(energy_unit="eV")
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 29: "Cu"}


def fill(group: h5py.Group, start: int, n: int, n_atoms: int, species: str = "numbers") -> None:
    """Structures 5 * start, 5 * (start + 1), ...: all of the same elements."""
    found = [numbered_structure(5 * (start + s), n_atoms, periodic=False) for s in range(n)]
    group["coordinates"] = np.stack([s.positions for s in found])
    group["energies"] = np.array([s.energy for s in found])
    group["forces"] = np.stack([s.forces for s in found])
    numbers = found[0].atomic_numbers
    symbols = [SYMBOLS[int(number)] for number in numbers]
    group["species"] = {
        "numbers": numbers.astype(np.int32),
        "bytes": np.array(symbols, dtype="S"),
        "strings": symbols,
        "each": np.stack([s.atomic_numbers for s in found]).astype(np.uint8),
    }[species]


@pytest.mark.parametrize("species", ["numbers", "bytes", "strings", "each"])
def test_nested_groups_are_read_in_order(tmp_path: Path, species: str) -> None:
    path = tmp_path / "ani.h5"
    with h5py.File(path, "w") as file:
        fill(file.create_group("gdb_s01/a"), 0, 2, 1, species)
        fill(file.create_group("gdb_s01/b"), 2, 3, 4, species)
        fill(file.create_group("gdb_s02"), 5, 1, 3, species)
    found = list(read_structures(path, EV))
    assert [s.structure_id for s in found] == [f"ani:{i}" for i in range(6)]
    assert [s.group for s in found] == ["gdb_s01/a"] * 2 + ["gdb_s01/b"] * 3 + ["gdb_s02"]
    sizes = (1, 1, 4, 4, 4, 3)
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(5 * s, sizes[s], periodic=False))


def test_arrays_at_the_root_belong_to_no_group(tmp_path: Path) -> None:
    path = tmp_path / "ani.hdf5"
    with h5py.File(path, "w") as file:
        fill(file, 0, 2, 3)
    assert [s.group for s in read_structures(path, EV)] == ["", ""]


def test_ani_units_are_asked_for_and_applied(tmp_path: Path) -> None:
    path = tmp_path / "ani.h5"
    with h5py.File(path, "w") as file:
        fill(file.create_group("a"), 1, 1, 2)
    with pytest.raises(UnitError, match=r"ani.h5 does not say its units.*Hartree"):
        list(read_structures(path))
    (found,) = read_structures(path, ReadOptions(energy_unit="Ha"))
    expected = numbered_structure(5, 2, periodic=False)
    assert found.energy == pytest.approx(27.211386 * expected.energy, rel=1e-6)
    np.testing.assert_allclose(found.forces, 27.211386 * expected.forces, rtol=1e-6)


def test_named_keys_as_in_ani_1x(tmp_path: Path) -> None:
    path = tmp_path / "ani1x.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("H2")
        fill(group, 0, 2, 2)
        group.move("energies", "wb97x_dz.energy")
        group.move("forces", "wb97x_dz.forces")
        group["ccsd(t)_cbs.energy"] = np.full(2, np.nan)
    options = ReadOptions(
        energy_unit="eV", energy_key="wb97x_dz.energy", forces_key="wb97x_dz.forces"
    )
    for s, structure in enumerate(read_structures(path, options)):
        assert_same(structure, numbered_structure(5 * s, 2, periodic=False))
    with pytest.raises(DataError, match=r"group H2 has no array 'wb97x'"):
        list(read_structures(path, ReadOptions(energy_unit="eV", energy_key="wb97x")))


def test_cells_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        fill(file, 0, 2, 2)
        file["cell"] = np.diag([7.0, 8.0, 9.0])
    for structure in read_structures(path, EV):
        assert structure.pbc.all()
        np.testing.assert_array_equal(structure.cell, np.diag([7.0, 8.0, 9.0]))


def test_errors_name_file_group_and_structure(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        fill(file.create_group("ok"), 0, 2, 2)
        fill(file.create_group("unlucky"), 2, 3, 2)
        file["unlucky/energies"][1] = np.nan
    with pytest.raises(DataError, match=r"a.h5, structure 3: energy is nan"):
        list(read_structures(path, EV))
    with h5py.File(path, "a") as file:
        del file["unlucky/forces"]
    with pytest.raises(DataError, match=r"a.h5, group unlucky has no forces"):
        list(read_structures(path, EV))


def test_external_links_are_not_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        fill(file.create_group("secret"), 0, 1, 2)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file.create_group("ok"), 0, 1, 2)
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/secret")
        file["around"] = h5py.SoftLink("/")
    assert len(list(read_structures(tmp_path / "a.h5", EV))) == 1


def test_a_file_without_coordinates_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match=r"a.h5 has no group with one of R, coords"):
        list(read_structures(path, EV))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a.h5 cannot be read as HDF5"):
        list(read_structures(path, EV))


def test_a_missing_h5py_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"pip install kdcache\[hdf5\]"):
        list(read_structures(tmp_path / "a.h5", EV))
