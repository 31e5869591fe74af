"""Losses are element means; labels may be missing; nothing turns into NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.config import LossConfig
from kdcache.distill.losses import GroundTruthLoss, Rows, atom_counts, compare, find_loss, mse
from kdcache.distill.schedules import Clock
from kdcache.errors import ConfigError, ShapeError
from tests.distill.fields import make_batch, make_output, rows

NAMES = ("mse", "mae", "huber", "rmse+mae", "l2mae")
LOSSES = {name: find_loss(name) for name in NAMES}
ENERGY_LOSSES = ("mae", "mse", "huber", "rmse+mae")


def truth(**settings: object) -> GroundTruthLoss:
    return GroundTruthLoss(LossConfig.model_validate(settings), Clock(10))


DEFAULT_TRUTH = truth()


def expected(name: str, difference: np.ndarray, weight: np.ndarray) -> float:
    """The definitions written out with numpy: rows repeated as often as their weight says."""
    chosen = np.repeat(difference, weight.astype(int), axis=0)
    if not chosen.size:
        return 0.0
    size = np.abs(chosen)
    return float(
        {
            "mse": np.mean(chosen**2),
            "mae": np.mean(size),
            "huber": np.mean(np.where(size < 1, size**2 / 2, size - 0.5)),
            "rmse+mae": np.sqrt(np.mean(chosen**2)) + np.mean(size),
            "l2mae": np.mean(np.sqrt((chosen**2).sum(axis=1))),
        }[name]
    )


@given(
    name=st.sampled_from(NAMES),
    shape=st.sampled_from([(5, 3), (5, 3, 2), (1, 3), (0, 3)]),
    seed=st.integers(0, 1000),
    weights=st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
def test_a_row_of_weight_k_counts_as_k_rows(
    name: str, shape: tuple[int, ...], seed: int, weights: list[int]
) -> None:
    prediction, target = rows(*shape, seed=seed), 2 * rows(*shape, seed=seed + 1)
    weight = torch.tensor(weights[: shape[0]], dtype=torch.float64)
    value = LOSSES[name](prediction, target, Rows(weight))
    judged = expected(name, (prediction - target).numpy(), weight.numpy())
    assert float(value) == pytest.approx(judged, rel=1e-12, abs=1e-15)
    plain = LOSSES[name](prediction, target, Rows())
    ones = np.ones(shape[0])
    assert float(plain) == pytest.approx(
        expected(name, (prediction - target).numpy(), ones), rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_at_zero_difference_is_zero_not_nan(name: str) -> None:
    prediction = torch.ones(4, 3, requires_grad=True)
    LOSSES[name](prediction, torch.ones(4, 3), Rows()).backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("forces", [*ENERGY_LOSSES, "l2mae"])
@pytest.mark.parametrize("energy", ENERGY_LOSSES)
def test_batch_without_labels_gives_exactly_zero(energy: str, forces: str) -> None:
    batch, output = make_batch(), make_output()
    batch.energy = torch.full_like(output.energy, torch.nan)
    batch.forces = torch.full_like(output.forces, torch.nan)
    batch.weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = truth(energy=energy, forces=forces)(output, batch, 0)
    loss.total.backward()
    assert loss.total.item() == 0.0
    for tensor in (output.energy, output.forces):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("per_atom", [False, True])
def test_missing_labels_change_nothing_for_the_others(per_atom: bool) -> None:
    batch, output = make_batch(), make_output()
    assert batch.energy is not None
    assert batch.forces is not None
    batch.energy[1] = torch.nan
    batch.forces[1:3] = torch.nan
    loss = truth(energy_per_atom=per_atom)(output, batch, 0)
    loss.total.backward()
    counts = torch.tensor([1.0, 3.0]) if per_atom else torch.ones(2)
    energy = ((output.energy[[0, 2]] - batch.energy[[0, 2]]).abs() / counts).mean()
    forces = (output.forces[[0, 3, 4, 5]] - batch.forces[[0, 3, 4, 5]]).norm(dim=1).mean()
    torch.testing.assert_close(loss.parts["energy"], energy)
    torch.testing.assert_close(loss.parts["forces"], forces)
    torch.testing.assert_close(loss.total, energy + 100 * forces)
    assert output.energy.grad is not None
    assert output.forces.grad is not None
    assert output.energy.grad[1] == 0.0
    assert not output.forces.grad[1:3].any()
    assert output.forces.grad[3:].any()


@pytest.mark.parametrize("mean_over", ["labelled", "batch"])
def test_forces_on_fixed_atoms_do_not_count_unless_asked_for(mean_over: str) -> None:
    batch, output = make_batch(), make_output()
    assert batch.forces is not None
    batch.fixed = torch.tensor([True, False, True, False, False, True])
    loss = truth(forces="mae", mean_over=mean_over)(output, batch, 0)
    free = ~batch.fixed
    expected = (output.forces[free] - batch.forces[free]).abs().mean()
    torch.testing.assert_close(loss.parts["forces"], expected.detach())
    loss.total.backward()
    assert output.forces.grad is not None
    assert not output.forces.grad[batch.fixed].any()
    assert output.forces.grad[free].all()
    whole = truth(forces="mae", free_atoms_only=False)(output, batch, 0)
    expected = (output.forces - batch.forces).abs().mean()
    torch.testing.assert_close(whole.parts["forces"], expected.detach())


def test_a_batch_of_fixed_atoms_teaches_no_force() -> None:
    batch, output = make_batch(), make_output()
    batch.fixed = torch.ones(6, dtype=torch.bool)
    assert truth()(output, batch, 0).parts["forces"] == 0.0


def test_over_the_batch_a_label_weighs_what_it_would_among_all_labels() -> None:
    batch, output = make_batch(), make_output()
    assert batch.energy is not None
    assert batch.forces is not None
    whole = truth(mean_over="batch", forces="mae")
    hidden = torch.tensor([False, True, True])
    energy = batch.energy.masked_fill(hidden, torch.nan)
    forces = batch.forces.masked_fill(hidden[batch.structure_index, None], torch.nan)
    few = whole(output, replace(batch, energy=energy, forces=forces), 0).parts
    rest = whole(
        output,
        replace(
            batch,
            energy=batch.energy.masked_fill(~hidden, torch.nan),
            forces=batch.forces.masked_fill(~hidden[batch.structure_index, None], torch.nan),
        ),
        0,
    ).parts
    for name, value in truth(forces="mae")(output, batch, 0).parts.items():
        torch.testing.assert_close(few[name] + rest[name], value)


def test_energy_without_forces_still_counts() -> None:
    batch, output = make_batch(), make_output()
    with_nan = torch.full_like(output.forces, torch.nan).detach()
    masked = truth()(output, replace(batch, forces=with_nan), 0)
    absent = truth()(output, replace(batch, forces=None), 0)
    assert masked.total == absent.total
    assert list(absent.parts) == ["energy"]


@pytest.mark.proof
@given(ratio=st.floats(0.05, 20), synthetic=st.lists(st.booleans(), min_size=3, max_size=3))
def test_weights_by_origin_are_equations_9_to_11(ratio: float, synthetic: list[bool]) -> None:
    """Ekström Kelvinius et al. 2023, appendix D.2: w_dft = 1 / (1 - a + a r), w_s = r w_dft."""
    batch, output = make_batch(), make_output()
    assert batch.energy is not None
    flags = torch.tensor(synthetic)
    batch.weight = torch.where(flags, ratio, 1.0).double()
    share = flags.double().mean()
    w_dft = 1 / (1 - share + share * ratio)
    w_synthetic = ratio * w_dft
    if any(synthetic) and not all(synthetic):
        weight = torch.where(flags, w_synthetic, w_dft)
    else:
        weight = torch.ones(3, dtype=torch.float64)
    judged = (weight * (output.energy - batch.energy).abs()).mean()
    torch.testing.assert_close(DEFAULT_TRUTH(output, batch, 0).parts["energy"], judged)


def test_weights_follow_the_step_and_zero_is_left_out() -> None:
    settings = {"kind": "linear", "points": [[0, 0], [1, 10]]}
    loss = truth(energy_weight=settings, forces_weight=0)
    batch, output = make_batch(), make_output()
    assert loss(output, batch, 0).parts == {}
    at_five = loss(output, batch, 5)
    torch.testing.assert_close(at_five.total, 5 * at_five.parts["energy"])
    assert not at_five.parts["energy"].requires_grad


def test_atom_counts_are_of_structures() -> None:
    assert atom_counts(make_batch()).tolist() == [1, 2, 3]


def test_half_precision_is_compared_in_float32() -> None:
    prediction = torch.full((2, 3), 300.0, dtype=torch.bfloat16, requires_grad=True)
    value = compare(mse, prediction, torch.zeros(2, 3, dtype=torch.float16), Rows(), "here")
    assert value.dtype == torch.float32
    assert value.item() == 90_000.0


def test_column_against_row_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"student has \[3\], target \[3, 1\]"):
        compare(mse, torch.zeros(3), torch.zeros(3, 1), Rows(), "Term x")
    batch, output = make_batch(), make_output()
    batch.energy = torch.zeros(3, 1)
    with pytest.raises(ShapeError, match="energy: student has"):
        truth()(output, batch, 0)


def test_unknown_loss_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean huber"):
        find_loss("hubert")
