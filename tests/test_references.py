"""Reference energies: fitted, isolated, given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import ConfigError, DataError, ShapeError
from kdcache.readers import ReadOptions, read_structures
from kdcache.references import (
    atom_references,
    fit_references,
    isolated_references,
    parse_references,
    total,
)
from kdcache.structures import Structure

Compositions = list[dict[int, int]]
WATER = {1: 2, 8: 1}


def flat(compositions: Compositions) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers and structure index of structures with these compositions."""
    numbers, owners = [], []
    for row, composition in enumerate(compositions):
        for element, count in composition.items():
            numbers += [element] * count
            owners += [row] * count
    return np.array(numbers), np.array(owners)


@given(st.permutations([{1: 2, 8: 1}, {1: 2}, {6: 1, 8: 2}, {1: 4, 6: 1}, {8: 1}]))
def test_exact_energies_give_back_their_references(compositions: Compositions) -> None:
    true = {1: -13.6, 6: -1029.5, 8: -2041.25}
    numbers, owners = flat(compositions)
    energies = np.bincount(owners, [true[int(n)] for n in numbers])
    fit = fit_references(numbers, owners, energies)
    assert fit.references == pytest.approx(true, abs=1e-9)
    assert fit.rank == 3
    assert fit.rmse < 1e-9
    assert "no meaning" not in fit.note


def test_the_fit_agrees_with_a_direct_weighted_solution() -> None:
    generator = np.random.default_rng(3)
    compositions = [
        {1: int(a), 6: int(b), 29: int(c)} for a, b, c in generator.integers(0, 4, (200, 3)) + 1
    ]
    numbers, owners = flat(compositions)
    energies = generator.normal(size=200) - 30.0
    weights = generator.uniform(0.1, 3.0, 200)
    counts = np.array([[c[1], c[6], c[29]] for c in compositions], float)
    direct = np.linalg.solve(
        counts.T @ (weights[:, None] * counts), counts.T @ (weights * energies)
    )
    fit = fit_references(numbers, owners, energies, weights)
    assert list(fit.references) == [1, 6, 29]
    np.testing.assert_allclose(list(fit.references.values()), direct, rtol=1e-10)
    left = energies - counts @ direct
    assert fit.rmse == pytest.approx(np.sqrt((weights * left**2).sum() / weights.sum()))


def test_one_molecule_gets_the_smallest_references_and_says_so() -> None:
    numbers, owners = flat([WATER] * 3)
    fit = fit_references(numbers, owners, np.array([-76.0, -75.0, -74.0]))
    # Minimum norm along the composition (2, 1): -75 * (2, 1) / 5.
    assert fit.references == pytest.approx({1: -30.0, 8: -15.0})
    assert fit.rank == 1
    assert "only 1 independent compositions" in fit.note
    assert total(fit.references, np.array([1, 8, 1])) == pytest.approx(-75.0)


def test_structures_without_energy_are_left_out_with_their_elements() -> None:
    numbers, owners = flat([{1: 2}, {79: 1, 1: 1}, {1: 1}])
    fit = fit_references(numbers, owners, np.array([-2.0, np.nan, -1.0]))
    assert fit.references == pytest.approx({1: -1.0})
    with pytest.raises(DataError, match="No structure has an energy"):
        fit_references(numbers, owners, np.full(3, np.nan))


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 atomic numbers and 2"):
        fit_references(np.array([1, 1, 8]), np.array([0, 0]), np.array([1.0]))
    with pytest.raises(ShapeError, match="structure 1, but there are 1"):
        fit_references(np.array([1, 1]), np.array([0, 1]), np.array([1.0]))


def atom(number: int, energy: float | None, n_atoms: int = 1) -> Structure:
    return Structure(
        structure_id=f"atom-{number}-{energy}",
        atomic_numbers=np.full(n_atoms, number),
        positions=np.zeros((n_atoms, 3)),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        energy=energy,
    )


def test_isolated_atoms_are_the_structures_of_one_atom() -> None:
    structures = [atom(1, -13.6), atom(8, -5.0, n_atoms=2), atom(8, -2041.0), atom(1, -13.6)]
    assert isolated_references(structures, [1, 8]) == {1: -13.6, 8: -2041.0}


@pytest.mark.parametrize(
    ("structures", "said"),
    [
        ([atom(1, -13.6), atom(1, -12.5)], "atom-1--13.6 and atom-1--12.5 are both H"),
        ([atom(1, -13.6)], r"no isolated atom of O \(found: H\)"),
        ([atom(8, None)], r"atom-8-None \(O\) has no energy"),
        ([], r"no isolated atom of H, O \(found: none\)"),
    ],
)
def test_isolated_atoms_that_say_too_little_or_too_much(
    structures: list[Structure], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        isolated_references(structures, [8, 1])


@pytest.mark.proof
def test_isolated_atoms_of_a_published_dataset(shared: Path) -> None:
    path = shared / "data" / "3bpa" / "iso_atoms.extxyz"
    found = isolated_references(read_structures(path, ReadOptions(unlabelled=True)))
    # Hydrogen in this functional, near the exact -13.6057 eV.
    assert found[1] == pytest.approx(-13.587222780835477)
    assert sorted(found) == [1, 6, 7, 8]


def test_given_references_by_symbol_number_or_mapping() -> None:
    expected = {1: -13.6, 8: -2041.5}
    assert parse_references("H=-13.6, O=-2041.5") == expected
    assert parse_references("1=-13.6,8=-2.0415e3,") == expected
    assert parse_references({"H": -13.6, 8: -2041.5}) == expected
    assert parse_references("") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Hh=1", r"'Hh' is no element: did you mean H"),
        ("X=1", "'X' is no element"),
        ("0=1", "'0' is no element"),
        ("H", r"reference of H is ''"),
        ("H=nan", "reference of H is 'nan'"),
        ("H=-13.6,1=-13", "H has two references|1 has two references"),
    ],
)
def test_given_references_that_cannot_be_meant(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_references(text)


def test_an_element_without_reference_is_never_zero() -> None:
    references = {1: -13.6, 8: -2041.0}
    np.testing.assert_array_equal(
        atom_references(references, np.array([8, 1, 1])), [-2041.0, -13.6, -13.6]
    )
    with pytest.raises(DataError, match=r"no reference energy for C, Cu \(known: H, O\)"):
        total(references, np.array([1, 29, 6]))
    assert total(references, np.array([], int)) == 0.0
