"""The structures, stores and teachers that the benchmarks of dumps and training run on.

Slabs like those of OC20 and molecules like those of COLL, rattled copies of a few; labels are
random numbers and weights are untrained, since no time depends on either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from systems import molecules, slabs

from kdcache.graphs import GraphRule
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.presets import find_preset
from kdcache.readers import ReadOptions
from kdcache.store import Store
from kdcache.teachers import NativeTeacher

# On a machine that others keep busy, the processor time of all threads tells sides apart where the
# wall time does not; it counts what would have overlapped.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SIZES = {"oc20": slabs, "coll": molecules}  # 80 atoms, periodic; 10 atoms, free
N_ORIGINALS = 32
RATTLE = 0.01  # Å: every copy is a structure of its own, with the neighbours of its original


def make_store(
    path: Path,
    size: str,
    n_structures: int,
    *,
    graph: GraphRule | None = None,
    block_atoms: int | None = None,
    shard_blocks: int | None = None,
) -> Store:
    """A finished store without teachers.

    Args:
        path: where it is made.
        size: "oc20" or "coll".
        n_structures: in it.
        graph: neighbour lists kept in it.
        block_atoms, shard_blocks: layout; None as an import chooses.
    """
    file = path.with_suffix(".npz")
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_npz(file, size, n_structures)
    read = ReadOptions(energy_unit="eV", tags_key="tags")
    layout = {"atom_capacity": block_atoms, "blocks_per_shard": shard_blocks}
    try:
        return import_dataset(file, path, ImportOptions(read, graph=graph, **layout))
    finally:
        file.unlink()


def _write_npz(file: Path, size: str, n_structures: int) -> None:
    originals, tags = SIZES[size](min(n_structures, N_ORIGINALS))
    chosen = np.arange(n_structures) % len(originals)
    rng = np.random.default_rng(0)
    positions = np.stack([s.positions for s in originals])[chosen]
    np.savez(
        file,
        R=positions + rng.normal(scale=RATTLE, size=positions.shape),
        z=np.stack([s.atomic_numbers for s in originals])[chosen],
        cell=np.stack([s.cell for s in originals])[chosen],
        pbc=np.stack([s.pbc for s in originals])[chosen],
        tags=np.stack(tags)[chosen],
        E=rng.normal(size=n_structures),
        F=rng.normal(size=positions.shape),
    )


def make_teacher(model: str | Mapping[str, object], device: str = "cpu") -> NativeTeacher:
    """An untrained model, by preset or hyperparameters, as a teacher."""
    return NativeTeacher(make_potential(model, device))


def make_potential(model: str | Mapping[str, object], device: str = "cpu") -> Potential:
    """An untrained model in eval mode."""
    settings = dict(find_preset(model).model) if isinstance(model, str) else dict(model)
    potential = Potential(build_model(settings, seed=0), Normalizer(), {})
    return potential.to(device, torch.float32).eval()


def devices(wanted: str) -> list[str]:
    """ "cpu" and, where there is one, "cuda"; or the one that is wanted."""
    if wanted != "all":
        return [wanted]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
