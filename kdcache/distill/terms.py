"""Bind distillation terms to the fields of a student and its teachers, and evaluate them.

Owns the checks that two fields can be compared, and the projections, which are trained with the
student and dropped at export. Reading the teacher's fields is the stream's.
Invariant: a term's initial weights depend on the seed and its own name alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kdcache.config import TermConfig
from kdcache.distill.losses import Loss, LossFunction, atom_counts, compare, find_loss
from kdcache.distill.projections import build_student_projection, build_teacher_projection
from kdcache.distill.schedules import Clock, weight_at
from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import FieldSpec
from kdcache.structures import Batch, ModelOutput

_OUTPUTS = ("energy", "forces", "atomic_energy")


def required_fields(terms: Iterable[TermConfig], teachers: Collection[str]) -> tuple[str, ...]:
    """What the stream must read, as "teacher name/field name", each once.

    Args:
        terms: as configured; a term whose weight is always 0 needs nothing.
        teachers: names in the store.

    Raises:
        ConfigError: a teacher is unknown, or not named where there are several.
    """
    keys = [
        f"{_teacher_of(term, teachers)}/{term.teacher}" for term in terms if not term.weight.is_zero
    ]
    return tuple(dict.fromkeys(keys))


def student_features(terms: Iterable[TermConfig]) -> tuple[str, ...]:
    """Entries of `ModelOutput.features` that the terms compare, each once."""
    names = [term.student for term in terms if term.student not in _OUTPUTS]
    return tuple(dict.fromkeys(names))


class Term(nn.Module):
    """One term, L(M_s(H_s), M_t(H_t)), without its weight; made by `build_terms`."""

    rms: Tensor

    def __init__(
        self,
        settings: TermConfig,
        key: str,
        loss: LossFunction,
        student_projection: nn.Module,
        teacher_projection: nn.Module,
        rms: float,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.key = key
        self.loss = loss
        self.student_projection = student_projection
        self.teacher_projection = teacher_projection
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
        student = self.student_projection(_student_field(output, self.settings.student, name))
        if self.key not in batch.teacher:
            raise ConfigError(
                f"Term {name}: the batch lacks {self.key}; {did_you_mean(self.key, batch.teacher)}."
            )
        # Half precision saves room in the store, not in the arithmetic.
        dtype = torch.promote_types(student.dtype, torch.float32)
        teacher = self.teacher_projection(batch.teacher[self.key].to(dtype))
        if self.settings.per_atom:
            counts = atom_counts(batch)
            student, teacher = student / counts, teacher / counts
        if self.settings.normalise == "rms":
            student, teacher = student / self.rms, teacher / self.rms
        return compare(self.loss, student, teacher, None, f"Term {name}")


class Terms(nn.Module):
    """The distillation terms of a run and their weights over time; made by `build_terms`."""

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

    def weights(self, step: int) -> dict[str, float]:
        """lambda_k(t) by term name."""
        return {
            term.settings.name: weight_at(term.settings.weight, step, self.clock)
            for term in self._bound()
        }

    def forward(self, output: ModelOutput, batch: Batch, step: int) -> Loss:
        """Sum over k of lambda_k(t) L_k; a term of weight 0 is left out, and costs nothing.

        Source: Ekström Kelvinius et al. 2023, Eq. 2, for several terms.
        """
        loss = Loss(output.energy.new_zeros(()))
        weights = self.weights(step)
        for term in self._bound():
            name = term.settings.name
            if weights[name]:
                value = term(output, batch)
                loss += Loss(weights[name] * value, {name: value.detach()})
        return loss

    def _bound(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]


def build_terms(
    terms: Sequence[TermConfig],
    *,
    student_fields: Sequence[FieldSpec],
    teacher_fields: Mapping[str, Mapping[str, FieldSpec]],
    clock: Clock,
    seed: int,
    field_rms: Mapping[str, float] | None = None,
) -> Terms:
    """Terms bound to fields, with projections made and every mismatch refused.

    Args:
        terms: as configured.
        student_fields: what the student computes, taps included.
        teacher_fields: teacher name → field name → spec.
        clock: what weights are measured against.
        seed: of the projections.
        field_rms: root mean square by "teacher name/field name", for `normalise: rms`.

    Raises:
        ConfigError: an unknown field, teacher or loss, or two fields that cannot be compared.
    """
    students = {spec.name: spec for spec in student_fields}
    bound = [
        _bind(term, students, teacher_fields, seed, field_rms or {})
        for term in terms
        if not term.weight.is_zero
    ]
    for term in bound:
        clock.length(term.settings.weight.unit)
    return Terms(bound, clock)


def _bind(
    term: TermConfig,
    students: Mapping[str, FieldSpec],
    teacher_fields: Mapping[str, Mapping[str, FieldSpec]],
    seed: int,
    field_rms: Mapping[str, float],
) -> Term:
    where = f"Term {term.name}"
    teacher_name = _teacher_of(term, teacher_fields)
    fields = teacher_fields[teacher_name]
    if term.student not in students:
        raise ConfigError(
            f"{where}: the student has no {term.student}; {did_you_mean(term.student, students)}."
        )
    if term.teacher not in fields:
        raise ConfigError(
            f"{where}: teacher {teacher_name} has no field {term.teacher}; "
            f"{did_you_mean(term.teacher, fields)}. Dump the teacher again with it."
        )
    student, teacher = students[term.student], fields[term.teacher]
    key = f"{teacher_name}/{term.teacher}"
    _check_comparable(term, student, teacher, where)
    projections = _projections(term, student, teacher, _generator(seed, term.name), where)
    return Term(term, key, find_loss(term.loss), *projections, _rms(term, key, field_rms, where))


def _check_comparable(term: TermConfig, student: FieldSpec, teacher: FieldSpec, where: str) -> None:
    for what, ours, theirs in (
        ("level", student.level, teacher.level),
        ("symmetry", student.symmetry, teacher.symmetry),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{where}: student {student.name} has {what} {ours}, teacher {teacher.name} "
                f"{theirs}; their rows mean different things. Name two fields of one {what}."
            )
    if term.loss == "l2mae" and student.symmetry != "vector":
        raise ConfigError(
            f"{where}: l2mae measures vectors, {student.name} is none. Say loss: mae."
        )
    if term.per_atom and (student.level != "structure" or student.shape):
        raise ConfigError(
            f"{where}: per_atom divides one number per structure by n_atoms, but {student.name} "
            f"has {student.row_size} per {student.level}. Leave it out."
        )


def _projections(
    term: TermConfig, student: FieldSpec, teacher: FieldSpec, generator: torch.Generator, where: str
) -> tuple[nn.Module, nn.Module]:
    vector = student.symmetry == "vector"
    ours, theirs = _channels(student), _channels(teacher)
    if ours is None or theirs is None:
        plain = term.student_projection.kind == term.teacher_projection.kind == "identity"
        if not plain or student.shape != teacher.shape:
            raise ConfigError(
                f"{where}: student {student.name} has rows of {list(student.shape)}, teacher "
                f"{teacher.name} of {list(teacher.shape)}; without channels on both sides only "
                f"rows of one shape compare, by identity projections."
            )
        return nn.Identity(), nn.Identity()
    of_teacher, width = build_teacher_projection(
        term.teacher_projection, theirs, ours, generator=generator, where=where
    )
    of_student = build_student_projection(
        term.student_projection, ours, width, vector=vector, generator=generator, where=where
    )
    return of_student, of_teacher


def _channels(spec: FieldSpec) -> int | None:
    """Extent of the channel axis; None for scalars and plain vectors such as forces."""
    channel_shape = spec.shape[1:] if spec.symmetry == "vector" else spec.shape
    return channel_shape[-1] if channel_shape else None


def _rms(term: TermConfig, key: str, field_rms: Mapping[str, float], where: str) -> float:
    if term.normalise == "none":
        return 1.0
    rms = field_rms.get(key)
    if rms is None or not math.isfinite(rms) or rms <= 0:
        raise ConfigError(
            f"{where}: normalise: rms needs the root mean square of {key}, got {rms}. "
            f"Say normalise: none."
        )
    return rms


def _teacher_of(term: TermConfig, teachers: Collection[str]) -> str:
    if term.teacher_name is not None:
        if term.teacher_name not in teachers:
            raise ConfigError(
                f"Term {term.name}: the store has no teacher {term.teacher_name}; "
                f"{did_you_mean(term.teacher_name, teachers)}."
            )
        return term.teacher_name
    if len(teachers) == 1:
        return next(iter(teachers))
    have = f"teachers {', '.join(sorted(teachers))}" if teachers else "no teacher"
    way_out = "Say which as teacher_name." if teachers else "Dump one into it first."
    raise ConfigError(f"Term {term.name} names no teacher, and the store has {have}. {way_out}")


def _student_field(output: ModelOutput, name: str, term: str) -> Tensor:
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


def _generator(seed: int, name: str) -> torch.Generator:
    # By name, not by place: a further term leaves the others' projections as they were.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
