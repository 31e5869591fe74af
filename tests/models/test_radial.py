from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import spherical_jn
from scipy.stats import binom

from kdcache.models.radial import RadialBasis

CUTOFF = 4.0
DISTANCES = torch.linspace(0.05, CUTOFF * 1.2, 60, dtype=torch.float64)


def basis(rbf: str, envelope: str = "polynomial", exponent: int = 5) -> RadialBasis:
    return RadialBasis(6, CUTOFF, rbf, envelope, exponent).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("rbf", ["gaussian", "spherical_bessel", "bernstein"])
@pytest.mark.parametrize("envelope", ["polynomial", "exponential"])
def test_values_and_slopes_vanish_at_the_cutoff_and_stay_finite_beyond(
    rbf: str, envelope: str
) -> None:
    edge = torch.tensor([CUTOFF * (1 - 1e-7), CUTOFF, CUTOFF * 1.1], dtype=torch.float64)
    edge.requires_grad_()
    values = basis(rbf, envelope)(edge)
    (slope,) = torch.autograd.grad(values.sum(), edge)
    assert values.abs().max() < 1e-12
    assert slope.abs().max() < 1e-6
    inside = basis(rbf, envelope)(DISTANCES)
    assert inside.isfinite().all()
    assert (inside[DISTANCES < 2.0].abs().amax(0) > 1e-4).any()


def test_polynomial_envelope_is_that_of_dimenet() -> None:
    x = np.linspace(0.1, 0.95, 7)
    centre = torch.tensor(x * CUTOFF)
    plain = basis("gaussian").rbf(torch.tensor(x))
    for p in (5, 6):
        expected = (
            1
            - (p + 1) * (p + 2) / 2 * x**p
            + p * (p + 2) * x ** (p + 1)
            - p * (p + 1) / 2 * x ** (p + 2)
        )
        found = basis("gaussian", exponent=p)(centre) / plain
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-6)


def test_gaussians_are_one_at_their_centres_and_one_width_apart() -> None:
    x = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    values = basis("gaussian").rbf(x)
    torch.testing.assert_close(values.diagonal(), torch.ones(6, dtype=torch.float64))
    assert float(values[0, 1]) == pytest.approx(math.exp(-0.5), rel=1e-6)


def test_bessel_functions_are_those_of_order_zero() -> None:
    x = np.linspace(0.05, 1.0, 9)
    found = basis("spherical_bessel").rbf(torch.tensor(x)).detach().numpy()
    for k in range(1, 7):
        omega = k * np.pi
        expected = math.sqrt(2 / CUTOFF**3) * omega * spherical_jn(0, omega * x)
        np.testing.assert_allclose(found[:, k - 1], expected, rtol=1e-5, atol=1e-6)


def test_bernstein_polynomials_are_binomial_probabilities() -> None:
    x = np.linspace(0.05, 1.0, 9)
    found = basis("bernstein").rbf(torch.tensor(x)).detach().numpy()
    gamma = math.log1p(math.exp(0.45264))
    expected = np.stack([binom.pmf(k, 5, np.exp(-gamma * x)) for k in range(6)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
