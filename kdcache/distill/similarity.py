"""Linear centred kernel alignment (CKA) of two sets of features of the same rows.

Owns the formula, and its value over more rows than fit into memory, exact whatever the batches.
Invariant: 1 for a feature with itself, the same after any orthogonal map and isotropic scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import ShapeError

# Relative difference of rows that counts as none, in units of the last digit.
ROUNDINGS = 16


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features, Frobenius norms.

    Args:
        x: [n_rows, ...]; further axes count as channels.
        y: [n_rows, ...], the same rows.

    Returns:
        Scalar in 0 … 1; NaN where one side is the same in every row.

    Raises:
        ShapeError: the rows differ in number.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited",
    section 3, the feature form of Eqs. 2 and 3.
    """
    if len(x) != len(y):
        raise ShapeError(
            f"CKA compares features of the same rows, got {len(x)} and {len(y)}. Compute both on "
            f"the same structures."
        )
    value, defined = weighted_linear_cka(x, y, None)
    return torch.where(defined, value, torch.full_like(value, torch.nan))


def weighted_linear_cka(x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Linear CKA where a row of weight k counts as k rows, and whether it is defined.

    Args:
        x, y: [n_rows, ...].
        weight: [n_rows], not negative; None for ones.

    Returns:
        Scalar, 0 where it is not defined; scalar bool.
    """
    x, x_varies = _centred(as_matrix(x), weight)
    y, y_varies = _centred(as_matrix(y), weight)
    defined = x_varies & y_varies
    cross = torch.linalg.vector_norm(y.T @ x).square()
    own = torch.linalg.vector_norm(x.T @ x) * torch.linalg.vector_norm(y.T @ y)
    value = cross / torch.where(defined, own, torch.ones_like(own))
    return torch.where(defined, value, torch.zeros_like(value)), defined


def as_matrix(values: Tensor) -> Tensor:
    """[n_rows, channels] of [n_rows, ...], also without rows or without further axes."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _centred(values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows about their mean, times the roots of their weights; and whether they differ at all."""
    if weight is None:
        weight = values.new_ones(len(values))
    total = weight.sum()
    mean = (weight[:, None] * values).sum(0) / torch.where(total > 0, total, torch.ones_like(total))
    root = weight.sqrt()[:, None]
    centred = (values - mean) * root
    # What is left of equal rows is rounding, and CKA of that would be noise of full size.
    rounding = ROUNDINGS * torch.finfo(values.dtype).eps
    varies = centred.square().sum() > rounding**2 * (values * root).square().sum()
    return centred, varies


@dataclass(frozen=True, slots=True)
class Alignment:
    """How alike two layers are.

    Attributes:
        cka: linear CKA of all rows, as papers give it.
        unbiased: the same ratio of unbiased estimates of HSIC.
        n_rows: that were compared.
    """

    cka: float
    unbiased: float
    n_rows: int


class StreamingAlignment:
    """CKA of every layer of one model with every layer of another, batch by batch.

    Keeps sums of products, not rows: the result is that of all rows at once, whatever the batches,
    so there is no bias from minibatches as in the mean over them of Nguyen et al. 2021. What is
    left is that of any finite sample: `cka` of n rows is too large, by about C_x C_y-like terms of
    effective widths over n (two unrelated features of C equal-sized channels give C / (n + C)),
    while numerator and denominators of `unbiased` are right in the mean for any n, and their ratio
    is off by O(1/n) only. Rows of one structure are not independent; n counts as less.

    Sums are in float64 about the mean of the first batch. Room: (all channels of x) × (all
    channels of y) × 8 bytes, and channels² of every layer.

    Args:
        x_layers, y_layers: names.
        pairs: which to compare, by name; None for all.

    Source: Kornblith et al. 2019, Eq. 3; Song et al. 2012, "Feature selection via dependence
    maximization", Eq. 5, for HSIC_1, here from moments of linear kernels.
    """

    def __init__(
        self, x_layers: list[str], y_layers: list[str], pairs: set[tuple[str, str]] | None = None
    ) -> None:
        every = {(x, y) for x in x_layers for y in y_layers}
        self.pairs = every if pairs is None else pairs
        self._x = {name: _Moments() for name in x_layers}
        self._y = {name: _Moments() for name in y_layers}
        self._cross: dict[tuple[str, str], _Cross] = {pair: _Cross() for pair in self.pairs}

    def update(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
        """Add a batch.

        Args:
            x, y: [n_rows, ...] by layer, rows of one pair the same things; every layer each time.

        Raises:
            ShapeError: the rows of a pair differ in number.
        """
        shifted_x = {name: self._x[name].add(value) for name, value in x.items()}
        shifted_y = {name: self._y[name].add(value) for name, value in y.items()}
        for first, second in self.pairs:
            ours, theirs = shifted_x[first], shifted_y[second]
            if len(ours) != len(theirs):
                raise ShapeError(
                    f"{first} has {len(ours)} rows, {second} {len(theirs)}: CKA compares features "
                    f"of the same rows. Compute both on the same structures and edges."
                )
            self._cross[first, second].add(ours, theirs)

    def drop(self, pairs: set[tuple[str, str]]) -> None:
        """Leave pairs out, whatever was summed of them."""
        self.pairs = self.pairs - pairs
        for pair in pairs:
            self._cross.pop(pair, None)

    def result(self) -> dict[tuple[str, str], Alignment]:
        """By pair of layers; NaN where one is the same in every row, or rows are too few."""
        own_x = {name: moments.own_hsic() for name, moments in self._x.items()}
        own_y = {name: moments.own_hsic() for name, moments in self._y.items()}
        found = {}
        for (first, second), cross in self._cross.items():
            x, y = self._x[first], self._y[second]
            biased, unbiased = cross.hsic(x, y)
            found[first, second] = Alignment(
                cka=_ratio(biased, own_x[first][0], own_y[second][0]),
                unbiased=_ratio(unbiased, own_x[first][1], own_y[second][1]),
                n_rows=x.n,
            )
        return found


def _ratio(cross: float, x: float, y: float) -> float:
    return cross / (x * y) ** 0.5 if x > 0 and y > 0 else float("nan")


class _Moments:
    """Sums over the rows of one layer, and of its products with itself."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.sum: Tensor | None = None
        self.squares = 0.0
        self.unshifted_squares = 0.0
        self.own = _Cross()

    def add(self, values: Tensor) -> Tensor:
        """The rows in float64 about the first batch's mean, [n_rows, channels]."""
        values = as_matrix(values.detach()).double()
        if self.shift is None or self.sum is None:
            self.shift = values.mean(0) if len(values) else values.new_zeros(values.shape[1])
            self.sum = torch.zeros_like(self.shift)
        self.unshifted_squares += float(values.square().sum())
        values = values - self.shift
        self.n += len(values)
        self.sum += values.sum(0)
        self.squares += float(values.square().sum())
        self.own.add(values, values)
        return values

    def own_hsic(self) -> tuple[float, float]:
        """Of the layer with itself; NaN where its rows differ by rounding alone."""
        biased, unbiased = self.own.hsic(self, self)
        rounding = ROUNDINGS * torch.finfo(torch.float64).eps
        if not biased**0.5 > rounding**2 * self.unshifted_squares:
            return float("nan"), float("nan")
        return biased, unbiased


class _Cross:
    """Sums over rows of products of two layers."""

    def __init__(self) -> None:
        self.product: Tensor | None = None
        self.x_by_y: Tensor | None = None
        self.y_by_x: Tensor | None = None
        self.squares = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        x_square, y_square = x.square().sum(1), y.square().sum(1)
        product, x_by_y, y_by_x = x.T @ y, y_square @ x, x_square @ y
        if self.product is None or self.x_by_y is None or self.y_by_x is None:
            self.product, self.x_by_y, self.y_by_x = product, x_by_y, y_by_x
        else:
            self.product += product
            self.x_by_y += x_by_y
            self.y_by_x += y_by_x
        self.squares += float(x_square @ y_square)

    def hsic(self, x: _Moments, y: _Moments) -> tuple[float, float]:
        """tr(HKHL) of the linear kernels, and HSIC_1 of Song et al. 2012 times n (n − 3)."""
        n = x.n
        nothing = float("nan"), float("nan")
        if self.product is None or self.x_by_y is None or self.y_by_x is None or n < 2:
            return nothing
        assert x.sum is not None
        assert y.sum is not None
        centred = self.product - torch.outer(x.sum, y.sum) / n
        biased = float(centred.square().sum())
        if n < 4:
            return biased, float("nan")
        # K and L without their diagonals: trace of their product, sums of all, and of row sums.
        trace = float(self.product.square().sum()) - self.squares
        all_k = float(x.sum @ x.sum) - x.squares
        all_l = float(y.sum @ y.sum) - y.squares
        both = (
            float(x.sum @ self.product @ y.sum)
            - float(self.x_by_y @ x.sum)
            - float(self.y_by_x @ y.sum)
            + self.squares
        )
        unbiased = trace + all_k * all_l / ((n - 1) * (n - 2)) - 2 * both / (n - 2)
        return biased, unbiased
