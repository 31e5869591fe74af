from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kdcache.errors import ConfigError, DataError
from kdcache.graphs import GraphRule
from kdcache.models import Hyperparameters, Model, build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.structures import Batch, ModelOutput
from tests.models.cases import Atoms, crystal, make_batch, molecule

NORMALIZER = Normalizer(energy_scale=2.5, energy_shift=-0.75, force_scale=3.0)


class Numbers(Model):
    """Atom k has energy Z/8 + k and force (k, 2k, 3k): exact in float32, different for each."""

    name: ClassVar[str] = "numbers"
    hyperparameter_type: ClassVar[type[Hyperparameters]] = Hyperparameters
    graph_rule = GraphRule(5.0)
    max_atomic_number = 60

    def forward(self, batch: Batch) -> ModelOutput:
        k = torch.arange(batch.n_atoms, dtype=batch.positions.dtype)
        atomic = batch.atomic_numbers / 8 + k
        energy = torch.zeros(batch.n_structures, dtype=k.dtype)
        energy = energy.index_add(0, batch.structure_index, atomic)
        forces = k.unsqueeze(-1) * torch.tensor([1.0, 2.0, 3.0], dtype=k.dtype)
        return ModelOutput(energy, forces, atomic, {"node": atomic.unsqueeze(-1)})


@pytest.fixture
def batch() -> Batch:
    structures = [molecule(4, 1), molecule(1, 2), crystal()]
    return make_batch(structures, GraphRule(5.0), torch.float32)


def test_units_are_put_on_and_atomic_energies_still_sum(batch: Batch) -> None:
    model = Numbers(Hyperparameters())
    raw, output = model(batch), Potential(model, NORMALIZER, {1: -13.0})(batch)
    torch.testing.assert_close(output.energy, raw.energy * 2.5 - 0.75)
    torch.testing.assert_close(output.forces, raw.forces * 3.0)
    assert torch.equal(output.features["node"], raw.features["node"])
    sums = torch.zeros(3).index_add(0, batch.structure_index, output.atomic_energy)
    torch.testing.assert_close(sums, output.energy)
    share = output.atomic_energy - 2.5 * raw.atomic_energy
    torch.testing.assert_close(share[0], torch.tensor(-0.75 / 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(share[4], torch.tensor(-0.75), rtol=1e-5, atol=1e-5)


def test_references_are_added_in_float64_and_only_at_prediction(batch: Batch) -> None:
    # 0.001 eV beside −100,000 eV would be lost in float32.
    references = {z: -1e5 - z - 0.001 for z in range(1, 61)}
    model = Numbers(Hyperparameters())
    potential = Potential(model, Normalizer(), references).to(torch.float32)
    relative, total = potential(batch), potential.predict(batch)
    assert relative.energy.dtype == torch.float32
    assert torch.equal(relative.energy, model(batch).energy)
    assert total.energy.dtype == total.atomic_energy.dtype == torch.float64
    numbers = batch.atomic_numbers.numpy()
    expected = relative.atomic_energy.double().numpy() - 1e5 - numbers - 0.001
    np.testing.assert_allclose(total.atomic_energy.numpy(), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        total.energy.numpy(), np.bincount(batch.structure_index, expected), rtol=0, atol=1e-9
    )


def test_a_potential_without_references_predicts_what_the_model_says(batch: Batch) -> None:
    model = Numbers(Hyperparameters())
    found = Potential(model, Normalizer(), {}).predict(batch)
    torch.testing.assert_close(found.energy, model(batch).energy.double())


@pytest.mark.parametrize("config", [{"name": "schnet"}, {"name": "painn", "direct_forces": False}])
def test_gradient_forces_are_predicted_without_grad_and_stay_the_gradient(
    config: dict[str, object],
) -> None:
    model = build_model({**config, "hidden_channels": 8, "cutoff": 4.0}).double()
    units = Normalizer(energy_scale=2.5, energy_shift=1.0, force_scale=2.5)
    potential = Potential(model, units, {z: -float(z) for z in range(1, 30)})
    batch = make_batch([molecule(4)], potential.graph_rule)
    with torch.no_grad():
        found = potential.predict(batch)
    assert not found.forces.requires_grad
    step = torch.zeros_like(batch.positions)
    step[2, 1] = 1e-4
    energies = []
    for sign in (1, -1):
        batch.positions = batch.positions + sign * step
        energies.append(float(potential.predict(batch).energy))
        batch.positions = batch.positions - sign * step
    slope = (energies[0] - energies[1]) / 2e-4
    assert slope == pytest.approx(-float(found.forces[2, 1]), rel=1e-5)


def test_elements_without_reference_or_embedding_are_refused(batch: Batch) -> None:
    model = Numbers(Hyperparameters())
    with pytest.raises(DataError, match=r"reference energies for \[1, 2\] only"):
        Potential(model, Normalizer(), {1: -13.0, 2: -70.0}).predict(batch)
    heavy = Atoms(np.array([79]), np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, dtype=bool))
    with pytest.raises(DataError, match="atomic number 79, and numbers has embeddings up to 60"):
        Potential(model, Normalizer(), {}).predict(make_batch([heavy], GraphRule(5.0)))
    with pytest.raises(ConfigError, match="atomic number 0"):
        Potential(model, Normalizer(), {0: 1.0})


def test_state_dict_is_the_models_under_one_prefix() -> None:
    model = build_model({"name": "painn", "hidden_channels": 8, "num_layers": 1})
    names = Potential(model, Normalizer(), {1: -13.0}).state_dict().keys()
    assert names == {f"model.{name}" for name in model.state_dict()}


def test_normalizer_survives_json_and_refuses_nonsense() -> None:
    assert Normalizer.from_json(NORMALIZER.to_json()) == NORMALIZER
    for values in ({"energy_scale": 0.0}, {"energy_shift": float("nan")}, {"scale": 1.0}):
        with pytest.raises(ValidationError):
            Normalizer.from_json(values)
