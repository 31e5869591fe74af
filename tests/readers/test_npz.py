"""npz in the rMD17 manner."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import DataError, UnitError
from kdcache.readers import ReadOptions, read_structures
from tests.readers.identity import assert_same, numbered_structure

EV = ReadOptions(energy_unit="eV")


def arrays(n: int = 6, n_atoms: int = 4) -> dict[str, Any]:
    """rMD17's arrays for molecules whose numbers do not change."""
    found = [numbered_structure(5 * s, n_atoms, periodic=False) for s in range(n)]
    return {
        "R": np.stack([s.positions for s in found]),
        "z": found[0].atomic_numbers.astype(np.uint8),
        "E": np.array([s.energy for s in found]),
        "F": np.stack([s.forces for s in found]),
    }


def save(path: Path, **changed: Any) -> Path:
    np.savez(path, **{k: v for k, v in {**arrays(), **changed}.items() if v is not None})
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        {},
        {"R": "coords", "z": "nuclear_charges", "E": "energies", "F": "forces"},
    ],
)
def test_both_spellings_are_read(tmp_path: Path, names: dict[str, str], compressed: bool) -> None:
    path = tmp_path / "ethanol.npz"
    write = np.savez_compressed if compressed else np.savez
    write(path, **{names.get(k, k): v for k, v in arrays().items()}, old_indices=np.arange(6))
    found = list(read_structures(path, EV))
    assert [s.structure_id for s in found] == [f"ethanol:{i}" for i in range(6)]
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(5 * s, 4, periodic=False))


def test_rmd17_units_reach_ev_and_ev_per_angstrom(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    (first, *_) = read_structures(path, ReadOptions(energy_unit="kcal/mol"))
    plain = arrays()
    assert first.energy == pytest.approx(0.0433641 * plain["E"][0], rel=1e-6)
    np.testing.assert_allclose(first.forces, 0.0433641 * plain["F"][0], rtol=1e-6)
    np.testing.assert_array_equal(first.positions, plain["R"][0])


def test_a_file_without_units_is_not_taken_for_ev(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match=r"a.npz does not say its units.*--energy-unit"):
        list(read_structures(save(tmp_path / "a.npz")))


def test_numbers_of_each_structure_and_padding(tmp_path: Path) -> None:
    z = np.tile(arrays()["z"], (6, 1))
    z[2, 3] = 0
    z[4] = z[4][::-1]
    found = list(read_structures(save(tmp_path / "a.npz", z=z), EV))
    assert [s.n_atoms for s in found] == [4, 4, 3, 4, 4, 4]
    np.testing.assert_array_equal(found[4].atomic_numbers, z[4])
    np.testing.assert_array_equal(found[2].forces, arrays()["F"][2, :3])


def test_column_major_arrays_are_read_row_by_row(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", R=np.asfortranarray(arrays()["R"]))
    for s, structure in enumerate(read_structures(path, EV)):
        assert_same(structure, numbered_structure(5 * s, 4, periodic=False))


def test_energies_in_a_column_and_one_atom(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    one = arrays(3, 1)
    np.savez(path, **{**one, "E": one["E"][:, None]})
    for s, structure in enumerate(read_structures(path, EV)):
        assert_same(structure, numbered_structure(5 * s, 1, periodic=False))


@pytest.mark.parametrize("stacked", [False, True])
def test_cells_shared_or_one_each_make_structures_periodic(tmp_path: Path, stacked: bool) -> None:
    cells = np.diag([9.0, 10.0, 11.0]) + np.arange(6)[:, None, None] / 4
    path = save(tmp_path / "a.npz", cell=cells if stacked else cells[3])
    for s, structure in enumerate(read_structures(path, EV)):
        np.testing.assert_array_equal(structure.cell, cells[s if stacked else 3])
        assert structure.pbc.tolist() == [True, True, True]
    flags = np.array([True, False, True])
    for structure in read_structures(save(path, cell=cells, pbc=flags), EV):
        np.testing.assert_array_equal(structure.pbc, flags)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"E": arrays()["E"][:5]}, r"a.npz: E has 5 rows, R has 6"),
        ({"R": arrays()["R"][0]}, r"R must be \[n_structures, n_atoms, 3\], got \[4, 3\]"),
        ({"F": arrays()["F"][:, :3]}, r"a.npz, structure 0: forces has 9 values for 4 atoms"),
        ({"F": None}, r"a.npz has no forces.*F, forces.*--forces-key"),
        ({"R": None}, r"a.npz has no positions \(looked for R, coords"),
        ({"energies": arrays()["E"]}, r"a.npz has E and energies.*--energy-key E"),
        ({"E": np.where(np.arange(6) == 4, np.nan, 1.0)}, r"a.npz, structure 4: energy is nan"),
        ({"z": np.array([1, 6, 8, 200])}, r"a.npz, structure 0 has atomic number 200"),
        ({"z": np.zeros((6, 4), int)}, r"a.npz, structure 0 has no atoms"),
        ({"z": np.array(["C", "H", "X", "O"])}, r"a.npz, structure 0: 'X' is no element"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        list(read_structures(save(tmp_path / "a.npz", **changed), EV))


class Trap:
    """Unpickling this would raise something no reader raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_arrays_of_objects_are_refused_unread(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", E=np.array([Trap()] * 6, dtype=object))
    with pytest.raises(DataError, match=r"a.npz: E holds Python objects"):
        list(read_structures(path, EV))


def test_a_file_that_is_no_archive_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"a.npz cannot be read as an npz archive"):
        list(read_structures(path, EV))


def test_labels_may_be_missing_when_asked(tmp_path: Path) -> None:
    energies = np.where(np.arange(6) == 4, np.nan, arrays()["E"])
    path = save(tmp_path / "a.npz", E=energies, F=None)
    found = list(read_structures(path, ReadOptions(energy_unit="eV", unlabelled=True)))
    assert [s.energy is None for s in found] == [False, False, False, False, True, False]
    assert all(s.forces is None for s in found)


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    peaks = []
    for name, n in (("small", 700), ("large", 2_800)):
        path = tmp_path / f"{name}.npz"
        rows = arrays(1, 200)
        stacked = {k: np.repeat(v, n, axis=0) for k, v in rows.items() if k != "z"}
        np.savez(path, z=rows["z"], **stacked)
        tracemalloc.start()
        for _ in read_structures(path, EV):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The larger archive holds 20 MB more.
    assert peaks[1] < peaks[0] + 2_000_000


def test_named_tags_are_read_and_padding_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(
        path,
        R=np.arange(12.0).reshape(2, 2, 3),
        z=np.array([[1, 8], [1, 0]]),
        E=np.zeros(2),
        F=np.zeros((2, 2, 3)),
        layer=np.array([[0, 1], [2, 0]]),
    )
    found = list(read_structures(path, ReadOptions(energy_unit="eV", tags_key="layer")))
    assert [s.tags.tolist() for s in found if s.tags is not None] == [[0, 1], [2]]
    with pytest.raises(DataError, match="has no array 'tag'"):
        list(read_structures(path, ReadOptions(energy_unit="eV", tags_key="tag")))
