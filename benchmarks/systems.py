"""Structures of the sizes that models are compared at: slabs like OC20's, molecules like COLL's."""

from __future__ import annotations

import numpy as np
import torch
from ase.build import add_adsorbate, fcc111

from kdcache.models import Model
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure

N_STRUCTURES = {"oc20": 4, "coll": 32}


def model_batch(model: Model, size: str, n_structures: int | None = None) -> Batch:
    """The batch of a size, "oc20" or "coll", with the neighbour lists the model wants."""
    make = slabs if size == "oc20" else molecules
    structures, tags = make(n_structures or N_STRUCTURES[size])
    batch = collate(structures, model.graph_rule, further=model.further_graphs)
    batch.tags = torch.tensor(np.concatenate(tags), dtype=torch.uint8)
    return batch


def slabs(n_structures: int) -> tuple[list[Structure], list[np.ndarray]]:
    """Metal slabs of 75 atoms with an adsorbate of five, rattled, and their tags."""
    structures, tags = [], []
    for k in range(n_structures):
        rng = np.random.default_rng(k)
        atoms = fcc111(["Cu", "Pt", "Ag", "Pd"][k % 4], (5, 3, 5), vacuum=10.0)
        n_metal = len(atoms)
        height = [1.8, 2.9, 2.9, 3.4, 3.4]
        for z, symbol, spot in zip(height, "COHHH", [0.0, 0.4, 0.9, -0.7, 0.2], strict=True):
            add_adsorbate(atoms, symbol, z, (3.0 + spot, 2.0 - spot))
        positions = atoms.get_positions() + rng.normal(scale=0.05, size=(len(atoms), 3))
        tag = np.where(atoms.get_tags() == 1, 1, 0)
        tag[n_metal:] = 2
        structures.append(
            Structure(
                structure_id=f"slab{k}",
                atomic_numbers=atoms.numbers.astype(np.int64),
                positions=positions,
                cell=np.array(atoms.cell),
                pbc=np.array([True, True, False]),
            )
        )
        tags.append(tag)
    return structures, tags


def molecules(n_structures: int) -> tuple[list[Structure], list[np.ndarray]]:
    """Ten atoms each, at random, none closer than 0.9 Å; all with tag 2."""
    structures, tags = [], []
    for k in range(n_structures):
        rng = np.random.default_rng(k)
        positions = np.zeros((1, 3))
        while len(positions) < 10:
            point = rng.uniform(0.0, 3.6, 3)
            if np.linalg.norm(positions - point, axis=1).min() > 0.9:
                positions = np.vstack([positions, point])
        structures.append(
            Structure(
                structure_id=f"molecule{k}",
                atomic_numbers=rng.choice([1, 6, 8], 10),
                positions=positions,
                cell=np.zeros((3, 3)),
                pbc=np.zeros(3, bool),
            )
        )
        tags.append(np.full(10, 2))
    return structures, tags
