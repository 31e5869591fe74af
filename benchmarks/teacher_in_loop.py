"""Training with the teacher run in every step: what a store is compared with.

Our own best honest way of it. Student, losses, optimizer and order are those of a `Trainer`; lists
of neighbours, the teacher's too, are found beforehand and read ahead on threads; the teacher
computes each batch in float32 without gradients, and sums edges only where a term asks for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdcache.config import StudentConfig, load_config
from kdcache.distill.strategies import apply_strategy
from kdcache.models.edges import TO_NODE, TO_VECTOR, edge_to_node, edge_to_vector
from kdcache.models.potential import Potential
from kdcache.progress import silent
from kdcache.store import open_store
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import further_neighbors, neighbors_for
from kdcache.stream.transfer import on_device, pinning
from kdcache.structures import Batch
from kdcache.train import Trainer

TEACHER_GRAPH = "teacher"  # the teacher's own neighbours, beside the student's in every batch


def student_config(base: dict[str, object], strategy: str, device: str) -> StudentConfig:
    """A configuration for stepping alone: no validation, energies as the store has them.

    Args:
        base: layer of a configuration, as `Preset.config` gives it.
        strategy: of distillation; "control" for none.
        device: that is trained on.
    """
    config = apply_strategy(load_config(base=base), strategy)
    settings = ["references.mode=none", "data.val_fraction=0", f"training.device={device}"]
    return load_config(base=config.model_dump(mode="json"), overrides=settings)


@dataclass
class Steps:
    """A student about to take steps, each from a batch of a loader.

    Attributes:
        trainer: with its student, terms, optimizer and average.
        batches: endless, on the trainer's device.
        teacher: computes what the terms ask for; None where the batches bring it.
        waited: seconds spent waiting for batches so far.
    """

    trainer: Trainer
    batches: Iterator[Batch]
    teacher: Potential | None = None
    waited: float = 0.0

    def take(self) -> dict[str, Tensor]:
        """One step: batch, student, losses, gradients, update; the loss and each of its terms."""
        trainer = self.trainer
        trainer.rate.apply(trainer.optimizer, trainer.step)
        asked = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - asked
        if self.teacher is not None:
            batch = taught(batch, self.teacher, trainer.terms.required_fields)
        output = trainer.stepped(batch)
        loss = trainer.truth(output, batch, trainer.step)
        loss = loss + trainer.terms(output, batch, trainer.step)
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        if trainer.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trainer.parameters, trainer.config.clip_norm)
        trainer.optimizer.step()
        trainer.average.update()
        trainer.step += 1
        return {"loss": loss.total.detach(), **loss.parts}

    def seconds(self, n_steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
        """Of one step by `clock`, over `n_steps` of them."""
        self._synchronize()
        start = clock()
        for _ in range(n_steps):
            self.take()
        self._synchronize()
        return (clock() - start) / n_steps

    def _synchronize(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)


def taught(batch: Batch, teacher: Potential, required: tuple[str, ...]) -> Batch:
    """The batch with the teacher's fields on it; no references stand between the two."""
    graphs = dict(batch.graphs)
    own = graphs.pop(TEACHER_GRAPH)
    theirs = replace(
        batch,
        edge_index=own.edge_index,
        edge_shift=own.edge_shift,
        graphs={name.removeprefix("teacher "): graph for name, graph in graphs.items()},
    )
    with torch.no_grad():
        output = teacher.predict(theirs)
        fields = {
            "energy": output.energy,
            "forces": output.forces,
            "atomic_energy": output.atomic_energy,
            **output.features,
        }
        found = {name: _field(fields, name.rpartition("/")[2], theirs) for name in required}
    dtype = batch.positions.dtype
    return replace(batch, teacher={k: v.detach().to(dtype) for k, v in found.items()}, graphs={})


def _field(fields: dict[str, Tensor], name: str, batch: Batch) -> Tensor:
    for suffix, reduce in ((TO_NODE, edge_to_node), (TO_VECTOR, edge_to_vector)):
        if name.endswith(suffix):
            return reduce(fields[name.removesuffix(suffix)], batch)
    return fields[name]


@contextmanager
def steps_of(
    store_path: Path,
    config: StudentConfig,
    cache: Path,
    teacher: Potential | None = None,
    *,
    ahead: int = 4,
) -> Iterator[Steps]:
    """A student to be trained from a store, or by a teacher in every step.

    Args:
        store_path: holds the teacher's fields; with `teacher` they are not read.
        config: of the student; its references must be none, so that both sides share a frame.
        cache: directory for neighbour lists.
        teacher: runs in every step; without references, on the device of the run.
        ahead: batches assembled ahead of use.
    """
    store = open_store(store_path)
    trainer = Trainer(store, cache / "run", config, cache, silent)
    trainer.potential.train()
    stream = trainer.stream
    if teacher is not None:
        further = further_neighbors(store, teacher.further_graphs, cache)
        lists = {f"teacher {name}": found for name, found in further.items()}
        lists[TEACHER_GRAPH] = neighbors_for(store, teacher.graph_rule, cache)
        stream = [
            (replace(reader, teacher_fields=(), further={**reader.further, **lists}), sampler)
            for reader, sampler in stream
        ]
    with Loader(stream, ahead=ahead, finish=pinning(trainer.device)) as loader:
        yield Steps(trainer, on_device(loader, trainer.device, trainer.dtype), teacher)


def check_same_losses(cached: Steps, in_loop: Steps, n_steps: int, tolerance: float) -> float:
    """The worst relative difference of any term in the first steps.

    Raises:
        RuntimeError: above the tolerance: the two sides do not train the same student.
    """
    worst = 0.0
    for step in range(n_steps):
        ours, theirs = cached.take(), in_loop.take()
        for name in ours.keys() | theirs.keys():
            there, here = float(theirs[name]), float(ours[name])
            difference = abs(there - here) / max(abs(here), 1e-30)
            worst = max(worst, difference)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{name} of step {step} is {here} from the store and {there} with the teacher "
                    f"in the loop, a difference of {difference:.2e}, beyond {tolerance:.0e}"
                )
    return worst
