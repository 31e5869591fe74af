"""Other formats of ASE and its databases."""

from __future__ import annotations

from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms

from kdcache.errors import DataError
from kdcache.readers import ReadOptions, read_structures
from tests.readers.identity import as_atoms, assert_same, numbered_structure


def test_a_trajectory_is_read_with_raw_forces_on_fixed_atoms(tmp_path: Path) -> None:
    images = [as_atoms(numbered_structure(s)) for s in range(6)]
    for atoms in images:
        atoms.set_constraint(FixAtoms([0]))
    path = tmp_path / "md.traj"
    ase.io.write(path, images)
    dataset = read_structures(path)
    found = list(dataset)
    assert dataset.notes == ["md.traj: energy from energy, forces from forces"]
    assert [s.structure_id for s in found] == [f"md:{s}" for s in range(6)]
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(s))


def test_the_ase_reader_and_ours_agree_on_extended_xyz(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    ase.io.write(path, [as_atoms(numbered_structure(s)) for s in range(6)])
    ours = read_structures(path)
    theirs = read_structures(path, ReadOptions(format="ase"))
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_a_database_is_read_in_the_order_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        for s in range(6):
            structure = numbered_structure(s)
            database.write(
                as_atoms(structure),
                name=f"n{s}",
                config_type=f"kind{s % 2}",
                split="test" if s == 3 else "train",
                dft_energy=structure.energy + 0.5,
                data={"dft_forces": structure.forces + 0.5},
            )
    for s, structure in enumerate(read_structures(path)):
        assert_same(structure, numbered_structure(s))
        assert (structure.group, structure.split) == (f"kind{s % 2}", "test" if s == 3 else "train")
    options = ReadOptions(id_key="name", energy_key="dft_energy", forces_key="dft_forces")
    for s, structure in enumerate(read_structures(path, options)):
        assert structure.structure_id == f"n{s}"
        assert structure.energy == numbered_structure(s).energy + 0.5
        np.testing.assert_array_equal(structure.forces, numbered_structure(s).forces + 0.5)


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.unheard"])
def test_a_file_ase_cannot_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nothing of the kind\n" * 20)
    with pytest.raises(DataError, match=rf"^{name} cannot be read as [^\n]*$"):
        list(read_structures(tmp_path / name))
