"""Open Catalyst LMDB files: keys 0 … n−1 and length, each value a pickled torch-geometric Data.

Both layouts that published files have, torch-geometric 2 and before, one record at a time.
Invariant: nothing is unpickled unless the user allowed it, and then only the classes in `_allowed`;
torch is imported by reading a file, not by importing this module.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import DataError
from kdcache.pickles import (
    ForbiddenGlobalError,
    Function,
    Record,
    load_restricted,
    refused_name,
)
from kdcache.readers.interface import ReadOptions, place, unreadable
from kdcache.readers.labels import LabelKeys, as_array, as_integers, label_structure
from kdcache.structures import Structure

Array = npt.NDArray[Any]

LENGTH = b"length"
# Names of the labels, in the order they are looked for.
ENERGY_KEYS = ("y", "energy")
FORCES_KEYS = ("force", "forces")
# A thousand atoms are 50 kB: a record above this is damaged or no structure.
MAX_RECORD_BYTES = 2**28
# Open Catalyst searches neighbours along a and b only, whatever the record says: c is the vacuum.
SLAB_PBC = (True, True, False)


def read_lmdb(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of an Open Catalyst LMDB file (S2EF or IS2RE), in the order of their keys.

    Energies are `y`, forces `force`, in eV and eV/Å; ids are "sid_fid" and groups the sid, unless
    the user names other attributes. A record without `pbc` is periodic along a and b: the files are
    of slabs, and the published models never look along c.

    Raises:
        DataError: pickles are not allowed, the layout is another one, a record is damaged, or its
            pickle names what no such file needs.
        UnitError: an unknown unit.
    """
    factors = options.factors()
    for index, attributes in enumerate(_records(path, options)):
        where = place(path, index)
        structure = _structure(attributes, where)
        structure.positions *= factors.length
        structure.cell *= factors.length
        named = replace(
            options,
            energy_key=options.energy_key or _present(attributes, ENERGY_KEYS),
            forces_key=options.forces_key or _present(attributes, FORCES_KEYS),
            tags_key=options.tags_key or ("tags" if attributes.get("tags") is not None else None),
        )
        known = {name: value for name, value in attributes.items() if value is not None}
        label_structure(structure, path, index, known, known, {}, named, factors, keys)
        if structure.fixed is not None:
            keys.record(path, "fixed atoms", "fixed")
        structure.group = structure.group or _text(attributes.get("sid"))
        if not structure.structure_id:
            parts = [_text(attributes.get(name)) for name in ("sid", "fid")]
            structure.structure_id = "_".join(part for part in parts if part)
        yield structure


def _records(path: Path, options: ReadOptions) -> Iterator[dict[str, Any]]:
    """The attributes of every record."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(
            f"{path.name} is an LMDB file, and the lmdb package is not installed. Install it: "
            "pip install 'kdcache[lmdb]'."
        ) from error
    if not options.allow_pickle:
        # Before anything is opened: LMDB maps its file and trusts it, so that a damaged one kills
        # the process.
        raise DataError(
            f"{path.name} consists of Python pickles, and unpickling a stranger's file can run "
            "its code. If you trust where it is from, pass --allow-pickle: then only the "
            "classes such files need are let through."
        )
    try:
        environment = lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False
        )
    except lmdb.Error as error:
        raise unreadable(path, "LMDB", error) from error
    try:
        with environment:
            yield from _of_environment(environment, path)
    except lmdb.Error as error:  # a page is not the one that its tree names
        raise unreadable(path, "LMDB", error) from error


def _of_environment(environment: Any, path: Path) -> Iterator[dict[str, Any]]:
    with environment.begin() as transaction:
        length = transaction.get(LENGTH)
        if length is None:
            raise DataError(
                f"{path.name} has no key 'length', so it is no Open Catalyst LMDB (keys 0 … n-1 "
                f"and length, pickled torch-geometric Data): it has {_shown_keys(transaction)}. "
                "Convert it to extended XYZ with the code that wrote it."
            )
        allowed = _allowed()
        n_records = _unpickled(length, allowed, f"{path.name}, key length")
        n_entries = environment.stat()["entries"]
        if not isinstance(n_records, int) or not 0 <= n_records < n_entries:
            raise DataError(
                f"{path.name} says length {n_records!r} and has {n_entries} keys, length among "
                "them. It is cut off or of another layout: get it again."
            )
        for index in range(n_records):
            where = place(path, index)
            value = transaction.get(str(index).encode())
            if value is None or len(value) > MAX_RECORD_BYTES:
                found = "is missing" if value is None else f"has {len(value):,} bytes"
                raise DataError(f"{where} {found}. The file is damaged: get it again.")
            yield _attributes(_unpickled(value, allowed, where), where)


def _shown_keys(transaction: Any) -> str:
    first = [key.decode(errors="replace") for key, _ in zip(
        transaction.cursor().iternext(keys=True, values=False), range(3), strict=False
    )]  # fmt: skip
    return f"keys {', '.join(map(repr, first))} …" if first else "no keys"


def _allowed() -> dict[tuple[str, str], object]:
    """What the pickles of such files name, both layouts together."""
    import torch  # only to read storages: importing the reader must not cost this

    def storage(data: object) -> Array:
        if not isinstance(data, bytes):
            raise TypeError("a tensor's storage is not bytes")
        # Another pickle inside; torch's own restricted unpickler reads it.
        try:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if name := refused_name(error):
                raise ForbiddenGlobalError(name) from error
            raise ValueError("a tensor's storage is damaged") from error
        except RuntimeError as error:  # torch would advise to load a TorchScript archive unsafely
            raise ValueError("a tensor's storage is none") from error
        if not isinstance(loaded, torch.storage.TypedStorage):
            raise TypeError(f"a tensor's storage is {type(loaded).__name__}")
        flat = torch.empty(0, dtype=loaded.dtype).set_(loaded._untyped_storage)
        values: Array = flat.numpy()
        return values

    return {
        ("torch_geometric.data.data", "Data"): Record,
        ("torch_geometric.data.data", "DataEdgeAttr"): Record,
        ("torch_geometric.data.data", "DataTensorAttr"): Record,
        ("torch_geometric.data.storage", "GlobalStorage"): Record,
        ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild),
        ("torch.storage", "_load_from_bytes"): Function(storage),
        ("collections", "OrderedDict"): OrderedDict,
        ("copyreg", "_reconstructor"): Function(_reconstruct),
        ("builtins", "object"): object,
    }


def _rebuild(values: object, offset: int, size: Any, stride: Any, *_: object) -> Array:
    """A tensor as an array, out of its storage."""
    if not isinstance(values, np.ndarray):
        raise TypeError("a tensor without a storage")
    spans = [(int(n) - 1) * int(step) for n, step in zip(size, stride, strict=True)]
    count = int(np.prod([int(n) for n in size], dtype=object))
    # A stride of 0 would make gigabytes of a few bytes.
    if count > len(values) or offset < 0 or min([*size, *stride], default=0) < 0:
        raise ValueError(f"a tensor of shape {list(size)} in a storage of {len(values)} values")
    if count and offset + sum(spans) >= len(values):
        raise ValueError("a tensor that reaches beyond its storage")
    if not count:
        return np.zeros(tuple(size), values.dtype)
    steps = [int(step) * values.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(values[offset:], tuple(size), steps)
    return view.copy()


def _reconstruct(kind: object, base: object, state: object) -> Record:
    """copyreg's way to make an object, for the one class that needs it."""
    if kind is not Record or base is not object or state is not None:
        raise TypeError("copyreg._reconstructor is asked for something else than Data")
    return Record()


def _unpickled(data: bytes, allowed: Mapping[tuple[str, str], object], where: str) -> object:
    try:
        return load_restricted(data, allowed)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _attributes(record: object, where: str) -> dict[str, Any]:
    """Attributes by name, in either layout."""
    if isinstance(record, Record):
        store = record.state.get("_store")
        if store is None:
            return record.state
        mapping = store.state.get("_mapping") if isinstance(store, Record) else None
        if isinstance(mapping, dict):
            return mapping
    raise DataError(
        f"{where} is a pickled {type(record).__name__}, not torch-geometric's Data as in Open "
        "Catalyst files. Convert it to extended XYZ with the code that wrote it."
    )


def _structure(attributes: Mapping[str, Any], where: str) -> Structure:
    """Numbers, positions, cell, pbc and fixed atoms of a record."""
    for name in ("atomic_numbers", "pos"):
        if attributes.get(name) is None:
            raise DataError(f"{where} has no {name}; it has {', '.join(sorted(attributes))}.")
    numbers = as_integers(attributes["atomic_numbers"], where, "atomic_numbers", 255)
    said = attributes.get("natoms")
    if said is not None and as_array(said, where, "natoms").sum() != len(numbers):
        raise DataError(f"{where} says natoms {said} and has {len(numbers)} atomic numbers.")
    cell = attributes.get("cell")
    pbc = attributes.get("pbc")
    if pbc is None:
        pbc = SLAB_PBC if cell is not None else False
    array = np.zeros(9) if cell is None else as_array(cell, where, "cell")
    if array.size != 9:
        raise DataError(f"{where}: cell must be three vectors, got {list(array.shape)}.")
    structure = Structure(
        structure_id="",
        atomic_numbers=numbers,
        positions=as_array(attributes["pos"], where, "pos"),
        cell=array.reshape(3, 3),
        pbc=np.array(np.broadcast_to(np.asarray(pbc, np.bool_).reshape(-1), (3,))),
    )
    if attributes.get("fixed") is not None:
        structure.fixed = as_integers(attributes["fixed"], where, "fixed", 1).astype(np.bool_)
    return structure


def _present(attributes: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if attributes.get(name) is not None), names[0])


def _text(value: object) -> str:
    """An id, which is an int, a string or a tensor of one number."""
    if value is None:
        return ""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(()).item()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
