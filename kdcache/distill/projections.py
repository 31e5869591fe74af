"""Maps of feature channels: M_s, trained with the student, and M_t, frozen.

Owns their shapes and initial weights; which feature meets which is `terms`.
Invariant: weights come from the given generator alone, so terms never change the student's own
start, and a map of vectors commutes with rotations.
"""

from __future__ import annotations

import math

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

    A trained map of the teacher's side would shrink both sides to zero; a random one keeps
    distances. Source: ours.
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


def build_student_projection(
    settings: ProjectionConfig,
    channels_in: int,
    channels_out: int,
    *,
    vector: bool,
    generator: Generator,
    where: str,
) -> nn.Module:
    """M_s: identity, linear, or an MLP with one hidden layer.

    Args:
        settings: which, and its sizes.
        channels_in: of the student's feature.
        channels_out: of what it is compared with.
        vector: whether the feature turns with the structure.
        generator: source of initial weights.
        where: the term, for errors.

    Raises:
        ConfigError: identity between two widths, an MLP or a bias on vectors.

    Source: Ekström Kelvinius et al. 2023, Eq. 3 and appendix E.2.
    """
    if settings.width not in (None, channels_out):
        raise ConfigError(
            f"{where}: student_projection.width is {settings.width}, but the teacher's side has "
            f"{channels_out} channels. Leave it out."
        )
    if settings.kind == "identity":
        if channels_in != channels_out:
            raise ConfigError(
                f"{where}: the student's feature has {channels_in} channels, the teacher's "
                f"{channels_out}; identity cannot compare them. Say student_projection: linear."
            )
        return nn.Identity()
    if vector and settings.bias:
        raise ConfigError(
            f"{where}: a bias on vectors would prefer one direction in space and break rotations. "
            f"Leave student_projection.bias out."
        )
    bias = not vector if settings.bias is None else settings.bias
    if settings.kind == "linear":
        return ChannelLinear(channels_in, channels_out, bias=bias, generator=generator)
    if vector:
        raise ConfigError(
            f"{where}: an mlp acts on x, y and z one by one and would break rotations of vectors. "
            f"Say student_projection: linear."
        )
    hidden = settings.hidden or 2 * channels_in
    return nn.Sequential(
        ChannelLinear(channels_in, hidden, bias=bias, generator=generator),
        nn.ReLU(),
        ChannelLinear(hidden, channels_out, bias=bias, generator=generator),
    )


def build_teacher_projection(
    settings: ProjectionConfig, channels_in: int, width: int, *, generator: Generator, where: str
) -> tuple[nn.Module, int]:
    """M_t and its channels out: identity, or a frozen random linear map.

    Args:
        settings: which, and its width.
        channels_in: of the teacher's field.
        width: channels out where the settings give none.
        generator: source of the frozen weights.
        where: the term, for errors.

    Raises:
        ConfigError: an MLP or a bias, which only a trained map has use for.
    """
    if settings.kind == "identity":
        return nn.Identity(), channels_in
    if settings.kind == "mlp" or settings.bias:
        raise ConfigError(
            f"{where}: teacher_projection can be identity or linear without bias; it is frozen, "
            f"since a trained one would shrink both sides to zero."
        )
    channels_out = settings.width or width
    return FrozenLinear(channels_in, channels_out, generator=generator), channels_out


def _uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
