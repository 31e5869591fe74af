from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.models import Model, build_model, pieces
from kdcache.models.pieces import edge_pieces
from kdcache.models.taps import Tap, Taps
from kdcache.structures import Batch
from tests.models.cases import crystal, make_batch, molecule

PAINN = {"name": "painn", "hidden_channels": 8, "num_layers": 2, "num_rbf": 4}
SCHNET = {
    "name": "schnet",
    "hidden_channels": 8,
    "num_filters": 12,
    "num_gaussians": 24,
    "num_interactions": 2,
}
MODELS = {
    "painn": (PAINN, "message_layers.1.rbf_proj"),
    "painn-gradient": ({**PAINN, "direct_forces": False}, "radial_basis"),
    "schnet": (SCHNET, "interactions.1.mlp"),
}
WIDTH = 24  # of the widest tensor over edges in all of them


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Model, str]:
    settings, path = MODELS[request.param]
    return build_model(settings, seed=1).double(), path


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_VALUES", 7 * WIDTH + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def batch_of(model: Model) -> Batch:
    # The second has no edges.
    return make_batch([molecule(6), molecule(1), crystal(), molecule(4)], model.graph_rule)


def learn(model: Model, path: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Everything a training step asks of a model, and how often it ran the module at `path`."""
    batch, runs = batch_of(model), []
    handle = model.get_submodule(path).register_forward_hook(lambda *call: runs.append(call[2]))
    with Taps(model, [Tap("edge", "inner", path)]) as tapped:
        output = model(batch)
        inner = tapped.outputs(batch)["edge_inner"]
    handle.remove()
    model.zero_grad()
    loss = output.energy.square().sum() + output.forces.square().sum() + inner.square().sum()
    loss.backward()
    gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
    assert len(gradients) > 10
    values = {"energy": output.energy, "forces": output.forces, "inner": inner}
    return {**values, **output.features, **gradients}, runs


def test_edges_in_pieces_give_what_all_at_once_give(
    case: tuple[Model, str], request: pytest.FixtureRequest
) -> None:
    whole, once = learn(*case)
    request.getfixturevalue("in_pieces")
    cut, runs = learn(*case)
    assert len(once) == 1
    batch = batch_of(case[0])
    # A piece has as many edges as there are atoms, where gradients are wanted.
    assert [len(run) for run in runs[:-1]] == [batch.n_atoms] * (batch.n_edges // batch.n_atoms)
    assert len(runs) > 2
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_predictions_in_pieces_are_those_of_all_edges_at_once(
    case: tuple[Model, str], request: pytest.FixtureRequest
) -> None:
    model, batch = case[0], batch_of(case[0])
    with torch.no_grad():
        whole = model(batch)
        request.getfixturevalue("in_pieces")
        cut = model(batch)
    for name in ("energy", "forces", "atomic_energy"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-9, atol=1e-10)


def test_a_batch_without_edges_is_one_piece(case: tuple[Model, str], in_pieces: Any) -> None:
    model, _ = case
    batch = make_batch([molecule(1)], model.graph_rule)
    assert batch.n_edges == 0
    assert model(batch).energy.shape == (1,)


def test_pieces_hold_every_edge_once_in_order(in_pieces: Any) -> None:
    index, vector = torch.arange(20), torch.rand(20, 3)
    with torch.no_grad():
        found = list(edge_pieces(WIDTH, 9, index, vector))
    assert [len(piece[0]) for piece in found] == [7, 7, 6]
    assert torch.equal(torch.cat([piece[0] for piece in found]), index)
    assert torch.equal(torch.cat([piece[1] for piece in found]), vector)


def test_more_threads_take_larger_pieces(monkeypatch: pytest.MonkeyPatch, in_pieces: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.no_grad():
        found = list(edge_pieces(WIDTH, 9, torch.arange(20)))
    assert [len(piece[0]) for piece in found] == [14, 6]


def test_with_gradients_a_piece_has_an_edge_for_every_atom(in_pieces: Any) -> None:
    found = list(edge_pieces(WIDTH, 9, torch.arange(20)))
    assert [len(piece[0]) for piece in found] == [9, 9, 2]


def test_an_edge_wider_than_a_piece_is_a_piece(in_pieces: Any) -> None:
    assert len(list(edge_pieces(10 * pieces.PIECE_VALUES, 1, torch.arange(3)))) == 3


def test_other_devices_compute_all_edges_at_once(in_pieces: Any) -> None:
    found = list(edge_pieces(WIDTH, 9, torch.empty(20, device="meta")))
    assert [piece[0].shape for piece in found] == [(20,)]
