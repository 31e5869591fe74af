"""How a student is watched while it is trained, and which of its states counts as the best.

Invariant: the training state is left as it was found; the weights looked at are the averaged ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kdcache.config import LossConfig
from kdcache.devices import batch_atoms
from kdcache.distill.schedules import Clock, weight_at
from kdcache.evaluate import Metrics, predict_batches
from kdcache.models.potential import Potential
from kdcache.optim import ExponentialAverage
from kdcache.stream.reader import WindowReader, sequential
from kdcache.stream.transfer import tensors
from kdcache.structures import Batch, IntArray

# Of validation structures that stay on the device from one validation to the next.
KEPT_BYTES = 2**30


class Validation:
    """The validation structures of a run.

    Args:
        potential: the student, in training mode and on its device.
        average: of its weights.
        reader: of the store the structures are in.
        rows: [n] the structures, ascending; there may be none.
        settings: what errors count for how much.
        clock: of the run.
    """

    def __init__(
        self,
        potential: Potential,
        average: ExponentialAverage,
        reader: WindowReader,
        rows: IntArray,
        settings: LossConfig,
        clock: Clock,
    ) -> None:
        self.potential = potential
        self.average = average
        self.reader = replace(reader, teacher_fields=(), labelled=None)
        self.rows = rows
        self.settings = settings
        self.clock = clock
        self._kept: list[Batch] | None = None

    def metrics(self) -> Metrics | None:
        """Errors of the averaged weights; None without structures."""
        if not len(self.rows):
            return None
        self.potential.eval()
        with self.average.swapped():
            free = self.settings.free_atoms_only
            found = predict_batches(self.potential, self._batches(), free_atoms_only=free)
            metrics = found.metrics()
        self.potential.train()
        return metrics

    def _batches(self) -> Iterator[Batch]:
        """All structures; read once if they fit what may be kept, and each time if not."""
        if self._kept is not None:
            yield from self._kept
            return
        weights = next(self.potential.parameters())
        kept: list[Batch] = []
        size = 0
        for batch in sequential(self.reader, self.rows, batch_atoms(None, weights.device)):
            moved = batch.to(weights.device, weights.dtype)
            size += sum(tensor.nbytes for tensor in tensors(moved))
            if size <= KEPT_BYTES:
                kept.append(moved)
            else:
                kept.clear()
            yield moved
        if size <= KEPT_BYTES:
            self._kept = kept

    def score(self, metrics: Metrics) -> float:
        """What "best" means: validation MAEs in the proportion the loss ends with."""
        settings, end = self.settings, self.clock.max_steps
        energy = weight_at(settings.energy_weight, end, self.clock)
        forces = weight_at(settings.forces_weight, end, self.clock)
        if not (energy or forces):
            # Taught by a teacher alone: a score of 0 throughout would keep the first model.
            energy = forces = 1.0
        energy_error = metrics.energy_mae_mev
        if settings.energy_per_atom:
            energy_error = metrics.energy_mae_mev_per_atom
        return energy * energy_error + forces * metrics.force_mae_mev_per_a
