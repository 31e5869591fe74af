"""Some structures of a store as a store of their own, for little traffic.

Owns which rows, what reading them costs, and that they are of one store; the new store is written
by `rewrite`. Invariant: of a source no other blocks are read than those that hold chosen rows, and
the new store takes its name only if the source is still the one it was begun with.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdcache.cluster import Here
from kdcache.errors import ConfigError, StoreError
from kdcache.progress import Progress, silent
from kdcache.sharing.expressions import normal, where
from kdcache.sharing.held import HeldFiles, Source, check_apart, source_files
from kdcache.store.choosing import Choice, choose_rows
from kdcache.store.combining import plan_subset, subset_note
from kdcache.store.contents import array_documents, array_reader
from kdcache.store.copy_shards import GroupCopy
from kdcache.store.index import INDEX
from kdcache.store.manifest import MANIFEST, Manifest, read_manifest
from kdcache.store.metadata import SCALE_SUFFIX
from kdcache.store.provenance import check_wanted, common_teachers, kept_fields, refuse_parts
from kdcache.store.reader import Store, open_store
from kdcache.store.rewrite import (
    Rewrite,
    RewriteReport,
    TeacherCopy,
    refuse_existing,
    write_rewrite,
)
from kdcache.store.shards import sync_directory
from kdcache.structures import IntArray

CHOSEN_SUFFIX = ".chosen"
BLOCKS_AT_ONCE = 16
SHARDS_AT_ONCE = 4


@dataclass(frozen=True)
class Cost:
    """What is read of a source for some of its rows.

    Attributes:
        n_rows, of_rows: chosen, of so many.
        n_blocks, of_blocks: that hold them, of so many.
        n_bytes: of these blocks, of the fields that are kept.
    """

    n_rows: int
    of_rows: int
    n_blocks: int
    of_blocks: int
    n_bytes: int

    @property
    def share(self) -> float:
        """Of the store's blocks."""
        return self.n_blocks / self.of_blocks


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen rows of a store, ready to be written as a store; made by `select_rows`.

    Attributes:
        store: the source.
        rows: of its index, ascending.
        description: what they have in common.
        teachers, fields: kept; None for all.
        cost: of reading them.
    """

    store: Store
    rows: IntArray
    description: str
    teachers: Sequence[str] | None
    fields: Sequence[str] | None
    cost: Cost

    def write(self, target: Path, jobs: int = 1, progress: Progress = silent) -> RewriteReport:
        """Write the rows as a new store, or go on with what was interrupted.

        Args:
            target: of the new store; nothing may be there.
            jobs: shards of it at once, at most 4: each is in memory.
            progress: shows structures, group by group.

        Raises:
            ConfigError: the new store would lie within the source.
            StoreError: something is at `target`, the source is damaged, or it was replaced while
                it was read.
        """
        target = refuse_existing(target if target.name else target.resolve())
        check_apart(self.store.path, target)
        chosen = target.with_name(target.name + CHOSEN_SUFFIX)
        rewrite = self._planned(progress)
        if (chosen / MANIFEST).is_file():  # a kill fell between the two names
            if read_manifest(chosen).dataset != rewrite.dataset:
                raise StoreError(
                    f"{chosen} was begun with other rows, or of another store. Delete it to begin "
                    f"anew."
                )
            shutil.rmtree(chosen)
        report = write_rewrite(chosen, rewrite, Here(min(jobs, SHARDS_AT_ONCE)), progress)
        files = self.store.files
        if isinstance(files, HeldFiles) and files.has_changed():
            shutil.rmtree(chosen)
            raise StoreError(
                f"{self.store.path} was replaced while it was read: rows may be of two stores, and "
                f"what was read is discarded. Run the command again, once the new one is whole."
            )
        os.rename(chosen, target)
        sync_directory(target.parent)
        return report

    def may_be(self, manifest: Manifest) -> bool:
        """Whether a store may be of these rows; which fields it has is another question."""
        note = subset_note(self.store, self.rows, self.description)
        return note in manifest.dataset.notes

    def _planned(self, progress: Progress) -> Rewrite:
        store = self.store
        dataset = store.manifest.dataset
        # To plan, every structure has its labels: which have them is read of the chosen ones alone.
        labelled = dataset.model_copy(update={"n_labelled": len(store)})
        manifest = store.manifest.model_copy(update={"dataset": labelled})
        rewrite = plan_subset(
            replace(store, manifest=manifest) if dataset.n_labelled else store,
            self.rows,
            self.description,
            Here(),
            teachers=self.teachers,
            fields=self.fields,
            progress=progress,
        )
        n_labelled = _labelled(store, self.rows)
        return replace(
            rewrite,
            dataset=rewrite.dataset.model_copy(update={"n_labelled": n_labelled}),
            structures=_from(store, rewrite.structures),
            teachers={
                name: TeacherCopy(one.entry, _from(store, one.copy), one.n_edges)
                for name, one in rewrite.teachers.items()
            },
        )


def select_rows(
    source: Source,
    *,
    condition: str | None = None,
    sample: int | None = None,
    seed: int | None = None,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
) -> Selection:
    """Rows of a store that are wanted, and what reading them costs.

    A store is in a random order: its first rows are a random sample, of which whole blocks are
    read. So a sample takes the first rows of those that satisfy the condition, the same for
    everybody; with a seed it is drawn as `choose_rows` draws it, from all blocks. Only what is
    needed to choose is read: manifest, index, documents, and indices of shards.

    Args:
        source: path, zip file or address of a store.
        condition: on columns of its index (`expressions.where`).
        sample: so many of the rows.
        seed: of a sample that is drawn; None for the first rows.
        teachers, fields: kept; None for all.

    Raises:
        ConfigError: no condition; no row, or fewer than the sample, satisfies it; a seed of no
            sample.
        StoreError: no such teacher or field, a damaged store, or one that was passed on without its
            structures.
    """
    if seed is not None and sample is None:
        raise ConfigError("A seed draws a sample, and none is asked for. Give --sample, too.")
    store = open_store(source_files(source))
    refuse_parts([store], "a store of some of its rows")
    check_wanted([store], fields)
    common_teachers([store], teachers)
    rows, said = np.arange(len(store)), []
    if condition is not None:
        rows = np.flatnonzero(where(store.index, condition))
        said.append(f"where {normal(condition)}")
        if not len(rows):
            raise ConfigError(
                f"--where {normal(condition)} holds for none of the {len(store)} structures of "
                f"{store.path}. A store holds at least one; ask for less."
            )
    if sample is not None:
        if sample > len(rows):
            raise ConfigError(
                f"A sample of {sample} is asked for, {len(rows)} structures of {store.path} are "
                f"there to choose from. Ask for at most as many."
            )
        if seed is None:
            rows = rows[:sample]
            said.append(f"the first {sample} in store order")
        else:
            left = None if condition is None else rows.tolist()
            choice = Choice(rows=left, sample=sample, seed=seed)
            rows = choose_rows(store, choice, Here())
            said.append(f"a sample of {sample} with seed {seed}")
    cost = _cost(store, rows, teachers, fields)
    return Selection(store, rows, "; ".join(said) or "all", teachers, fields, cost)


def _cost(
    store: Store, rows: IntArray, teachers: Sequence[str] | None, fields: Sequence[str] | None
) -> Cost:
    blocks = np.unique(store.plan.block[rows])
    wanted = {f"structures/{name}" for name in store.fields("structures")}
    for name in store.teachers if teachers is None else teachers:
        kept = kept_fields(store, name, fields)
        wanted |= {f"teachers/{name}/{spec.name}" for spec in kept}
    arrays = [
        array_reader(store.files, name, spec, document, store.plans[name.rpartition("/")[0]])
        for name, spec, document in array_documents(store.manifest, store.plans)
        if name.removesuffix(SCALE_SUFFIX) in wanted
    ]
    unread = [(array, shard) for array in arrays for shard in array.unread_shards(blocks)]
    store.files.each(lambda one: one[0].bounds(one[1]), unread)
    n_bytes = sum(part.end - part.start for array in arrays for part in array.ranges(blocks))
    n_bytes += store.files.size(INDEX) + store.files.size(MANIFEST)
    return Cost(len(rows), len(store), len(blocks), store.plan.n_blocks, n_bytes)


def _labelled(store: Store, rows: IntArray) -> int:
    """Of the chosen rows, those with energy and forces."""
    count = store.manifest.dataset.n_labelled
    if count in (0, len(store)):
        return len(rows) if count else 0
    names = ["structures/energy", "structures/forces"]
    if not {"energy", "forces"} <= set(store.fields("structures")):
        return 0
    chosen = np.zeros(len(store), bool)
    chosen[rows] = True
    blocks = np.unique(store.plan.block[rows])
    found = 0
    for first in range(0, len(blocks), BLOCKS_AT_ONCE):
        few = blocks[first : first + BLOCKS_AT_ONCE]
        here = np.flatnonzero(np.isin(store.plan.block, few))
        with store.fetched(names, few):
            has = np.isfinite(store.read(names[0], few))
            known = np.isfinite(store.read(names[1], few)).all(axis=1)
        n_atoms = store.index.n_atoms[here]
        has &= np.logical_and.reduceat(known, np.cumsum(n_atoms) - n_atoms)
        found += int((has & chosen[here]).sum())
    return found


def _from(store: Store, copy: GroupCopy) -> GroupCopy:
    """A copy that reads the files held open, not whatever is at their address by then."""
    # An open store's files do as well as its place, where all is done in this process.
    sources = tuple(replace(source, store=store.files) for source in copy.sources)
    return replace(copy, sources=sources)
