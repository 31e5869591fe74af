"""Units against constants of the literature, not of the library under test."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import UnitError
from kdcache.readers.units import ENERGY_UNITS, LENGTH_UNITS, unit_factors

# CODATA 2018: hartree and rydberg in eV, bohr in Å; kJ/mol from e and the Avogadro constant.
LITERATURE = {
    "Hartree": 27.211386245988,
    "Ha": 27.211386245988,
    "Ry": 13.605693122994,
    "kJ/mol": 1.0 / 96.48533212,
    "kcal/mol": 4.184 / 96.48533212,
    "eV": 1.0,
    "meV": 0.001,
}


@pytest.mark.parametrize(("name", "factor"), LITERATURE.items())
def test_energy_units_agree_with_codata(name: str, factor: float) -> None:
    assert unit_factors(name, None, "Å").energy == pytest.approx(factor, rel=2e-7)


@pytest.mark.parametrize(
    ("name", "factor"), [("Å", 1.0), ("Angstrom", 1.0), ("Bohr", 0.529177210903), ("nm", 10.0)]
)
def test_length_units_agree_with_codata(name: str, factor: float) -> None:
    assert unit_factors("eV", None, name).length == pytest.approx(factor, rel=2e-8)


@given(st.sampled_from(sorted(ENERGY_UNITS)), st.sampled_from(sorted(LENGTH_UNITS)))
def test_forces_follow_energy_and_length_unless_named(energy: str, length: str) -> None:
    factors = unit_factors(energy, None, length)
    assert factors.forces == factors.energy / factors.length
    assert unit_factors("eV", f"{energy}/{length}", "Å").forces == factors.forces


def test_a_unit_with_a_slash_is_split_at_the_last_one() -> None:
    assert unit_factors("eV", "kcal/mol/Å", "Å").forces == pytest.approx(0.0433641, rel=1e-6)


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (("Hartee", None, "Å"), "did you mean Hartree"),
        (("eV", None, "bhor"), "did you mean Bohr"),
        (("eV", "eV", "Å"), "energy per length"),
        (("Å", None, "Å"), "no unit of energy"),
        (("eV", "eV/eV", "Å"), "no unit of forces"),
        (("", None, "Å"), "no unit of energy"),
    ],
)
def test_an_unknown_unit_is_refused(units: tuple[str, str | None, str], said: str) -> None:
    with pytest.raises(UnitError, match=said):
        unit_factors(*units)
