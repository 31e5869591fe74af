"""Losses that look at structures as wholes: how atoms relate, and what a structure's mean is.

LSP, GSP and CKA compare relations among rows, so student and teacher may have different channels
and need no projection. Nothing waits for the device.
Invariant: a row of weight 0 changes neither value nor gradient; no rows give exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.distill.losses import Rows, traits
from kdcache.distill.similarity import as_matrix, weighted_linear_cka
from kdcache.errors import ShapeError
from kdcache.structures import Batch

# Vectors shorter than this have no direction; torch's cosine_similarity draws the line there too.
SHORTEST = 1e-8


@traits(relational=True, level="atom", mean_over="edges")
def lsp(prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """Local structure preservation: does each atom differ from its neighbours as the teacher's?

    The distances ‖h_j − h_i‖ of the edges into atom i, made shares of 1 by a softmax, and of these
    the Kullback-Leibler divergence from the teacher's, t (log t − log s), as a mean over edges.
    Edges are those of the student's graph. Distances of vectors are over all 3C numbers.

    Args:
        prediction: [n_atoms, ...].
        target: [n_atoms, ...], other channels allowed.
        rows: with the batch whose edges count; an edge weighs what its target does, and one whose
            source has weight 0 is left out.

    Source: Ekström Kelvinius et al. 2023, appendix E.1, as in the published code; Yang et al. 2020,
    "Distilling knowledge from graph convolutional networks", Eqs. 2–4 with another kernel.
    """
    batch = _batch_of(rows, "lsp")
    source, into = batch.edge_index.unbind(0)
    present = None
    weight = prediction.new_ones(len(into))
    if rows.weight is not None:
        present = (rows.weight[source] > 0) & (rows.weight[into] > 0)
        weight = rows.weight[into] * present
    ours = _log_shares(prediction, source, into, present)
    theirs = _log_shares(target, source, into, present)
    divergence = theirs.exp() * (theirs - ours)
    return (weight * divergence).sum() / _positive(weight.sum())


@traits(relational=True, level="atom", mean_over="structures")
def gsp(prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """Global structure preservation: do any two atoms of a structure differ as the teacher's?

    d_ij is the mean over channels of (h_i − h_j)². The loss is the mean over structures of the mean
    over their pairs (i, j), i = j among them, of (d_ij − d_ij of the teacher)².

    Takes room of n_atoms² of the batch, 26 MB in float32 for 32 structures of 80 atoms: the pairs
    within structures alone would have to be counted, which waits for the device.

    Args:
        prediction: [n_atoms, ...].
        target: [n_atoms, ...], other channels allowed.
        rows: with the batch, whose structures count; a pair weighs the product of its atoms'.

    Source: Ekström Kelvinius et al. 2023, appendix E.1, as in the published code; Joshi et al.
    2022, "On representation knowledge distillation for graph neural networks", Eq. 4.
    """
    batch = _batch_of(rows, "gsp")
    owner = batch.structure_index
    weight = prediction.new_ones(len(owner)) if rows.weight is None else rows.weight
    of_structure = _sums(weight, batch)
    share = weight / _positive(of_structure)[owner]
    difference = _distances(prediction, batch) - _distances(target, batch)
    same = owner[:, None] == owner[None, :]
    pairs = torch.where(same, difference, torch.zeros_like(difference)).square()
    of_atoms = share * (pairs @ share)
    return _mean_of_structures(_sums(of_atoms, batch), of_structure, batch)


@traits(relational=True, mean_over=None)
def cka(prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """1 − linear CKA of all rows of the batch: 0 where they agree up to rotation and scale.

    A batch of one row, or of equal ones, has nothing to compare and gives 0. Vectors count as 3C
    numbers. Of n rows of unrelated features CKA is not 0 but about C/n (see `similarity`): batches
    should have many more rows than channels.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited", Eq. 3
    in its feature form; tried as a loss in Ekström Kelvinius et al. 2023, appendix E.1.
    """
    similarity, defined = weighted_linear_cka(prediction, target, rows.weight)
    return torch.where(defined, 1 - similarity, torch.zeros_like(similarity))


@traits(level="atom", symmetry="vector", mean_over="structures")
def geometric(prediction: Tensor, target: Tensor, rows: Rows) -> Tensor:
    """Half the error of lengths and half that of directions, of each vector channel.

    |‖v‖ − ‖v‖ of the teacher| and 1 − cos, means over channels, then atoms, then structures. A
    vector of no length has no direction, and only its length counts.

    Args:
        prediction: [n_atoms, 3] or [n_atoms, 3, C].
        target: the same shape.
        rows: with the batch, whose structures count.

    Source: the published code of Ekström Kelvinius et al. 2023, its geometric v2v loss.
    """
    batch = _batch_of(rows, "geometric")
    ours = torch.linalg.vector_norm(prediction, dim=1)
    theirs = torch.linalg.vector_norm(target, dim=1)
    directed = (ours > SHORTEST) & (theirs > SHORTEST)
    # Where there is no direction the quotient is not formed: its gradient would be infinite.
    product = torch.where(directed, ours * theirs, torch.ones_like(ours))
    cosine = (prediction * target).sum(1) / product
    direction = torch.where(directed, 1 - cosine, torch.zeros_like(cosine))
    of_atoms = as_matrix(0.5 * ((ours - theirs).abs() + direction)).mean(1)
    weight = torch.ones_like(of_atoms) if rows.weight is None else rows.weight
    of_structure = _sums(weight, batch)
    means = _sums(weight * of_atoms, batch) / _positive(of_structure)
    return _mean_of_structures(means, of_structure, batch)


def _batch_of(rows: Rows, loss: str) -> Batch:
    if rows.batch is None:
        raise ShapeError(
            f"Loss {loss} needs to know which structure an atom belongs to, and got no batch. Pass "
            f"Rows(batch=…)."
        )
    return rows.batch


def _log_shares(features: Tensor, source: Tensor, into: Tensor, present: Tensor | None) -> Tensor:
    """Logarithm of the softmax of feature distances over the edges into each atom, [n_edges]."""
    features = as_matrix(features)
    distance = torch.linalg.vector_norm(features[source] - features[into], dim=1)
    counted = distance
    if present is not None:
        # An edge left out gets no share; its own value is multiplied by 0 in the end.
        counted = torch.where(present, distance, torch.full_like(distance, -1e30))
    n_atoms = len(features)
    largest = distance.new_full((n_atoms,), -torch.inf)
    largest = largest.scatter_reduce(0, into, counted.detach(), "amax")[into]
    total = distance.new_zeros(n_atoms).index_add(0, into, (counted - largest).exp())
    shares: Tensor = counted - largest - total[into].log()
    return shares if present is None else torch.where(present, shares, torch.zeros_like(shares))


def _distances(features: Tensor, batch: Batch) -> Tensor:
    """[n_atoms, n_atoms] mean squared difference of channels; of one structure, meaningful."""
    features = as_matrix(features)
    # About each structure's mean: far from zero, small differences would drown in the products.
    counts = _sums(features.new_ones(len(features)), batch)
    centre = features.new_zeros(batch.n_structures, features.shape[1])
    centre = centre.index_add(0, batch.structure_index, features.detach())
    features = features - (centre / _positive(counts)[:, None])[batch.structure_index]
    squares = features.square().sum(1)
    products = features @ features.T
    return (squares[:, None] + squares[None, :] - 2 * products) / max(features.shape[1], 1)


def _sums(values: Tensor, batch: Batch) -> Tensor:
    """[n_structures] of [n_atoms]."""
    return values.new_zeros(batch.n_structures).index_add(0, batch.structure_index, values)


def _mean_of_structures(values: Tensor, weight_sum: Tensor, batch: Batch) -> Tensor:
    """Mean of [n_structures], each weighing what its atoms do on average."""
    counts = _sums(torch.ones_like(batch.structure_index, dtype=values.dtype), batch)
    weight = weight_sum / _positive(counts)
    return (weight * values).sum() / _positive(weight.sum())


def _positive(values: Tensor) -> Tensor:
    """The values, 1 in place of 0: an empty mean is 0, not NaN."""
    return torch.where(values > 0, values, torch.ones_like(values))
