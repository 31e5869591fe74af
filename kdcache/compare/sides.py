"""What can be compared: the features a store holds, or those a run computes.

Owns reading and computing them for given structures; alignment is `pipeline`'s.
Invariant: rows of a layer are those of the chunk's structures, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.checkpoint import load_potential
from kdcache.config import load_config
from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.models.taps import Tap
from kdcache.store import Store
from kdcache.stream.edges import teacher_edges
from kdcache.stream.neighbors import BlockEdges, block_rows
from kdcache.stream.probe import find_block_taps
from kdcache.stream.window import collate, range_rows
from kdcache.structures import IntArray, Structure
from kdcache.teachers import NativeTeacher


@dataclass(frozen=True, slots=True)
class Chunk:
    """Structures compared at once.

    Attributes:
        source_index: [n_structures] places in the dataset.
        structures: themselves, where a run computes on them; empty otherwise.
    """

    source_index: IntArray
    structures: Sequence[Structure] = ()


@dataclass(frozen=True, slots=True)
class Computed:
    """Features of a chunk.

    Attributes:
        layers: [n_rows, ...] by name.
        edges: by name of each layer of level edge, [n_edges, 5] integers: source and target atom
            within the chunk, and the shift.
    """

    layers: dict[str, Tensor]
    edges: dict[str, npt.NDArray[np.int64]]


class Side(Protocol):
    """One of the models compared.

    Attributes:
        name: for titles.
        layers: every feature by name.
        taught: student layer → teacher fields it was trained towards; only of runs.
    """

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> dict[str, FieldSpec]: ...
    @property
    def taught(self) -> dict[str, set[str]]: ...

    def compute(self, chunk: Chunk) -> Computed:
        """All layers of the chunk's structures."""
        ...


class StoreSide:
    """The features that the teachers of a store left in it.

    Args:
        store: open. With several teachers, layers are called "teacher/field".

    Raises:
        ConfigError: there is no teacher, or none with features.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.name = store.path.name
        self.taught: dict[str, set[str]] = {}
        several = len(store.teachers) > 1
        self.layers: dict[str, FieldSpec] = {}
        self._keys: dict[str, str] = {}
        for teacher in store.teachers:
            for spec in store.fields(f"teachers/{teacher}").values():
                if is_feature(spec):
                    layer = f"{teacher}/{spec.name}" if several else spec.name
                    self.layers[layer] = spec
                    self._keys[layer] = f"{teacher}/{spec.name}"
        if not self.layers:
            raise ConfigError(
                f"{store.path} holds no features to compare. Dump a teacher into it first "
                f"(kdcache dump-teacher --into {store.path})."
            )

    def compute(self, chunk: Chunk) -> Computed:
        store = self.store
        rows = store.index.source_order[chunk.source_index]
        blocks = np.unique(store.index.block[rows]).tolist()
        held = block_rows(store, blocks)
        place = np.searchsorted(held, rows)
        n_atoms = store.index.n_atoms[held]
        atoms = _ranges(n_atoms, place)
        edges: dict[str, BlockEdges] = {}
        found = Computed({}, {})
        for layer, key in self._keys.items():
            teacher = key.rpartition("/")[0]
            index = atoms
            if self.layers[layer].level == "edge":
                if teacher not in edges:
                    edges[teacher] = teacher_edges(store, teacher).read(blocks)
                index = _ranges(edges[teacher].n_edges, place)
                found.edges[layer] = _edges_within(edges[teacher], place, n_atoms[place], index)
            values = store.read(f"teachers/{key}", blocks)[index]
            found.layers[layer] = torch.from_numpy(values)
        return found


class RunSide:
    """The features a trained model computes.

    Args:
        path: run directory.
        taps: inner modules beside the model's own features; all its blocks without any.
        device: where it computes.

    Raises:
        TrainingError: no model there, or a damaged one.
        ConfigError: a tap names no module, or one that gives no such feature.
    """

    def __init__(self, path: Path, taps: Sequence[Tap], device: str) -> None:
        self.potential = load_potential(path, device=device).eval()
        chosen = tuple(taps) or find_block_taps(self.potential)
        self._model = NativeTeacher(self.potential, chosen)
        self._device = device
        self.name = path.name
        self.layers = {s.name: s for s in self._model.field_specs() if is_feature(s)}
        self.taught = _taught(path, chosen)

    def compute(self, chunk: Chunk) -> Computed:
        rule, further = self._model.graph_rule, self._model.further_graphs
        batch = collate(chunk.structures, rule, further=further)
        self.potential.check_elements(batch.atomic_numbers.to(self._device))
        fields = self._model.compute(batch.to(self._device, self._model.dtype))
        edges = np.concatenate([batch.edge_index.T.numpy(), batch.edge_shift.numpy()], axis=1)
        edges = np.rint(edges).astype(np.int64)
        by_edge = [name for name, spec in self.layers.items() if spec.level == "edge"]
        return Computed({name: fields[name] for name in self.layers}, dict.fromkeys(by_edge, edges))


def is_feature(spec: FieldSpec) -> bool:
    """Whether a field has channels: no energy, no force, no neighbour list."""
    channels = spec.shape[1:] if spec.symmetry == "vector" else spec.shape
    return bool(channels) and spec.level != "structure" and not spec.dtype.startswith("int")


def _taught(run: Path, taps: Sequence[Tap]) -> dict[str, set[str]]:
    """What a run's own configuration says was compared in its training."""
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    found: dict[str, set[str]] = {}
    for term in load_config(file).terms:
        names = [term.student]
        if "=" in term.student:
            wanted = Tap.parse(term.student)
            names = [t.field for t in taps if (t.kind, t.path) == (wanted.kind, wanted.path)]
        for name in names:
            found.setdefault(name, set()).add(term.teacher)
    return found


def _ranges(counts: IntArray, place: IntArray) -> IntArray:
    return range_rows((np.cumsum(counts) - counts)[place], counts[place])


def _edges_within(
    edges: BlockEdges, place: IntArray, n_atoms: IntArray, index: IntArray
) -> npt.NDArray[np.int64]:
    first = np.cumsum(n_atoms) - n_atoms
    atoms = edges.edge_index[index] + np.repeat(first, edges.n_edges[place])[:, None]
    return np.concatenate([atoms, edges.edge_shift[index]], axis=1).astype(np.int64)
