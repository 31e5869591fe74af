"""Evaluate distillation terms: features against fields, weighted over time.

What is compared with what was decided by `binding`; reading the teacher's fields is the stream's.
Invariant: a row that a teacher has nothing for counts for nothing, in value and in gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from kdcache.config import TermConfig
from kdcache.distill.losses import (
    Loss,
    LossFunction,
    Rows,
    Shares,
    atom_counts,
    compare,
    traits_of,
)
from kdcache.distill.schedules import Clock, weight_at
from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import Level
from kdcache.structures import Batch, ModelOutput


class Term(nn.Module):
    """One term, L(M_s(H_s), M_t(H_t)), without its weight; made by `binding.build_terms`.

    Args:
        settings: as configured.
        feature: the student's, or the name of an output.
        key: the teacher's field in `Batch.teacher`.
        loss: the distance.
        student_projection, teacher_projection: M_s and M_t.
        rms: what both sides are divided by where they are normalised.
        level: of the rows.
    """

    rms: Tensor

    def __init__(
        self,
        settings: TermConfig,
        feature: str,
        key: str,
        loss: LossFunction,
        student_projection: nn.Module,
        teacher_projection: nn.Module,
        rms: float,
        level: Level = "atom",
    ) -> None:
        super().__init__()
        self.settings = settings
        self.feature = feature
        self.key = key
        self.level = level
        self.loss = loss
        self.student_projection = student_projection
        self.teacher_projection = teacher_projection
        # Edges are matched one by one; other rows are missing where a teacher failed.
        self.may_miss_rows = level == "edge"
        self.register_buffer("rms", torch.tensor(rms))

    def forward(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Scalar distance between the student's feature and the teacher's field.

        Args:
            output: of the student; energies relative to the references.
            batch: holding `key` among its teacher fields, in any floating dtype.

        Raises:
            ConfigError: student or batch lacks the field.
            ShapeError: they have different rows.

        Source: Ekström Kelvinius et al. 2023, Eqs. 3, 4, 7 and 8.
        """
        name = self.settings.name
        student = self.student_projection(_student_feature(output, self.feature, name))
        if self.key not in batch.teacher:
            raise ConfigError(
                f"Term {name}: the batch lacks {self.key}; {did_you_mean(self.key, batch.teacher)}."
            )
        # Half precision saves room in the store, not in the arithmetic.
        dtype = torch.promote_types(student.dtype, torch.float32)
        target, weight = self._target(batch, dtype)
        teacher = self.teacher_projection(target)
        if self.settings.per_atom:
            counts = atom_counts(batch)
            student, teacher = student / counts, teacher / counts
        if self.settings.normalise == "rms":
            student, teacher = student / self.rms, teacher / self.rms
        return compare(self.loss, student, teacher, Rows(weight, batch), f"Term {name}")

    def count(self, batch: Batch) -> Tensor:
        """What the term's mean is divided by, before the student has said anything."""
        target, weight = self._target(batch, batch.positions.dtype)
        if weight is None:
            weight = batch.positions.new_ones(len(target))
        over = traits_of(self.loss).mean_over
        if over == "rows":
            return weight.sum()
        if over == "edges":
            source, into = batch.edge_index.unbind(0)
            return (weight[into] * (weight[source] > 0)).sum()
        # Structures, each weighing what its atoms do on average.
        zeros = batch.positions.new_zeros(batch.n_structures)
        sums = zeros.index_add(0, batch.structure_index, weight)
        return (sums / atom_counts(batch)).sum()

    def _target(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The teacher's rows, and what each weighs."""
        target = batch.teacher[self.key].to(dtype)
        weight = origin_weight(batch, self.level)
        return _present(target, weight) if self.may_miss_rows else (target, weight)


class Terms(nn.Module):
    """The distillation terms of a run and their weights over time."""

    def __init__(self, terms: Sequence[Term], clock: Clock) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.clock = clock

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def required_fields(self) -> tuple[str, ...]:
        """Keys of `Batch.teacher` that the terms read, each once."""
        return tuple(dict.fromkeys(term.key for term in self._bound()))

    def expect_missing(self, teachers: Collection[str]) -> None:
        """Rows of these teachers' fields may be NaN, and then do not count.

        Looked for only where they may be: it costs a pass over the features.
        """
        for term in self._bound():
            term.may_miss_rows |= term.key.partition("/")[0] in teachers

    def weights(self, step: int) -> dict[str, float]:
        """lambda_k(t) by term name."""
        return {
            term.settings.name: weight_at(term.settings.weight, step, self.clock)
            for term in self._bound()
        }

    def counts(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """What the mean of each term that counts at a step is divided by."""
        weights = self.weights(step)
        return {
            term.settings.name: term.count(batch)
            for term in self._bound()
            if weights[term.settings.name]
        }

    def forward(
        self, output: ModelOutput, batch: Batch, step: int, shares: Shares | None = None
    ) -> Loss:
        """Sum over k of lambda_k(t) L_k; a term of weight 0 is left out, and costs nothing.

        Source: Ekström Kelvinius et al. 2023, Eq. 2, for several terms.
        """
        loss = Loss(output.energy.new_zeros(()))
        weights = self.weights(step)
        for term in self._bound():
            name = term.settings.name
            if weights[name]:
                loss = loss.add(name, weights[name], term(output, batch), shares)
        return loss

    def losses(self) -> dict[str, LossFunction]:
        """What every term measures by, by its name."""
        return {term.settings.name: term.loss for term in self._bound()}

    def _bound(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]


def origin_weight(batch: Batch, level: Level) -> Tensor | None:
    """Weight of every row of a level by its structure's origin; None where nothing is mixed.

    Source: Ekström Kelvinius et al. 2023, section D.2, for every contribution to the loss.
    """
    weight = batch.origin_weight
    if weight is None or level == "structure":
        return weight
    owner = batch.structure_index
    return weight[owner if level == "atom" else owner[batch.edge_index[1]]]


def _present(target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features and weights by row, with zeros where the teacher has no such row."""
    absent = target.isnan()
    if absent.dim() > 1:  # an energy has no channels
        absent = absent.flatten(1).any(dim=1)
    present = (~absent).to(target.dtype)
    # A row of weight 0 must be a number: 0 times NaN would still be NaN.
    target = target.masked_fill(absent.reshape(-1, *[1] * (target.dim() - 1)), 0.0)
    return target, present if weight is None else present * weight


def _student_feature(output: ModelOutput, name: str, term: str) -> Tensor:
    if name == "energy":
        return output.energy
    if name == "forces":
        return output.forces
    if name == "atomic_energy":
        return output.atomic_energy
    if name not in output.features:
        raise ConfigError(
            f"Term {term}: the student returned no {name}; {did_you_mean(name, output.features)}."
        )
    return output.features[name]
