"""The records that flow: a structure from a reader, a batch into a model, what comes out of it.

Runs on numpy alone: `Batch` and `ModelOutput` only name torch tensors, they never import torch.
Invariant: eV, Å, eV/Å; cell rows are the lattice vectors; edge_index row 0 is the source, row 1 the
target, and edge_shift the integer cell shift of the source image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

CONTENT_HASH_BYTES = 16
MAX_ATOMIC_NUMBER = 118
# What an atom counts as where nothing is said: an adsorbate, as Open Catalyst treats molecules.
DEFAULT_TAG = 2


@dataclass(slots=True)
class Structure:
    """One atomic structure with its labels, if it has any.

    Attributes:
        structure_id: unique within its dataset.
        atomic_numbers: [n_atoms] int64.
        positions: [n_atoms, 3] float64, Å.
        cell: [3, 3] float64, Å, rows are vectors; zeros where there is none.
        pbc: [3] bool.
        energy: eV, or None without a label.
        forces: [n_atoms, 3] float64, eV/Å, or None without a label.
        origin: where the structure comes from: "data", later "rattled" and others.
        weight: weight in the ground-truth loss.
        group: what errors are reported by (config_type, reaction, sid); "" for none.
        split: "train", "val", "test" or "" where the dataset does not say.
        tags: [n_atoms] uint8, 0 below the surface, 1 surface, 2 adsorbate (or no surface at all);
            None counts as 2.
        fixed: [n_atoms] bool, atoms held in place; None counts as free.
    """

    structure_id: str
    atomic_numbers: IntArray
    positions: FloatArray
    cell: FloatArray
    pbc: npt.NDArray[np.bool_]
    energy: float | None = None
    forces: FloatArray | None = None
    origin: str = "data"
    weight: float = 1.0
    group: str = ""
    split: str = ""
    tags: npt.NDArray[np.uint8] | None = None
    fixed: npt.NDArray[np.bool_] | None = None

    @property
    def n_atoms(self) -> int:
        return len(self.atomic_numbers)

    def content_hash(self) -> bytes:
        """SHA-256 of what the teacher sees, cut to 16 bytes: numbers, positions, cell, pbc, tags.

        Little-endian int32 count, int32 numbers, float64 positions and cell, one byte per pbc flag;
        negative zeros count as zeros. Then one byte per tag, where any is not 2. The same bytes on
        every machine.
        """
        digest = hashlib.sha256(np.array(self.n_atoms, "<i4").tobytes())
        digest.update(self.atomic_numbers.astype("<i4").tobytes())
        # Adding 0.0 turns -0.0 into 0.0: equal positions must have equal bytes.
        digest.update((self.positions + 0.0).astype("<f8").tobytes())
        digest.update((self.cell + 0.0).astype("<f8").tobytes())
        digest.update(self.pbc.astype("u1").tobytes())
        # Without tags every atom counts as 2, so both spellings of that are one structure.
        if self.tags is not None and (self.tags != DEFAULT_TAG).any():
            digest.update(self.tags.astype("u1").tobytes())
        return digest.digest()[:CONTENT_HASH_BYTES]


def dataset_digest(content_hashes: Iterable[bytes]) -> str:
    """SHA-256 (hex) over the content hashes in dataset order: the identity of a dataset."""
    digest = hashlib.sha256()
    for content_hash in content_hashes:
        digest.update(content_hash)
    return digest.hexdigest()


def check_structure(structure: Structure, where: str, *, unlabelled: bool = False) -> None:
    """Refuse a structure that would poison a dataset, in one line naming it.

    Args:
        structure: as a reader made it.
        where: file and place, e.g. "train.extxyz, structure 41".
        unlabelled: accept a structure without energy or without forces.

    Raises:
        DataError: zero atoms, wrong shapes, an unknown element, NaN or infinity, a cell that does
            not span its periodic axes, or a missing label.
    """
    n_atoms = structure.n_atoms
    if n_atoms == 0:
        raise DataError(f"{where} has no atoms. Remove it from the dataset.")
    numbers = structure.atomic_numbers
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        bad = int(numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)][0])
        raise DataError(f"{where} has atomic number {bad}; elements run from 1 to 118.")
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("positions", structure.positions, (n_atoms, 3)),
        ("cell", structure.cell, (3, 3)),
        ("pbc", structure.pbc, (3,)),
    ]
    if structure.forces is not None:
        expected.append(("forces", structure.forces, (n_atoms, 3)))
    for name, flags in (("tags", structure.tags), ("fixed", structure.fixed)):
        if flags is not None:
            expected.append((name, flags, (n_atoms,)))
    for name, array, shape in expected:
        if array.shape != shape:
            raise DataError(f"{where}: {name} must be {list(shape)}, got {list(array.shape)}.")
        if array.dtype != np.bool_ and not np.isfinite(array).all():
            raise DataError(f"{where}: {name} holds NaN or infinity. Remove or repair it.")
    if structure.energy is not None and not np.isfinite(structure.energy):
        raise DataError(f"{where}: energy is {structure.energy}. Remove or repair it.")
    periodic = structure.cell[structure.pbc]
    if len(periodic) and np.linalg.matrix_rank(periodic) < len(periodic):
        raise DataError(
            f"{where} is periodic along {int(structure.pbc.sum())} axes but its cell does not span "
            f"them. Give it a cell, or pbc F F F."
        )
    if unlabelled:
        return
    if structure.energy is None:
        raise DataError(
            f"{where} has no energy. Name its key (--energy-key), or pass --unlabelled."
        )
    if structure.forces is None:
        raise DataError(
            f"{where} has no forces. Name their key (--forces-key), or pass --unlabelled."
        )


class Graph(NamedTuple):
    """One neighbour list of a batch.

    Attributes:
        edge_index: [2, n_edges] int64, source and target, atoms counted within the batch.
        edge_shift: [n_edges, 3], integers in the dtype of positions.
    """

    edge_index: Tensor
    edge_shift: Tensor


@dataclass(slots=True)
class Batch:
    """Structures concatenated along their atoms, ready for a model.

    Attributes:
        atomic_numbers: [n_atoms] int64.
        positions: [n_atoms, 3] Å.
        cell: [n_structures, 3, 3] Å.
        pbc: [n_structures, 3] bool.
        structure_index: [n_atoms] int64, non-decreasing.
        n_structures: structures in the batch.
        edge_index: [2, n_edges] int64, atoms counted within the batch.
        edge_shift: [n_edges, 3], integers in the dtype of positions.
        energy: [n_structures] eV, NaN without a label; None where none was asked for.
        forces: [n_atoms, 3] eV/Å, NaN without a label; None where none was asked for.
        weight: [n_structures], weight in the ground-truth loss; None counts as ones.
        origin_weight: [n_structures], weight by origin in every loss, contained in `weight`; None
            where nothing is mixed.
        teacher: teacher fields as "teacher name/field name", rows by the field's level.
        graphs: further neighbour lists by name, for models that need more than one.
        tags: [n_atoms] uint8, 0 below the surface, 1 surface, 2 adsorbate; None where unknown.
        fixed: [n_atoms] bool, atoms held in place; None where unknown.
        rows: [n_structures] the structures' rows in the store or dataset they came from.
    """

    atomic_numbers: Tensor
    positions: Tensor
    cell: Tensor
    pbc: Tensor
    structure_index: Tensor
    n_structures: int
    edge_index: Tensor
    edge_shift: Tensor
    energy: Tensor | None = None
    forces: Tensor | None = None
    weight: Tensor | None = None
    origin_weight: Tensor | None = None
    teacher: dict[str, Tensor] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    tags: Tensor | None = None
    fixed: Tensor | None = None
    rows: IntArray | None = None

    @property
    def n_atoms(self) -> int:
        # No len(): it would make a number of what a tracer keeps open.
        return self.atomic_numbers.shape[0]

    @property
    def n_edges(self) -> int:
        return self.edge_index.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on `device`; floating tensors in `dtype` when one is given."""

        def moved(tensor: Tensor) -> Tensor:
            wanted = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=wanted, non_blocking=True)

        return self.map(moved)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy with `change` of every tensor."""
        changed: dict[str, Any] = {
            "teacher": {k: change(v) for k, v in self.teacher.items()},
            "graphs": {k: Graph(*map(change, v)) for k, v in self.graphs.items()},
        }
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in (*changed, "rows", "n_structures") and value is not None:
                changed[item.name] = change(value)
        return replace(self, **changed)


@dataclass(slots=True)
class ModelOutput:
    """What every model returns.

    Attributes:
        energy: [n_structures], eV once a potential has put units and references back.
        forces: [n_atoms, 3], eV/Å likewise.
        atomic_energy: [n_atoms], summing to energy within each structure.
        features: by field name: node [n_atoms, C], vector [n_atoms, 3, C], edge [n_edges, C].
    """

    energy: Tensor
    forces: Tensor
    atomic_energy: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
