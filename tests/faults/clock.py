"""A clock that is set to and fro while kdcache looks at it."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

YEARS = 20 * 365.25 * 86400


@contextmanager
def jumping_clock() -> Iterator[list[float]]:
    """Within it, every look at the clock finds it elsewhere within twenty years; what was seen."""
    rng, seen = np.random.default_rng(), list[float]()
    real_time, real_datetime = time.time, datetime.datetime

    def now() -> float:
        seen.append(real_time() + rng.uniform(-YEARS, YEARS))
        return seen[-1]

    class Jumping(real_datetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real_datetime.fromtimestamp(now(), tz)

    changed: list[tuple[Any, str, Any]] = [
        (time, "time", now),
        (time, "time_ns", lambda: int(now() * 1e9)),
    ]
    for name, module in list(sys.modules.items()):
        if name.startswith("kdcache") and getattr(module, "datetime", None) is real_datetime:
            changed.append((module, "datetime", Jumping))
    kept = [(place, name, getattr(place, name)) for place, name, _ in changed]
    for place, name, replacement in changed:
        setattr(place, name, replacement)
    try:
        yield seen
    finally:
        for place, name, original in kept:
            setattr(place, name, original)
