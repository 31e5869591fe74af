"""Units of energies, lengths and forces, and their factors to eV, Å and eV/Å.

Constants are ASE's (CODATA). Invariant: forces without a unit of their own are energy per length,
so that naming Hartree for the energies never leaves forces in eV/Å.
"""

from __future__ import annotations

from dataclasses import dataclass

import ase.units

from kdcache.errors import UnitError, did_you_mean

ENERGY_UNITS: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "Hartree": ase.units.Hartree,
    "Ry": ase.units.Rydberg,
    "kcal/mol": ase.units.kcal / ase.units.mol,
    "kJ/mol": ase.units.kJ / ase.units.mol,
}
LENGTH_UNITS: dict[str, float] = {"Å": 1.0, "Bohr": ase.units.Bohr, "nm": ase.units.nm}

# Other spellings, compared in lower case. "ev" and "mev" are safe: nobody's data is in MeV.
SPELLINGS: dict[str, str] = {
    "ha": "Hartree",
    "eh": "Hartree",
    "rydberg": "Ry",
    "a": "Å",
    "å": "Å",  # both letters that look so: U+00E5, and lower case of the Angstrom sign
    "ang": "Å",
    "angstrom": "Å",
    "ångström": "Å",
    "a0": "Bohr",
    "nanometer": "nm",
}


@dataclass(frozen=True, slots=True)
class UnitFactors:
    """What values are multiplied by to be in kdcache's units.

    Attributes:
        energy: to eV.
        forces: to eV/Å.
        length: to Å.
    """

    energy: float
    forces: float
    length: float


def unit_factors(energy: str, forces: str | None, length: str) -> UnitFactors:
    """Factors of the named units.

    Args:
        energy: eV, meV, Hartree (Ha), Ry, kcal/mol or kJ/mol.
        forces: an energy per length, e.g. "kcal/mol/Å"; None takes `energy` per `length`.
        length: Å (Angstrom, A), Bohr or nm.

    Raises:
        UnitError: a unit is unknown or of another quantity.
    """
    energy_factor = _factor(energy, "energy", ENERGY_UNITS)
    length_factor = _factor(length, "length", LENGTH_UNITS)
    if forces is None:
        forces_factor = energy_factor / length_factor
    else:
        numerator, slash, denominator = forces.strip().rpartition("/")
        if not slash:
            raise UnitError(
                f"forces unit {forces!r} is not an energy per length. Write it like eV/Å, "
                "Hartree/Bohr or kcal/mol/Å."
            )
        forces_factor = _factor(numerator, "forces (energy part)", ENERGY_UNITS) / _factor(
            denominator, "forces (length part)", LENGTH_UNITS
        )
    return UnitFactors(energy_factor, forces_factor, length_factor)


def _factor(name: str, quantity: str, known: dict[str, float]) -> float:
    by_lower_case = {unit.lower(): unit for unit in known}
    lower = name.strip().lower()
    unit = by_lower_case.get(lower) or SPELLINGS.get(lower, "")
    if unit not in known:
        raise UnitError(
            f"{name!r} is no unit of {quantity}: {did_you_mean(name.strip(), known)}. "
            "Taking it for another would scale every label."
        )
    return known[unit]
