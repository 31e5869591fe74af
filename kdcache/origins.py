"""How structures of several origins share a batch and a loss.

Arithmetic only: no files, no tensors. The first origin is the dataset itself, the others are
overlays of structures that a teacher labelled.
Invariant: the weights of a batch average to 1, so mixing never changes the scale of a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kdcache.errors import ConfigError

ROUNDING = 1e-9  # shares of 0.1, 0.2 and 0.7 are meant to make 1


def origin_weights(shares: Sequence[float], ratios: Sequence[float]) -> list[float]:
    """Weight of a structure of each origin in the losses of a batch.

    For the dataset and one overlay these are w_dft and w_s; several overlays are weighed by the
    same rule, w_k = r_k w_dft with the mean over the batch at 1.

    Args:
        shares: alpha_batch of each origin, not negative, summing to 1; the dataset's first.
        ratios: r of each origin, its weight over the dataset's; the dataset's is 1.

    Returns:
        w of each origin, the sum of share times weight being 1 (Eq. 9).

    Source: Ekström Kelvinius et al. 2023, Eqs. 9–11.

    Example:
        >>> origin_weights([0.5, 0.5], [1.0, 3.0])
        [0.5, 1.5]
    """
    mean = sum(share * ratio for share, ratio in zip(shares, ratios, strict=True))
    return [ratio / mean for ratio in ratios]


def batch_parts(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Structures of each origin in every batch; the dataset's come first, then the overlays'.

    Args:
        batch_size: structures in a batch.
        shares: alpha_target of each overlay.

    Raises:
        ConfigError: the shares exceed 1, or a batch is too small to hold one of them.

    Example:
        >>> batch_parts(32, [0.25, 0.5])
        [8, 8, 16]
    """
    if sum(shares) > 1.0 + ROUNDING:
        raise ConfigError(
            f"data.overlays: the shares {list(shares)} sum to {sum(shares):g}, and a batch has no "
            f"room for more than 1. Lower them."
        )
    # Whole structures at the running sum of shares: no part is off by more than one of them.
    bounds = [round(batch_size * sum(shares[:k])) for k in range(len(shares) + 1)]
    parts = [after - before for before, after in itertools.pairwise(bounds)]
    for share, part in zip(shares, parts, strict=True):
        if (part == 0) != (share == 0.0):
            raise ConfigError(
                f"data.overlays: a share of {share:g} is no whole structure in a batch of "
                f"{batch_size}. Make training.batch_size or the share larger."
            )
    own = batch_size - sum(parts)
    if own == 0 and sum(shares) < 1.0 - ROUNDING:
        raise ConfigError(
            f"data.overlays: shares {list(shares)} leave no place in a batch of {batch_size} for "
            f"the dataset itself. Make training.batch_size larger, or say 1."
        )
    return [own, *parts]


def child_id(parent: str, kind: str, number: int) -> str:
    """Id of a structure made from another one.

    Example:
        >>> child_id("train:41", "rattled", 2)
        'train:41~rattled2'
    """
    return f"{parent}~{kind}{number}"


def parent_ids(structure_id: str) -> list[str]:
    """Ids of the structures one was made from, the nearest first; itself is not among them.

    Example:
        >>> parent_ids("train:41~relaxed30~rattled0")
        ['train:41~relaxed30', 'train:41']
    """
    parts = structure_id.split("~")
    return ["~".join(parts[:k]) for k in range(len(parts) - 1, 0, -1)]
