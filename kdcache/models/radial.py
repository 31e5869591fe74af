"""Distances expanded in smooth functions that vanish at the cutoff.

Invariant: state-dict names are the Open Catalyst ones (`rbf.offset`, `rbf.frequencies`,
`rbf.pregamma`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

RadialName = Literal["gaussian", "spherical_bessel", "bernstein"]
EnvelopeName = Literal["polynomial", "exponential"]

# e⁻⁵⁰ is nothing beside 1 in double precision. Smaller Gaussians, most of a basis of 128, would be
# denormal numbers in float32, or make such by a product with a weight: on a CPU exp then takes ten
# times as long, and a matrix product of the basis fifty times.
SMALLEST_EXPONENT = -50.0


class Gaussians(nn.Module):
    """exp(−½ ((x − μ_k)(R−1))²) with centres μ_k evenly over [0, 1]."""

    offset: Tensor

    def __init__(self, num_rbf: int) -> None:
        super().__init__()
        self.coefficient = -0.5 * (num_rbf - 1) ** 2
        self.register_buffer("offset", torch.linspace(0.0, 1.0, num_rbf))

    def forward(self, scaled: Tensor) -> Tensor:
        """[n_edges] distances over cutoff to [n_edges, num_rbf]."""
        difference = scaled.unsqueeze(-1) - self.offset
        return torch.exp((self.coefficient * difference.square()).clamp(min=SMALLEST_EXPONENT))


class SphericalBessel(nn.Module):
    """√(2/r³) sin(ω_k x) / x with trained frequencies, at first kπ.

    Source: Gasteiger et al. 2020 (DimeNet), Eq. 7.
    """

    def __init__(self, num_rbf: int, cutoff: float) -> None:
        super().__init__()
        self.norm = math.sqrt(2.0 / cutoff**3)
        self.frequencies = nn.Parameter(math.pi * torch.arange(1.0, num_rbf + 1.0))

    def forward(self, scaled: Tensor) -> Tensor:
        """[n_edges] distances over cutoff to [n_edges, num_rbf]."""
        column = scaled.unsqueeze(-1)
        return self.norm / column * torch.sin(self.frequencies * column)


class Bernstein(nn.Module):
    """Bernstein polynomials of exp(−γx), γ trained.

    Source: Unke et al. 2021 (SpookyNet), Eq. 13.
    """

    binomials: Tensor
    exponents: Tensor

    def __init__(self, num_rbf: int) -> None:
        super().__init__()
        binomials = torch.tensor([float(math.comb(num_rbf - 1, k)) for k in range(num_rbf)])
        self.register_buffer("binomials", binomials, persistent=False)
        self.register_buffer("exponents", torch.arange(float(num_rbf)), persistent=False)
        self.pregamma = nn.Parameter(torch.tensor(0.45264))  # softplus of it is 0.94486

    def forward(self, scaled: Tensor) -> Tensor:
        """[n_edges] distances over cutoff to [n_edges, num_rbf]."""
        q = torch.exp(-nn.functional.softplus(self.pregamma) * scaled).unsqueeze(-1)
        return self.binomials * q.pow(self.exponents) * (1.0 - q).pow(self.exponents.flip(0))


class RadialBasis(nn.Module):
    """A basis times an envelope that goes smoothly to zero at the cutoff.

    Args:
        num_rbf: functions.
        cutoff: Å.
        rbf: which basis.
        envelope: "polynomial", 1 − 21x⁵ + 35x⁶ − 15x⁷ for exponent 5, or "exponential",
            exp(−x²/((1−x)(1+x))).
        exponent: p of the polynomial, whose first p−1 derivatives vanish at 0 and two at 1.

    Source: Gasteiger et al. 2020 (DimeNet), Eq. 8; Unke et al. 2021 (SpookyNet), Eq. 16.
    """

    rbf: nn.Module

    def __init__(
        self, num_rbf: int, cutoff: float, rbf: RadialName, envelope: EnvelopeName, exponent: int
    ) -> None:
        super().__init__()
        self.inverse_cutoff = 1.0 / cutoff
        self.envelope: EnvelopeName = envelope
        self.exponent = exponent
        if rbf == "gaussian":
            self.rbf = Gaussians(num_rbf)
        elif rbf == "spherical_bessel":
            self.rbf = SphericalBessel(num_rbf, cutoff)
        else:
            self.rbf = Bernstein(num_rbf)

    def forward(self, distance: Tensor) -> Tensor:
        """[n_edges] Å to [n_edges, num_rbf]."""
        scaled = distance * self.inverse_cutoff
        basis: Tensor = self.rbf(scaled)
        return self._envelope(scaled).unsqueeze(-1) * basis

    def envelope_at(self, distance: Tensor) -> Tensor:
        """[n_edges] Å to [n_edges]: 1 at an atom, 0 at the cutoff and beyond."""
        return self._envelope(distance * self.inverse_cutoff)

    def _envelope(self, scaled: Tensor) -> Tensor:
        if self.envelope == "polynomial":
            p = self.exponent
            a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
            inner = 1.0 - scaled.pow(p) * (a - scaled * (b - c * scaled))
        else:
            # At and beyond the cutoff the quotient has no value: keep it, and its gradient, finite.
            below = scaled.clamp(max=1.0 - 1e-6)
            inner = torch.exp(-below.square() / ((1.0 - below) * (1.0 + below)))
        return torch.where(scaled < 1.0, inner, 0.0)
