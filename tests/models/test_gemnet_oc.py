from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.errors import ConfigError, DataError
from kdcache.models import Model, build_model
from kdcache.models.gemnet_oc import GemNetOC
from kdcache.models.taps import Tap, Taps
from kdcache.models.weights import load_weights
from kdcache.structures import Batch, Graph
from kdcache.testing import check_student
from tests.models.cases import crystal, make_batch, molecule

SMALL = {
    "name": "gemnet-oc", "num_spherical": 4, "num_radial": 6, "num_blocks": 2, "emb_size_atom": 8,
    "emb_size_edge": 10, "emb_size_trip_in": 4, "emb_size_trip_out": 5, "emb_size_quad_in": 3,
    "emb_size_quad_out": 4, "emb_size_aint_in": 4, "emb_size_aint_out": 5, "emb_size_rbf": 3,
    "emb_size_cbf": 4, "emb_size_sbf": 5, "num_atom": 1, "num_output_afteratom": 1,
    "num_global_out_layers": 1, "cutoff": 3.0, "max_neighbors": None, "max_neighbors_qint": 4,
}  # fmt: skip


def small(**choices: object) -> Model:
    return build_model({**SMALL, **choices}).double()


def small_batch(model: Model, *structures: object) -> Batch:
    chosen = structures or (molecule(5), crystal(), molecule(4, seed=1))
    return make_batch(chosen, model.graph_rule, torch.float64, model.further_graphs)  # type: ignore[arg-type]


@pytest.mark.proof
@pytest.mark.parametrize(
    "choices",
    [
        {},
        # A limited main graph would depend on the order of atoms, as the published one does.
        {"max_neighbors_aeaint": 2, "max_neighbors_aint": 9},
        {"quad_interaction": False, "extensive": False},
        {"atom_edge_interaction": False, "edge_atom_interaction": False, "forces_coupled": True},
        {"atom_interaction": False, "cutoff_qint": 2.5, "cutoff_aeaint": 2.0},
        {"direct_forces": False, "rbf": "spherical_bessel", "envelope": "exponential"},
        {"sbf": "spherical_harmonics", "direct_forces": False},
        {
            "cbf": "gaussian", "sbf": "gaussian_outer", "scale_basis": True,
            "rbf_spherical": "bernstein", "num_output_afteratom": 0, "emb_size_edge": 8,
        },
    ],
    ids=lambda choices: "-".join(choices) or "default",
)  # fmt: skip
def test_symmetries_hold_and_a_structure_alone_is_one_in_a_batch(
    choices: dict[str, object],
) -> None:
    # Among the structures: an atom alone, two out of reach, three, and images of an atom of itself.
    check_student(small(**choices))


@pytest.mark.proof
@pytest.mark.parametrize("sbf", ["legendre_outer", "spherical_harmonics"])
def test_gradient_forces_are_finite_differences_of_the_energy(sbf: str) -> None:
    model = small(direct_forces=False, sbf=sbf)
    atoms = molecule(5)
    forces = model(small_batch(model, atoms)).forces
    step = 1e-4

    def energy(atom: int, axis: int, by: float) -> float:
        moved = atoms.positions.copy()
        moved[atom, axis] += by
        with torch.no_grad():
            return float(model(small_batch(model, atoms.moved(moved))).energy)

    for atom, axis in ((0, 0), (2, 1), (4, 2)):
        slope = (energy(atom, axis, step) - energy(atom, axis, -step)) / (2 * step)
        assert forces[atom, axis].item() == pytest.approx(-slope, rel=1e-5, abs=1e-8)


def test_a_loss_on_gradient_forces_reaches_the_weights() -> None:
    model = small(direct_forces=False)
    model(small_batch(model)).forces.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # Energies come from the last layer's weights linearly, forces from everything before as well.
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert gradients["int_blocks.0.quad_interaction.dense_db.linear.weight"].abs().sum() > 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("n_atoms", [1, 2, 3])
def test_structures_without_edges_or_quadruplets_are_computed(n_atoms: int, direct: bool) -> None:
    model = small(direct_forces=direct)
    line = molecule(n_atoms)
    line = line.moved(np.arange(3.0 * n_atoms).reshape(n_atoms, 3) * [0.4, 0.0, 0.0])
    output = model(small_batch(model, line))
    assert torch.isfinite(output.energy).all()
    assert torch.isfinite(output.forces).all()
    if n_atoms == 1:
        assert output.features["edge"].shape == (0, 10)
        assert not output.forces.any()


def test_a_straight_line_of_atoms_has_finite_gradients() -> None:
    model = small(direct_forces=False)
    line = molecule(4)
    line = line.moved(np.arange(4.0)[:, None] * [0.9, 0.3, 0.2])
    batch = small_batch(model, line)
    output = model(batch)
    assert torch.isfinite(output.forces).all()
    output.forces.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_edges_may_come_in_any_order() -> None:
    model = small(max_neighbors=3)
    batch = small_batch(model)
    generator = torch.Generator().manual_seed(0)

    def shuffled(graph: Graph) -> tuple[Graph, Tensor]:
        order = torch.randperm(graph.edge_index.shape[1], generator=generator)
        return Graph(graph.edge_index[:, order], graph.edge_shift[order]), order

    main, order = shuffled(Graph(batch.edge_index, batch.edge_shift))
    other = replace(
        batch,
        edge_index=main.edge_index,
        edge_shift=main.edge_shift,
        graphs={name: shuffled(graph)[0] for name, graph in batch.graphs.items()},
    )
    expected, found = model(batch), model(other)
    torch.testing.assert_close(found.forces, expected.forces, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        found.features["edge"], expected.features["edge"][order], rtol=1e-10, atol=1e-12
    )


def test_rows_taken_a_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    batch = small_batch(model)
    with torch.no_grad():
        whole = model(batch)
        monkeypatch.setattr("kdcache.models.gemnet_oc.rows.PART", 64)
        parts = model(batch)
        with Taps(model, [Tap("edge", "m", "int_blocks.0.m")]) as tapped:
            heard = model(batch)
            assert len(tapped.outputs(batch)["edge_m"]) == batch.n_edges
    for found in (parts, heard):
        torch.testing.assert_close(found.forces, whole.forces, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            found.features["edge"], whole.features["edge"], rtol=1e-10, atol=1e-12
        )


def test_tags_choose_the_middle_edges_and_no_tags_count_as_adsorbate() -> None:
    model = small(qint_tags=[2])
    batch = small_batch(model)

    def energies(tags: Tensor | None) -> Tensor:
        with torch.no_grad():
            return model(replace(batch, tags=tags)).energy  # type: ignore[no-any-return]

    twos = torch.full((batch.n_atoms,), 2, dtype=torch.uint8)
    assert torch.equal(energies(None), energies(twos))
    without = energies(torch.zeros_like(twos))
    assert (without != energies(twos)).all()
    one_adsorbate = torch.zeros_like(twos)
    one_adsorbate[0] = 2
    some = energies(one_adsorbate)
    assert some[0] != without[0]
    torch.testing.assert_close(some[1:], without[1:])


def test_a_batch_without_the_further_graphs_is_refused() -> None:
    model = small()
    batch = replace(small_batch(model), graphs={})
    with pytest.raises(DataError, match=r"no neighbour list 'aeaint'.*further_graphs"):
        model(batch)


def test_an_edge_without_its_reverse_is_refused() -> None:
    model = small()
    batch = small_batch(model)
    batch = replace(batch, edge_index=batch.edge_index[:, 1:], edge_shift=batch.edge_shift[1:])
    with pytest.raises(DataError, match="has no reverse"):
        model(batch)


def test_scale_factors_scale_and_their_absence_is_identity() -> None:
    model = small()
    batch = small_batch(model)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("scale_factor")}
    other = small()
    for module in other.scale_modules().values():
        module.scale_factor.fill_(3.0)
    load_weights(other, state)  # the branch's weights come without them
    expected = model(batch).features["node"]
    torch.testing.assert_close(other(batch).features["node"], expected)
    module = model.scale_modules()["int_blocks.1.quad_interaction.scale_sbf_sum"]
    module.scale_factor.fill_(1.0)
    torch.testing.assert_close(model(batch).features["node"], expected)
    module.scale_factor.fill_(2.0)
    assert not torch.allclose(model(batch).features["node"], expected)


def test_shared_embeddings_get_the_mean_of_the_blocks_gradients() -> None:
    weights = {}
    for divided in (True, False):
        model = small()
        assert isinstance(model, GemNetOC)
        if not divided:
            for weight, _ in model.shared_embeddings():
                weight._backward_hooks.clear()  # type: ignore[union-attr]
        model(small_batch(model)).forces.sum().backward()
        weights[divided] = {name: p.grad for name, p in model.named_parameters()}
    n_blocks = 2
    for name, gradient in weights[False].items():
        shared = name.startswith(("mlp_rbf", "mlp_cbf", "mlp_sbf"))
        times = (n_blocks + 1 if "rbf_out" in name else n_blocks) if shared else 1
        divided = weights[True][name]
        if gradient is None or divided is None:
            assert gradient is divided, name
        else:
            torch.testing.assert_close(divided * times, gradient, msg=name)


def test_initial_weights_follow_the_specification() -> None:
    model = build_model({**SMALL, "emb_size_edge": 64, "num_radial": 32})
    state = model.state_dict()
    weight = state["int_blocks.1.layers_after_skip.0.dense_mlp.1.linear.weight"]
    torch.testing.assert_close(weight.mean(1), torch.zeros(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.var(1), torch.full((64,), 1 / 64), rtol=1e-3, atol=0)
    basis = state["mlp_sbf_qint.weight"]
    expected = torch.full((5,), 1 / (32 * 16))
    torch.testing.assert_close(basis.var((0, 1)), expected, rtol=1e-2, atol=0)
    assert state["atom_emb.embeddings.weight"].abs().max() <= math.sqrt(3.0)
    same = build_model({**SMALL, "emb_size_edge": 64, "num_radial": 32}, seed=0).state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    zeros = build_model({**SMALL, "output_init": "zeros"})
    output = zeros(make_batch([molecule(3)], zeros.graph_rule, torch.float32, zeros.further_graphs))
    assert not output.energy.any()
    assert not output.forces.any()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"a2a": (3.0, 1000), "aeaint": (3.0, 20), "qint": (3.0, 4)}),
        (
            {"max_neighbors": 9, "max_neighbors_aint": None, "max_neighbors_qint": None},
            {"a2a": (3.0, 20), "aeaint": (3.0, 20), "qint": (3.0, 9)},
        ),
        (
            {"quad_interaction": False, "cutoff_qint": 9.0, "cutoff_aeaint": 3.5},
            {"a2a": (3.5, 1000), "aeaint": (3.5, 20)},
        ),
        ({"atom_interaction": False}, {"aeaint": (3.0, 20), "qint": (3.0, 4)}),
    ],
)
def test_rules_of_further_graphs_take_the_published_defaults(
    given: Mapping[str, object], expected: Mapping[str, tuple[float, int | None]]
) -> None:
    rules = small(**given).further_graphs
    assert {k: (r.cutoff, r.max_neighbors) for k, r in rules.items()} == expected


def test_a_graph_wider_than_that_of_atoms_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cutoff_qint is 5\.0 and cutoff_aint 4\.0"):
        small(cutoff_qint=5.0, cutoff_aint=4.0)


def test_scale_factors_are_read_from_a_file_and_kept_as_numbers(tmp_path: Path) -> None:
    names = small().scale_modules()
    path = tmp_path / "scales.json"
    path.write_text(json.dumps({"comment": "x", **dict.fromkeys(names, 1.5)}))
    model = small(scale_factors=str(path))
    path.unlink()
    again = build_model({"name": "gemnet-oc", **model.hyperparameters.model_dump(mode="json")})
    for made in (model, again):
        assert {float(m.scale_factor) for m in made.scale_modules().values()} == {1.5}
    path.write_text(json.dumps(dict.fromkeys(list(names)[1:], 1.5)))
    with pytest.raises(ConfigError, match=f"scale factors lack {next(iter(names))}"):
        small(scale_factors=str(path))
    path.write_text(json.dumps({"out_blocks.7.scale_sum": 1.0}))
    with pytest.raises(
        ConfigError, match=r"out_blocks\.7\.scale_sum, which this gemnet-oc has not"
    ):
        small(scale_factors=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        small(scale_factors=str(tmp_path / "none.json"))
