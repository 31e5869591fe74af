"""Moments and histograms of values that come in parts.

Arithmetic only. Invariant: parts that are merged in one order give one result, to the last bit,
whoever made them; counts do not even depend on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.structures import FloatArray, IntArray

Array = npt.NDArray[Any]

N_BINS = 1000
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Values widened to float64 at a time: 8 MB.
TILE_VALUES = 2**20


@dataclass
class Moments:
    """What is summed over values; NaN and infinities are counted and left out of the rest.

    Attributes:
        n_nan, n_infinite, n_zero: how many.
        least, largest: of the finite values; infinite where there are none.
        n, mean, square: [n_channels] finite values, their mean, and the sum of their squared
            deviations from it.
    """

    n_nan: int = 0
    n_infinite: int = 0
    n_zero: int = 0
    least: float = np.inf
    largest: float = -np.inf
    n: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    mean: FloatArray = field(default_factory=lambda: np.zeros(0))
    square: FloatArray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(cls, values: Array, n_channels: int) -> Moments:
        """Of values [n_rows, …, n_channels], in float64, a tile at a time.

        Example:
            >>> found = Moments.of(np.array([1.0, np.nan, 3.0, 0.0]), 1)
            >>> found.n.tolist(), found.mean.round(3).tolist(), found.n_nan, found.n_zero
            ([3], [1.333], 1, 1)
        """
        rows = values.reshape(-1, n_channels)
        step = max(1, TILE_VALUES // max(1, n_channels))
        total = cls()
        for start in range(0, len(rows), step):
            total = total.merged(cls._of_tile(rows[start : start + step].astype(np.float64)))
        return total

    @classmethod
    def _of_tile(cls, rows: FloatArray) -> Moments:
        finite = np.isfinite(rows)
        n = finite.sum(axis=0, dtype=np.int64)
        n_nan = int(np.isnan(rows).sum())
        kept = rows if finite.all() else np.where(finite, rows, 0.0)
        mean = kept.sum(axis=0) / np.maximum(n, 1)
        square = np.where(finite, np.square(kept - mean), 0.0).sum(axis=0)
        return cls(
            n_nan=n_nan,
            n_infinite=int(finite.size - finite.sum()) - n_nan,
            n_zero=int((rows == 0.0).sum()),
            least=float(np.where(finite, rows, np.inf).min()),
            largest=float(np.where(finite, rows, -np.inf).max()),
            n=n,
            mean=mean,
            square=square,
        )

    def merged(self, other: Moments) -> Moments:
        """Of both together.

        Source: Chan, Golub and LeVeque 1979, Eqs. 1.5a and 1.5b.
        """
        if not len(self.n) or not len(other.n):
            return other if not len(self.n) else self
        n = self.n + other.n
        change = other.mean - self.mean
        share = other.n / np.maximum(n, 1)
        return Moments(
            self.n_nan + other.n_nan,
            self.n_infinite + other.n_infinite,
            self.n_zero + other.n_zero,
            min(self.least, other.least),
            max(self.largest, other.largest),
            n,
            self.mean + change * share,
            self.square + other.square + change**2 * self.n * share,
        )

    def pooled(self) -> Moments:
        """All channels as one."""
        total = Moments()
        for k in range(len(self.n)):
            one = slice(k, k + 1)
            part = Moments(n=self.n[one], mean=self.mean[one], square=self.square[one])
            total = total.merged(part)
        counts = (self.n_nan, self.n_infinite, self.n_zero, self.least, self.largest)
        return Moments(*counts, total.n, total.mean, total.square)

    @property
    def std(self) -> FloatArray:
        """[n_channels] standard deviation, divided by n."""
        deviation: FloatArray = np.sqrt(self.square / np.maximum(self.n, 1))
        return deviation


def count_bins(values: Array, least: float, largest: float) -> IntArray:
    """[N_BINS] finite values in equal bins from the least to the largest, the last one closed.

    Example:
        >>> count_bins(np.array([0.0, 0.5, 1.0, np.nan]), 0.0, 1.0)[[0, 500, 999]].tolist()
        [1, 1, 1]
    """
    flat = values.reshape(-1)
    counts = np.zeros(N_BINS, np.int64)
    # Quarters, which are exact: the range of float64 itself does not fit a float64.
    width = (largest / 4 - least / 4) / N_BINS
    for start in range(0, len(flat), TILE_VALUES):
        tile = flat[start : start + TILE_VALUES].astype(np.float64)
        tile = tile[np.isfinite(tile)]
        places = (
            ((tile / 4 - least / 4) / width).astype(np.int64)
            if width > 0
            else np.zeros(len(tile), int)
        )
        counts += np.bincount(np.clip(places, 0, N_BINS - 1), minlength=N_BINS)
    return counts


def quantiles_of(
    counts: IntArray, least: float, largest: float, wanted: Sequence[float] = QUANTILES
) -> list[float]:
    """Quantiles of binned values, right to within a bin: 1/1000 of the range.

    The q-th is the least value that a share q of the values does not exceed.

    Example:
        >>> counts = count_bins(np.arange(1001.0), 0.0, 1000.0)
        >>> [round(value) for value in quantiles_of(counts, 0.0, 1000.0, (0.25, 0.5))]
        [250, 500]
    """
    width = (largest / 4 - least / 4) / len(counts)
    total = np.cumsum(counts)
    found = []
    for share in wanted:
        # The first bin that reaches the share; 0.95 times a count is rounded.
        reached = share * int(total[-1]) * (1.0 - 1e-12)
        bin_number = int(np.searchsorted(total, reached, side="left"))
        before = int(total[bin_number]) - int(counts[bin_number])
        within = (reached - before) / max(1, int(counts[bin_number]))
        found.append(min(largest, 4 * (least / 4 + width * (bin_number + within))))
    return found
