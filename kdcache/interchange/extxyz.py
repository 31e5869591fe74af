"""Extended XYZ out of a store, every number as it is.

ASE's own writer keeps eight decimals; this one writes the shortest text that reads back as the same
number. Invariant: ASE and our reader get what the store holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict

from kdcache.interchange.selection import Selection, Taken, new_output
from kdcache.progress import Progress, silent

Array = npt.NDArray[Any]


def write_extxyz(selection: Selection, path: str | Path, *, progress: Progress = silent) -> Path:
    """Write structures, labels and a teacher's fields to an extended XYZ file.

    Labels are `energy` and `forces`, the teacher's fields `<teacher>_<field>`: in the comment line
    for structures, columns for atoms. Ids, splits and groups are structure_id, split, config_type.

    Args:
        selection: what is written.
        path: of a new file.
        progress: shows structures.

    Returns:
        The path.

    Raises:
        StoreError: something is there already, or a shard is damaged.
    """
    with (
        new_output(path) as partial,
        open(partial, "w", encoding="utf-8", newline="\n") as file,
        progress("export", len(selection), "structures") as advance,
    ):
        for taken in selection:
            _write(file, taken, selection)
            advance()
    return Path(path)


def _write(file: TextIO, taken: Taken, selection: Selection) -> None:
    structure = taken.structure
    info: dict[str, Any] = {}
    if structure.cell.any():
        info["Lattice"] = _numbers(structure.cell)
    columns: list[tuple[str, str, Array]] = [("pos", "R", structure.positions)]
    if structure.fixed is not None and structure.fixed.any():
        # ASE's column says which atoms may move.
        columns.append(("move_mask", "L", ~structure.fixed))
    if structure.tags is not None:
        columns.append(("tags", "I", structure.tags))
    if structure.forces is not None:
        columns.append(("forces", "R", structure.forces))
    known: dict[str, Any] = {}
    if structure.energy is not None:
        known["energy"] = structure.energy
    for spec in selection.specs if taken.fields is not None else ():
        assert taken.fields is not None
        values, name = taken.fields[spec.name], f"{selection.prefix}_{spec.name}"
        if spec.level == "atom":
            columns.append((name, "R", values.reshape(len(values), -1)))
        else:
            known[name] = float(values[0]) if not spec.shape else values[0].ravel().astype(float)
    known["structure_id"] = _text(structure.structure_id)
    for key, text in (("split", structure.split), ("config_type", structure.group)):
        if text:
            known[key] = _text(text)
    if structure.origin != "data":
        known["origin"] = _text(structure.origin)
    widths = [f"{name}:{kind}:{array[0].size}" for name, kind, array in columns]
    info["Properties"] = ":".join(["species:S:1", *widths])
    info["pbc"] = " ".join("T" if flag else "F" for flag in structure.pbc)
    file.write(f"{structure.n_atoms}\n{key_val_dict_to_str(info | known)}\n")  # type: ignore[no-untyped-call]
    texts = [_texts(kind, array) for _, kind, array in columns]
    for k, number in enumerate(structure.atomic_numbers.tolist()):
        file.write(" ".join([chemical_symbols[number], *(rows[k] for rows in texts)]) + "\n")


def _texts(kind: str, array: Array) -> list[str]:
    """The text of each row."""
    rows = array.reshape(len(array), -1)
    if kind == "L":
        return [" ".join("T" if flag else "F" for flag in row) for row in rows.tolist()]
    return [" ".join(map(repr, row)) for row in _plain(rows).tolist()]


def _plain(values: Array) -> Array:
    """Float32 as the shortest text of its own precision, not of the float64 it widens to."""
    if values.dtype == np.float32:
        return np.array([[float(str(x)) for x in row] for row in values]).reshape(values.shape)
    return values


def _text(value: str) -> str:
    """A value of the comment line that ASE and our reader read back as the same text.

    As JSON, which both know, where it would be read as something else: "007", "T", "1 2 3", or a
    break of the line, after which atoms of somebody's choice would begin.
    """
    if value.isprintable() and not value.startswith("_JSON"):
        plain = _escaped(value)
        line = key_val_dict_to_str({"x": plain})  # type: ignore[no-untyped-call]
        found = key_val_str_to_dict(line)  # type: ignore[no-untyped-call]
        if np.ndim(found.get("x", [])) == 0 and str(found["x"]) == value:
            return plain
    return _escaped(f"_JSON {json.dumps(value)}")


def _escaped(value: str) -> str:
    # ASE writes backslashes as they are and reads them as escapes.
    return value.replace("\\", "\\\\")


def _numbers(values: Array) -> str:
    return " ".join(map(repr, values.ravel().tolist()))
