"""The layers of PaiNN: messages, updates, the force head, scale factors.

Scalars are [n_atoms, H], vectors [n_atoms, 3, H]. Between layers vectors lie in memory as [3,
n_atoms, H]: products with scalars then run over long rows, up to three times as fast on a CPU.
Invariant: state-dict names are the Open Catalyst ones; linear layers act on atoms, but for the one
that turns radial functions into filters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class ScaledSiLU(nn.Module):
    """x · sigmoid(x) / 0.6, which about keeps the variance of a normal input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x) * (1.0 / 0.6)


class ScaleFactor(nn.Module):
    """x times a factor fitted before training; 0 means not fitted, and leaves x as it is."""

    scale_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale_factor", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        # Chosen on the device: reading the value here would make every layer wait for it.
        return x * torch.where(self.scale_factor == 0.0, 1.0, self.scale_factor)


class EdgeInputs(NamedTuple):
    """What every layer needs of a piece of the edges, computed once per forward pass.

    Attributes:
        source, target: [n_edges] int64.
        direction: [3, n_edges, 1], unit vectors from target to source, divided by √H.
        radial: [n_edges, num_rbf].
        envelope: [n_edges, 1], what the filters' bias is multiplied with; None leaves it constant.
    """

    source: Tensor
    target: Tensor
    direction: Tensor
    radial: Tensor
    envelope: Tensor | None


class Message(nn.Module):
    """Sum over neighbours of filtered scalars and vectors.

    Source: Schütt et al. 2021 (PaiNN), Eqs. 7 and 8, in the Open Catalyst variant: LayerNorm
    before, vectors divided by √H, scalars by √2.
    """

    def __init__(self, hidden_channels: int, num_rbf: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.x_layernorm = nn.LayerNorm(hidden_channels)
        self.x_proj = nn.Sequential(
            nn.Linear(hidden_channels, hidden_channels),
            ScaledSiLU(),
            nn.Linear(hidden_channels, 3 * hidden_channels),
        )
        self.rbf_proj = nn.Linear(num_rbf, 3 * hidden_channels)

    def forward(
        self, x: Tensor, vector: Tensor | None, edges: Sequence[EdgeInputs]
    ) -> tuple[Tensor, Tensor]:
        """New scalars and vectors.

        Args:
            x: [n_atoms, H].
            vector: [n_atoms, 3, H], or None before the first layer, where all are zero.
            edges: of the batch, in pieces.
        """
        atoms = self.x_proj(self.x_layernorm(x))
        axes = x.new_zeros(3, *x.shape) if vector is None else vector.transpose(0, 1)
        # Scaled on atoms, which are fewer than edges.
        scaled = None if vector is None else axes * (1.0 / math.sqrt(3.0 * self.hidden_channels))
        sums, shifts = torch.zeros_like(x), torch.zeros_like(axes)
        for piece in edges:
            filtered = atoms.index_select(0, piece.source) * self._filters(piece)
            scalars, along, outward = filtered.split(self.hidden_channels, dim=-1)
            message = piece.direction * outward
            if scaled is not None:
                message = message + scaled.index_select(1, piece.source) * along
            sums.index_add_(0, piece.target, scalars.to(x.dtype))
            shifts.index_add_(1, piece.target, message.to(x.dtype))
        x = (x + sums) * (1.0 / math.sqrt(2.0))
        return x, (axes + shifts).transpose(0, 1)

    def _filters(self, edges: EdgeInputs) -> Tensor:
        if edges.envelope is None:
            filters: Tensor = self.rbf_proj(edges.radial)
            return filters
        linear = functional.linear(edges.radial, self.rbf_proj.weight)
        return linear + edges.envelope.to(linear.dtype) * self.rbf_proj.bias


class Update(nn.Module):
    """Mix scalars and vectors of each atom.

    Source: Schütt et al. 2021 (PaiNN), Eqs. 9 and 10, in the Open Catalyst variant: scalar
    products divided by √H, the increment of the scalars by √2.
    """

    def __init__(self, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.vec_proj = nn.Linear(hidden_channels, 2 * hidden_channels, bias=False)
        self.xvec_proj = nn.Sequential(
            nn.Linear(2 * hidden_channels, hidden_channels),
            ScaledSiLU(),
            nn.Linear(hidden_channels, 3 * hidden_channels),
        )

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """New scalars [n_atoms, H] and vectors [n_atoms, 3, H]."""
        axes = vector.transpose(0, 1)
        left, right = self.vec_proj(axes).split(self.hidden_channels, dim=-1)
        product = (left * right).sum(0)
        # 1e-8: the derivative of the root stays finite where vectors vanish.
        length = ((right * right).sum(0) + 1e-8).sqrt()
        mixed = self.xvec_proj(torch.cat((x, length.to(x.dtype)), dim=-1))
        shift, gate, scale = mixed.split(self.hidden_channels, dim=-1)
        increment = torch.add(shift, gate * product, alpha=1.0 / math.sqrt(self.hidden_channels))
        x = torch.add(x, increment, alpha=1.0 / math.sqrt(2.0))
        return x, (axes + scale * left).transpose(0, 1)


class GatedEquivariantBlock(nn.Module):
    """Scalars and vectors to other widths, vectors gated by scalars.

    Source: Schütt et al. 2021 (PaiNN), Figure 3.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.vec1_proj = nn.Linear(in_channels, in_channels, bias=False)
        self.vec2_proj = nn.Linear(in_channels, out_channels, bias=False)
        self.update_net = nn.Sequential(
            nn.Linear(2 * in_channels, in_channels),
            ScaledSiLU(),
            nn.Linear(in_channels, 2 * out_channels),
        )
        self.act = ScaledSiLU()

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """[n_atoms, in], [n_atoms, 3, in] to [n_atoms, out], [n_atoms, 3, out]."""
        axes = vector.transpose(0, 1)
        projected = self.vec1_proj(axes)
        # 1e-30 changes no digit and makes the derivative at zero 0. torch's vector_norm over this
        # axis takes ten times as long.
        length = ((projected * projected).sum(0) + 1e-30).sqrt()
        mixed = self.update_net(torch.cat((x, length.to(x.dtype)), dim=-1))
        x, gate = mixed.split(self.out_channels, dim=-1)
        return self.act(x), (gate * self.vec2_proj(axes)).transpose(0, 1)


class ForceHead(nn.Module):
    """Forces straight from the features, two gated blocks."""

    def __init__(self, hidden_channels: int) -> None:
        super().__init__()
        half = hidden_channels // 2
        self.output_network = nn.ModuleList(
            [GatedEquivariantBlock(hidden_channels, half), GatedEquivariantBlock(half, 1)]
        )

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """[n_atoms, 3]."""
        for block in self.output_network:
            x, vector = block(x, vector)
        return vector.squeeze(-1)


class AtomEmbedding(nn.Module):
    """A row of numbers per element, hydrogen first."""

    def __init__(self, num_elements: int, hidden_channels: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(num_elements, hidden_channels)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """[n_atoms] to [n_atoms, H]."""
        rows: Tensor = self.embeddings(atomic_numbers - 1)
        return rows
