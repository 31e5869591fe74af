"""What every model must do, whichever it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.graphs import GraphRule
from kdcache.models import Model, build_model
from kdcache.structures import Batch, ModelOutput
from tests.models.cases import Atoms, crystal, make_batch, molecule

MODELS = {
    "painn": {"name": "painn", "hidden_channels": 16, "num_layers": 3, "num_rbf": 8},
    "painn-gradient": {
        "name": "painn",
        "hidden_channels": 16,
        "num_layers": 2,
        "num_rbf": 8,
        "direct_forces": False,
    },
    "painn-bessel": {
        "name": "painn",
        "hidden_channels": 12,
        "num_layers": 2,
        "num_rbf": 6,
        "rbf": "spherical_bessel",
        "envelope": "exponential",
        "direct_forces": False,
    },
    "painn-bernstein": {
        "name": "painn",
        "hidden_channels": 12,
        "num_layers": 2,
        "num_rbf": 6,
        "rbf": "bernstein",
    },
    "schnet": {
        "name": "schnet",
        "hidden_channels": 16,
        "num_filters": 12,
        "num_interactions": 2,
        "num_gaussians": 10,
        "cutoff": 5.0,
    },
}
# 1 -> 4 -> 0 -> 1 and 2 -> 3 -> 2: not its own inverse.
PERMUTATION = np.array([1, 4, 3, 2, 0])
TURN, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))
if np.linalg.det(TURN) < 0:
    TURN[0] *= -1


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return build_model(MODELS[request.param], seed=3).double()


def compute(model: Model, *structures: Atoms) -> ModelOutput:
    return model(make_batch(structures, model.graph_rule))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_outputs_are_what_the_specifications_say(model: Model) -> None:
    structures = [molecule(5), molecule(1), crystal()]
    batch = make_batch(structures, model.graph_rule)
    output = model(batch)
    specs = {spec.name: spec for spec in model.field_specs()}
    tensors = {
        "energy": output.energy,
        "forces": output.forces,
        "atomic_energy": output.atomic_energy,
        **output.features,
    }
    assert specs.keys() == tensors.keys()
    for name, spec in specs.items():
        n_rows = batch.n_structures if spec.level == "structure" else batch.n_atoms
        assert tuple(tensors[name].shape) == (n_rows, *spec.shape), name
        assert (spec.symmetry == "vector") == (len(spec.shape) > 0 and spec.shape[0] == 3), name
    for i, energy in enumerate(output.energy):
        assert_same(output.atomic_energy[batch.structure_index == i].sum(), energy)


def test_rotation_turns_vectors_and_leaves_the_rest(model: Model) -> None:
    turn = torch.tensor(TURN)
    for structure in (molecule(5), crystal()):
        turned = structure.moved(structure.positions @ TURN, structure.cell @ TURN)
        before, after = compute(model, structure), compute(model, turned)
        assert before.forces.abs().max() > 1e-3
        assert_same(after.energy, before.energy)
        assert_same(after.atomic_energy, before.atomic_energy)
        assert_same(after.forces, before.forces @ turn)
        assert_same(after.features["node"], before.features["node"])
        if "vector" in before.features:
            expected = torch.einsum("nxh,xy->nyh", before.features["vector"], turn)
            assert_same(after.features["vector"], expected)


def test_translation_changes_nothing(model: Model) -> None:
    for structure in (molecule(5), crystal()):
        moved = structure.moved(structure.positions + np.array([3.7, -1.2, 0.4]))
        before, after = compute(model, structure), compute(model, moved)
        assert_same(after.energy, before.energy)
        assert_same(after.forces, before.forces)


def test_atoms_may_be_wrapped_into_the_cell_or_not(model: Model) -> None:
    structure = crystal()
    shifts = np.array([[0, 2, -1], [0, 0, 0], [-3, 0, 1]])
    unwrapped = structure.moved(structure.positions + shifts @ structure.cell)
    before, after = compute(model, structure), compute(model, unwrapped)
    assert_same(after.energy, before.energy)
    assert_same(after.forces, before.forces)


def test_permutation_permutes_atoms(model: Model) -> None:
    structure = molecule(5)
    permuted = Atoms(
        structure.atomic_numbers[PERMUTATION],
        structure.positions[PERMUTATION],
        structure.cell,
        structure.pbc,
    )
    before, after = compute(model, structure), compute(model, permuted)
    order = torch.tensor(PERMUTATION)
    assert_same(after.energy, before.energy)
    assert_same(after.forces, before.forces[order])
    for name, feature in before.features.items():
        assert_same(after.features[name], feature[order])


def test_batch_equals_single(model: Model) -> None:
    structures = [molecule(4, 1), molecule(1), crystal(), molecule(7, 2), molecule(2, 3)]
    whole = compute(model, *structures)
    singles = [compute(model, structure) for structure in structures]
    assert_same(whole.energy, torch.cat([s.energy for s in singles]))
    assert_same(whole.forces, torch.cat([s.forces for s in singles]))
    assert_same(whole.atomic_energy, torch.cat([s.atomic_energy for s in singles]))
    for name, feature in whole.features.items():
        assert_same(feature, torch.cat([s.features[name] for s in singles]))


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_without_edges_there_is_an_energy_and_no_force(model: Model, n_atoms: int) -> None:
    apart = Atoms(
        np.array([1, 8])[:n_atoms],
        np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])[:n_atoms],
        np.zeros((3, 3)),
        np.zeros(3, dtype=bool),
    )
    batch = make_batch([apart], model.graph_rule)
    assert batch.n_edges == 0
    output = model(batch)
    assert output.energy.isfinite().all()
    assert (output.forces == 0).all()
    (output.energy.square().sum() + output.forces.square().sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_crystal_of_one_atom_sees_its_images_and_feels_no_force(model: Model) -> None:
    cell = np.array([[2.5, 0.0, 0.0], [0.3, 2.6, 0.0], [0.1, 0.2, 2.4]])
    single = Atoms(np.array([29]), np.zeros((1, 3)), cell, np.ones(3, dtype=bool))
    repeated = Atoms(
        np.array([29, 29]),
        np.array([[0.0, 0.0, 0.0], cell[1]]),
        np.stack([cell[0], 2 * cell[1], cell[2]]),
        np.ones(3, dtype=bool),
    )
    one, two = compute(model, single), compute(model, repeated)
    assert_same(one.forces, torch.zeros(1, 3, dtype=torch.float64))
    assert_same(2 * one.energy, two.energy)
    alone = compute(model, Atoms(np.array([29]), np.zeros((1, 3)), cell, np.zeros(3, dtype=bool)))
    assert (alone.energy - one.energy).abs() > 1e-6


def test_the_batch_is_left_as_it_was(model: Model) -> None:
    batch = make_batch([molecule(4), crystal()], model.graph_rule)
    copies = {name: getattr(batch, name).clone() for name in ("positions", "edge_shift", "cell")}
    model(batch)
    assert not batch.positions.requires_grad
    for name, copy in copies.items():
        assert torch.equal(getattr(batch, name), copy), name


@pytest.mark.parametrize("name", ["painn-gradient", "painn-bessel", "schnet"])
def test_conservative_forces_are_the_negative_gradient(name: str) -> None:
    model = build_model(MODELS[name], seed=3).double()
    assert model.conservative
    for structure in (molecule(4), crystal()):
        batch = make_batch([structure], model.graph_rule)

        def energy(positions: Tensor, batch: Batch = batch) -> Tensor:
            moved = Batch(
                batch.atomic_numbers,
                positions,
                batch.cell,
                batch.pbc,
                batch.structure_index,
                batch.n_structures,
                batch.edge_index,
                batch.edge_shift,
            )
            return model(moved).energy.sum()

        forces = model(batch).forces.detach()
        step = 1e-5
        for atom, axis in ((0, 0), (1, 2), (2, 1)):
            shift = torch.zeros_like(batch.positions)
            shift[atom, axis] = step
            with torch.no_grad():
                up, down = energy(batch.positions + shift), energy(batch.positions - shift)
            slope = float((up - down) / (2 * step))
            assert slope == pytest.approx(-float(forces[atom, axis]), rel=1e-6, abs=1e-8)


def test_a_loss_on_forces_reaches_every_weight_with_the_right_slope(model: Model) -> None:
    batch = make_batch([molecule(4), crystal()], model.graph_rule)
    target = torch.tensor(np.random.default_rng(2).normal(size=(batch.n_atoms, 3)))

    def loss() -> Tensor:
        return (model(batch).forces - target).square().mean()

    loss().backward()
    for name, weight in model.named_parameters():
        # A constant added to all atomic energies leaves forces alone.
        if weight.grad is None or not weight.grad.any():
            assert name.endswith(("lin2.bias", "out_energy.2.bias")) or (
                not model.conservative and name.startswith("out_energy")
            ), name
            continue
        row = int(weight.grad.abs().argmax())
        step = 1e-6
        with torch.no_grad():
            flat = weight.view(-1)
            flat[row] += step
            up = loss()
            flat[row] -= 2 * step
            down = loss()
            flat[row] += step
        slope = float((up - down) / (2 * step))
        assert slope == pytest.approx(float(weight.grad.view(-1)[row]), rel=1e-4, abs=1e-8), name


def test_forces_need_no_graph_outside_training(model: Model) -> None:
    batch = make_batch([molecule(4)], model.graph_rule)
    with torch.no_grad():
        output = model(batch)
    assert_same(output.forces, model(batch).forces.detach())
    tensors = (output.energy, output.forces, output.atomic_energy, *output.features.values())
    assert not any(tensor.requires_grad for tensor in tensors)


def test_equal_seeds_give_equal_weights_and_leave_the_global_state(model: Model) -> None:
    config = {"name": model.name, **model.hyperparameters.model_dump()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first, second, other = (build_model(config, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert any(
        not torch.equal(tensor, other.state_dict()[name])
        for name, tensor in first.state_dict().items()
    )
    assert all(weight.dtype == torch.float32 for weight in first.parameters())


def test_float32_agrees_with_float64(model: Model) -> None:
    single = build_model({"name": model.name, **model.hyperparameters.model_dump()}, seed=3)
    structures = [molecule(5), crystal()]
    exact = compute(model, *structures)
    rounded = single(make_batch(structures, model.graph_rule, torch.float32))
    assert rounded.energy.dtype == torch.float32
    torch.testing.assert_close(rounded.energy.double(), exact.energy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rounded.forces.double(), exact.forces, rtol=1e-3, atol=1e-4)


def test_autocast_to_bfloat16_keeps_energies_and_forces_in_float32(model: Model) -> None:
    single = model.float()
    batch = make_batch([molecule(5), crystal()], model.graph_rule, torch.float32)
    exact = single(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = single(batch)
        (rounded.energy.square().sum() + rounded.forces.square().sum()).backward()
    for name in ("energy", "forces", "atomic_energy"):
        found, expected = getattr(rounded, name), getattr(exact, name)
        assert found.dtype == torch.float32, name
        assert not torch.equal(found, expected), name
        # bfloat16 has eight bits: 0.4 % each time.
        assert (found - expected).abs().max() < 0.05 * expected.abs().max(), name
    assert all(p.grad is None or p.grad.isfinite().all() for p in single.parameters())


def test_a_neighbor_limit_is_part_of_the_graph_rule() -> None:
    painn = build_model({"name": "painn", "max_neighbors": 7, "cutoff": 4.0})
    schnet = build_model({"name": "schnet", "max_neighbors": 7, "cutoff": 4.0})
    assert painn.graph_rule == GraphRule(4.0, 7, symmetric=True)
    assert schnet.graph_rule == GraphRule(4.0, 7)
