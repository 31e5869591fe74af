"""What a sweep file may say.

Pydantic models only. Invariant: unknown keys are refused, as in the configuration of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from kdcache.config import read_yaml, validate
from kdcache.config.schedules import NotNegative, Section

Grid = dict[str, tuple[JsonValue, ...]]


class StrategySettings(Section):
    """One strategy of a sweep; a bare text is its name."""

    name: str = Field(description="n2n, n2n+v2v, annealed, control, …")
    weights: dict[str, tuple[NotNegative, ...]] = Field(
        default={}, description="lambda by part, one or several: {n2n: [10, 100]}"
    )
    teacher_name: str | None = Field(default=None, description="null where the store has one")
    published: str | None = Field(
        default=None, description="row of the published lambda, T/S/D; null: the nearest"
    )
    grid: Grid = Field(
        default={}, description="settings of this strategy alone, as in terms.n2n.loss: [mse, mae]"
    )

    @model_validator(mode="before")
    @classmethod
    def _text_is_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _number_is_one_choice(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v if isinstance(v, list | tuple) else (v,) for k, v in value.items()}


class SweepConfig(Section):
    """A grid of runs over one store."""

    store: str = Field(description="path of the store all runs are trained from")
    preset: str | None = Field(
        default=None, description="what the runs start from; null without base: painn-small"
    )
    base: str | dict[str, JsonValue] = Field(
        default={}, description="configuration of a run, or the path of its YAML file"
    )
    strategies: tuple[StrategySettings, ...] = Field(
        default=(), description="none: the base's own terms"
    )
    grid: Grid = Field(default={}, description="values by setting, as in training.seed: [0, 1, 2]")
    split: Literal["val", "test"] = Field(
        default="val", description="of the store, on which errors are measured"
    )

    @field_validator("grid")
    @classmethod
    def _lists_hold_values(cls, value: Grid) -> Grid:
        empty = [key for key, values in value.items() if not values]
        if empty:
            raise ValueError(f"{empty[0]} has no values; name at least one, or leave it out")
        return value


def load_sweep(path: str | Path) -> SweepConfig:
    """The sweep a YAML file describes.

    Raises:
        ConfigError: no such file, an unknown key, or a value that does not fit.
    """
    return validate(read_yaml(path), SweepConfig, str(path))
