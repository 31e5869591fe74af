"""Distances and angles as numbers: radial, circular and spherical bases, and their embeddings.

Owns what the published code calls basis layers, their names and shared modules.
Invariant: angles enter by their cosines, and no function has an infinite derivative.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.polynomial import chebyshev, legendre
from torch import Tensor, nn
from torch.nn import functional

from kdcache.models.gemnet_oc.hyperparameters import CircularName, SphericalName
from kdcache.models.gemnet_oc.layers import ScaleFactor
from kdcache.models.radial import EnvelopeName, RadialBasis, RadialName
from kdcache.structures import FloatArray

# Square of the sine below which a direction counts as collinear with an axis and has no azimuth.
# Rows of a perfect crystal are collinear up to rounding, of float32 or of a file's digits, and must
# not get an azimuth from that.
COLLINEAR = 1e-10


class ScaledRadialBasis(RadialBasis):
    """A radial basis with a factor of its own, where bases are scaled."""

    def __init__(
        self, num_rbf: int, cutoff: float, rbf: RadialName, envelope: EnvelopeName, exponent: int,
        *, scaled: bool,
    ) -> None:  # fmt: skip
        super().__init__(num_rbf, cutoff, rbf, envelope, exponent)
        self.scale_rbf = ScaleFactor() if scaled else None

    def forward(self, distance: Tensor) -> Tensor:
        """[n_edges] Å to [n_edges, num_rbf]."""
        basis = super().forward(distance)
        return basis if self.scale_rbf is None else self.scale_rbf(basis)


class Gaussians(nn.Module):
    """Gaussians with centres evenly over [-1, 1], as wide as they are apart."""

    offset: Tensor

    def __init__(self, num: int) -> None:
        super().__init__()
        self.coefficient = -0.5 * ((num - 1) / 2.0) ** 2
        self.register_buffer("offset", torch.linspace(-1.0, 1.0, num))

    def forward(self, x: Tensor) -> Tensor:
        """[…] to […, num]."""
        return torch.exp(self.coefficient * (x.unsqueeze(-1) - self.offset).square())


class CircularBasis(nn.Module):
    """Functions of one angle: Y_l0 or Gaussians of its cosine.

    Args:
        num_spherical: S, their number.
        kind: which.
        radial_basis: of the edges they are combined with; may be shared.
        scaled: multiplied by a factor of their own.
    """

    def __init__(
        self, num_spherical: int, kind: CircularName, radial_basis: nn.Module, *, scaled: bool
    ) -> None:
        super().__init__()
        self.num_spherical = num_spherical
        self.radial_basis = radial_basis
        # The name of the published code, whose state dict has it.
        self.gaussians = "cosφ_basis" if kind == "gaussian" else None
        if self.gaussians is not None:
            self.add_module(self.gaussians, Gaussians(num_spherical))
        self.scale_cbf = ScaleFactor() if scaled else None

    def forward(self, cosine: Tensor) -> Tensor:
        """Cosines […] to […, S]."""
        if self.gaussians is not None:
            basis: Tensor = self.get_submodule(self.gaussians)(cosine)
        else:
            basis = zonal_harmonics(cosine, self.num_spherical)
        return basis if self.scale_cbf is None else self.scale_cbf(basis)


class SphericalBasis(nn.Module):
    """Functions of an angle φ and a dihedral θ.

    Every kind is a product of a function of φ and one of θ. "legendre_outer" is Y_l0(φ) Y_l'0(θ),
    "gaussian_outer" likewise with Gaussians, "spherical_harmonics" the real Y_lm(φ, θ) in the order
    m = 0, 1, …, l, -l, …, -1.

    Args:
        num_spherical: S; S² functions.
        kind: which.
        radial_basis: of the outer edges; may be shared.
        scaled: multiplied by a factor of their own.
    """

    def __init__(
        self, num_spherical: int, kind: SphericalName, radial_basis: nn.Module, *, scaled: bool
    ) -> None:
        super().__init__()
        self.num_spherical = num_spherical
        self.kind = kind
        self.radial_basis = radial_basis
        if kind == "gaussian_outer":
            self.circular_basis = Gaussians(num_spherical)
        self.scale_sbf = ScaleFactor() if scaled else None

    def forward(self, cosine: Tensor, dihedral: tuple[Tensor, Tensor]) -> Tensor:
        """All functions at once.

        Args:
            cosine: […], of φ.
            dihedral: […] and […], cosine and sine of θ, the sine not negative.

        Returns:
            […, S²].
        """
        if self.kind == "spherical_harmonics":
            basis = spherical_harmonics(cosine, dihedral, self.num_spherical)
        else:
            if self.kind == "gaussian_outer":
                first, second = self.circular_basis(cosine), self.circular_basis(dihedral[0])
            else:
                first = zonal_harmonics(cosine, self.num_spherical)
                second = zonal_harmonics(dihedral[0], self.num_spherical)
            basis = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
        return basis if self.scale_sbf is None else self.scale_sbf(basis)


class BasisEmbedding(nn.Module):
    """Maps the product of radial and angular functions to few channels.

    Args:
        num_radial: R.
        n_angular: S or S².
        width: B.
    """

    def __init__(self, num_radial: int, n_angular: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_radial, n_angular, width))

    @property
    def effective_weight(self) -> Tensor:
        """[R, B, n_angular].

        The published code reads the memory of [R, n_angular, B] in this shape, without transposing.
        """
        n_radial, n_angular, width = self.weight.shape
        return self.weight.view(n_radial, width, n_angular)

    def forward(self, radial: Tensor) -> Tensor:
        """[n_edges, R] to [n_edges, B, n_angular]: what angular functions are contracted with."""
        n_radial, n_angular, width = self.weight.shape
        flat = functional.linear(radial, self.weight.view(n_radial, -1).t())
        return flat.view(-1, width, n_angular)


def zonal_harmonics(cosine: Tensor, num: int) -> Tensor:
    """Y_l0 = √((2l+1)/4π) P_l for l below `num`.

    Args:
        cosine: […].

    Returns:
        […, num].
    """
    polynomials = [torch.ones_like(cosine), cosine]
    for l in range(1, num - 1):  # noqa: E741
        polynomials.append(
            ((2 * l + 1) / (l + 1)) * cosine * polynomials[l] - (l / (l + 1)) * polynomials[l - 1]
        )
    norms = [math.sqrt((2 * l + 1) / (4.0 * math.pi)) for l in range(num)]  # noqa: E741
    return torch.stack(
        [norm * polynomial for norm, polynomial in zip(norms, polynomials, strict=False)], dim=-1
    )


def zonal_harmonics_as_cosines(num: int) -> FloatArray:
    """[num, num + 1]: a_lm with Y_l0(cos θ) = Σ_m a_lm cos(mθ), and in the last column Y_l0(0)."""
    table = np.zeros((num, num + 1))
    for degree in range(num):
        norm = math.sqrt((2 * degree + 1) / (4.0 * math.pi))
        series = [0.0] * degree + [norm]
        cosines = chebyshev.poly2cheb(legendre.leg2poly(series))
        table[degree, : len(cosines)] = cosines
        table[degree, num] = legendre.legval(0.0, series)
    return table


def spherical_harmonics(cosine: Tensor, azimuth: tuple[Tensor, Tensor], num: int) -> Tensor:
    """Real Y_lm for l below `num`, per l in the order m = 0, 1, …, l, -l, …, -1.

    Without the Condon–Shortley sign; m > 0 goes with cos(mθ), m < 0 with sin(|m|θ).

    Args:
        cosine: […], of the polar angle.
        azimuth: […] and […], cosine and sine of θ.

    Returns:
        […, num²].
    """
    # 1e-18 keeps the derivative of the root finite.
    sine = (1.0 - cosine.square()).clamp(min=1e-18).sqrt()
    cosines, sines = multiples(*azimuth, num)
    associated: dict[tuple[int, int], Tensor] = {(0, 0): torch.ones_like(cosine)}
    for m in range(num):
        if m:
            associated[m, m] = (2 * m - 1) * sine * associated[m - 1, m - 1]
        if m + 1 < num:
            associated[m + 1, m] = (2 * m + 1) * cosine * associated[m, m]
        for l in range(m + 2, num):  # noqa: E741
            associated[l, m] = (
                (2 * l - 1) * cosine * associated[l - 1, m]
                - (l + m - 1) * associated[l - 2, m]
            ) / (l - m)  # fmt: skip
    columns = []
    for l in range(num):  # noqa: E741
        for m in [*range(l + 1), *range(-l, 0)]:
            k = abs(m)
            norm = (2 * l + 1) / (4.0 * math.pi) * math.factorial(l - k) / math.factorial(l + k)
            factor = math.sqrt(norm if m == 0 else 2.0 * norm)
            angular = cosines[..., k] if m >= 0 else sines[..., k]
            columns.append(factor * associated[l, k] * angular)
    return torch.stack(columns, dim=-1)


def multiples(cosine: Tensor, sine: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """cos(mθ) and sin(mθ) for m below `num`, […] to […, num] each.

    Where both are 0 all multiples are 0, but for cos(0θ), which is 1.
    """
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for m in range(1, num):
        cosines.append(cosine * cosines[m - 1] - sine * sines[m - 1])
        sines.append(cosine * sines[m - 1] + sine * cosines[m - 1])
    return torch.stack(cosines, dim=-1), torch.stack(sines, dim=-1)


def frame(direction: Tensor) -> tuple[Tensor, Tensor]:
    """Two unit vectors that span the plane normal to each of [n, 3] unit vectors.

    Source: Duff et al. 2017, "Building an orthonormal basis, revisited", Listing 3.
    """
    x, y, z = direction.unbind(-1)
    sign = torch.where(z < 0.0, -1.0, 1.0).to(z.dtype)
    a = -1.0 / (sign + z)
    b = x * y * a
    first = torch.stack([1.0 + sign * x * x * a, sign * b, -sign * x], dim=-1)
    second = torch.stack([b, sign + y * y * a, -y], dim=-1)
    return first, second


def azimuth(vector: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Direction of vectors within the plane of a frame.

    Args:
        vector: [n, k, 3].
        first, second: [n, 3], as `frame` gives them.

    Returns:
        Cosine and sine [n, k] of the angle with `first`, both 0 where the vector is normal to the
        plane, and whether it is.
    """
    along = (vector * first.unsqueeze(1)).sum(-1)
    across = (vector * second.unsqueeze(1)).sum(-1)
    square = along.square() + across.square()
    normal = square < COLLINEAR
    inverse = torch.where(normal, 1.0, square).rsqrt()
    inverse = torch.where(normal, 0.0, inverse)
    return along * inverse, across * inverse, normal
