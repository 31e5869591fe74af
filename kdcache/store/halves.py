"""Between float32 and float16 at the processor's own speed.

numpy converts value by value (0.24 GB/s of float16), torch by the processor's instruction (8 GB/s),
so torch is borrowed where the process has loaded it; the store itself needs no torch.
Invariant: the same bits either way.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# In native byte order. From float64, torch rounds twice: to float32 and on to float16.
TORCHS = frozenset({np.dtype(np.float16), np.dtype(np.float32)})

# One tile stays in the cache, and below the size from which torch would start threads.
TILE_VALUES = 2**15


def convert(values: Array, out: Array) -> None:
    """Fill `out` with `values` in its dtype, rounded to nearest even.

    Args:
        values: contiguous float16, float32 or float64, finite and within the range of `out`.
        out: contiguous, of the same shape.
    """
    torch = sys.modules.get("torch")
    if (
        torch is not None
        and values.dtype in TORCHS
        and out.dtype in TORCHS
        and values.flags.writeable
    ):
        torch.from_numpy(out).copy_(torch.from_numpy(values))
    else:
        np.copyto(out, values, casting="same_kind")


def tiles(n_rows: int, row_size: int) -> list[slice]:
    """Runs of rows of at most `TILE_VALUES` values; a longer row stands alone.

    Example:
        >>> tiles(5, TILE_VALUES // 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, TILE_VALUES // max(1, row_size))
    return [slice(first, min(first + step, n_rows)) for first in range(0, n_rows, step)]
