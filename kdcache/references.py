"""Reference energies of elements: what is taken off total energies before a model sees them.

Fitted, read off isolated atoms, or given. Numpy only; where they are recorded and added back is the
caller's. Invariant: references are eV by atomic number, and an element without one is an error,
never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols

from kdcache.errors import ConfigError, DataError, ShapeError, did_you_mean
from kdcache.structures import FloatArray, IntArray, Structure

# Two energies of one isolated atom nearer than this (eV) are one, printed with other digits.
SAME_ATOM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class ReferenceFit:
    """References fitted to total energies.

    Attributes:
        references: eV by atomic number.
        rank: independent compositions among the structures, at most the number of elements.
        rmse: eV per structure, what the references leave of the energies.
    """

    references: dict[int, float]
    rank: int
    rmse: float

    @property
    def note(self) -> str:
        """What a user must know about the fit, in one line."""
        n_elements = len(self.references)
        elements = ", ".join(chemical_symbols[number] for number in sorted(self.references))
        line = f"least-squares references for {elements}, {self.rmse:.6g} eV RMSE left"
        if self.rank == n_elements:
            return line
        return (
            f"{line}; {n_elements} elements occur in only {self.rank} independent compositions, so "
            "the smallest references of all that fit equally well were taken: single values have "
            "no meaning, and other compositions will be off"
        )


def fit_references(
    atomic_numbers: npt.NDArray[np.integer],
    structure_index: npt.NDArray[np.integer],
    energies: FloatArray,
    weights: FloatArray | None = None,
) -> ReferenceFit:
    """The references that leave the least of the energies, by (weighted) least squares.

    Solves min_r Σ_s w_s (E_s - Σ_e n_se r_e)², with the minimum-norm solution where compositions
    do not determine r (a dataset of one molecule).

    Args:
        atomic_numbers: [n_atoms].
        structure_index: [n_atoms], the structure of each atom, counted from 0.
        energies: [n_structures] eV; structures with NaN are left out.
        weights: [n_structures], positive; None counts as ones.

    Raises:
        DataError: no structure has an energy.
        ShapeError: the lengths do not fit each other.

    Source: ours (ordinary least squares over compositions).
    """
    if len(atomic_numbers) != len(structure_index):
        raise ShapeError(
            f"{len(atomic_numbers)} atomic numbers and {len(structure_index)} structure indices: "
            "one of each per atom is needed."
        )
    if len(structure_index) and structure_index.max() >= len(energies):
        raise ShapeError(
            f"an atom belongs to structure {structure_index.max()}, but there are "
            f"{len(energies)} energies."
        )
    elements, column = np.unique(atomic_numbers, return_inverse=True)
    cells = structure_index * len(elements) + column.reshape(-1)
    counts = np.bincount(cells, minlength=len(energies) * len(elements)).astype(np.float64)
    counts = counts.reshape(len(energies), len(elements))
    weight = np.ones(len(energies)) if weights is None else np.asarray(weights, np.float64)
    labelled = np.isfinite(energies) & (weight > 0)
    if not labelled.any():
        raise DataError(
            "No structure has an energy, so references cannot be fitted. Give them "
            "(references.mode given), or use none."
        )
    counts, energies, weight = counts[labelled], energies[labelled], weight[labelled]
    # Structures of one composition enter as one row with their mean energy: the same solution, and
    # the system is as small as the number of compositions.
    compositions, row = np.unique(counts, axis=0, return_inverse=True)
    row = row.reshape(-1)
    row_weight = np.bincount(row, weight)
    mean = np.bincount(row, weight * energies) / row_weight
    root = np.sqrt(row_weight)
    solution, _, rank, _ = np.linalg.lstsq(compositions * root[:, None], mean * root)
    left = energies - counts @ solution
    # An element that only unlabelled structures hold has no column of counts and no reference.
    references = {int(elements[e]): float(solution[e]) for e in np.flatnonzero(counts.sum(axis=0))}
    rmse = float(np.sqrt(np.average(left**2, weights=weight)))
    return ReferenceFit(references, int(rank), rmse)


def isolated_references(
    structures: Iterable[Structure], elements: Iterable[int] = ()
) -> dict[int, float]:
    """References from structures of a single atom.

    Args:
        structures: larger ones are passed over.
        elements: atomic numbers that must be among them.

    Returns:
        eV by atomic number.

    Raises:
        DataError: an isolated atom without energy, two energies for one element, or an element
            without an isolated atom.
    """
    references: dict[int, float] = {}
    first: dict[int, str] = {}
    for structure in structures:
        if structure.n_atoms != 1:
            continue
        number = int(structure.atomic_numbers[0])
        symbol = chemical_symbols[number]
        if structure.energy is None:
            raise DataError(f"isolated atom {structure.structure_id} ({symbol}) has no energy.")
        known = references.setdefault(number, structure.energy)
        named = first.setdefault(number, structure.structure_id)
        if abs(known - structure.energy) > SAME_ATOM_TOLERANCE:
            raise DataError(
                f"isolated atoms {named} and {structure.structure_id} are both {symbol}, with "
                f"{known} and {structure.energy} eV. Every energy would move by the difference. "
                "Keep the one in the spin state you mean."
            )
    missing = [chemical_symbols[number] for number in sorted(set(elements) - set(references))]
    if missing:
        found = ", ".join(chemical_symbols[number] for number in sorted(references)) or "none"
        raise DataError(
            f"no isolated atom of {', '.join(missing)} (found: {found}). Add single-atom "
            "structures with energies, or fit the references (references.mode least_squares)."
        )
    return references


def parse_references(text: str | Mapping[str | int, float]) -> dict[int, float]:
    """References as a person writes them.

    Args:
        text: "H=-13.6,O=-2041.8", or a mapping of symbols or atomic numbers to eV.

    Raises:
        ConfigError: an unknown element, one named twice, or a value that is no number.

    Example:
        >>> parse_references("H=-13.6, O=-2041.8")
        {1: -13.6, 8: -2041.8}
    """
    pairs: list[tuple[str, object]] = []
    if isinstance(text, str):
        for part in filter(str.strip, text.split(",")):
            name, _, written = part.partition("=")
            pairs.append((name.strip(), written.strip()))
    else:
        pairs = [(str(name), value) for name, value in text.items()]
    references: dict[int, float] = {}
    for name, value in pairs:
        number = _element(name)
        try:
            energy = float(str(value))
        except ValueError:
            energy = np.nan
        if not np.isfinite(energy):
            raise ConfigError(
                f"reference of {name} is {value!r}, not an energy in eV. Write H=-13.6,O=-2041.8."
            )
        if number in references:
            raise ConfigError(
                f"{name} has two references, {references[number]} and {energy} eV. Keep one."
            )
        references[number] = energy
    return references


def atom_references(
    references: Mapping[int, float], atomic_numbers: npt.NDArray[np.integer]
) -> FloatArray:
    """The reference of every atom: [n_atoms] eV.

    Raises:
        DataError: an element has no reference.
    """
    present: IntArray = np.unique(atomic_numbers).astype(np.int64)
    missing = [chemical_symbols[number] for number in present if int(number) not in references]
    if missing:
        known = ", ".join(chemical_symbols[number] for number in sorted(references)) or "none"
        raise DataError(
            f"no reference energy for {', '.join(missing)} (known: {known}). Counting zero would "
            "put their energies off by keV. Give one, or fit on data that holds them."
        )
    table = np.zeros(int(present.max(initial=0)) + 1)
    for number in present:
        table[number] = references[int(number)]
    result: FloatArray = table[atomic_numbers]
    return result


def total(references: Mapping[int, float], atomic_numbers: npt.NDArray[np.integer]) -> float:
    """The sum of the references of a structure's atoms, eV.

    Raises:
        DataError: an element has no reference.
    """
    return float(atom_references(references, atomic_numbers).sum())


def _element(name: str) -> int:
    if name.isdecimal() and 0 < int(name) < len(chemical_symbols):
        return int(name)
    number = NUMBER_OF_SYMBOL.get(name.capitalize(), 0)
    if number == 0:
        raise ConfigError(f"{name!r} is no element: {did_you_mean(name, _near(name))}.")
    return int(number)


def _near(name: str) -> list[str]:
    """Symbols with the same first letter: the whole table would be no help."""
    return [symbol for symbol in chemical_symbols[1:] if symbol[0] == name[:1].upper()]
