"""From positions to what models compute on, and from energies back to forces.

Invariant: differentiable in the positions, no loop over structures, no wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.structures import Batch, ModelOutput


def edge_vectors(batch: Batch) -> Tensor:
    """[n_edges, 3] Å, from each target to its source's image.

    positions[source] + edge_shift @ cell - positions[target]
    """
    source, target = batch.edge_index.unbind(0)
    cell = batch.cell.index_select(0, batch.structure_index.index_select(0, source))
    # A product and a sum, not a matrix product: autocast would round that to bfloat16.
    image = (batch.edge_shift.unsqueeze(-1) * cell).sum(1)
    between = batch.positions.index_select(0, source) - batch.positions.index_select(0, target)
    return between + image


def sum_structures(atomic: Tensor, batch: Batch) -> Tensor:
    """[n_structures], the sum of [n_atoms] over the atoms of each structure."""
    zeros = atomic.new_zeros(batch.n_structures)
    return zeros.index_add(0, batch.structure_index, atomic)


def gradient_forces(compute: Callable[[Batch], ModelOutput], batch: Batch) -> ModelOutput:
    """The output of `compute` with forces −∂E/∂positions in place of its own.

    Works under `torch.no_grad`, and then returns tensors without a graph. Where gradients are
    enabled the graph is kept, so that a loss on forces can be differentiated.

    Args:
        compute: energies and features of a batch, differentiable in its positions.
        batch: edges and shifts are constants.
    """
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        positions = batch.positions
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        output = compute(replace(batch, positions=positions))
        (gradient,) = torch.autograd.grad(output.energy.sum(), positions, create_graph=keep_graph)
    if keep_graph:
        return replace(output, forces=-gradient)
    return ModelOutput(
        energy=output.energy.detach(),
        forces=-gradient,
        atomic_energy=output.atomic_energy.detach(),
        features={name: feature.detach() for name, feature in output.features.items()},
    )
