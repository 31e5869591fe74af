"""Ranges of local files, asked for before they are read, as long as reading them meets a disk.

Advice to the system and no more: nothing that is read depends on it, and it raises nothing.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class DiskAhead:
    """Whether asking ahead gains anything, and the asking.

    A disk that is asked for one block of a window after another gives half of what it does when it
    is asked for all at once. Blocks that the page cache holds come no sooner, and asking costs more
    than a small read: it is left out until a read meets the disk again.

    Attributes:
        gains: the last reading met a disk; of the first one, that is not known yet.
    """

    def __init__(self) -> None:
        self.gains = ADVISES

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what asks and reads on this thread."""
        before = _disk_reads()
        yield
        self.gains = _disk_reads() > before


def ask_for(descriptor: int, start: int, end: int) -> None:
    """Have the system read bytes [start, end) of an open file into its cache, without waiting."""
    # Of what is no file, reading says so.
    with suppress(OSError):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)


# What this thread has had read from disks is counted by Linux only.
ADVISES = hasattr(os, "posix_fadvise") and hasattr(resource, "RUSAGE_THREAD")


def _disk_reads() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock if ADVISES else 0
