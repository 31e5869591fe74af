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
    assert dataset.notes == [
        "md.traj: energy from energy, forces from forces, fixed atoms from FixAtoms"
    ]
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


@pytest.mark.parametrize("format_name", ["extxyz", "ase"])
def test_constraints_are_fixed_atoms_and_tags_are_read_when_named(
    tmp_path: Path, format_name: str
) -> None:
    images = [as_atoms(numbered_structure(s)) for s in range(6)]
    for s, atoms in enumerate(images):
        atoms.set_tags(np.arange(len(atoms)) % 3)
        atoms.set_constraint(FixAtoms([len(atoms) - 1]))
        # ASE leaves the column out where an image has no constraint, and so does nothing here.
        if s == 4:
            atoms.set_constraint()
    path = tmp_path / "a.extxyz"
    ase.io.write(path, images, columns=["symbols", "positions", "tags", "move_mask"])
    options = ReadOptions(format=format_name, unlabelled=True)
    for s, structure in enumerate(read_structures(path, options)):
        assert structure.tags is None  # they are layers as often as not
        n_atoms = structure.n_atoms
        fixed = [False] * n_atoms if structure.fixed is None else structure.fixed.tolist()
        assert fixed == [s != 4 and k == n_atoms - 1 for k in range(n_atoms)]
    named = ReadOptions(format=format_name, unlabelled=True, tags_key="tags")
    for structure in read_structures(path, named):
        assert structure.tags is not None
        assert structure.tags.tolist() == [k % 3 for k in range(structure.n_atoms)]
    missing = ReadOptions(format=format_name, unlabelled=True, tags_key="layers")
    with pytest.raises(DataError, match="--tags-key"):
        list(read_structures(path, missing))


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
