"""How far stored values are from computed ones, row by row and over a whole sample.

Owns what a codec and rounding explain; where values come from is others'. Invariant: memory grows
with the rows of a sample, not with their width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.audit.sample import Stored
from kdcache.fields import FieldSpec
from kdcache.store import FieldError
from kdcache.store.codecs import FLOAT16_MAX, FLOATS, channels
from kdcache.structures import FloatArray, IntArray

Array = npt.NDArray[Any]

HALF_RELATIVE = 2.0**-11  # half a step of float16
HALF_ABSOLUTE = 2.0**-25  # below its smallest normal number
# The recorded error is of the whole field; that of the few structures of a sample may be larger.
SAMPLING = 3.0
# Share of the stored values' size that those of the sample count as at least: a structure at rest
# has forces of rounding alone, which differ by as much as they are.
AT_REST = 0.1
# Fields that are zero everywhere differ by nothing that rounding could explain.
SMALLEST = 1e-12
# What is said of axes has two decimals.
SAME_AXES = 5e-3


@dataclass(slots=True)
class Difference:
    """A field over the sample, piece by piece.

    Attributes:
        spec: of the field.
        recorded: what the manifest says storing changed.
        tolerance: relative, of computing once more.
    """

    spec: FieldSpec
    recorded: FieldError
    tolerance: float
    n_values: int = 0
    products: float = 0.0
    squares: float = 0.0
    squares_stored: float = 0.0
    squares_off: float = 0.0
    moment: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    moment_computed: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    _mean_squares: list[float] = field(default_factory=list)
    _stored_squares: list[FloatArray] = field(default_factory=list)
    _excess: list[FloatArray] = field(default_factory=list)
    _structure: list[IntArray] = field(default_factory=list)
    _off: list[FloatArray] = field(default_factory=list)
    _unseen: int = 0

    def add(self, stored: Stored, computed: Array, structure: IntArray, match: IntArray) -> None:
        """Rows of one piece.

        Args:
            stored: rows of the store.
            computed: [n_rows, *shape] rows of the teacher, references of energies taken off.
            structure: [n_rows] store row of the structure each row belongs to.
            match: [n_rows] place of each row in `stored`, -1 where it is not there.
        """
        self._structure.append(structure)
        self._stored_squares.append(stored.mean_squares)
        if not len(computed):
            self._excess.append(np.zeros(0))
            self._off.append(np.zeros(0))
            return
        there = match >= 0
        values = np.zeros((len(match), *stored.values.shape[1:]), stored.values.dtype)
        values[there] = stored.values[match[there]]
        if self.spec.dtype not in FLOATS:
            excess = np.where(
                (values != computed).reshape(len(values), -1).any(axis=1), np.inf, 0.0
            )
            off = excess
        else:
            excess, off = self._add_floats(values, computed, stored.half_step)
        self._excess.append(np.where(there, excess, np.inf))
        self._off.append(np.where(there, off, np.inf))

    def add_unseen(self, count: int) -> None:
        """Stored rows that nothing computed belongs to."""
        self._unseen += count

    def _add_floats(
        self, values: Array, computed: Array, half_step: Array
    ) -> tuple[FloatArray, FloatArray]:
        # Values that were replaced in storing are replaced alike here, where the manifest says so.
        if self.recorded.nonfinite:
            computed = np.where(np.isfinite(computed), computed, 0)
        if self.recorded.clipped:
            computed = np.clip(computed, -FLOAT16_MAX, FLOAT16_MAX)
        computed = computed.astype(np.result_type(computed, np.float32), copy=False)
        values = values.astype(computed.dtype, copy=False)
        n_channels = channels(self.spec)
        ours = values.reshape(len(values), -1, n_channels)
        theirs = computed.reshape(ours.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.abs(ours - theirs)
            squares = np.square(off, dtype=np.float64).sum(axis=(1, 2))
            self.n_values += computed.size
            self.products += float(np.einsum("nij,nij->", ours, theirs, dtype=np.float64))
            self.squares += float(np.einsum("nij,nij->", theirs, theirs, dtype=np.float64))
            self.squares_stored += float(np.einsum("nij,nij->", ours, ours, dtype=np.float64))
            self.squares_off += float(squares.sum())
            if self.spec.symmetry == "vector":
                self._add_moments(values, computed)
            largest = np.abs(theirs).max(axis=(1, 2))
            if self.spec.codec == "half":
                off -= HALF_RELATIVE * np.abs(theirs) + HALF_ABSOLUTE
            elif self.spec.codec == "compact":
                off -= half_step
            excess = off.max(axis=(1, 2)) - self.tolerance * largest
            mean_squares = np.square(theirs, dtype=np.float64).mean(axis=(1, 2))
        self._mean_squares += mean_squares[np.isfinite(mean_squares)].tolist()
        unknown = ~np.isfinite(excess)
        return np.where(unknown, np.inf, excess), np.where(unknown, np.inf, squares)

    def _add_moments(self, values: Array, computed: Array) -> None:
        ours = values.reshape(len(values), 3, -1).astype(np.float64)
        theirs = computed.reshape(len(values), 3, -1).astype(np.float64)
        self.moment += np.einsum("nic,njc->ij", ours, theirs)
        self.moment_computed += np.einsum("nic,njc->ij", theirs, theirs)

    @property
    def typical(self) -> float:
        """What differences are relative to: root mean square of the computed values.

        Where those of the sample are tiny, what is stored counts, too, but not more than as its
        median structure: a few values that are far too large would hide what is wrong elsewhere.
        """
        computed = float(np.mean(self._mean_squares)) if self._mean_squares else 0.0
        stored = np.concatenate([np.zeros(0), *self._stored_squares])
        median = float(np.median(stored)) if len(stored) else 0.0
        return max(math.sqrt(computed), AT_REST * math.sqrt(median), SMALLEST)

    @property
    def n_rows(self) -> int:
        """Sampled rows."""
        return sum(map(len, self._excess)) + self._unseen

    @property
    def n_outside(self) -> int:
        """Rows with a value further off than its codec, and computing once more, explain."""
        limit = self.tolerance * self.typical
        return sum(int((excess > limit).sum()) for excess in self._excess) + self._unseen

    @property
    def cosine(self) -> float:
        """Between all stored and all computed values; 1 where both are zero."""
        if self.spec.dtype not in FLOATS:
            return 1.0 if not self.n_outside else float("nan")
        norms = np.sqrt(self.squares) * np.sqrt(self.squares_stored)
        if norms == 0.0:
            return 1.0 if self.squares == self.squares_stored else 0.0
        return float(self.products / norms)

    @property
    def relative(self) -> float:
        """Root mean square difference over that of the values."""
        if self.spec.dtype not in FLOATS:
            return self.n_outside / self.n_rows if self.n_rows else 0.0
        if not self.n_values or not self.squares_off:
            return 0.0
        return float(np.sqrt(self.squares_off / self.n_values) / self.typical)

    @property
    def bound(self) -> float:
        """What `relative` may be."""
        if self.spec.dtype not in FLOATS:
            return 0.0
        return SAMPLING * self.recorded.relative + self.tolerance

    def worst(self) -> tuple[int, float]:
        """Store row of the structure with the largest difference, and that difference."""
        if not any(map(len, self._off)):
            return -1, 0.0
        rows, place = np.unique(np.concatenate(self._structure), return_inverse=True)
        squares = np.bincount(place, np.concatenate(self._off)) / np.bincount(place)
        worst = int(squares.argmax())
        if self.spec.dtype not in FLOATS:
            return int(rows[worst]), float(squares[worst] > 0)
        size = np.sqrt(squares[worst] / self.spec.row_size)
        return int(rows[worst]), float(size / self.typical)

    def axes(self) -> FloatArray | None:
        """[3, 3] M with stored = M · computed, where other axes explain a vector field."""
        if self.spec.symmetry != "vector" or not np.isfinite(self.moment).all():
            return None
        if np.linalg.matrix_rank(self.moment_computed, hermitian=True) < 3:
            return None
        found = self.moment @ np.linalg.inv(self.moment_computed)
        # What remains unexplained: ‖stored − M computed‖² by the normal equations.
        left = self.squares_stored - float((found * self.moment).sum())
        if np.abs(found - np.eye(3)).max() < SAME_AXES or left >= 1e-3 * self.squares_stored:
            return None
        return found
