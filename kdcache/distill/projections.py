"""Maps of feature channels: M_s, trained with the student, and M_t, frozen unless asked.

Owns their shapes and initial weights; which feature meets which is `terms`.
Invariant: weights come from the given generator alone, so terms never change the student's own
start, and a map of vectors commutes with rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from kdcache.config import ProjectionConfig
from kdcache.errors import ConfigError


class ChannelLinear(nn.Module):
    """A linear map of the last axis; without bias it is equivariant on [n, 3, C].

    Args:
        channels_in, channels_out: widths.
        bias: add one; never for vectors, a constant vector has a direction of its own.
        generator: source of the initial weights, uniform within ±1/sqrt(channels_in).
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, bias: bool, generator: Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(channels_in)
        self.weight = nn.Parameter(_uniform((channels_out, channels_in), bound, generator))
        self.bias = nn.Parameter(_uniform((channels_out,), bound, generator)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        # Features may come in half precision from a region of autocast that has ended.
        return nn.functional.linear(features.to(self.weight.dtype), self.weight, self.bias)


class FrozenLinear(nn.Module):
    """A fixed random map with orthonormal rows, or columns when it widens.

    It keeps distances, and cannot collapse. Source: ours.
    """

    weight: Tensor

    def __init__(self, channels_in: int, channels_out: int, *, generator: Generator) -> None:
        super().__init__()
        tall = max(channels_in, channels_out), min(channels_in, channels_out)
        basis, _ = torch.linalg.qr(torch.randn(tall, generator=generator))
        weight = basis.T if channels_out <= channels_in else basis
        self.register_buffer("weight", weight.contiguous())

    def forward(self, features: Tensor) -> Tensor:
        return nn.functional.linear(features.to(self.weight.dtype), self.weight)


@dataclass(frozen=True, slots=True)
class Sides:
    """What both maps of a term must fit.

    Attributes:
        student, teacher: channels of the two features.
        vector: whether the features turn with the structure.
        relational: the loss takes sides of different channels.
        where: the term, for errors.
    """

    student: int
    teacher: int
    vector: bool
    relational: bool
    where: str


def build_projections(
    student: ProjectionConfig, teacher: ProjectionConfig, sides: Sides, generator: Generator
) -> tuple[nn.Module, nn.Module]:
    """M_s and M_t, each identity, linear, or an MLP with one hidden layer.

    M_s is trained with the student. M_t is frozen unless `trained` says otherwise, because a
    trained M_t can collapse: with a trained map on both sides, both learn to give zeros, the loss
    vanishes and nothing is distilled, so that is refused. Opposite an untrained M_s a trained M_t
    is possible, as Eq. 3 has it; yet with a distance such as mse it still rewards a student whose
    features carry little, only the other losses hold against that. The source reports trained M_s
    and identity M_t throughout.

    Args:
        student: of M_s.
        teacher: of M_t; its width, where not given, is the student's.
        sides: the channels and what else they must fit.
        generator: source of initial weights.

    Raises:
        ConfigError: identity between two widths, an MLP or a bias on vectors, two trained maps, a
            frozen MLP.

    Source: Ekström Kelvinius et al. 2023, Eq. 3 and appendix E.2 (Table 15).
    """
    if _is_trained(student, default=True) and _is_trained(teacher, default=False):
        raise ConfigError(
            f"{sides.where}: with trained projections on both sides, both would shrink to zero. "
            f"Leave out teacher_projection.trained, or say student_projection: identity."
        )
    theirs = teacher.width or (sides.teacher if teacher.kind == "identity" else sides.student)
    of_teacher = _map(
        teacher, "teacher", (sides.teacher, theirs), sides, generator, _is_trained(teacher, False)
    )
    width = student.width
    if width not in (None, theirs) and not sides.relational:
        raise ConfigError(
            f"{sides.where}: student_projection.width is {width}, but the teacher's side has "
            f"{theirs} channels. Leave it out."
        )
    ours = width or theirs
    if student.kind == "identity":
        if sides.student != theirs and not sides.relational:
            raise ConfigError(
                f"{sides.where}: the student's feature has {sides.student} channels, the teacher's "
                f"{theirs}; identity cannot compare them. Say student_projection: linear."
            )
        ours = width or sides.student
    of_student = _map(
        student, "student", (sides.student, ours), sides, generator, _is_trained(student, True)
    )
    return of_student, of_teacher


def _is_trained(settings: ProjectionConfig, default: bool) -> bool:
    chosen = default if settings.trained is None else settings.trained
    return chosen and settings.kind != "identity"


def _map(
    settings: ProjectionConfig,
    side: str,
    channels: tuple[int, int],
    sides: Sides,
    generator: Generator,
    trained: bool,
) -> nn.Module:
    channels_in, channels_out = channels
    name = f"{side}_projection"
    if settings.kind == "identity":
        if channels_in != channels_out:
            raise ConfigError(
                f"{sides.where}: {name}.width is {channels_out}, and identity keeps the feature's "
                f"{channels_in} channels. Leave it out, or say {name}.kind: linear."
            )
        return nn.Identity()
    if sides.vector and settings.bias:
        raise ConfigError(
            f"{sides.where}: a bias on vectors would prefer one direction in space and break "
            f"rotations. Leave {name}.bias out."
        )
    if sides.vector and settings.kind == "mlp":
        raise ConfigError(
            f"{sides.where}: an mlp acts on x, y and z one by one and would break rotations of "
            f"vectors. Say {name}: linear."
        )
    if not trained:
        if settings.kind == "mlp" or settings.bias:
            what = "an mlp" if settings.kind == "mlp" else "a bias"
            raise ConfigError(
                f"{sides.where}: {name} is frozen, and {what} is of use only where it is trained. "
                f"Say {name}.trained: true, or {name}: linear without bias."
            )
        return FrozenLinear(channels_in, channels_out, generator=generator)
    bias = not sides.vector if settings.bias is None else settings.bias
    if settings.kind == "linear":
        return ChannelLinear(channels_in, channels_out, bias=bias, generator=generator)
    hidden = settings.hidden or 2 * channels_in
    return nn.Sequential(
        ChannelLinear(channels_in, hidden, bias=bias, generator=generator),
        nn.ReLU(),
        ChannelLinear(hidden, channels_out, bias=bias, generator=generator),
    )


def _uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
