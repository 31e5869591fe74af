"""What a loss is, the element-wise ones, and the ground-truth loss made of them.

Losses that compare how rows relate are in `distill.structural`. Rows may carry weights. Nothing
waits for the device: missing labels are masked by weights of zero, never by indexing.
Invariant: a batch without any label gives a loss of exactly 0 and gradients of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from kdcache.config import LossConfig
from kdcache.distill.schedules import Clock, weight_at
from kdcache.errors import ConfigError, ShapeError
from kdcache.fields import Level, Symmetry
from kdcache.registry import lookup
from kdcache.structures import Batch, ModelOutput


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows of a prediction and its target are.

    Attributes:
        weight: [n_rows], not negative, or None for ones; a row of weight 0 does not count.
        batch: the structures and edges that rows belong to; element-wise losses do without.
    """

    weight: Tensor | None = None
    batch: Batch | None = None


class LossFunction(Protocol):
    """A distance between a prediction and its target; one may carry `traits`.

    Args:
        prediction: [n_rows, ...].
        target: the same dtype, finite everywhere; the same shape, but for losses that compare how
            rows relate: those take other channels.
        rows: weights, and the batch.

    Returns:
        Scalar; 0 where there are no rows or all weights are 0.
    """

    def __call__(self, prediction: Tensor, target: Tensor, rows: Rows, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Traits:
    """What a loss asks of the features it compares.

    Attributes:
        relational: it compares how rows relate, so the two sides may differ in channels.
        level: the only level whose rows it takes; None for any.
        symmetry: the only symmetry it takes; None for any.
        mean_over: what it is a mean of, each weighing as much as its rows do; None where it is no
            mean, so that parts of a batch do not add up to the whole.
    """

    relational: bool = False
    level: Level | None = None
    symmetry: Symmetry | None = None
    mean_over: Literal["rows", "edges", "structures"] | None = "rows"


L = TypeVar("L", bound=LossFunction)


def traits(
    *,
    relational: bool = False,
    level: Level | None = None,
    symmetry: Symmetry | None = None,
    mean_over: Literal["rows", "edges", "structures"] | None = "rows",
) -> Callable[[L], L]:
    """A decorator that gives a loss function its `Traits`; without it a loss has the defaults."""

    def mark(loss: L) -> L:
        vars(loss)["traits"] = Traits(relational, level, symmetry, mean_over)
        return loss

    return mark


def traits_of(loss: LossFunction) -> Traits:
    """What `loss` asks of the features it compares."""
    found = getattr(loss, "traits", Traits())
    return found if isinstance(found, Traits) else Traits()


ALL_EQUAL = Rows()


def mse(prediction: Tensor, target: Tensor, rows: Rows = ALL_EQUAL) -> Tensor:
    """Mean of squared differences."""
    return _mean((prediction - target).square(), rows.weight)


def mae(prediction: Tensor, target: Tensor, rows: Rows = ALL_EQUAL) -> Tensor:
    """Mean of absolute differences."""
    return _mean((prediction - target).abs(), rows.weight)


def huber(prediction: Tensor, target: Tensor, rows: Rows = ALL_EQUAL) -> Tensor:
    """Mean of d²/2 where |d| < 1, of |d| - 1/2 beyond."""
    values = nn.functional.huber_loss(prediction, target, reduction="none", delta=1.0)
    return _mean(values, rows.weight)


@traits(mean_over=None)
def rmse_mae(prediction: Tensor, target: Tensor, rows: Rows = ALL_EQUAL) -> Tensor:
    """Root mean square difference plus mean absolute difference.

    Source: Matin et al. 2025, Eq. 3.
    """
    difference = prediction - target
    scaled = difference
    if rows.weight is not None:
        scaled = difference * _over_rows(rows.weight.sqrt(), difference)
    # A norm, not the square root of a mean: its gradient at zero difference is 0 instead of NaN.
    rms: Tensor = torch.linalg.vector_norm(scaled) / _count(difference, rows.weight).sqrt()
    return rms + _mean(difference.abs(), rows.weight)


@traits(symmetry="vector")
def l2mae(prediction: Tensor, target: Tensor, rows: Rows = ALL_EQUAL) -> Tensor:
    """Mean length of difference vectors, xyz along the second axis: [n, 3] or [n, 3, C].

    Source: Open Catalyst's L2MAE, the force loss behind Ekström Kelvinius et al. 2023, Eq. 1.
    """
    return _mean(torch.linalg.vector_norm(prediction - target, dim=1), rows.weight)


def find_loss(name: str) -> LossFunction:
    """The loss of that name in the entry-point group kdcache.losses.

    Raises:
        ConfigError: there is none, with the nearest name, or it cannot be called.
    """
    found = lookup("kdcache.losses", name)
    if not callable(found):
        raise ConfigError(f"Loss {name} is {found!r} and cannot be called. Correct its package.")
    return cast(LossFunction, found)


def compare(
    loss: LossFunction, prediction: Tensor, target: Tensor, rows: Rows, where: str
) -> Tensor:
    """`loss` in the student's precision, at least float32, after a check of shapes.

    Args:
        loss: the distance.
        prediction: [n_rows, ...], requires grad; half precision is widened.
        target: the same shape, or the same rows where the loss compares relations; any floating
            dtype. Gradients reach it where a trained map made it.
        rows: weights [n_rows], and the batch.
        where: what the error line starts with.

    Raises:
        ShapeError: the shapes differ; broadcasting would compare every row with every other.
    """
    n_axes = 1 if traits_of(loss).relational else max(prediction.ndim, target.ndim)
    if prediction.shape[:n_axes] != target.shape[:n_axes]:
        raise ShapeError(
            f"{where}: student has {list(prediction.shape)}, target {list(target.shape)}. "
            f"Rows would meet the wrong partners; both must come from the same batch."
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    weight = None if rows.weight is None else rows.weight.to(dtype)
    return loss(prediction.to(dtype), target.to(dtype), Rows(weight, rows.batch))


# By part of a loss: what this process's mean contributes to that of the whole batch.
Shares = Mapping[str, Tensor]


@dataclass(slots=True)
class Loss:
    """A weighted sum and what it is made of.

    Attributes:
        total: scalar, requires grad.
        parts: by name, each without its weight, detached and still on the device. A part whose
            weight is 0 at this step is not computed and not listed.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.total + other.total, {**self.parts, **other.parts})

    def add(self, name: str, weight: float, value: Tensor, shares: Shares | None) -> Loss:
        """With a further part; where the batch is shared, with this process's share of it."""
        if shares is not None:
            value = value * shares[name]
        return self + Loss(weight * value, {name: value.detach()})


class GroundTruthLoss(nn.Module):
    """alpha_E(t) L_E + alpha_F(t) L_F over the structures that have labels.

    Weighted by `batch.weight`, normalised within the batch, which gives the origin weights of
    Eqs. 9–11 of the source when synthetic structures carry r and the others 1. Forces on fixed
    atoms do not count where `settings.free_atoms_only` says so: they were never relaxed.

    Args:
        settings: losses and weights.
        clock: what the weights' schedules are measured against.

    Source: Ekström Kelvinius et al. 2023, Eq. 1.
    """

    def __init__(self, settings: LossConfig, clock: Clock) -> None:
        super().__init__()
        self.settings = settings
        self.clock = clock
        self.energy_loss = find_loss(settings.energy)
        self.forces_loss = find_loss(settings.forces)
        for schedule in (settings.energy_weight, settings.forces_weight):
            clock.length(schedule.unit)

    def forward(
        self, output: ModelOutput, batch: Batch, step: int, shares: Shares | None = None
    ) -> Loss:
        """The loss at an optimizer step.

        Args:
            output: energies [n_structures] eV relative to the references, forces [n_atoms, 3] eV/Å.
            batch: with energy and forces in the same frame, NaN without a label, or None.
            step: counted from 0; decides the weights.
            shares: of each part, where several processes hold parts of a batch.

        Raises:
            ShapeError: output and batch do not belong together.
        """
        loss = Loss(output.energy.new_zeros(()))
        for name, alpha in self._weights(batch, step).items():
            value = self._energy(output, batch) if name == "energy" else self._forces(output, batch)
            loss = loss.add(name, alpha, value, shares)
        return loss

    def counts(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """What the mean of each part is divided by, before the student has said anything."""
        found = {}
        for name in self._weights(batch, step):
            labelled, weight = self._rows(batch, name)
            counted = labelled * weight if self.settings.mean_over == "labelled" else weight
            found[name] = counted.sum()
        return found

    def _weights(self, batch: Batch, step: int) -> dict[str, float]:
        """alpha by part, of those that count at a step and have labels."""
        settings = self.settings
        parts = {
            "energy": (settings.energy_weight, batch.energy),
            "forces": (settings.forces_weight, batch.forces),
        }
        weights = {
            name: weight_at(schedule, step, self.clock)
            for name, (schedule, labels) in parts.items()
            if labels is not None
        }
        return {name: weight for name, weight in weights.items() if weight}

    def _rows(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """1 for a row with a label and 0 without; its weight if it had one."""
        weight = batch.weight
        if name == "energy":
            assert batch.energy is not None
            labelled = (~batch.energy.isnan()).to(batch.energy.dtype)
        else:
            assert batch.forces is not None
            labelled = (~batch.forces.isnan().any(dim=1)).to(batch.forces.dtype)
            weight = None if weight is None else weight[batch.structure_index]
            if self.settings.free_atoms_only and batch.fixed is not None:
                free = (~batch.fixed).to(labelled.dtype)
                weight = free if weight is None else weight * free
        return labelled, torch.ones_like(labelled) if weight is None else weight

    def _energy(self, output: ModelOutput, batch: Batch) -> Tensor:
        prediction, labels = output.energy, cast(Tensor, batch.energy)
        if self.settings.energy_per_atom:
            counts = atom_counts(batch)
            prediction, labels = prediction / counts, labels / counts
        return self._compare(self.energy_loss, prediction, labels, batch, "energy")

    def _forces(self, output: ModelOutput, batch: Batch) -> Tensor:
        labels = cast(Tensor, batch.forces)
        return self._compare(self.forces_loss, output.forces, labels, batch, "forces")

    def _compare(
        self, loss: LossFunction, prediction: Tensor, labels: Tensor, batch: Batch, where: str
    ) -> Tensor:
        # A missing label counts with weight 0, but 0 times NaN would still be NaN.
        labels = torch.where(labels.isnan(), torch.zeros_like(labels), labels)
        labelled, weight = self._rows(batch, where)
        counted = labelled * weight
        value = compare(loss, prediction, labels, Rows(counted), where)
        if self.settings.mean_over == "batch":
            value = value * counted.sum() / weight.sum().clamp_min(1e-12)
        return value


def atom_counts(batch: Batch) -> Tensor:
    """Atoms per structure, [n_structures] in the dtype of positions, without leaving the device."""
    counts = batch.positions.new_zeros(batch.n_structures)
    ones = torch.ones_like(batch.structure_index, dtype=counts.dtype)
    return counts.index_add_(0, batch.structure_index, ones)


def _over_rows(row_values: Tensor, like: Tensor) -> Tensor:
    """[n_rows] shaped to multiply [n_rows, ...]."""
    return row_values.reshape(-1, *[1] * (like.dim() - 1))


def _count(values: Tensor, weight: Tensor | None) -> Tensor:
    """Elements that count, at least something: an empty mean is 0, not NaN."""
    if weight is None:
        # Filled on the device: `new_tensor` would make it here and copy it, waiting for the copy.
        return values.new_full((), max(values.numel(), 1))
    total = weight.sum() * (values.numel() // max(len(values), 1))
    return torch.where(total > 0, total, torch.ones_like(total))


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.sum() / max(values.numel(), 1)
    return (values * _over_rows(weight, values)).sum() / _count(values, weight)
