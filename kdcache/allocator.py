"""What the C library does with memory that is freed: kept for the next tensor, within a bound.

A setting of the whole process, so programs call it and no module does on import. Invariant: it
changes how fast memory comes, never a number that is computed.
"""

from __future__ import annotations

import ctypes
import sys

# glibc's mallopt(3): parameters, and the largest threshold it takes.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_MMAP_THRESHOLD = 4 * 2**20 * ctypes.sizeof(ctypes.c_long)

KEPT_BYTES = 2**30
BYTES_AT_ONCE = 64 * 2**20


def keep_freed_memory() -> None:
    """Keep up to 1 GiB of freed memory in this process instead of giving it back at once.

    The tensors of one layer are freed before those of the next are made. Where glibc gives them
    back in between, every one of them meets fresh pages, which the system has to clear: up to half
    of the time of a small model on a CPU. Replaces what MALLOC_TRIM_THRESHOLD_ says, which dask
    sets low for its workers. Without effect on other systems, and under another allocator.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    for parameter, value in (
        (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD),
        (M_TRIM_THRESHOLD, KEPT_BYTES),
        (M_TOP_PAD, BYTES_AT_ONCE),
    ):
        mallopt(parameter, value)
