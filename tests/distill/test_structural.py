"""Losses over whole structures, judged by loops over structures, atoms and edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.config import TermConfig
from kdcache.distill.binding import build_terms
from kdcache.distill.losses import LossFunction, Rows, find_loss
from kdcache.distill.schedules import Clock
from kdcache.distill.similarity import linear_cka
from kdcache.errors import ShapeError
from kdcache.fields import FieldSpec
from kdcache.structures import Batch
from tests.distill.fields import N_ATOMS, make_batch, make_output, rows

NAMES = ("lsp", "gsp", "cka", "geometric")
# Into atom 1 one edge, into 3 three, one of them from an image of itself; atom 0 has none.
EDGES = torch.tensor([[2, 4, 5, 3, 3, 4], [1, 3, 3, 3, 4, 5]])


def graph_batch() -> Batch:
    batch = make_batch()
    shift = torch.zeros(EDGES.shape[1], 3, dtype=torch.float64)
    shift[3, 0] = 1.0
    return replace(batch, edge_index=EDGES, edge_shift=shift)


def features(name: str, seed: int) -> Tensor:
    return rows(N_ATOMS, 3, 4, seed=seed) if name == "geometric" else rows(N_ATOMS, 4, seed=seed)


def lsp_by_loops(ours: Tensor, theirs: Tensor, edges: list[tuple[int, int]]) -> float:
    def shares(h: Tensor) -> dict[tuple[int, int, int], float]:
        found = {}
        for i in range(len(h)):
            into = [(k, j) for k, (j, target) in enumerate(edges) if target == i]
            sizes = {(k, j): math.exp(float((h[j] - h[i]).norm())) for k, j in into}
            found.update({(k, j, i): v / sum(sizes.values()) for (k, j), v in sizes.items()})
        return found

    s, t = shares(ours), shares(theirs)
    return sum(t[e] * math.log(t[e] / s[e]) for e in t) / len(t)


def gsp_by_loops(ours: Tensor, theirs: Tensor, structures: list[list[int]]) -> float:
    def distance(h: Tensor, i: int, j: int) -> float:
        return float(((h[i] - h[j]) ** 2).mean())

    means = []
    for atoms in structures:
        squares = [
            (distance(ours, i, j) - distance(theirs, i, j)) ** 2 for i in atoms for j in atoms
        ]
        means.append(sum(squares) / len(squares))
    return sum(means) / len(means)


def geometric_by_loops(ours: Tensor, theirs: Tensor, structures: list[list[int]]) -> float:
    means = []
    for atoms in structures:
        values = []
        for i in atoms:
            for v, w in zip(ours[i].T, theirs[i].T, strict=True):
                cosine = float(v @ w / (v.norm() * w.norm()))
                values.append(0.5 * abs(float(v.norm() - w.norm())) + 0.5 * (1 - cosine))
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


STRUCTURES = [[0], [1, 2], [3, 4, 5]]


def judged(name: str, ours: Tensor, theirs: Tensor, kept: list[int]) -> float:
    """The loss of some atoms alone."""
    if name == "cka":
        return 1 - float(linear_cka(ours[kept], theirs[kept]))
    if name == "lsp":
        pairs = [(int(j), int(i)) for j, i in EDGES.T]
        return lsp_by_loops(ours, theirs, [e for e in pairs if set(e) <= set(kept)])
    structures = [[i for i in atoms if i in kept] for atoms in STRUCTURES]
    by_loops = gsp_by_loops if name == "gsp" else geometric_by_loops
    return by_loops(ours, theirs, [atoms for atoms in structures if atoms])


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_loops_over_atoms_and_edges(name: str) -> None:
    ours, theirs = features(name, 1), features(name, 2)
    if name != "geometric":
        theirs = rows(N_ATOMS, 3, 5, seed=2)  # other channels, and vectors against scalars
    value = find_loss(name)(ours, theirs, Rows(batch=graph_batch()))
    expected = judged(name, ours.flatten(1) if name == "cka" else ours, theirs, list(range(6)))
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kept", [[3, 4, 5], [0, 3, 4, 5], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("name", NAMES)
def test_structures_of_weight_zero_count_for_nothing(name: str, kept: list[int]) -> None:
    ours, theirs = features(name, 1).requires_grad_(), features(name, 2)
    weight = torch.zeros(N_ATOMS, dtype=torch.float64)
    weight[kept] = 2.0
    value = find_loss(name)(ours, theirs, Rows(weight, graph_batch()))
    assert value.item() == pytest.approx(judged(name, ours.detach(), theirs, kept), rel=1e-12)
    value.backward()
    assert ours.grad is not None
    others = [i for i in range(N_ATOMS) if i not in kept]
    assert not ours.grad[others].any()
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_change_nothing(name: str) -> None:
    ours, theirs, batch = features(name, 1), features(name, 2), graph_batch()
    weight = torch.full((N_ATOMS,), 0.3, dtype=torch.float64)
    loss = find_loss(name)
    torch.testing.assert_close(
        loss(ours, theirs, Rows(weight, batch)), loss(ours, theirs, Rows(batch=batch))
    )


@pytest.mark.parametrize("name", ["gsp", "geometric"])
def test_structures_weigh_what_their_origin_does(name: str) -> None:
    ours, theirs, batch = features(name, 1), features(name, 2), graph_batch()
    loss = find_loss(name)
    of_structure = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    weighted = loss(ours, theirs, Rows(of_structure[batch.structure_index], batch)).item()
    alone = [judged(name, ours, theirs, atoms) for atoms in STRUCTURES]
    mean = sum(w * v for w, v in zip(of_structure.tolist(), alone, strict=True)) / 4.5
    assert weighted == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name: str) -> None:
    theirs, batch = features(name, 2), graph_batch()
    weight = torch.tensor([1.0, 2.0, 2.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    loss = find_loss(name)
    for rows_ in (Rows(batch=batch), Rows(weight, batch)):
        assert torch.autograd.gradcheck(
            lambda ours, given=rows_: loss(ours, theirs, given),
            features(name, 1).requires_grad_(),
        )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_compare_gives_exactly_zero(name: str) -> None:
    loss, batch = find_loss(name), graph_batch()
    ours, theirs = features(name, 1).requires_grad_(), features(name, 2)
    none = loss(ours, theirs, Rows(torch.zeros(N_ATOMS, dtype=torch.float64), batch))
    assert none.item() == 0.0
    none.backward()
    assert ours.grad is not None
    assert not ours.grad.any()
    empty = replace(
        batch,
        structure_index=batch.structure_index[:0],
        edge_index=EDGES[:, :0],
        n_structures=0,
    )
    assert loss(ours[:0], theirs[:0], Rows(batch=empty)).item() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_equal_features_give_zero_with_finite_gradients(name: str) -> None:
    ours = features(name, 1)
    ours[4] = ours[3]  # two atoms alike: no distance between them
    if name == "geometric":
        ours[0] = 0.0  # and a vector without direction
    ours.requires_grad_()
    value = find_loss(name)(ours, ours.detach().clone(), Rows(batch=graph_batch()))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize("name", ["lsp", "gsp", "geometric"])
def test_without_a_batch_it_is_said_what_is_missing(name: str) -> None:
    with pytest.raises(ShapeError, match="got no batch"):
        find_loss(name)(features(name, 1), features(name, 2), Rows())


def test_relations_are_kept_by_rotations_of_either_side() -> None:
    batch = graph_batch()
    ours, theirs = features("gsp", 1), rows(N_ATOMS, 7, seed=2)
    turn, _ = torch.linalg.qr(rows(4, 4, seed=3))
    for name in ("lsp", "gsp", "cka"):
        loss: LossFunction = find_loss(name)
        torch.testing.assert_close(
            loss(ours @ turn, theirs, Rows(batch=batch)), loss(ours, theirs, Rows(batch=batch))
        )


def test_terms_hand_the_batch_on_and_need_no_projection() -> None:
    teacher = {"node": FieldSpec("node", "atom", (6,))}
    terms = build_terms(
        [TermConfig(name=name, student="node", teacher="node", loss=name) for name in NAMES[:3]],
        student_fields=[FieldSpec("node", "atom", (4,))],
        teacher_fields={"a": teacher},
        clock=Clock(1),
        seed=0,
    )
    assert not list(terms.parameters())
    batch, output = graph_batch(), make_output()
    parts = terms(output, batch, 0).parts
    for name, value in parts.items():
        direct = find_loss(name)(
            output.features["node"], batch.teacher["a/node"], Rows(batch=batch)
        )
        torch.testing.assert_close(value, direct.detach())
