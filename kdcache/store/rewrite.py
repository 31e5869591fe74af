"""Write rows of stores as a new store, shard by shard, here or by many processes.

What goes where is `picking`'s, what a shard's bytes are `shard_writer`'s. Invariant: the new store
appears under its name only when it is whole, holds the same bytes however many processes wrote it,
and no process holds more than a shard of it and a few blocks of a source.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kdcache.cluster import Cluster
from kdcache.errors import IdentityError, StoreError
from kdcache.fields import N_EDGES
from kdcache.progress import Progress, silent
from kdcache.store.codecs import OnOverflow
from kdcache.store.copy_shards import CopyShards, GroupCopy
from kdcache.store.create import add_teacher, create_store
from kdcache.store.entries import DatasetEntry, FieldEntry, GraphEntry, TeacherEntry
from kdcache.store.files import disk_size
from kdcache.store.index import StoreIndex
from kdcache.store.layout import BlockPlan
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST, Manifest, read_manifest
from kdcache.store.reader import open_store
from kdcache.store.shards import sync_directory
from kdcache.store.work import WorkFolder, unfinished_groups
from kdcache.store.writer import GroupWriter
from kdcache.structures import IntArray

Array = npt.NDArray[Any]

UNFINISHED_SUFFIX = ".unfinished"


@dataclass(frozen=True, eq=False)
class TeacherCopy:
    """A teacher of a new store.

    Attributes:
        entry: what the manifest says of it; its errors are filled when it is written.
        copy: where its rows come from.
        n_edges: [n_structures] edges of its own, None where it has none.
    """

    entry: TeacherEntry
    copy: GroupCopy
    n_edges: IntArray | None


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A new store that is made of rows of others.

    Attributes:
        index, plan, dataset, graph, seed: as for `create_store`.
        structures: where the ground truth comes from.
        teachers: by name.
        on_overflow: values beyond float16 where a field becomes "half".
        notes: what a user should know, a line each.
    """

    index: StoreIndex
    plan: BlockPlan
    dataset: DatasetEntry
    graph: GraphEntry | None
    seed: int | None
    structures: GroupCopy
    teachers: Mapping[str, TeacherCopy]
    on_overflow: OnOverflow = "stop"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What was written.

    Attributes:
        manifest: of the new store.
        n_bytes: on disk.
        seconds: wall time of this call.
        notes: what a user should know, a line each.
    """

    manifest: Manifest
    n_bytes: int
    seconds: float
    notes: tuple[str, ...]


def write_rewrite(
    target: str | Path, rewrite: Rewrite, cluster: Cluster, progress: Progress = silent
) -> RewriteReport:
    """Write a new store, or go on with one that was interrupted.

    Until it is whole it lies beside the target, under the name TARGET.unfinished. The error
    recorded for a field is the root of the summed squares of the one its sources recorded, weighed
    by their values, and of what storing it again changed: as for independent changes. Counts of
    replaced values are those of the sources, whose places are not known, and the new ones.

    Args:
        target: of the new store; nothing may be there.
        rewrite: what it holds.
        cluster: who writes the shards.
        progress: shows structures, group by group.

    Raises:
        StoreError: something is at `target`; a source is damaged; or the unfinished store was
            begun with other fields or another layout.
        IdentityError: the unfinished store holds other structures or teachers.
        TeacherError: a value that the new codec cannot hold, naming the structure.
    """
    started = time.perf_counter()
    target = refuse_existing(target)
    path = target.with_name(target.name + UNFINISHED_SUFFIX)
    _check_teachers(path, rewrite)
    if not _has(path, "structures"):
        writer = create_store(
            path,
            index=rewrite.index,
            plan=rewrite.plan,
            fields=rewrite.structures.fields,
            dataset=rewrite.dataset,
            graph=rewrite.graph,
            seed=rewrite.seed,
        )
        _write_group(writer, rewrite.structures, cluster, progress)
    _check_structures(path, rewrite)
    for name, teacher in rewrite.teachers.items():
        if not _has(path, f"teachers/{name}"):
            writer = add_teacher(
                path,
                name,
                teacher.entry,
                teacher.copy.fields,
                n_edges=teacher.n_edges,
                on_overflow=rewrite.on_overflow,
            )
            _write_group(writer, teacher.copy, cluster, progress)
    manifest = read_manifest(path)
    n_bytes = disk_size(path)
    os.rename(path, target)
    sync_directory(target.parent)
    return RewriteReport(manifest, n_bytes, time.perf_counter() - started, rewrite.notes)


def refuse_existing(target: str | Path) -> Path:
    """A path at which a new store may appear.

    Raises:
        StoreError: something is there, or it is the address of a server.
    """
    target = local_path(target, "a new store")
    # A link or a pipe, too: a finished store could not take its name.
    is_free = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    if os.path.lexists(target) and not is_free:
        raise StoreError(f"{target} exists, and nothing is overwritten. Name another path.")
    return target


def _write_group(
    writer: GroupWriter, copy: GroupCopy, cluster: Cluster, progress: Progress
) -> None:
    with writer:
        pending = writer.pending_shards()
        sizes = {shard: _n_structures(writer.plan, shard) for shard in pending}
        work = CopyShards.begin(writer, copy)
        with progress(f"write {writer.group}", sum(sizes.values()), "structures") as advance:
            if pending:
                for shard, record in cluster.run(work, pending):
                    writer.publish(shard, record)
                    advance(sizes[shard])
        writer.commit()


def _n_structures(plan: BlockPlan, shard: int) -> int:
    rows = plan.shard_structures(shard)
    return int(rows.stop - rows.start)


def _has(path: Path, group: str) -> bool:
    """A group that an earlier attempt finished."""
    if not (path / MANIFEST).is_file() or WorkFolder(path, group).begun:
        return False
    return group == "structures" or group.rpartition("/")[2] in read_manifest(path).teachers


def _check_structures(path: Path, rewrite: Rewrite) -> None:
    manifest = read_manifest(path)
    fields = {s.name: FieldEntry.describe(s) for s in rewrite.structures.fields}
    same = (
        manifest.dataset == rewrite.dataset
        and manifest.structures == fields
        and manifest.graph == rewrite.graph
        and manifest.capacities.atom == rewrite.plan.atom_capacity
        and manifest.capacities.blocks_per_shard == rewrite.plan.blocks_per_shard
        and (open_store(path).index.content_hash == rewrite.index.content_hash).all()
    )
    if not same:
        raise IdentityError(_begun_otherwise(path, "other structures, fields or another layout"))


def _check_teachers(path: Path, rewrite: Rewrite) -> None:
    """What an earlier attempt finished or began is wanted still, before anything is added to it."""
    finished = read_manifest(path).teachers if (path / MANIFEST).is_file() else {}
    begun = {group.rpartition("/")[2] for group in unfinished_groups(path)} - {"structures"}
    for name in sorted(begun | finished.keys()):
        wanted = rewrite.teachers.get(name)
        if wanted is None or (name in finished and not _same_teacher(wanted, finished[name])):
            raise IdentityError(_begun_otherwise(path, f"another teacher {name!r} or other fields"))


def _same_teacher(wanted: TeacherCopy, found: TeacherEntry) -> bool:
    own = () if wanted.n_edges is None else (N_EDGES,)
    written = {spec.name: FieldEntry.describe(spec) for spec in (*wanted.copy.fields, *own)}
    return found.digest == wanted.entry.digest and found.fields == written


def _begun_otherwise(path: Path, what: str) -> str:
    return (
        f"{path} was begun with {what}. Shards of both would be mixed. Repeat the command that "
        f"began it, or delete {path} to begin anew."
    )
