"""What a list of edges must satisfy before features are matched by it.

Owns the checks of a teacher's own edges, vectorised over many structures; searching edges is
`graphs`', matching them `kdcache.matching`'s. Invariant: an accepted list names every edge once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.structures import FloatArray, IntArray

# Å beyond the cutoff: the rounding of the distance, far below any bond.
DISTANCE_TOLERANCE = 1e-6


def check_edges(
    edge_index: npt.NDArray[Any],
    edge_shift: npt.NDArray[Any],
    n_atoms: IntArray,
    n_edges: IntArray,
    where: str,
) -> None:
    """Edges join atoms of their own structure, each once, sorted by target, source, shift.

    Args:
        edge_index: [n, 2] source and target, counted from each structure's first atom.
        edge_shift: [n, 3] integer cell shift of the source image.
        n_atoms: [n_structures].
        n_edges: [n_structures], summing to n.
        where: what the error line starts with.

    Raises:
        StoreError: naming the first edge that breaks it.
    """
    if not len(edge_index):
        return
    owner = np.repeat(np.arange(len(n_edges)), n_edges)
    foreign = (edge_index.min(axis=1) < 0) | (edge_index.max(axis=1) >= n_atoms[owner])
    if foreign.any():
        row = int(np.argmax(foreign))
        raise StoreError(
            f"{where}: an edge names an atom its structure lacks: edge {row} is "
            f"{edge_index[row].tolist()}, the structure has {int(n_atoms[owner[row]])} atoms. The "
            f"list is of other structures; features would be matched to the wrong edges."
        )
    # Column by column, the first difference decides: 1 rises, -1 falls, 0 is the same edge again.
    rises = np.zeros(len(edge_index) - 1, np.int8)
    for column in (owner, edge_index[:, 1], edge_index[:, 0], *edge_shift.T):
        step = np.sign(np.diff(column.astype(np.int64))).astype(np.int8)
        rises = np.where(rises == 0, step, rises)
    if (rises <= 0).any():
        row = int(np.argmax(rises <= 0)) + 1
        raise StoreError(
            f"{where}: edge {row}, {edge_index[row].tolist()} with shift "
            f"{edge_shift[row].tolist()}, is not behind the one before it in the order of target, "
            f"source, shift. Features would be matched to the wrong edges."
        )


def check_lengths(
    edge_index: npt.NDArray[Any],
    edge_shift: npt.NDArray[Any],
    n_atoms: IntArray,
    n_edges: IntArray,
    positions: FloatArray,
    cell: FloatArray,
    cutoff: float,
    where: str,
) -> None:
    """No edge is longer than the cutoff of the graph it is said to belong to.

    Args:
        edge_index, edge_shift, n_atoms, n_edges, where: as for `check_edges`, which they passed.
        positions: [sum of n_atoms, 3] Å.
        cell: [n_structures, 3, 3] Å.
        cutoff: Å.

    Raises:
        StoreError: naming the longest edge.
    """
    if not len(edge_index):
        return
    owner = np.repeat(np.arange(len(n_edges)), n_edges)
    first = (np.cumsum(n_atoms) - n_atoms)[owner]
    source, target = edge_index.T.astype(np.int64) + first
    image = np.einsum("ni,nij->nj", edge_shift.astype(np.float64), cell[owner])
    length = np.linalg.norm(positions[source] + image - positions[target], axis=1)
    row = int(np.argmax(length))
    if length[row] > cutoff + DISTANCE_TOLERANCE:
        raise StoreError(
            f"{where}: edge {row} is {length[row]:.4g} Å long, the teacher's graph ends at "
            f"{cutoff:g} Å. The list is of other structures or of another graph; features would be "
            f"matched to the wrong edges."
        )
