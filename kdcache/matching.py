"""Which edge of one neighbour list is which of another, by (source, target, shift).

Integer keys and one binary search for many structures at once; positions and distances play no
part. Invariant: two edges are matched only if both atoms and the periodic image are the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import DataError

IntArray = npt.NDArray[np.int64]

# Keys stay below this, so that no product of extents leaves int64.
MAX_KEYS = 2**62


def match_edges(
    edge_index: npt.NDArray[np.integer[Any]],
    edge_shift: npt.NDArray[np.integer[Any]],
    other_index: npt.NDArray[np.integer[Any]],
    other_shift: npt.NDArray[np.integer[Any]],
) -> IntArray:
    """The row of every edge in another list of the same atoms.

    Args:
        edge_index: [2, n_edges] source and target, atoms counted over all structures; any order.
        edge_shift: [n_edges, 3] integer cell shift of the source image.
        other_index: [2, n_other], as above.
        other_shift: [n_other, 3].

    Returns:
        [n_edges] rows of the other list, -1 where it has no such edge.

    Raises:
        DataError: the other list names an edge twice, so that its row is anyone's guess.

    Example:
        >>> index, shift = np.array([[0, 0, 1], [0, 1, 0]]), np.zeros((3, 3), int)
        >>> match_edges(index, shift, index[:, 2:0:-1], shift[:2]).tolist()
        [-1, 1, 0]
    """
    matched = np.full(edge_index.shape[1], -1, np.int64)
    if not other_index.shape[1] or not len(matched):
        return matched
    keys, other_keys = _keys(edge_index, edge_shift, other_index, other_shift)
    order: IntArray | None = None
    if (np.diff(other_keys) <= 0).any():
        order = np.argsort(other_keys, kind="stable")
        other_keys = other_keys[order]
        _refuse_repeated(other_keys, order, other_index, other_shift)
    place = np.minimum(np.searchsorted(other_keys, keys), len(other_keys) - 1)
    found = other_keys[place] == keys
    matched[found] = place[found] if order is None else order[place[found]]
    return matched


def _keys(
    edge_index: npt.NDArray[Any],
    edge_shift: npt.NDArray[Any],
    other_index: npt.NDArray[Any],
    other_shift: npt.NDArray[Any],
) -> tuple[IntArray, IntArray]:
    """One integer per edge in either list, equal for equal edges, rising in canonical order."""
    n_atoms = int(max(edge_index.max(), other_index.max())) + 1
    images, other_images, n_images = _images(edge_shift, other_shift)
    if n_atoms**2 * n_images >= MAX_KEYS:
        images, other_images, n_images = _few_images(edge_shift, other_shift)

    def keys(index: npt.NDArray[Any], image: IntArray) -> IntArray:
        source, target = index.astype(np.int64)
        key: IntArray = (target * n_atoms + source) * n_images + image
        return key

    return keys(edge_index, images), keys(other_index, other_images)


def _images(shift: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[IntArray, IntArray, int]:
    """A number for every image in the box of all shifts, and how many there are."""
    lowest = np.minimum(shift.min(axis=0), other.min(axis=0)).astype(np.int64)
    highest = np.maximum(shift.max(axis=0), other.max(axis=0)).astype(np.int64)
    x, y, z = (int(extent) for extent in highest - lowest + 1)

    def number(rows: npt.NDArray[Any]) -> IntArray:
        a, b, c = (rows[:, k].astype(np.int64) - lowest[k] for k in range(3))
        numbers: IntArray = (a * y + b) * z + c
        return numbers

    return number(shift), number(other), x * y * z


def _few_images(shift: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[IntArray, IntArray, int]:
    """The same among the shifts that occur: unwrapped atoms may be thousands of cells apart."""
    both = np.concatenate([shift, other])
    unique, number = np.unique(both, axis=0, return_inverse=True)
    number = number.reshape(-1).astype(np.int64)
    return number[: len(shift)], number[len(shift) :], len(unique)


def _refuse_repeated(
    keys: IntArray, order: IntArray, index: npt.NDArray[Any], shift: npt.NDArray[Any]
) -> None:
    repeated = np.flatnonzero(np.diff(keys) == 0)
    if len(repeated):
        first, second = sorted(int(row) for row in order[repeated[0] : repeated[0] + 2])
        source, target = index[:, first].tolist()
        raise DataError(
            f"edges {first} and {second} are both from atom {source} to atom {target} with shift "
            f"{shift[first].tolist()}: which features belong to it is undecided. Dump them again."
        )
