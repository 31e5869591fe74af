"""Evaluate weights over the course of training.

Pure functions of the step: nothing to save, the same after a resume.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from kdcache.config import WeightSchedule
from kdcache.config.schedules import Unit
from kdcache.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Clock:
    """What positions in a schedule are measured against.

    Attributes:
        max_steps: optimizer steps of the whole training.
        steps_per_epoch: where known; schedules in epochs need it.
    """

    max_steps: int
    steps_per_epoch: float | None = None

    def length(self, unit: Unit) -> float:
        """Steps in one `unit`.

        Raises:
            ConfigError: epochs are asked for and their length is not known.
        """
        if unit == "fraction":
            return float(self.max_steps)
        if unit == "step":
            return 1.0
        if self.steps_per_epoch is None:
            raise ConfigError(
                "A schedule counts epochs, but the steps of an epoch are not known here. "
                "Give it in fractions of max_steps (unit: fraction) or in steps (unit: step)."
            )
        return float(self.steps_per_epoch)


def weight_at(schedule: WeightSchedule, step: int, clock: Clock) -> float:
    """The weight at an optimizer step, counted from 0.

    Example:
        >>> ramp = WeightSchedule(kind="linear", points=((0.0, 1.0), (0.5, 3.0)))
        >>> [weight_at(ramp, step, Clock(max_steps=100)) for step in (0, 25, 50, 99)]
        [1.0, 2.0, 3.0, 3.0]
    """
    # A correctly rounded quotient: step 7 of 100 is exactly the 0.07 somebody wrote.
    position = step / clock.length(schedule.unit)
    points = schedule.points
    after = bisect_right([start for start, _ in points], position)
    if after == 0:
        return points[0][1]
    if schedule.kind != "linear" or after == len(points):
        return points[after - 1][1]
    (start, low), (stop, high) = points[after - 1 : after + 1]
    return low + (position - start) / (stop - start) * (high - low)


def scaled(schedule: WeightSchedule, factor: float) -> WeightSchedule:
    """The schedule with every weight times `factor`."""
    points = tuple((position, weight * factor) for position, weight in schedule.points)
    return schedule.model_copy(update={"points": points})


def constant(weight: float) -> WeightSchedule:
    """A weight that never changes."""
    return WeightSchedule(points=((0.0, weight),))


def ramp(start: float, stop: float, until: float) -> WeightSchedule:
    """From `start` to `stop` in a straight line, arriving at the fraction `until` of training."""
    return WeightSchedule(kind="linear", points=((0.0, start), (until, stop)))
