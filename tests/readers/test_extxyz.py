"""Extended XYZ: ASE is the judge of what a file says."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from kdcache.errors import DataError, UnitError
from kdcache.readers import ReadOptions, read_structures
from kdcache.structures import Structure
from tests.readers.identity import as_atoms, assert_same, numbered_structure


def write(path: Path, n: int = 7, **info: object) -> Path:
    ase.io.write(path, [as_atoms(numbered_structure(s), **info) for s in range(n)])
    return path


def assert_as_ase_reads(path: Path, options: ReadOptions | None = None) -> int:
    count = 0
    found = read_structures(path, options)
    for structure, atoms in zip(found, ase.io.iread(path, ":"), strict=True):
        np.testing.assert_array_equal(structure.atomic_numbers, atoms.numbers)
        np.testing.assert_array_equal(structure.positions, atoms.positions)
        np.testing.assert_array_equal(structure.cell, atoms.cell.array)
        np.testing.assert_array_equal(structure.pbc, atoms.pbc)
        assert structure.energy == atoms.calc.results["energy"]
        if structure.forces is not None:
            np.testing.assert_array_equal(structure.forces, atoms.calc.results["forces"])
        count += 1
    return count


def test_every_value_comes_back_in_its_place(tmp_path: Path) -> None:
    found = list(read_structures(write(tmp_path / "data.extxyz")))
    assert [s.structure_id for s in found] == [f"data:{i}" for i in range(7)]
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(s))


@pytest.mark.proof
@pytest.mark.parametrize(
    "name",
    ["h2combustion/tiny_train", "h2combustion/irc", "3bpa/train_mixedT", "wbe/bulk_val"],
)
def test_real_files_read_as_ase_reads_them(shared: Path, name: str) -> None:
    assert assert_as_ase_reads(shared / "data" / f"{name}.extxyz") > 0


@pytest.mark.proof
def test_isolated_atoms_have_energies_and_no_forces(shared: Path) -> None:
    path = shared / "data" / "3bpa" / "iso_atoms.extxyz"
    with pytest.raises(DataError, match=r"iso_atoms.extxyz, structure 0 has no forces"):
        list(read_structures(path))
    assert assert_as_ase_reads(path, ReadOptions(unlabelled=True)) == 4


@pytest.mark.parametrize(
    "comment",
    [
        'Lattice="4 0 0 0 5 0 1 2 6" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1',
        'Lattice="4 0 0 0 5 0 1 2 6" pbc="T F T" '
        "Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.5e1",
        'Properties=Z:I:1:pos:R:3:mass:R:1:forces:R:3 energy=3 pbc=T Lattice="4 0 0 0 5 0 0 0 6"',
        "Properties=forces:R:3:pos:R:3:species:S:1 energy=1",
        'Properties=species:S:1:pos:R:3:forces:R:3 energy=1 note="a \\"b\\" = c" flag {x y}',
    ],
)
def test_the_comment_line_means_what_ase_says(tmp_path: Path, comment: str) -> None:
    columns = {"Z:I": "6 0.1 0.2 -3e-1 12.0 1 2 3", "forces:R:3:pos": "1 2 3 0.1 0.2 -3e-1 c"}
    row = next((r for k, r in columns.items() if f"={k}" in comment), "C 0.1 0.2 -3e-1 1 2 3")
    path = tmp_path / "a.extxyz"
    path.write_text(f"2\n{comment}\n{row}\n{row}\n")
    assert assert_as_ase_reads(path) == 1


def test_structures_after_a_blank_line_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz", 2)
    path.write_text(path.read_text() + "\n\n" + path.read_text() + "\n")
    assert len(list(read_structures(path))) == 4


def test_compressed_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "plain.extxyz").read_bytes()))
    found = list(read_structures(path))
    assert [s.structure_id for s in found[:2]] == ["a:0", "a:1"]
    assert_same(found[4], numbered_structure(4))


def test_units_scale_energies_lengths_and_by_default_forces(tmp_path: Path) -> None:
    path = write(tmp_path / "a.extxyz")
    plain = list(read_structures(path))
    options = ReadOptions(energy_unit="Hartree", length_unit="Bohr")
    for before, after in zip(plain, read_structures(path, options), strict=True):
        assert after.energy == pytest.approx(27.211386 * before.energy, rel=1e-6)
        np.testing.assert_allclose(after.positions, 0.52917721 * before.positions, rtol=1e-7)
        np.testing.assert_allclose(after.cell, 0.52917721 * before.cell, rtol=1e-7)
        np.testing.assert_allclose(after.forces, 51.422067 * before.forces, rtol=1e-6)


def test_an_unknown_unit_is_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="did you mean Hartree"):
        read_structures(write(tmp_path / "a.extxyz"), ReadOptions(energy_unit="hartre"))


def damaged(path: Path, old: str, new: str, count: int = 1) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\nenergy=1\n", r"a.extxyz, structure 0 has no atoms"),
        ("2\nenergy=1\nH 0 0 0\n", r"structure 0 ends after 1 of 2 atoms"),
        ("1\nenergy=1\nH 0 0\n", r"structure 0 \(line 1\).*atom 0 has 3 columns"),
        ("1\nenergy=1\nQq 0 0 0\n", r"structure 0 \(line 1\).*'Qq' is no element"),
        ("1\nenergy=1\nH 0 zero 0\n", r"structure 0 \(line 1\).*could not convert"),
        ("1\nenergy=1\nH 0 0 0\nH 1 1 1\n", r"a.extxyz, line 4: a number of atoms"),
        ("1\nProperties=species:S:1 energy=1\nH\n", r"structure 0 \(line 1\).*pos"),
        ("hello\n", r"a.extxyz, line 1: a number of atoms.*'hello'"),
    ],
)
def test_a_damaged_file_is_named_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.extxyz"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        list(read_structures(path, ReadOptions(unlabelled=True)))
    assert "\n" not in str(caught.value)


def test_nan_is_refused_naming_the_structure(tmp_path: Path) -> None:
    path = damaged(write(tmp_path / "a.extxyz"), "energy=-302.0", "energy=NaN")
    with pytest.raises(DataError, match=r"a.extxyz, structure 3: energy is nan"):
        list(read_structures(path))


def frames(*kinds: str) -> list[Atoms]:
    """Frames with labels under "REF" keys, in a calculator, both, or none."""
    made = []
    for s, kind in enumerate(kinds):
        structure = numbered_structure(s)
        atoms = as_atoms(structure)
        if kind in ("ref", "both"):
            atoms.info["REF_energy"] = structure.energy + 1000.0
            atoms.arrays["REF_forces"] = structure.forces + 1000.0
        if kind not in ("calc", "both"):
            atoms.calc = None
        made.append(atoms)
    return made


def read_frames(path: Path, images: list[Atoms], **options: object) -> list[Structure]:
    ase.io.write(path, images, format="extxyz")
    return list(read_structures(path, ReadOptions(**options)))


def test_reference_keys_come_before_the_calculator(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    found = read_frames(path, frames("both", "ref"))
    for s, structure in enumerate(found):
        assert structure.energy == numbered_structure(s).energy + 1000.0
        np.testing.assert_array_equal(structure.forces, numbered_structure(s).forces + 1000.0)
    named = list(read_structures(path, ReadOptions(energy_key="REF_energy")))
    assert [s.energy for s in named] == [s.energy for s in found]


def test_the_notes_say_which_keys_were_taken(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.extxyz", frames("ref"), format="extxyz")
    dataset = read_structures(tmp_path / "a.extxyz")
    list(dataset)
    assert dataset.notes == ["a.extxyz: energy from REF_energy, forces from REF_forces"]


@pytest.mark.parametrize("kinds", [("ref", "calc"), ("calc", "both"), ("calc", "ref")])
def test_two_keys_in_one_dataset_are_refused(tmp_path: Path, kinds: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"structure 1 has its energy under.*structure 0 under"):
        read_frames(tmp_path / "a.extxyz", frames(*kinds))


def test_two_keys_in_two_files_are_refused_naming_both(tmp_path: Path) -> None:
    for name, kind in (("a", "ref"), ("b", "calc")):
        ase.io.write(tmp_path / f"{name}.extxyz", frames(kind), format="extxyz")
    with pytest.raises(DataError, match=r"b.extxyz, structure 0.*a.extxyz, structure 0"):
        list(read_structures(str(tmp_path / "*.extxyz")))


def test_energy_and_forces_of_two_sources_are_refused(tmp_path: Path) -> None:
    images = frames("both")
    del images[0].arrays["REF_forces"]
    with pytest.raises(DataError, match="energy under 'REF_energy' but its forces under 'forces'"):
        read_frames(tmp_path / "a.extxyz", images)


def test_a_named_key_that_is_missing_is_refused_with_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"structure 0 has no energy.*did you mean REF_energy"):
        read_frames(tmp_path / "a.extxyz", frames("ref"), energy_key="REF_enrgy")


def test_structures_without_labels_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.extxyz"
    with pytest.raises(DataError, match=r"a.extxyz, structure 1 has no energy"):
        read_frames(path, frames("calc", "none"))
    found = list(read_structures(path, ReadOptions(unlabelled=True)))
    assert found[0].energy is not None
    assert found[1].energy is None
    assert found[1].forces is None


def test_groups_splits_and_ids_come_from_keys(tmp_path: Path) -> None:
    structure = numbered_structure(0)
    for value, expected in (("valid", "val"), ("TRAIN", "train"), ("irc", "")):
        path = tmp_path / f"{value}.extxyz"
        atoms = as_atoms(structure, config_type="bulk", rxn=7, split=value, name="x1")
        ase.io.write(path, atoms)
        (plain,) = read_structures(path)
        assert (plain.group, plain.split, plain.structure_id) == ("bulk", expected, f"{value}:0")
        (named,) = read_structures(
            path, ReadOptions(group_key="rxn", id_key="name", split_key="none")
        )
        assert (named.group, named.split, named.structure_id) == ("7", "", "x1")
    with pytest.raises(DataError, match=r"split 'split' is 'irc', not train, val or test"):
        list(read_structures(tmp_path / "irc.extxyz", ReadOptions(split_key="split")))
    with pytest.raises(DataError, match=r"no 'rxm' \(--group-key\): did you mean rxn"):
        list(read_structures(tmp_path / "irc.extxyz", ReadOptions(group_key="rxm")))


def peak_bytes(path: Path) -> int:
    """Peak memory of a pass over a file, beyond what one pass warmed up."""
    for _ in read_structures(path):
        pass
    tracemalloc.start()
    for _ in read_structures(path):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_a_file_eight_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    small, large = tmp_path / "small.extxyz", tmp_path / "large.extxyz"
    ase.io.write(small, [as_atoms(numbered_structure(s, 40)) for s in range(50)])
    large.write_text(small.read_text() * 8)
    first, second = peak_bytes(small), peak_bytes(large)
    # An index of frames or a list of structures would show: the larger file is 1.3 MB longer.
    assert large.stat().st_size - small.stat().st_size > 1_000_000
    assert second < first + 20_000
