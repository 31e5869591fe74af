"""Errors as the field counts them, against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdcache.errors import ConfigError, DataError
from kdcache.evaluate import Predictions, gap_closed, kept, predict_structures
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.structures import Structure


def predictions() -> Predictions:
    """Two structures of one and two atoms."""
    return Predictions(
        n_atoms=np.array([1, 2]),
        energy=np.array([1.01, -3.0]),
        true_energy=np.array([1.0, -3.1]),
        forces=np.array([[0.02, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
        true_forces=np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
        groups=["a", "b"],
    )


def test_metrics_equal_hand_written_sums() -> None:
    metrics = predictions().metrics()
    assert metrics.energy_mae_mev == pytest.approx(1e3 * (0.01 + 0.1) / 2)
    assert metrics.energy_rmse_mev == pytest.approx(1e3 * np.sqrt((0.01**2 + 0.1**2) / 2))
    assert metrics.energy_mae_mev_per_atom == pytest.approx(1e3 * (0.01 + 0.05) / 2)
    assert metrics.force_mae_mev_per_a == pytest.approx(1e3 * (0.02 + 3.0) / 9)
    assert metrics.force_rmse_mev_per_a == pytest.approx(1e3 * np.sqrt((0.02**2 + 9.0) / 9))
    # An atom without force counts 0, equal forces 1, opposite ones -1.
    assert metrics.force_cos == pytest.approx((0 + 1 - 1) / 3)
    assert (metrics.n_structures, metrics.n_atoms) == (2, 3)


def test_efwt_needs_energy_and_every_force_component() -> None:
    found = predictions()
    assert found.metrics().efwt == 0.5  # the second is off by 0.1 eV and 3 eV/Å
    found.forces[0, 2] = 0.031
    assert found.metrics().efwt == 0.0
    found.forces[0] = 0.0
    found.energy[0] = 1.021
    assert found.metrics().efwt == 0.0


def test_fixed_atoms_count_for_energies_alone() -> None:
    found = replace(predictions(), free=np.array([True, True, False]))
    metrics = found.metrics()
    assert metrics.force_mae_mev_per_a == pytest.approx(1e3 * 0.02 / 6)
    assert metrics.force_cos == pytest.approx((0 + 1) / 2)
    assert metrics.energy_mae_mev == predictions().metrics().energy_mae_mev
    assert metrics.n_atoms == 3
    assert found.n_fixed == 1
    found.energy[1] = found.true_energy[1]
    assert found.metrics().efwt == 1.0  # off by 3 eV/Å, but held in place
    whole = replace(found, free=None)
    assert whole.metrics().efwt == 0.5
    none_free = replace(found, free=np.zeros(3, bool)).metrics()
    assert np.isnan(none_free.force_mae_mev_per_a)
    assert np.isfinite(none_free.energy_mae_mev)


@pytest.mark.parametrize("free_atoms_only", [True, False])
def test_fixed_atoms_of_structures_are_left_out_by_choice(free_atoms_only: bool) -> None:
    model = build_model({"name": "painn", "hidden_channels": 4, "num_layers": 1, "num_rbf": 4})
    potential = Potential(model, Normalizer(), {}).eval()
    kinds: list[tuple[int, list[bool] | None]] = [(2, [True, False]), (1, None), (2, [False] * 2)]
    structures = [
        Structure(
            structure_id=str(s),
            atomic_numbers=np.ones(n, np.int64),
            positions=np.arange(3.0 * n).reshape(n, 3),
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, bool),
            energy=0.0,
            forces=np.zeros((n, 3)),
            fixed=None if fixed is None else np.array(fixed),
        )
        for s, (n, fixed) in enumerate(kinds)
    ]
    found = predict_structures(potential, structures, free_atoms_only=free_atoms_only)
    assert found.n_fixed == (1 if free_atoms_only else 0)


def test_groups_are_reported_apart() -> None:
    groups = predictions().by_group()
    assert list(groups) == ["a", "b"]
    assert groups["a"].energy_mae_mev == pytest.approx(10.0)
    assert groups["b"].force_mae_mev_per_a == pytest.approx(500.0)


def test_gap_closed_is_one_at_the_teacher_and_negative_beyond_the_control() -> None:
    # The paper's Table 3: PaiNN-small 489, PaiNN 440, n2n 457 meV close 65 %.
    assert gap_closed(457, control=489, teacher=440) == pytest.approx(0.653, abs=1e-3)
    assert gap_closed(440, 489, 440) == 1.0
    assert gap_closed(515, 489, 440) < 0
    assert np.isnan(gap_closed(1.0, 2.0, 2.0))


def molecule(energy: float | None, *, split: str = "", largest: float = 1.0) -> Structure:
    forces = np.zeros((2, 3))
    forces[0, 0], forces[1, 0] = largest, -largest
    return Structure(
        "h2",
        np.array([1, 8]),
        np.array([[0.0, 0.0, 0.0], [0.9, 0.0, 0.0]]),
        np.zeros((3, 3)),
        np.zeros(3, bool),
        energy,
        forces,
        split=split,
    )


def small_potential(references: dict[int, float]) -> Potential:
    model = build_model({"name": "painn", "hidden_channels": 8, "num_layers": 1}, seed=1)
    return Potential(model, Normalizer(energy_scale=2.0, force_scale=2.0), references).eval()


def test_large_references_cost_no_digits() -> None:
    with_references = small_potential({1: -13.6, 8: -2041.98765432})
    bare = small_potential({})
    total = -13.6 - 2041.98765432
    found = predict_structures(with_references, [molecule(total + 0.25)])
    plain = predict_structures(bare, [molecule(0.25)])
    assert found.true_energy == pytest.approx(plain.true_energy, abs=1e-7)
    assert found.energy == pytest.approx(plain.energy, abs=1e-7)


def test_structures_without_labels_or_elements_are_refused_by_name() -> None:
    potential = small_potential({1: -13.6, 8: -2041.9})
    with pytest.raises(DataError, match='"h2" has no energy'):
        predict_structures(potential, [molecule(None)])
    with pytest.raises(DataError, match="no structures to evaluate"):
        predict_structures(potential, [])
    with pytest.raises(DataError, match="atomic number 8"):
        predict_structures(small_potential({1: -13.6}), [molecule(1.0)])


def test_kept_chooses_by_split_and_force() -> None:
    found = [molecule(0.0, split="test"), molecule(1.0, split="val"),
             molecule(2.0, split="test", largest=30.0)]  # fmt: skip
    assert [s.energy for s in kept(found, split="test")] == [0.0, 2.0]
    assert [s.energy for s in kept(found, split="test", max_force=20.0)] == [0.0]
    assert [s.energy for s in kept(found)] == [0.0, 1.0, 2.0]
    for limit in (float("nan"), 0.0, -1.0):
        with pytest.raises(ConfigError, match="must be a positive number, got"):
            list(kept(found, max_force=limit))
