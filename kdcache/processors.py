"""How many processors this process may use."""

from __future__ import annotations

import os


def n_processors() -> int:
    """Those that it was given, as a batch system does; without such a limit, all there are."""
    if hasattr(os, "sched_getaffinity"):  # of Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
