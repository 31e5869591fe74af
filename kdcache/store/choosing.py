"""Which structures of a store become a store of their own.

By the index alone, but for elements. Invariant: the same store, wishes and seed choose the same
structures, in store order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kdcache.cluster import Cluster
from kdcache.errors import ConfigError, did_you_mean
from kdcache.progress import Progress, silent
from kdcache.store.reader import Store
from kdcache.store.scan import made_only_of
from kdcache.structures import MAX_ATOMIC_NUMBER, IntArray

UNNAMED = "unnamed"


@dataclass(frozen=True, slots=True)
class Choice:
    """What chosen structures have in common; None asks for nothing.

    Attributes:
        splits: "train", "val", "test"; "unnamed" for those of none.
        origins: "data", "rattled" and others.
        ids: of the structures.
        rows: of the index, counted from 0.
        max_atoms: a structure has at most.
        elements: atomic numbers; a structure has no others.
        sample: so many of those that are left, at random.
        seed: of the sample.
    """

    splits: Sequence[str] | None = None
    origins: Sequence[str] | None = None
    ids: Sequence[str] | None = None
    rows: Sequence[int] | None = None
    max_atoms: int | None = None
    elements: Sequence[int] | None = None
    sample: int | None = None
    seed: int = 0

    @property
    def description(self) -> str:
        """The wishes in a line, for people and the manifest; no names of files."""
        said = []
        if self.splits is not None:
            said.append(f"split {' or '.join(self.splits)}")
        if self.origins is not None:
            said.append(f"origin {' or '.join(self.origins)}")
        if self.ids is not None:
            said.append(f"{len(self.ids)} ids")
        if self.rows is not None:
            said.append(f"{len(self.rows)} rows")
        if self.max_atoms is not None:
            said.append(f"at most {self.max_atoms} atoms")
        if self.elements is not None:
            said.append(f"only elements {', '.join(map(str, sorted(self.elements)))}")
        if self.sample is not None:
            said.append(f"a sample of {self.sample} with seed {self.seed}")
        return "; ".join(said) if said else "all"


def choose_rows(
    store: Store, choice: Choice, cluster: Cluster, progress: Progress = silent
) -> IntArray:
    """Rows of the chosen structures, ascending: all wishes hold, the sample is drawn last.

    Raises:
        ConfigError: a split, origin, id or row the store does not have, an element there is not, a
            larger sample than there are structures, or nothing is left; says which wish left
            nothing.
        StoreError: elements are asked for, and a shard is damaged.
    """
    if choice.sample is not None and choice.sample < 1:
        raise ConfigError(f"A sample of {choice.sample} is none. A store holds at least one.")
    for number in choice.elements or ():
        if not 1 <= number <= MAX_ATOMIC_NUMBER:
            raise ConfigError(f"{number} is no element: they run from 1 to {MAX_ATOMIC_NUMBER}.")
    index = store.index
    steps: list[tuple[str, npt.NDArray[np.bool_]]] = []
    if choice.splits is not None:
        splits = ["" if split == UNNAMED else split for split in choice.splits]
        steps.append(("split", _named(index.split, splits, "split", store)))
    if choice.origins is not None:
        steps.append(("origin", _named(index.origin, choice.origins, "origin", store)))
    if choice.ids is not None:
        steps.append(("ids", _with_ids(store, choice.ids)))
    if choice.rows is not None:
        steps.append(("rows", _in_rows(store, choice.rows)))
    if choice.max_atoms is not None:
        steps.append((f"at most {choice.max_atoms} atoms", index.n_atoms <= choice.max_atoms))
    if choice.elements is not None:
        steps.append(("elements", made_only_of(store, choice.elements, cluster, progress)))
    left = [np.ones(len(store), bool)]
    for _, wanted in steps:
        left.append(left[-1] & wanted)
    rows = np.flatnonzero(left[-1])
    if not len(rows):
        shown = ", ".join(
            f"{name} {int(after.sum())}"
            for (name, _), (_, after) in zip(steps, pairwise(left), strict=True)
        )
        raise ConfigError(
            f"No structure of {store.path} is chosen: of {len(store)}, {shown} are left. A store "
            f"holds at least one; ask for less."
        )
    if choice.sample is None:
        return rows
    if choice.sample > len(rows):
        raise ConfigError(
            f"A sample of {choice.sample} is asked for, {len(rows)} structures of {store.path} are "
            f"there to choose from. Ask for at most as many."
        )
    generator = np.random.Generator(np.random.PCG64(choice.seed))
    return np.sort(generator.permutation(rows)[: choice.sample])


def _named(
    column: npt.NDArray[np.object_], wanted: Sequence[str], what: str, store: Store
) -> npt.NDArray[np.bool_]:
    texts = column.astype(str)
    known = sorted(set(texts.tolist()))
    for name in wanted:
        if name not in known:
            raise ConfigError(
                f"{store.path} has no {what} {name or UNNAMED!r}: "
                f"{did_you_mean(name, [text or UNNAMED for text in known])}"
            )
    return np.isin(texts, list(wanted))


def _with_ids(store: Store, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    row_of = {structure_id: row for row, structure_id in enumerate(store.index.structure_id)}
    missing = [structure_id for structure_id in ids if structure_id not in row_of]
    if missing:
        raise ConfigError(
            f"{store.path} has no structure {missing[0]!r}, nor {len(missing) - 1} more of "
            f"{len(ids)} ids. Leave them out, or name the store they are from."
            if len(missing) > 1
            else f"{store.path} has no structure {missing[0]!r}. Leave it out of the ids."
        )
    wanted = np.zeros(len(store), bool)
    wanted[[row_of[structure_id] for structure_id in ids]] = True
    return wanted


def _in_rows(store: Store, rows: Sequence[int]) -> npt.NDArray[np.bool_]:
    for row in rows:
        if not 0 <= row < len(store):
            raise ConfigError(f"{store.path} has rows 0…{len(store) - 1}, not {row}.")
    wanted = np.zeros(len(store), bool)
    wanted[np.array(rows, np.int64)] = True
    return wanted
