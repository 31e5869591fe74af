"""Which structures of a store a run trains on, validates on, and sees the labels of.

Reads labels and the index, no features. Invariant: the choice depends on the store and the
settings alone, so a control and its students see the same structures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.config import DataConfig
from kdcache.errors import TrainingError
from kdcache.store import Store
from kdcache.structures import MAX_ATOMIC_NUMBER, FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of a store by their part in a run.

    Attributes:
        train: rows trained on, ascending.
        validation: labelled rows errors are watched on, ascending.
        labelled: [n_structures] whether the ground truth of a structure may be used.
        force_rms: root mean square force component of the labelled training rows, eV/Å.
    """

    train: IntArray
    validation: IntArray
    labelled: BoolArray
    force_rms: float

    @property
    def train_labelled(self) -> IntArray:
        """Training rows with ground truth."""
        return self.train[self.labelled[self.train]]

    @property
    def train_unlabelled(self) -> IntArray:
        """Training rows only a teacher speaks about."""
        return self.train[~self.labelled[self.train]]


def select(store: Store, settings: DataConfig) -> Selection:
    """Choose training and validation rows and whose labels are seen.

    The store's splits count where it has them: "train" and unnamed structures are trained on, "val"
    watched, "test" left alone. `settings.max_force` cleans the dataset before anything else, so it
    looks at every label there is. Without a "val" split, `settings.val_fraction` of the labelled
    training rows is held out.

    Raises:
        TrainingError: nothing to train on, or a setting leaves nothing.
    """
    has_label, max_force, square_sum = _label_summary(store)
    kept = np.ones(len(has_label), bool)
    if settings.max_force is not None:
        kept = ~(max_force > settings.max_force)
    split = np.asarray(store.index.split)
    train = np.flatnonzero(np.isin(split, ["train", ""]) & kept)
    validation = np.flatnonzero((split == "val") & kept & has_label)
    if not len(train):
        raise TrainingError(
            f"{store.path} has no structures to train on: {len(split)} in all, "
            f"{int((~kept).sum())} above max_force, splits {sorted(set(split.tolist()))}."
        )
    generator = np.random.default_rng(settings.labels_seed)
    if not len(validation) and settings.val_fraction:
        candidates = train[has_label[train]]
        count = round(settings.val_fraction * len(candidates))
        validation = np.sort(generator.permutation(candidates)[:count])
        train = np.setdiff1d(train, validation)
    labelled = has_label.copy()
    candidates = train[has_label[train]]
    if not len(train):
        raise TrainingError(
            f"data.val_fraction {settings.val_fraction} holds out all {len(validation)} structures "
            f"that could be trained on. Lower it."
        )
    if settings.labels < 1.0:
        count = max(1, round(settings.labels * len(candidates)))
        seen = generator.permutation(candidates)[:count]
        labelled[train] = False
        labelled[seen] = True
    used = train[labelled[train]]
    components = 3 * float(store.index.n_atoms[used].sum())
    rms = float(np.sqrt(square_sum[used].sum() / components)) if components else 0.0
    return Selection(train, validation, labelled, rms)


def n_trained_on(store: Store) -> int:
    """Structures of a store that no split holds out."""
    return int(np.isin(store.index.split, ["train", ""]).sum())


def composition(store: Store, rows: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
    """What reference energies are fitted to: atomic numbers and energies of some structures.

    Returns:
        atomic_numbers [n_atoms], structure_index [n_atoms] counted from 0, energies [n_structures]
        eV, in the order of `rows`.
    """
    numbers, owners, energies = [], [], []
    wanted = np.zeros(len(store.index), bool)
    wanted[rows] = True
    done = 0
    for block in np.unique(store.index.block[rows]):
        rows_here = store.plan.block_structures(int(block))
        here = wanted[rows_here]
        n_atoms = store.index.n_atoms[rows_here]
        all_numbers = store.read("structures/atomic_numbers", [int(block)])
        numbers.append(all_numbers[np.repeat(here, n_atoms)])
        owners.append(np.repeat(done + np.arange(here.sum()), n_atoms[here]))
        energies.append(store.read("structures/energy", [int(block)])[here])
        done += int(here.sum())
    return (
        np.concatenate(numbers).astype(np.int64),
        np.concatenate(owners),
        np.concatenate(energies),
    )


def elements_of(store: Store, rows: IntArray) -> IntArray:
    """Atomic numbers that occur in some structures, ascending, each once."""
    wanted = np.zeros(len(store.index), bool)
    wanted[rows] = True
    present = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
    for block in np.unique(store.index.block[rows]):
        here = store.plan.block_structures(int(block))
        numbers = store.read("structures/atomic_numbers", [int(block)])
        present[numbers[np.repeat(wanted[here], store.index.n_atoms[here])]] = True
    return np.flatnonzero(present)


def _label_summary(store: Store) -> tuple[BoolArray, FloatArray, FloatArray]:
    """Per structure: labelled or not, largest force component, sum of squared components."""
    n_structures = len(store.index)
    has_label = np.zeros(n_structures, bool)
    largest, squares = np.full(n_structures, np.nan), np.full(n_structures, np.nan)
    for block in range(store.plan.n_blocks):
        rows = store.plan.block_structures(block)
        energy = store.read("structures/energy", [block])
        forces = store.read("structures/forces", [block])
        n_atoms = store.index.n_atoms[rows]
        first = np.cumsum(n_atoms) - n_atoms
        largest[rows] = np.maximum.reduceat(np.abs(forces).max(axis=1), first)
        squares[rows] = np.add.reduceat((forces**2).sum(axis=1), first)
        has_label[rows] = np.isfinite(energy) & np.isfinite(squares[rows])
    return has_label, largest, squares
