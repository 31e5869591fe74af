"""Edge features brought to atoms: sums over the edges that end in each atom.

Where a student has no edges to compare, it learns these instead, and they cost a store what node
features cost. Invariant: differentiable, no loop over structures, no wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.models.geometry import edge_vectors
from kdcache.structures import Batch

TO_NODE = "_to_node"
TO_VECTOR = "_to_vector"


def edge_to_node(edge: Tensor, batch: Batch) -> Tensor:
    """Sum of features over the edges into each atom, invariant.

        H_edge2node,i = Σ_{j ∈ N(i)} H_edge,(i,j)

    i is the target of an edge and j its source; a neighbour counts once for each of its images.

    Args:
        edge: [n_edges, M], rows as in `batch.edge_index`.
        batch: whose edges they are.

    Returns:
        [n_atoms, M]; zeros for an atom without edges.

    Source: Ekström Kelvinius et al. 2023, Eq. 5.
    """
    return _sum_at_targets(edge, batch)


def edge_to_vector(edge: Tensor, batch: Batch) -> Tensor:
    """Sum of features times unit vectors over the edges into each atom, turning with the structure.

        H^k_vec,i = Σ_{j ∈ N(i)} u_ij H^k_edge,(i,j),   u_ij = (x_j − x_i) / |x_j − x_i|

    i is the target of an edge, j its source in the image that the edge names, so u_ij points from
    target to source. The code published with the paper has the opposite sign.

    Args:
        edge: [n_edges, M], rows as in `batch.edge_index`.
        batch: whose edges they are.

    Returns:
        [n_atoms, 3, M]; zeros for an atom without edges.

    Source: Ekström Kelvinius et al. 2023, Eq. 6.
    """
    vectors = edge_vectors(batch)
    unit = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    unit = unit.to(edge.dtype)
    # Axis by axis: a product of all three takes three times the room of the edge features.
    axes = [_sum_at_targets(edge * unit[:, k, None], batch) for k in range(3)]
    return torch.stack(axes, dim=1)


def _sum_at_targets(edge: Tensor, batch: Batch) -> Tensor:
    zeros = edge.new_zeros((batch.n_atoms, edge.shape[1]))
    return zeros.index_add(0, batch.edge_index[1], edge)
