from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.errors import DataError
from kdcache.graphs import GraphRule
from kdcache.models.gemnet_oc.bases import BasisEmbedding, CircularBasis, SphericalBasis
from kdcache.models.gemnet_oc.hyperparameters import SphericalName
from kdcache.models.gemnet_oc.inputs import Edges
from kdcache.models.gemnet_oc.mixing import pair_mixing, quadruplet_angles
from kdcache.models.gemnet_oc.paths import (
    EdgeFinder,
    Quadruplets,
    Slots,
    quadruplets,
    reverse_edges,
    triplets,
)
from kdcache.models.gemnet_oc.quadruplet_mixing import quadruplet_mixing
from kdcache.structures import Graph
from tests.models.cases import Atoms, crystal, make_batch, molecule, relative_error
from tests.models.test_gemnet_oc_steps import spherical_functions

Ends = tuple[Tensor, Tensor, Tensor]
Keys = list[tuple[int, int, tuple[int, ...]]]


def perfect_crystal() -> Atoms:
    """Rows of collinear atoms, and images of atoms of themselves on both sides of them."""
    positions = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    return Atoms(np.full(4, 29), positions, 2.0 * np.eye(3), np.ones(3, dtype=bool))


CASES = {
    "molecules": [molecule(4), molecule(1), molecule(5, seed=2)],
    "images": [crystal(), molecule(3)],
    "perfect": [perfect_crystal()],
}


@pytest.fixture(params=CASES)
def edges(request: pytest.FixtureRequest) -> tuple[Edges, Edges]:
    """A main and a narrower directed graph, both in an order that is none."""
    main_rule, middle_rule = GraphRule(2.1, 9, symmetric=True), GraphRule(1.9, 3)
    batch = make_batch(CASES[request.param], main_rule, torch.float64, {"middle": middle_rule})
    generator = torch.Generator().manual_seed(1)
    made = []
    for graph in (Graph(batch.edge_index, batch.edge_shift), batch.graphs["middle"]):
        order = torch.randperm(graph.edge_index.shape[1], generator=generator)
        shuffled = Graph(graph.edge_index[:, order], graph.edge_shift[order])
        made.append(Edges.of(batch, shuffled))
    return made[0], made[1]


def keys(edges: Edges) -> Keys:
    shifts = [tuple(row) for row in edges.shift.tolist()]
    return list(zip(edges.source.tolist(), edges.target.tolist(), shifts, strict=True))


def test_reverse_edges_go_back_through_the_same_image(edges: tuple[Edges, Edges]) -> None:
    main, _ = edges
    listed = keys(main)
    reverse = reverse_edges(*main.ends, main.finder).tolist()
    for k, (source, target, shift) in enumerate(listed):
        assert listed[reverse[k]] == (target, source, tuple(-n for n in shift))


def test_an_edge_without_reverse_is_refused() -> None:
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    shift = torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(DataError, match="from atom 2 to 1 has no reverse"):
        reverse_edges(source, target, shift, EdgeFinder(source, target, shift, 3))


@pytest.mark.proof
def test_triplets_are_all_pairs_into_an_atom_but_an_edge_with_itself(
    edges: tuple[Edges, Edges],
) -> None:
    for outer, inner in product(edges, edges):
        found = set()
        mask = triplets(outer.target, inner.finder.find(*outer.ends), inner.slots)
        for out, slot in mask.nonzero().tolist():
            found.add((out, int(inner.slots.edge[outer.target[out], slot])))
        expected = {
            (o, i)
            for (o, out), (i, ingoing) in product(enumerate(keys(outer)), enumerate(keys(inner)))
            if out[1] == ingoing[1] and (out[0], out[2]) != (ingoing[0], ingoing[2])
        }
        assert found == expected
        assert len(found) == int(mask.sum())


def found_quadruplets(paths: Quadruplets, main: Edges, middle: Edges) -> set[tuple[int, int, int]]:
    table = main.slots.edge
    partners = paths.partners(table, middle.source)
    return {
        (int(table[middle.target[q], c]), q, int(table[middle.source[q], d]))
        for q, c, d in partners.nonzero().tolist()
    }


def minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


@pytest.mark.proof
def test_quadruplets_are_all_paths_that_do_not_turn_back_or_close(
    edges: tuple[Edges, Edges],
) -> None:
    main, middle = edges
    paths = quadruplets(middle.ends, main.ends, main.slots, main.finder)
    listed = list(enumerate(keys(main)))
    expected = set()
    for q, (b, a, o_ba) in enumerate(keys(middle)):
        for (out, (c, into_a, o_ca)), (inner, (d, into_b, o_db)) in product(listed, listed):
            if into_a != a or into_b != b:
                continue
            back = d == a and o_db == minus((0, 0, 0), o_ba)
            same = (c, o_ca) == (b, o_ba)
            closed = d == c and o_db == minus(o_ca, o_ba)
            if not (back or same or closed):
                expected.add((out, q, inner))
    assert found_quadruplets(paths, main, middle) == expected


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["legendre_outer", "spherical_harmonics", "gaussian_outer"])
def test_sums_over_quadruplets_are_those_of_a_list_of_all_of_them(
    edges: tuple[Edges, Edges], kind: SphericalName
) -> None:
    main, middle = edges
    paths = quadruplets(middle.ends, main.ends, main.slots, main.finder)
    angles = quadruplet_angles(
        paths, middle.source, middle.target, middle.vector, main.slots, main.vector
    )
    generator = torch.Generator().manual_seed(0)
    basis = SphericalBasis(4, kind, torch.nn.Identity(), scaled=False).double()
    embedding = BasisEmbedding(6, 16, 3).double()
    torch.nn.init.normal_(embedding.weight, generator=generator)
    radial = torch.randn(len(main.source), 6, generator=generator, dtype=torch.float64)
    u = torch.randn(*paths.inner.shape, 5, generator=generator, dtype=torch.float64)
    bilinear = torch.randn(2, 15, generator=generator, dtype=torch.float64)

    # θ from the cross products of the definition, not from azimuths.
    listed = sorted(found_quadruplets(paths, main, middle))
    outer, through, inner = torch.tensor(listed).T
    v_ca, v_ba, v_db = main.vector[outer], middle.vector[through], main.vector[inner]
    x, y = torch.linalg.cross(v_ca, v_ba), torch.linalg.cross(v_db, v_ba)
    across = torch.linalg.vector_norm(torch.linalg.cross(x, y), dim=-1).clamp(min=1e-9)
    theta = torch.atan2(across, (x * y).sum(-1))
    phi = (v_ca * v_ba).sum(-1)
    functions = spherical_functions(basis, phi, torch.cos(theta), torch.sin(theta))
    messages = u[through, main.slots.slot[inner]]
    products = functions.unsqueeze(-1) * messages.unsqueeze(1)
    sums = products.new_zeros(len(radial), 16, 5).index_add(0, outer, products)
    with torch.no_grad():
        expected = torch.bmm(embedding(radial), sums).flatten(1) @ bilinear.T
        found = quadruplet_mixing(angles, basis, embedding, radial)(u, bilinear)
    # Where atoms stand in a row the published floor of 1e-9 leaves rounding in θ.
    assert relative_error(found, expected) < 1e-6


def test_pairs_take_all_images_of_a_neighbour_together(edges: tuple[Edges, Edges]) -> None:
    main, _ = edges
    generator = torch.Generator().manual_seed(0)
    radial = torch.randn(len(main.source), 3, generator=generator, dtype=torch.float64)
    p = torch.randn(main.n_atoms, 2, generator=generator, dtype=torch.float64)
    bilinear = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    found = pair_mixing(main.source, main.target, radial, main.n_atoms)(p, bilinear)
    products = (radial.unsqueeze(-1) * p[main.source].unsqueeze(1)).flatten(1)
    sums = products.new_zeros(main.n_atoms, 6).index_add(0, main.target, products)
    torch.testing.assert_close(found, sums @ bilinear.T)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_a_table_gives_back_the_rows_it_was_given(targets: list[int]) -> None:
    target = torch.tensor(targets, dtype=torch.int64)
    slots = Slots(target, 7)
    rows = torch.arange(1.0, len(targets) + 1.0).unsqueeze(-1)
    table = slots.spread(rows)
    assert torch.equal(slots.collect(table), rows)
    assert table.sum() == rows.sum()
    assert torch.equal(slots.filled.sum(1), torch.bincount(target, minlength=7))
    assert torch.equal(slots.edge < len(targets), slots.filled)


def test_an_edge_is_found_by_all_of_its_ends() -> None:
    source, target = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0])
    shift = torch.tensor([[0, 0, 0], [0, 1, 0], [0, -1, 0]])
    finder = EdgeFinder(source, target, shift, 2)
    assert finder.find(source, target, shift).tolist() == [0, 1, 2]
    # Outside the range of known shifts, where keys would collide with those of other edges.
    far = torch.tensor([[0, 2, 0], [1, 0, 0], [0, 0, 40]])
    assert finder.find(source, target, far).tolist() == [3, 3, 3]
    empty = torch.zeros(0, dtype=torch.int64)
    nothing = EdgeFinder(empty, empty, torch.zeros(0, 3, dtype=torch.int64), 2)
    assert nothing.find(source, target, shift).tolist() == [0, 0, 0]


def test_gaussians_of_an_angle_keep_the_published_name() -> None:
    basis = CircularBasis(5, "gaussian", torch.nn.Identity(), scaled=True)
    assert set(basis.state_dict()) == {"cosφ_basis.offset", "scale_cbf.scale_factor"}
    values = basis(torch.tensor([-1.0, 0.0, 0.5]))
    assert values.argmax(-1).tolist() == [0, 2, 3]
    torch.testing.assert_close(values[1, 1], torch.exp(torch.tensor(-0.5)))
