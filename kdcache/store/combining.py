"""Plans of new stores: some structures of a store, or the structures of several.

Reads indexes and manifests, no features; `rewrite` carries a plan out. Invariant: a plan keeps
every structure with its labels, teachers and licences, or says which it leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cluster import Cluster
from kdcache.errors import StoreError
from kdcache.fields import GRAPH_FIELDS, OPTIONAL_FIELDS, STRUCTURE_FIELDS, FieldSpec
from kdcache.progress import Progress, silent
from kdcache.store.copy_shards import UNSAID, GroupCopy, GroupSource
from kdcache.store.index import StoreIndex, index_from_plan
from kdcache.store.layout import BlockPlan, plan_blocks
from kdcache.store.picking import Pick, dataset_places, gathered, pick_rows, riffle
from kdcache.store.provenance import (
    check_wanted,
    common_teachers,
    kept_fields,
    refuse_parts,
    rounded_again,
    united_dataset,
    united_graph,
    united_teacher,
)
from kdcache.store.reader import Store
from kdcache.store.rewrite import Rewrite, TeacherCopy
from kdcache.store.scan import labelled, location
from kdcache.structures import IntArray

HashKeys = npt.NDArray[np.uint64]


def plan_subset(
    store: Store,
    rows: IntArray,
    description: str,
    cluster: Cluster,
    *,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    atom_capacity: int | None = None,
    blocks_per_shard: int | None = None,
    progress: Progress = silent,
) -> Rewrite:
    """A store of some structures of another, in its order: a random order stays one.

    Its dataset holds them in the order of the other's dataset.

    Args:
        store: to take from.
        rows: of its index, ascending.
        description: what the rows have in common, for the manifest.
        cluster: reads labels, where some structures have none.
        teachers: kept; None for all.
        fields: of the teachers that are kept; None for all.
        atom_capacity, blocks_per_shard: None for those of `store`.
        progress: shows labels read.

    Raises:
        StoreError: no such teacher or field; a shard is damaged; or `store` was passed on without
            its structures.
    """
    refuse_parts([store], "a store of some of its rows")
    return _assemble(
        [store],
        pick_rows(rows),
        subset_note(store, rows, description),
        cluster,
        teachers=teachers,
        fields=fields,
        atom_capacity=atom_capacity or store.plan.atom_capacity,
        blocks_per_shard=blocks_per_shard or store.plan.blocks_per_shard,
        progress=progress,
    )


def subset_note(store: Store, rows: IntArray, description: str) -> str:
    """What the manifest of a subset says of where its rows are from; arguments of `plan_subset`."""
    return (
        f"subset of {store.manifest.root_digest}: {len(rows)} of {len(store)} structures "
        f"({description})"
    )


def plan_merge(
    stores: Sequence[Store],
    cluster: Cluster,
    *,
    seed: int = 0,
    skip_repeated: bool = False,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    atom_capacity: int | None = None,
    blocks_per_shard: int | None = None,
    progress: Progress = silent,
) -> Rewrite:
    """A store of the structures of several, in one random order (`picking.riffle`).

    Its dataset is that of the first store, then that of the second, and so on. Ground truth that a
    store was published without counts as "no label" there; any other field of the structures that
    one of them lacks is left out.

    Args:
        stores: two or more.
        cluster: reads labels, where some structures have none.
        seed: of the order.
        skip_repeated: of structures with equal contents in several stores, keep the first store's.
        teachers: kept; None for all, which all stores must have.
        fields: of the teachers that are kept; None for all.
        atom_capacity, blocks_per_shard: None chooses, as for an import.
        progress: shows labels read.

    Raises:
        StoreError: a structure occurs twice, a name means two teachers, a store lacks one, or was
            passed on without its structures.
    """
    check_several(stores)
    refuse_parts(stores, "a merge")
    rows = [np.arange(len(store)) for store in stores]
    repeated = _repeated(stores)
    notes = []
    if any(map(len, repeated)):
        if not skip_repeated:
            raise StoreError(_first_repeated(stores, repeated))
        rows = [np.setdiff1d(mine, twice) for mine, twice in zip(rows, repeated, strict=True)]
        notes.append(
            f"{sum(map(len, repeated))} structures of later stores repeat an earlier one's, to the "
            f"last bit, and are skipped"
        )
    _refuse_equal_ids(stores, rows)
    roots = ", ".join(store.manifest.root_digest for store in stores)
    return _assemble(
        stores,
        riffle(rows, seed),
        "; ".join([f"merge of {roots}, riffled with seed {seed}", *notes]),
        cluster,
        teachers=teachers,
        fields=fields,
        atom_capacity=atom_capacity,
        blocks_per_shard=blocks_per_shard,
        progress=progress,
        notes=tuple(notes),
    )


def _assemble(
    stores: Sequence[Store],
    pick: Pick,
    note: str,
    cluster: Cluster,
    *,
    teachers: Sequence[str] | None,
    fields: Sequence[str] | None,
    atom_capacity: int | None,
    blocks_per_shard: int | None,
    progress: Progress,
    notes: tuple[str, ...] = (),
) -> Rewrite:
    names = common_teachers(stores, teachers)
    check_wanted(stores, fields)
    graph, why = united_graph(stores)
    copies = {}
    rounded: list[str] = []
    for name in names:
        entry = united_teacher(stores, name)
        check_edge_fields(stores[0], name, graph is not None, fields)
        copies[name] = replace(teacher_copy(stores, name, pick, fields), entry=entry)
        rounded += rounded_again(name, copies[name].copy.fields)
    n_edges = _counts(stores, pick, "structures") if graph is not None else None
    plan = plan_blocks(
        gathered(pick, [store.index.n_atoms for store in stores]),
        n_edges,
        atom_capacity=atom_capacity,
        blocks_per_shard=blocks_per_shard,
    )
    index = _index(stores, pick, plan)
    has_labels = gathered(pick, [labelled(store, cluster, progress) for store in stores])
    structures = structures_copy(stores, pick, graph is not None)
    kept = {spec.name for spec in structures.fields}
    left_out = [
        f"{name} is left out: not every store holds it"
        for name in dict.fromkeys(name for store in stores for name in store.fields("structures"))
        if name not in kept and name not in [spec.name for spec in GRAPH_FIELDS]
    ]
    said = (*notes, *([why] if why else []), *left_out)
    told = "; ".join([note, *said])
    return Rewrite(
        index=index,
        plan=plan,
        dataset=united_dataset(stores, index, int(has_labels.sum()), told),
        graph=graph,
        # No permutation that could be drawn again from a seed alone: the index has it.
        seed=None,
        structures=structures,
        teachers=copies,
        notes=(*said, *rounded),
    )


def _counts(stores: Sequence[Store], pick: Pick, group: str) -> IntArray:
    return gathered(pick, [store.plans[group].n_edges for store in stores])


def _index(stores: Sequence[Store], pick: Pick, plan: BlockPlan) -> StoreIndex:
    def column(name: str) -> npt.NDArray[Any]:
        return gathered(pick, [getattr(store.index, name) for store in stores])

    return index_from_plan(
        plan,
        structure_id=column("structure_id"),
        content_hash=column("content_hash"),
        source_index=dataset_places(pick, [store.index.source_index for store in stores]),
        origin=column("origin"),
        split=column("split"),
        group=column("group"),
        weight=column("weight"),
    )


def structures_copy(stores: Sequence[Store], pick: Pick, with_graph: bool) -> GroupCopy:
    """Ground truth of the picked structures: what all stores hold, or some and others need not."""
    held = [store.fields("structures") for store in stores]
    fields: list[FieldSpec] = [
        spec
        for spec in (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS)
        if all(spec.name in known for known in held)
        or (spec.name in UNSAID and any(spec.name in known for known in held))
    ]
    if with_graph:
        fields += GRAPH_FIELDS
    sources = tuple(GroupSource(location(store), "structures", {}) for store in stores)
    return GroupCopy(tuple(fields), sources, pick)


def teacher_copy(
    stores: Sequence[Store], name: str, pick: Pick, wanted: Sequence[str] | None
) -> TeacherCopy:
    """A teacher of all these stores, of which some fields are kept; None for all.

    Raises:
        StoreError: it has none of those wanted.
    """
    group = f"teachers/{name}"
    fields = kept_fields(stores[0], name, wanted)
    own = stores[0].teachers[name].has_own_edges and set(GRAPH_FIELDS) <= set(fields)
    sources = tuple(
        GroupSource(location(store), group, store.teachers[name].errors) for store in stores
    )
    n_edges = _counts(stores, pick, group) if own else None
    return TeacherCopy(stores[0].teachers[name], GroupCopy(fields, sources, pick), n_edges)


def check_edge_fields(
    store: Store, teacher: str, has_graph: bool, wanted: Sequence[str] | None
) -> None:
    """Edge features without a list of their own need the store's."""
    if has_graph or store.teachers[teacher].has_own_edges:
        return
    edges = [spec.name for spec in kept_fields(store, teacher, wanted) if spec.level == "edge"]
    if edges:
        raise StoreError(
            f"{edges[0]} of teacher {teacher!r} has a row for every edge of {store.path}'s "
            f"neighbour list, which the new store does not hold: the stores' graph rules differ. "
            f"Keep other fields (--fields)."
        )


def check_several(stores: Sequence[Store]) -> None:
    """Two stores or more, none of them twice.

    Raises:
        StoreError: fewer, or one is.
    """
    if len(stores) < 2:
        raise StoreError(f"{len(stores)} store is given, and a merge takes at least two.")
    places = [str(location(store)) for store in stores]
    for place in places:
        if places.count(place) > 1:
            raise StoreError(f"{place} is named twice. Name each store once.")


def hash_keys(store: Store) -> HashKeys:
    """[n_structures, 2] content hashes as numbers, to be sorted."""
    return np.ascontiguousarray(store.index.content_hash).view("<u8")


def _repeated(stores: Sequence[Store]) -> list[IntArray]:
    """Rows of each store whose contents an earlier store holds, too."""
    keys = np.concatenate([hash_keys(store) for store in stores])
    source = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
    row = np.concatenate([np.arange(len(store)) for store in stores])
    order = np.lexsort((row, source, keys[:, 1], keys[:, 0]))
    keys, source, row = keys[order], source[order], row[order]
    begins = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    earliest = source[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    twice = source > earliest
    return [np.sort(row[twice & (source == number)]) for number in range(len(stores))]


def _first_repeated(stores: Sequence[Store], repeated: Sequence[IntArray]) -> str:
    number = next(k for k, rows in enumerate(repeated) if len(rows))
    store, row = stores[number], int(repeated[number][0])
    content = store.index.content_hash[row]
    for other in stores[:number]:
        found = np.flatnonzero((other.index.content_hash == content).all(axis=1))
        if len(found):
            break
    return (
        f"{store.path} and {other.path} both hold structure {store.index.structure_id[row]!r} (in "
        f"the latter {other.index.structure_id[int(found[0])]!r}), the first of "
        f"{sum(map(len, repeated))} with equal contents. It would count twice. Keep the first of "
        f"each (--skip-repeated); for stores of one dataset, unite their teachers "
        f"(--same-structures)."
    )


def _refuse_equal_ids(stores: Sequence[Store], rows: Sequence[IntArray]) -> None:
    seen: dict[str, int] = {}
    for number, (store, mine) in enumerate(zip(stores, rows, strict=True)):
        for structure_id in store.index.structure_id[mine]:
            before = seen.setdefault(structure_id, number)
            if before != number:
                raise StoreError(
                    f"{stores[before].path} and {store.path} call different structures "
                    f"{structure_id!r}. An id is unique in a store. Import one of them again with "
                    f"other ids (--id-key)."
                )
