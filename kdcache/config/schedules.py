"""How weights and the learning rate go over the course of training.

Owns the sections' base and what schedules may say; `distill.schedules` and `optim` evaluate them.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Unit = Literal["fraction", "step", "epoch"]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _flag_is_no_number(cls, value: object) -> object:
        for key, item in value.items() if isinstance(value, dict) else ():
            field = cls.model_fields.get(key)
            if field and isinstance(item, bool) and field.annotation not in (bool, bool | None):
                raise ValueError(f"{key} must not be {str(item).lower()}")
        return value


class WeightSchedule(Section):
    """A weight over the course of training; a bare number is a constant one."""

    kind: Literal["constant", "linear", "steps"] = Field(
        default="constant",
        description="linear joins the points, steps holds each value until the next",
    )
    points: tuple[tuple[NotNegative, NotNegative], ...] = Field(
        description="[position, weight] pairs; held before the first and after the last"
    )
    unit: Unit = Field(
        default="fraction", description="what positions count: parts of max_steps or others"
    )

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, value: object) -> object:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return {"kind": "constant", "points": [[0.0, value]]}
        return value

    @model_validator(mode="after")
    def _points_fit_kind(self) -> Self:
        positions = [position for position, _ in self.points]
        if not positions:
            raise ValueError("a weight schedule needs at least one [position, weight] point")
        if self.kind == "constant" and len(positions) > 1:
            raise ValueError(f"a constant weight has one point, got {len(positions)}; say linear")
        if any(b <= a for a, b in itertools.pairwise(positions)):
            raise ValueError(f"positions must rise, got {positions}")
        if self.unit == "fraction" and positions[-1] > 1:
            raise ValueError(
                f"positions are fractions of max_steps, got {positions[-1]:g}; say unit: step"
            )
        return self

    @model_serializer(mode="wrap")
    def _constant_is_number(self, handler: SerializerFunctionWrapHandler) -> object:
        return self.points[0][1] if self.kind == "constant" else handler(self)

    @property
    def is_zero(self) -> bool:
        """Whether the weight is zero throughout."""
        return all(weight == 0 for _, weight in self.points)


class RateSection(Section):
    """A learning-rate schedule; lengths are counted in `unit`."""

    unit: Unit = Field(default="fraction", description="what warmup, decay and milestones count")
    warmup: NotNegative = Field(default=0.0, description="length of the linear warm-up")

    def lengths(self) -> tuple[float, ...]:
        """Every position and length of this schedule, in `unit`."""
        return (self.warmup,)

    @model_validator(mode="after")
    def _fractions_fit(self) -> Self:
        largest = max(self.lengths())
        if self.unit == "fraction" and largest > 1:
            raise ValueError(f"lengths are fractions of max_steps, got {largest:g}; say unit: step")
        return self


class ConstantRate(RateSection):
    """The peak rate, after a warm-up if there is one."""

    name: Literal["constant"] = "constant"


class LinearWarmupExponentialDecay(RateSection):
    """Open Catalyst's schedule for COLL: factor ** (step / decay), times a linear warm-up."""

    name: Literal["linear_warmup_exponential_decay"] = "linear_warmup_exponential_decay"
    warmup: NotNegative = Field(default=0.02, description="length of the linear warm-up")
    factor: float = Field(default=0.01, gt=0, le=1, description="decay over one `decay` length")
    decay: Positive | None = Field(default=None, description="null: the whole training")

    def lengths(self) -> tuple[float, ...]:
        return (self.warmup, self.decay or 0.0)


class MultiStep(RateSection):
    """Open Catalyst's schedule for OC20: times `factor` at every milestone."""

    name: Literal["multi_step"] = "multi_step"
    factor: float = Field(default=0.1, gt=0, le=1)
    milestones: tuple[NotNegative, ...] = ()
    warmup_factor: Fraction = Field(
        default=0.2, description="share of the rate the warm-up starts from"
    )

    def lengths(self) -> tuple[float, ...]:
        return (self.warmup, *self.milestones)

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"milestones must rise, got {list(value)}")
        return value


class Plateau(RateSection):
    """Times `factor` after more than `patience` evaluations without improvement."""

    name: Literal["plateau"] = "plateau"
    factor: float = Field(default=0.8, gt=0, lt=1)
    patience: int = Field(default=3, ge=0, description="evaluations")
    threshold: NotNegative = Field(default=1e-4, description="relative improvement that counts")
    min_factor: Fraction = Field(default=0.0, description="share of the peak rate never gone below")


class Cosine(RateSection):
    """Half a cosine from the peak rate at the end of the warm-up to the end of training."""

    name: Literal["cosine"] = "cosine"
    min_factor: Fraction = Field(
        default=0.0, description="share of the peak rate reached at the end"
    )


RateSchedule = Annotated[
    ConstantRate | LinearWarmupExponentialDecay | MultiStep | Plateau | Cosine,
    Field(discriminator="name"),
]
