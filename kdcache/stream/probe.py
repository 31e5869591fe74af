"""Run a potential once over three atoms, to learn what its inner modules give.

Invariant: nothing of the potential changes, its random state included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kdcache.fields import FieldSpec
from kdcache.models.potential import Potential
from kdcache.models.taps import Taps, block_taps, tap_spec
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure
from kdcache.taps import Tap


def tap_specs(potential: Potential, taps: Sequence[Tap]) -> tuple[FieldSpec, ...]:
    """The fields that taps on a potential fill, their widths measured.

    Args:
        potential: on any device, in any precision.
        taps: on its model.

    Raises:
        ConfigError: a tap names no module, or one that gives no such feature.
    """
    if not taps:
        return ()
    batch = _three_atoms(potential)
    with torch.no_grad(), Taps(potential.model, taps) as tapped:
        potential(batch)
        found = tapped.outputs(batch)
    dtype = str(next(potential.parameters()).dtype).removeprefix("torch.")
    return tuple(tap_spec(tap, found[tap.field].shape[-1], dtype) for tap in taps)


def find_block_taps(potential: Potential) -> tuple[Tap, ...]:
    """Taps on all that the blocks of a potential's model return; see `block_taps`."""
    batch = _three_atoms(potential)
    with torch.no_grad():
        return block_taps(potential.model, lambda: potential(batch), batch)


def _three_atoms(potential: Potential) -> Batch:
    """A bent molecule, of 3 atoms and 6 edges: counts that nothing can mistake."""
    probe = Structure(
        structure_id="probe",
        atomic_numbers=np.full(3, min(potential.references, default=1)),
        positions=np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
    )
    batch = collate([probe], potential.graph_rule, further=potential.further_graphs)
    weights = next(potential.parameters())
    return batch.to(weights.device, weights.dtype)
