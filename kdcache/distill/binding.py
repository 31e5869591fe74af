"""Bind distillation terms to the fields of a student and its teachers.

Owns the checks that two fields can be compared, and the making of projections, which are trained
with the student and dropped at export.
Invariant: a term's initial weights depend on the seed and its own name alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from kdcache.config import TermConfig
from kdcache.distill.losses import LossFunction, find_loss, traits_of
from kdcache.distill.projections import Sides, build_projections
from kdcache.distill.schedules import Clock
from kdcache.distill.terms import Term, Terms
from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import FieldSpec
from kdcache.taps import Tap

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
    names = [student_field(term) for term in terms if term.student not in _OUTPUTS]
    return tuple(dict.fromkeys(names))


def student_taps(terms: Iterable[TermConfig]) -> tuple[Tap, ...]:
    """Inner modules of the student that the terms compare, each once.

    Raises:
        ConfigError: a tap in another notation.
    """
    texts = [term.student for term in terms if "=" in term.student and not term.weight.is_zero]
    return tuple(dict.fromkeys(Tap.parse(text) for text in texts))


def student_field(term: TermConfig) -> str:
    """The name of what a term compares on the student's side; of a tap, the field it fills."""
    return Tap.parse(term.student).field if "=" in term.student else term.student


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
    ours = student_field(term)
    if ours not in students:
        raise ConfigError(
            f"{where}: the student has no {ours}; {did_you_mean(ours, students)}. A module inside "
            f"it is written as a tap, e.g. node/msg1=message_layers.1."
        )
    if term.teacher not in fields:
        raise ConfigError(
            f"{where}: teacher {teacher_name} has no field {term.teacher}; "
            f"{did_you_mean(term.teacher, fields)}. Dump the teacher again with it."
        )
    student, teacher = students[ours], fields[term.teacher]
    key = f"{teacher_name}/{term.teacher}"
    loss = find_loss(term.loss)
    _check_comparable(term, student, teacher, loss, where)
    generator = _generator(seed, term.name)
    projections = _projections(term, student, teacher, loss, generator, where)
    rms = _rms(term, key, field_rms, where)
    return Term(term, ours, key, loss, *projections, rms, student.level)


def _check_comparable(
    term: TermConfig, student: FieldSpec, teacher: FieldSpec, loss: LossFunction, where: str
) -> None:
    for what, ours, theirs in (
        ("level", student.level, teacher.level),
        ("symmetry", student.symmetry, teacher.symmetry),
    ):
        if ours != theirs:
            raise ConfigError(
                f"{where}: student {student.name} has {what} {ours}, teacher {teacher.name} "
                f"{theirs}; their rows mean different things. Name two fields of one {what}."
            )
    traits = traits_of(loss)
    if traits.symmetry not in (None, student.symmetry):
        raise ConfigError(
            f"{where}: {term.loss} measures {traits.symmetry} features, {student.name} is "
            f"{student.symmetry}. Say loss: mse."
        )
    if traits.level not in (None, student.level):
        raise ConfigError(
            f"{where}: {term.loss} measures features of level {traits.level}, {student.name} has "
            f"one row per {student.level}. Say loss: mse."
        )
    if term.per_atom and (student.level != "structure" or student.shape):
        raise ConfigError(
            f"{where}: per_atom divides one number per structure by n_atoms, but {student.name} "
            f"has {student.row_size} per {student.level}. Leave it out."
        )


def _projections(
    term: TermConfig,
    student: FieldSpec,
    teacher: FieldSpec,
    loss: LossFunction,
    generator: torch.Generator,
    where: str,
) -> tuple[nn.Module, nn.Module]:
    ours, theirs = _channels(student), _channels(teacher)
    relational = traits_of(loss).relational
    if ours is None or theirs is None:
        plain = term.student_projection.kind == term.teacher_projection.kind == "identity"
        if not plain or (student.shape != teacher.shape and not relational):
            raise ConfigError(
                f"{where}: student {student.name} has rows of {list(student.shape)}, teacher "
                f"{teacher.name} of {list(teacher.shape)}; without channels on both sides only "
                f"rows of one shape compare, by identity projections."
            )
        return nn.Identity(), nn.Identity()
    sides = Sides(ours, theirs, student.symmetry == "vector", relational, where)
    return build_projections(term.student_projection, term.teacher_projection, sides, generator)


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
    way_out = (
        "Say which: --teacher NAME, or teacher_name in the term."
        if teachers
        else "Dump one into it first."
    )
    raise ConfigError(f"Term {term.name} names no teacher, and the store has {have}. {way_out}")


def _generator(seed: int, name: str) -> torch.Generator:
    # By name, not by place: a further term leaves the others' projections as they were.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
