"""Which structures of a dataset are held out for validation and test.

Arithmetic on hashes only. Invariant: structures with equal contents, or of one group when whole
groups are split, are on one side; the choice depends on the seed and those contents, not on the
order of the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kdcache.errors import ConfigError, DataError
from kdcache.structures import IntArray

HELD_OUT = ("val", "test")


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Refuse fractions that leave nothing to train on.

    Raises:
        ConfigError: another name than val or test, a value outside (0, 1), or a sum of 1 or more.
    """
    for name, fraction in fractions.items():
        if name not in HELD_OUT:
            raise ConfigError(
                f"split {name!r} is neither val nor test. Name what is held out; the rest trains."
            )
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"split {name}={fraction} must lie between 0 and 1.")
    if sum(fractions.values()) >= 1.0:
        raise ConfigError(
            f"splits {dict(fractions)} sum to {sum(fractions.values())}: nothing would be left to "
            "train on. Make them smaller."
        )


def choose_splits(
    split: Sequence[str],
    units: Sequence[bytes],
    fractions: Mapping[str, float],
    seed: int,
) -> npt.NDArray[np.str_]:
    """Hold structures out at random, whole units at a time.

    A unit is ranked by SHA-256(seed, unit); units are held out in that order until a split has its
    share, rounded up to whole units.

    Args:
        split: [n] what the dataset says: "train", "val", "test" or "".
        units: [n] what stays together: content hashes, or group names as bytes.
        fractions: e.g. {"val": 0.05, "test": 0.1}, of the structures that are "train" or "".
        seed: of the choice.

    Returns:
        [n] splits; structures that are not held out and said nothing are "train".

    Raises:
        DataError: the dataset already has a split of that name, or a split stays empty or takes
            everything.
    """
    chosen = np.array(split, dtype=object)
    for name in fractions:
        present = int((chosen == name).sum())
        if present:
            raise DataError(
                f"the dataset already names {present} structures {name!r}, and --split {name} "
                "would hold out more. Drop one of the two (--split-key none ignores the dataset's)."
            )
    free: IntArray = np.flatnonzero(np.isin(chosen.astype(str), ["", "train"]))
    sizes: dict[bytes, int] = {}
    for row in free:
        sizes[units[row]] = sizes.get(units[row], 0) + 1
    salt = seed.to_bytes(16, "little", signed=True)
    ranked = sorted(sizes, key=lambda unit: hashlib.sha256(salt + unit).digest())
    side: dict[bytes, str] = {}
    position = 0
    for name in HELD_OUT:
        wanted = round(fractions.get(name, 0.0) * len(free))
        taken = 0
        while taken < wanted and position < len(ranked):
            side[ranked[position]] = name
            taken += sizes[ranked[position]]
            position += 1
        if name in fractions and not taken:
            raise DataError(
                f"split {name}={fractions[name]} of {len(free)} structures is none. Make it larger."
            )
    if position == len(ranked):
        raise DataError(
            f"the splits {dict(fractions)} would take all {len(free)} structures, in "
            f"{len(ranked)} groups: nothing would be left to train on. Split by structure, or less."
        )
    for row in free:
        chosen[row] = side.get(units[row], "train")
    return chosen.astype(str)
