"""Losses of a batch that several processes hold parts of.

A mean over the whole is the sum of local means, each by its share of what is averaged over, so
that a label or an atom weighs the same wherever it is. Invariant: what is no such mean is refused,
never approximated.
"""

from __future__ import annotations

from torch import Tensor

from kdcache.distill.losses import GroundTruthLoss, traits_of
from kdcache.distill.terms import Terms
from kdcache.errors import ConfigError
from kdcache.structures import Batch


def part_counts(truth: GroundTruthLoss, terms: Terms, batch: Batch, step: int) -> dict[str, Tensor]:
    """What the mean of every part of the loss is divided by on this process; scalars by part."""
    return {**truth.counts(batch, step), **terms.counts(batch, step)}


def check_shareable(truth: GroundTruthLoss, terms: Terms) -> None:
    """Refuse a loss whose value of a whole batch does not follow from those of its parts.

    Raises:
        ConfigError: naming it.
    """
    settings = truth.settings
    used = {f"Term {name}": loss for name, loss in terms.losses().items()}
    if not settings.energy_weight.is_zero:
        used["loss.energy"] = truth.energy_loss
    if not settings.forces_weight.is_zero:
        used["loss.forces"] = truth.forces_loss
    for where, loss in used.items():
        if traits_of(loss).mean_over is None:
            raise ConfigError(
                f"{where}: {getattr(loss, '__name__', loss)} of a batch is no sum over its "
                f"structures, so several processes would train something else than one. Start one "
                f"process, or choose another loss."
            )
