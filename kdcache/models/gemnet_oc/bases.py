"""Distances and angles as numbers: radial, circular and spherical bases, and their embeddings.

Owns what the published code calls basis layers, their names and shared modules.
Invariant: angles enter by their cosines, and no function has an infinite derivative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.models.gemnet_oc.hyperparameters import CircularName, SphericalName
from kdcache.models.gemnet_oc.layers import ScaleFactor
from kdcache.models.radial import EnvelopeName, RadialBasis, RadialName

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
    m = 0, 1, …, l, -l, …, -1, without the Condon–Shortley sign; m > 0 goes with cos(mθ), m < 0 with
    sin(|m|θ).

    Args:
        num_spherical: S; S² functions.
        kind: which.
        radial_basis: of the outer edges; may be shared.
        scaled: multiplied by a factor of their own.

    Attributes:
        columns: [S²] int64, which function of θ each of S² functions of φ goes with; None where
            there are S of both, and all go with all, those of φ first.
        n_dihedral: functions of θ.
    """

    columns: Tensor | None

    def __init__(
        self, num_spherical: int, kind: SphericalName, radial_basis: nn.Module, *, scaled: bool
    ) -> None:
        super().__init__()
        self.num_spherical = num_spherical
        self.kind = kind
        self.radial_basis = radial_basis
        columns: Tensor | None = None
        self.n_dihedral = num_spherical
        if kind == "gaussian_outer":
            self.circular_basis = Gaussians(num_spherical)
        elif kind == "spherical_harmonics":
            orders = _orders(num_spherical)
            # cos(mθ) from m = 0, then sin(mθ) from m = 1.
            columns = torch.tensor([m if m >= 0 else num_spherical - 1 - m for _, m in orders])
            self.n_dihedral = 2 * num_spherical - 1
        # On the device: a list would be copied there at every use.
        self.register_buffer("columns", columns, persistent=False)
        self.scale_sbf = ScaleFactor() if scaled else None

    def polar(self, cosine: Tensor) -> Tensor:
        """Functions of φ: […] to […, S] or […, S²]."""
        if self.kind == "spherical_harmonics":
            basis = associated_harmonics(cosine, self.num_spherical)
        elif self.kind == "gaussian_outer":
            basis = self.circular_basis(cosine)
        else:
            basis = zonal_harmonics(cosine, self.num_spherical)
        return basis if self.scale_sbf is None else self.scale_sbf(basis)

    def dihedral(self, cosine: Tensor, sine: Tensor) -> Tensor:
        """Functions of θ.

        Args:
            cosine, sine: […, n], of θ, whose sign is not used. Where both are 0, an atom of the
                dihedral stands on its axis, and θ counts as π/2.

        Returns:
            […, n_dihedral, n].
        """
        if self.kind == "gaussian_outer":
            gaussians: Tensor = self.circular_basis(cosine)
            return gaussians.transpose(-1, -2)
        if self.kind == "legendre_outer":
            return zonal_harmonics(cosine, self.num_spherical, dim=-2)
        none = cosine.square() + sine.square() < 0.5
        cosines, sines = multiples(cosine, torch.where(none, 1.0, sine.abs()), self.num_spherical)
        return torch.stack(cosines + sines[1:], dim=-2)


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


def zonal_harmonics(cosine: Tensor, num: int, dim: int = -1) -> Tensor:
    """Y_l0 = √((2l+1)/4π) P_l for l below `num`.

    Args:
        cosine: […].
        num: at least 2.
        dim: where the functions stand in the result.

    Returns:
        […, num].
    """
    polynomials = [torch.ones_like(cosine), cosine]
    for n in range(1, num - 1):
        rising = ((2 * n + 1) / (n + 1)) * cosine * polynomials[n]
        polynomials.append(rising - (n / (n + 1)) * polynomials[n - 1])
    norms = [math.sqrt((2 * n + 1) / (4.0 * math.pi)) for n in range(num)]
    return torch.stack([norm * p for norm, p in zip(norms, polynomials, strict=True)], dim=dim)


def associated_harmonics(cosine: Tensor, num: int) -> Tensor:
    """What of the real Y_lm depends on the polar angle, in the order of `SphericalBasis`.

    √2 (for m ≠ 0) · N_lm · P_l|m|, without the Condon–Shortley sign.

    Args:
        cosine: […], of the polar angle.

    Returns:
        […, num²].
    """
    # 1e-18 keeps the derivative of the root finite.
    sine = (1.0 - cosine.square()).clamp(min=1e-18).sqrt()
    legendre: dict[tuple[int, int], Tensor] = {(0, 0): torch.ones_like(cosine)}
    for m in range(num):
        if m:
            legendre[m, m] = (2 * m - 1) * sine * legendre[m - 1, m - 1]
        if m + 1 < num:
            legendre[m + 1, m] = (2 * m + 1) * cosine * legendre[m, m]
        for n in range(m + 2, num):
            rising = (2 * n - 1) * cosine * legendre[n - 1, m]
            legendre[n, m] = (rising - (n + m - 1) * legendre[n - 2, m]) / (n - m)
    columns = []
    for n, m in _orders(num):
        k = abs(m)
        norm = (2 * n + 1) / (4.0 * math.pi) * math.factorial(n - k) / math.factorial(n + k)
        columns.append(math.sqrt(norm if m == 0 else 2.0 * norm) * legendre[n, k])
    return torch.stack(columns, dim=-1)


def _orders(num: int) -> list[tuple[int, int]]:
    """Degree and order of real spherical harmonics, m = 0, 1, …, l, -l, …, -1 in each degree."""
    return [(n, m) for n in range(num) for m in [*range(n + 1), *range(-n, 0)]]


def multiples(cosine: Tensor, sine: Tensor, num: int) -> tuple[list[Tensor], list[Tensor]]:
    """cos(mθ) and sin(mθ) for m below `num`, […] each."""
    cosines, sines = [torch.ones_like(cosine)], [torch.zeros_like(sine)]
    for m in range(1, num):
        cosines.append(cosine * cosines[m - 1] - sine * sines[m - 1])
        sines.append(cosine * sines[m - 1] + sine * cosines[m - 1])
    return cosines, sines


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


def azimuth(vector: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Direction of vectors within the plane of a frame.

    Args:
        vector: [n, k, 3].
        first, second: [n, 3], as `frame` gives them.

    Returns:
        Cosine and sine [n, k] of the angle with `first`, both 0 where the vector is normal to the
        plane.
    """
    along = (vector * first.unsqueeze(1)).sum(-1)
    across = (vector * second.unsqueeze(1)).sum(-1)
    square = along.square() + across.square()
    normal = square < COLLINEAR
    inverse = torch.where(normal, 1.0, square).rsqrt()
    inverse = torch.where(normal, 0.0, inverse)
    return along * inverse, across * inverse
