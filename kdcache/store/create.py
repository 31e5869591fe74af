"""Begin a store, or a teacher of one, or go on with what was interrupted.

Owns what is refused before a byte is written; the writing is the writer's. Invariant: nothing that
is there is overwritten, and nothing is gone on with under another identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.fields import GRAPH_FIELDS, N_EDGES, FieldSpec
from kdcache.store.codecs import OnNonfinite, OnOverflow
from kdcache.store.contents import plan_of
from kdcache.store.entries import (
    Capacities,
    DatasetEntry,
    FieldEntry,
    GraphEntry,
    OrderEntry,
    RuleLike,
    TeacherEntry,
    check_name,
)
from kdcache.store.index import StoreIndex, check_places, read_index
from kdcache.store.layout import BlockPlan, with_edges
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST, PLAIN_FORMAT_VERSION, Manifest, read_manifest
from kdcache.store.work import WORK, StoreLock
from kdcache.store.writer import GroupWriter


def create_store(
    path: str | Path,
    *,
    index: StoreIndex,
    plan: BlockPlan,
    fields: Sequence[FieldSpec],
    dataset: DatasetEntry,
    graph: RuleLike | None = None,
    seed: int | None = None,
    lock: StoreLock | None = None,
) -> GroupWriter:
    """A writer of a new store's structures, or of one that an interrupted writer began.

    Args:
        path: of the store; missing, empty, or an unfinished store of the same identity.
        index: a row per structure, in store order.
        plan: its layout.
        fields: of group "structures", codec "exact".
        dataset: where the structures come from.
        graph: rule of the neighbour list among `fields`, if there is one.
        seed: the permutation from dataset order to store order was drawn from.
        lock: held by the caller, if it holds one.

    Raises:
        StoreError: something else is at `path`, a finished store among others; the index does not
            fit the plan; or the unfinished store was begun with another layout.
        IdentityError: the unfinished store was begun with another dataset.
    """
    path = local_path(path, "a store")
    _refuse_foreign(path)
    check_places(index, plan, "the index to be written")
    digest = index.dataset_digest()
    if dataset.digest != digest or dataset.n_structures != len(index):
        raise StoreError(
            f"The dataset entry is of {dataset.n_structures} structures, {dataset.digest[:12]}…, "
            f"the index holds {len(index)}, {digest[:12]}…. They are not of one dataset."
        )
    for spec in fields:
        if spec.codec != "exact":
            raise StoreError(
                f"Ground truth is kept exactly; field {spec.name} asks for codec {spec.codec!r}."
            )
    entry = None
    if graph is not None:
        entry = graph if isinstance(graph, GraphEntry) else GraphEntry.describe(graph)
    manifest = Manifest(
        format_version=PLAIN_FORMAT_VERSION,
        capacities=Capacities(
            n_blocks=plan.n_blocks,
            blocks_per_shard=plan.blocks_per_shard,
            structure=plan.structure_capacity,
            atom=plan.atom_capacity,
            edge=plan.edge_capacity,
        ),
        dataset=dataset,
        order=OrderEntry(seed=seed),
        graph=entry,
        n_atoms=int(plan.n_atoms.sum()),
        n_edges=int(plan.n_edges.sum()),
        structures={spec.name: FieldEntry.describe(spec) for spec in fields},
        teachers={},
        digests={},
        root_digest="0" * 64,
        created="",
    )
    return GroupWriter(
        path, "structures", plan, index, fields, manifest, None, "stop", "stop", lock
    )


def add_teacher(
    path: str | Path,
    name: str,
    entry: TeacherEntry,
    fields: Sequence[FieldSpec],
    *,
    n_edges: npt.ArrayLike | None = None,
    on_overflow: OnOverflow = "stop",
    on_nonfinite: OnNonfinite = "stop",
    lock: StoreLock | None = None,
    shared: bool = False,
) -> GroupWriter:
    """A writer of one more teacher's fields, or of those an interrupted writer began.

    Args:
        path: of a finished store.
        name: of the teacher within it.
        entry: where the features come from; its `fields` and `errors` are filled here.
        fields: what is stored; with `n_edges`, edge_index and edge_shift among it.
        n_edges: [n_structures] the teacher's own edges, that rows of level edge belong to; None
            where they belong to the store's graph.
        on_overflow: values beyond float16, codec "half": "stop", or "clip" to ±65504.
        on_nonfinite: NaN and infinities: "stop", or "zero".
        lock: held by the caller, if it holds one.
        shared: one of several writers of this teacher, each in a process of its own.

    Raises:
        StoreError: no finished store, a teacher of this name is there, the unfinished one was begun
            with other fields, or edges that do not go with the fields.
        IdentityError: the unfinished teacher of this name is another one.
    """
    path = local_path(path, "a teacher")
    group = f"teachers/{check_name(name, 'teacher')}"
    if not (path / MANIFEST).is_file():
        raise StoreError(
            f"{path} is no finished store, so no teacher can be added. Import the dataset first."
        )
    manifest = read_manifest(path)
    manifest.refuse_withheld(f"a teacher {name!r}")
    index = read_index(path, manifest.dataset.n_structures)
    plan = plan_of(manifest, index, str(path))
    _check_edge_fields(fields, own=n_edges is not None)
    own = () if n_edges is None else (N_EDGES,)
    described = {spec.name: FieldEntry.describe(spec) for spec in (*fields, *own)}
    entry = entry.model_copy(update={"fields": described, "errors": {}, "n_failed": 0})
    if n_edges is not None:
        plan = with_edges(plan, n_edges)
    return GroupWriter(
        path, group, plan, index, fields, manifest, entry, on_overflow, on_nonfinite, lock, shared
    )


def _check_edge_fields(fields: Sequence[FieldSpec], *, own: bool) -> None:
    if any(spec.name == N_EDGES.name for spec in fields):
        raise StoreError(f"{N_EDGES.name} is written by the store itself. Leave it out of fields.")
    if own and not set(GRAPH_FIELDS) <= set(fields):
        raise StoreError(
            f"Edges of a teacher's own need {GRAPH_FIELDS[0].name} and {GRAPH_FIELDS[1].name} "
            f"(exact) among {[spec.name for spec in fields]}: rows would have no atoms to "
            f"belong to."
        )


def _refuse_foreign(path: Path) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreError(f"{path} is a file. A store is a directory: choose another path.")
    if (path / MANIFEST).is_file() or (path / WORK).is_dir():
        return
    found = sorted(entry.name for entry in path.iterdir())
    if found:
        raise StoreError(
            f"{path} exists and is no kdcache store (it holds {', '.join(found[:3])}). Nothing is "
            f"overwritten: choose another path."
        )
