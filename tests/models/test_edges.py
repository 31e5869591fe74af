"""Edge features brought to atoms: Eqs. 5 and 6 edge by edge, and as published code gave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.graphs import GraphRule
from kdcache.models.edges import edge_to_node, edge_to_vector
from kdcache.structures import Batch
from tests.models.cases import Atoms, crystal, make_batch, molecule, relative_error

RULE = GraphRule(3.5)
LONE = Atoms(np.array([6]), np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool))


def features(batch: Batch, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch.n_edges, channels, generator=generator, dtype=torch.float64)


def one_by_one(edge: Tensor, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Eqs. 5 and 6 as a loop over edges."""
    node = np.zeros((batch.n_atoms, edge.shape[1]))
    vector = np.zeros((batch.n_atoms, 3, edge.shape[1]))
    for k in range(batch.n_edges):
        j, i = (int(atom) for atom in batch.edge_index[:, k])
        cell = batch.cell[int(batch.structure_index[i])].numpy()
        x_j = batch.positions[j].numpy() + batch.edge_shift[k].numpy() @ cell
        u_ij = x_j - batch.positions[i].numpy()
        u_ij = u_ij / np.sqrt((u_ij**2).sum())
        node[i] += edge[k].numpy()
        for channel in range(edge.shape[1]):
            vector[i, :, channel] += u_ij * float(edge[k, channel])
    return node, vector


@pytest.mark.proof
def test_sums_are_those_of_equations_5_and_6_edge_by_edge() -> None:
    batch = make_batch([molecule(7), crystal(), LONE], RULE)
    edge = features(batch)
    node, vector = one_by_one(edge, batch)
    np.testing.assert_allclose(edge_to_node(edge, batch), node, rtol=0, atol=1e-12)
    np.testing.assert_allclose(edge_to_vector(edge, batch), vector, rtol=0, atol=1e-12)
    assert not edge_to_node(edge, batch)[-1].any()
    assert not edge_to_vector(edge, batch)[-1].any()


@pytest.mark.proof
def test_vectors_turn_with_the_structure_and_sums_stay() -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    turn *= np.linalg.det(turn)
    plain = [molecule(6), crystal()]
    turned = [s.moved(s.positions @ turn.T, s.cell @ turn.T) for s in plain]
    before, after = make_batch(plain, RULE), make_batch(turned, RULE)
    edge = features(before)
    expected = torch.einsum("ij,njc->nic", torch.tensor(turn), edge_to_vector(edge, before))
    torch.testing.assert_close(edge_to_vector(edge, after), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(edge_to_node(edge, after), edge_to_node(edge, before))


@pytest.mark.proof
@pytest.mark.parametrize("case", ["molecule", "batch3", "slab"])
def test_published_code_gives_the_same_sums_and_vectors_of_opposite_sign(
    case: str, shared: Path
) -> None:
    directory = shared / "golden" / "gemnet_oc" / case
    inputs, graph = np.load(directory / "inputs.npz"), np.load(directory / "graph_float64.npz")
    outputs = np.load(directory / "outputs_float64.npz")
    edge_index = torch.tensor(graph["main_graph.edge_index"])
    batch = Batch(
        atomic_numbers=torch.tensor(inputs["atomic_numbers"]),
        positions=torch.tensor(inputs["pos"], dtype=torch.float64),
        cell=torch.tensor(inputs["cell"], dtype=torch.float64),
        pbc=torch.tensor(inputs["pbc"]),
        structure_index=torch.tensor(inputs["batch"]),
        n_structures=len(inputs["natoms"]),
        edge_index=edge_index,
        # It counts the images of targets where we count those of sources.
        edge_shift=-torch.tensor(graph["main_graph.cell_offset"], dtype=torch.float64),
    )
    edge = torch.tensor(outputs["edge_feature"])
    node, vector = (torch.tensor(outputs[f"{name}_feature"]) for name in ("e2n", "vector"))
    assert relative_error(edge_to_node(edge, batch), node) < 1e-12
    assert relative_error(edge_to_vector(edge, batch), -vector) < 1e-12


def test_gradients_flow_to_features_and_positions() -> None:
    batch = make_batch([molecule(4)], RULE)
    batch.positions.requires_grad_()
    edge = features(batch).requires_grad_()
    edge_to_vector(edge, batch).square().sum().backward()  # type: ignore[no-untyped-call]
    assert edge.grad is not None
    assert edge.grad.abs().min() > 0
    assert batch.positions.grad is not None
