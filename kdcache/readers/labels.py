"""Which keys of a structure are its labels, its group, its split and its id.

For formats whose structures carry keys of their own (extended XYZ, ASE); tables have columns.
Invariant: within one dataset all energies come from one key and all forces from one, because two
keys are two levels of theory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import DataError, did_you_mean
from kdcache.readers.interface import ReadOptions, place
from kdcache.readers.units import UnitFactors
from kdcache.structures import FloatArray, IntArray, Structure

REFERENCE_KEYS = {"energy": "REF_energy", "forces": "REF_forces"}
GROUP_KEYS = ("config_type", "group")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class LabelKeys:
    """The keys taken while a dataset is read, and the first place of each.

    Attributes:
        taken: "energy" or "forces" to (key, where it was first taken).
        by_file: file name to what was taken from it, for the notes of an import.
    """

    taken: dict[str, tuple[str, str]] = field(default_factory=dict)
    by_file: dict[str, dict[str, str]] = field(default_factory=dict)

    def record(self, path: Path, quantity: str, key: str) -> None:
        """Note that labels of `path` are read from `key`, for a table with fixed columns."""
        self.by_file.setdefault(path.name, {})[quantity] = key

    def of_dataset(self) -> dict[str, str]:
        """Keys by quantity, over all files read so far."""
        found: dict[str, list[str]] = {}
        for taken in self.by_file.values():
            for quantity, key in taken.items():
                if key not in found.setdefault(quantity, []):
                    found[quantity].append(key)
        return {quantity: ", ".join(names) for quantity, names in found.items()}

    def choose(
        self,
        quantity: str,
        path: Path,
        index: int,
        values: Mapping[str, Any],
        results: Mapping[str, Any],
        options: ReadOptions,
    ) -> Any:
        """The label `quantity` of one structure, or None where it has none.

        Args:
            quantity: "energy" or "forces".
            path, index: where the structure is.
            values: keys written in the file.
            results: the calculator's, as ASE gives them.
            options: with the user's keys.

        Raises:
            DataError: the structure's key is not the one the dataset began with.
        """
        named = options.energy_key if quantity == "energy" else options.forces_key
        reference = REFERENCE_KEYS[quantity]
        if named is not None:
            key = named
            value = values[named] if named in values else results.get(named)
        elif reference in values:
            key, value = reference, values[reference]
        else:
            key, value = quantity, results.get(quantity)
        if value is None:
            if named is not None and not options.unlabelled:
                known = [name for name in {**values, **results} if name]
                raise DataError(
                    f"{place(path, index)} has no {quantity} under {named!r}: "
                    f"{did_you_mean(named, known)}. Or pass --unlabelled."
                )
            return None
        first = self.taken.setdefault(quantity, (key, place(path, index)))
        if first[0] != key:
            raise DataError(
                f"{place(path, index)} has its {quantity} under {key!r}, {first[1]} under "
                f"{first[0]!r}. Labels of two methods would be mixed. Name one "
                f"(--{quantity}-key {first[0]}), or import the files apart."
            )
        self.record(path, quantity, key)
        return value


def label_structure(
    structure: Structure,
    path: Path,
    index: int,
    info: Mapping[str, Any],
    arrays: Mapping[str, Any],
    results: Mapping[str, Any],
    options: ReadOptions,
    factors: UnitFactors,
    keys: LabelKeys,
) -> Structure:
    """Fill in the labels, group, split and id of a structure.

    Args:
        structure: with numbers, positions, cell, pbc.
        path, index: where it is.
        info: keys of the structure.
        arrays: keys of its atoms.
        results: the calculator's.
        options: the user's keys.
        factors: to eV and eV/Å.
        keys: what the dataset's labels were taken from so far.

    Raises:
        DataError: a label is no number, keys are mixed, or a named key is missing.
    """
    where = place(path, index)
    energy = keys.choose("energy", path, index, info, results, options)
    forces = keys.choose("forces", path, index, arrays, results, options)
    if energy is not None and forces is not None:
        _refuse_two_sources(keys, where, options)
    if energy is not None:
        structure.energy = as_energy(energy, where) * factors.energy
    if forces is not None:
        structure.forces = as_array(forces, where, "forces") * factors.forces
    structure.group = _group(info, where, options.group_key)
    written = info.get(options.split_key or "split")
    structure.split = split_of(written, where, named=options.split_key)
    if written is not None and options.split_key != "none":
        keys.record(path, "split", "split" if structure.split else f"nothing ({written!r} is none)")
    if options.id_key is not None:
        structure.structure_id = str(_named(info, options.id_key, where, "--id-key"))
    if options.tags_key is not None:
        values = _named(arrays, options.tags_key, where, "--tags-key")
        structure.tags = as_integers(values, where, options.tags_key, 255).astype(np.uint8)
        keys.record(path, "tags", options.tags_key)
    return structure


def as_energy(value: Any, where: str) -> float:
    """One number out of what a file holds under an energy key.

    Raises:
        DataError: not one number.
    """
    array = as_array(value, where, "energy")
    if array.size != 1:
        raise DataError(f"{where}: energy must be one number, got {array.size}. Name another key.")
    return float(array.reshape(()))


def as_array(value: Any, where: str, name: str) -> FloatArray:
    """Float64 numbers out of what a file holds.

    Raises:
        DataError: not numbers.
    """
    try:
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise DataError(f"{where}: {name} must be numbers, got {shown}.") from error


def as_integers(value: Any, where: str, name: str, largest: int) -> IntArray:
    """[n] integers from 0 to `largest`, which a file may keep as floats.

    Raises:
        DataError: not such integers.
    """
    array = as_array(value, where, name).reshape(-1)
    if not ((array == np.round(array)) & (array >= 0) & (array <= largest)).all():
        raise DataError(f"{where}: {name} must be integers from 0 to {largest}.")
    return array.astype(np.int64)


def split_of(value: Any, where: str, *, named: str | None) -> str:
    """ "train", "val", "test", or "" where nothing is said.

    A key the user did not name is not taken for a split unless it reads like one.

    Raises:
        DataError: the user named the key and its value is no split.
    """
    if named == "none" or (value is None and named is None):
        return ""
    split = SPLITS.get(str(value).lower(), "")
    if named is not None and not split:
        raise DataError(
            f"{where}: split {named!r} is {value!r}, not train, val or test. Its structures would "
            "be trained on. Name another key (--split-key), or none."
        )
    return split


def _refuse_two_sources(keys: LabelKeys, where: str, options: ReadOptions) -> None:
    if options.energy_key is not None or options.forces_key is not None:
        return
    energy_key, forces_key = keys.taken["energy"][0], keys.taken["forces"][0]
    if (energy_key == "REF_energy") != (forces_key == "REF_forces"):
        raise DataError(
            f"{where} has its energy under {energy_key!r} but its forces under {forces_key!r}. "
            "Labels of two methods would be mixed. Name both keys (--energy-key, --forces-key)."
        )


def _group(info: Mapping[str, Any], where: str, named: str | None) -> str:
    if named is not None:
        return str(_named(info, named, where, "--group-key"))
    for key in GROUP_KEYS:
        if key in info:
            return str(info[key])
    return ""


def _named(info: Mapping[str, Any], key: str, where: str, option: str) -> Any:
    if key not in info:
        raise DataError(f"{where} has no {key!r} ({option}): {did_you_mean(key, info)}.")
    return info[key]
