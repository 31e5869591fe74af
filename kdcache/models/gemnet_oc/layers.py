"""The small layers GemNet-OC is made of: linear maps without bias, residuals, scale factors.

Invariant: state-dict names are the Open Catalyst ones, and no layer has a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcache.models.gemnet_oc.rows import Scaled

INVERSE_SQRT_2 = 1.0 / math.sqrt(2.0)
# silu times this about keeps the variance of a normal input.
SILU_SCALE = 1.0 / 0.6

Reference = Callable[[], tuple[Tensor, Tensor | None]]
Observer = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]


def linear(x: Tensor, weight: Tensor, gain: float = 1.0) -> Tensor:
    """gain · x @ weight.T of [n, n_in] and [n_out, n_in]."""
    if gain == 1.0:
        return functional.linear(x, weight)
    return torch.addmm(x.new_zeros(1), x, weight.t(), beta=0.0, alpha=gain)


def silu(fresh: Tensor) -> Tensor:
    """x · sigmoid(x) of a tensor that nobody else holds, in place where no gradient is."""
    return functional.silu(fresh, inplace=not fresh.requires_grad)


class ScaleFactor(nn.Module):
    """A factor that gives a tensor the variance of a reference; 0 means not fitted, identity.

    Attributes:
        observer: what fits it listens here, and gets the scaled tensor, the reference, how often
            each row of the reference counts and which rows of the tensor count.
    """

    scale_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_factor", torch.tensor(0.0))
        self.observer: Observer | None = None

    @property
    def factor(self) -> Tensor:
        """[], what is multiplied with."""
        # On the device: reading the value here would make every layer wait for it.
        return self.scale_factor.masked_fill(self.scale_factor == 0.0, 1.0)

    def forward(
        self, x: Tensor, reference: Reference | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """x, scaled; arguments as of `observe`."""
        scaled = x * self.factor
        if reference is not None:
            self.observe(scaled, reference, counted)
        return scaled

    def observe(self, scaled: Tensor, reference: Reference, counted: Tensor | None = None) -> None:
        """Tell the observer, if there is one, about a tensor already multiplied by `factor`.

        Args:
            scaled: [n, channels].
            reference: gives [k, channels], whose variance it should have, and [k], how often each
                of these rows counts, or None for once.
            counted: [n] bool, which rows count; all without.
        """
        if self.observer is not None:
            self.observer(scaled, *reference(), counted)


class Dense(nn.Module):
    """A linear map without bias, and the activation silu / 0.6."""

    def __init__(self, n_in: int, n_out: int, *, activation: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)
        self.activation = activation

    @property
    def weight(self) -> Tensor:
        """[n_out, n_in]."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """[n, n_in] to [n, n_out]."""
        return self.extend(Scaled(x)).tensor()

    def extend(self, x: Scaled) -> Scaled:
        """Likewise, with factors not multiplied out."""
        y = linear(x.values, self.weight, x.gain)
        return Scaled(silu(y), SILU_SCALE, fresh=True) if self.activation else Scaled(y)


class Residual(nn.Module):
    """(x + two dense layers of x) / √2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_mlp = nn.Sequential(Dense(width, width), Dense(width, width))

    def extend(self, x: Scaled) -> Scaled:
        """[n, width] to [n, width]; x is used up."""
        y = extend(self.dense_mlp, x)
        return x.plus(y.values, y.gain).times(INVERSE_SQRT_2)


def residuals(width: int, n_layers: int) -> nn.ModuleList:
    """`n_layers` residual layers."""
    return nn.ModuleList([Residual(width) for _ in range(n_layers)])


def mlp(n_in: int, n_out: int, n_residual: int) -> nn.ModuleList:
    """A dense layer where the widths differ, then residual layers."""
    first = [Dense(n_in, n_out)] if n_in != n_out else []
    return nn.ModuleList([*first, *residuals(n_out, n_residual)])


def extend(layers: Iterable[nn.Module], x: Scaled) -> Scaled:
    """x through dense and residual layers in turn, factors not multiplied out; x is used up."""
    for layer in layers:
        x = cast(Dense | Residual, layer).extend(x)
    return x


def apply(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """x through dense and residual layers in turn."""
    return extend(layers, Scaled(x)).tensor()


class EdgeEmbedding(nn.Module):
    """Dense layer of [features of source, features of target, features of the edge]."""

    def __init__(self, atom_width: int, edge_in: int, edge_out: int) -> None:
        super().__init__()
        self.atom_width = atom_width
        self.dense = Dense(2 * atom_width + edge_in, edge_out)

    def atoms(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The atoms' part of the product, as sources and as targets.

        It is taken on atoms, which are fewer than edges.
        """
        width = self.atom_width
        weight = self.dense.weight
        return linear(h, weight[:, :width]), linear(h, weight[:, width : 2 * width])

    def edges(
        self, m: Tensor, source: Tensor, target: Tensor, atoms: tuple[Tensor, Tensor]
    ) -> Scaled:
        """New edge features.

        Args:
            m: [n_edges, edge_in].
            source, target: [n_edges].
            atoms: as `atoms` gives them.

        Returns:
            [n_edges, edge_out].
        """
        y = linear(m, self.dense.weight[:, 2 * self.atom_width :])
        y = y + atoms[0].index_select(0, source)
        y = y.add_(atoms[1].index_select(0, target))
        return Scaled(silu(y), SILU_SCALE, fresh=True)

    def forward(self, h: Tensor, m: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """[n_atoms, atom_width] and [n_edges, edge_in] to [n_edges, edge_out]."""
        return self.edges(m, source, target, self.atoms(h)).tensor()


class TapPoint(nn.Identity):
    """Passes a tensor on: a module whose path names a feature."""


def he_orthogonal(weight: Tensor, generator: torch.Generator | None) -> None:
    """Draw orthogonal weights, standardised over their inputs, of variance one over their number.

    Args:
        weight: [n_out, n_in], or [n_in, n_in', n_out].

    Source: Gasteiger et al. 2022 (GemNet-OC), after He et al. 2015, as the Open Catalyst Project
        initialises it.
    """
    if weight.is_meta:
        return
    with torch.no_grad():
        nn.init.orthogonal_(weight, generator=generator)
        axes = (1,) if weight.ndim == 2 else (0, 1)
        n_inputs = math.prod(weight.shape[axis] for axis in axes)
        variance, mean = torch.var_mean(weight, dim=axes, keepdim=True)
        # 1e-6: a single input has no variance to divide by.
        weight.sub_(mean).div_((variance + 1e-6).sqrt()).mul_(1.0 / math.sqrt(n_inputs))
