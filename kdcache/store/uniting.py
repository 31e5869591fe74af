"""The plan of a store of one dataset with the teachers of several stores of it.

Reads indexes and manifests, no features; `rewrite` carries the plan out. Invariant: a teacher's
rows go to the structures they were computed for, whatever the order of its store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdcache.errors import IdentityError, StoreError
from kdcache.store.combining import (
    check_edge_fields,
    check_several,
    hash_keys,
    structures_copy,
    teacher_copy,
)
from kdcache.store.entries import TeacherEntry, check_name
from kdcache.store.picking import Pick, pick_rows
from kdcache.store.provenance import check_wanted, common_teachers, refuse_parts, rounded_again
from kdcache.store.reader import Store
from kdcache.store.rewrite import Rewrite, TeacherCopy
from kdcache.structures import IntArray


def plan_union(
    stores: Sequence[Store],
    *,
    rename: Mapping[tuple[int, str], str] | None = None,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
) -> Rewrite:
    """A store of one dataset with the teachers of several stores of it.

    Order, layout, ground truth and neighbour lists are those of the first. The others may be in
    another order: then each shard is gathered from all over the store, which reads it again and
    again unless it is in memory.

    Args:
        stores: two or more, of equal structures in any order.
        rename: new names of teachers, by store and name.
        teachers: kept, by their new names; None for all.
        fields: of the teachers that are kept; None for all.

    Raises:
        IdentityError: a structure of one store is not in another.
        StoreError: two teachers of one name; edge features whose neighbour list is not the first
            store's; the first store was passed on without its structures.
    """
    check_several(stores)
    # The others give features alone, which are matched by contents: they may lack structures.
    refuse_parts(stores[:1], "a merge that has the structures of the store named first")
    check_wanted(stores, fields)
    first, whole = stores[0], np.arange(len(stores[0]))
    copies: dict[str, TeacherCopy] = {}
    owner: dict[str, int] = {}
    notes = []
    rename = dict(rename or {})
    for number, store in enumerate(stores):
        pick = pick_rows(whole if number == 0 else _same_rows(first, store))
        for old, entry in store.teachers.items():
            name = rename.pop((number, old), old)
            check_name(name, "teacher")
            if teachers is not None and name not in teachers:
                continue
            if name in copies:
                said = stores[owner[name]].teachers.get(name)
                if said is not None and _equal(said, entry):
                    notes.append(f"teacher {name!r} of {store.path} is there already")
                    continue
                raise StoreError(
                    f"{stores[owner[name]].path} and {store.path} both have a teacher {name!r}. "
                    f"One name means one teacher: rename one (--rename {number + 1}:{old}=NEW), or "
                    f"name others (--teachers)."
                )
            check_edge_fields(store, old, first.graph == store.graph, fields)
            copies[name] = teacher_copy([store], old, pick, fields)
            owner[name] = number
            if not _in_same_places(first, store, pick):
                notes += rounded_again(name, copies[name].copy.fields)
    for number, old in rename:
        raise StoreError(f"{stores[number].path} has no teacher {old!r} to be renamed.")
    for name in teachers or ():
        if name not in copies:
            common_teachers(stores, [name])  # says what is known
            raise StoreError(f"No teacher is called {name!r} once some are renamed.")
    roots = ", ".join(store.manifest.root_digest for store in stores[1:])
    dataset = first.manifest.dataset
    note = f"with teachers of {roots}, of the same structures"
    return Rewrite(
        index=first.index,
        plan=first.plan,
        dataset=dataset.model_copy(update={"notes": [*dataset.notes, note]}),
        graph=first.graph,
        seed=first.manifest.order.seed,
        structures=structures_copy([first], pick_rows(whole), first.graph is not None),
        teachers=copies,
        notes=tuple(notes),
    )


def _equal(a: TeacherEntry, b: TeacherEntry) -> bool:
    return a.digest == b.digest and a.fields == b.fields


def _in_same_places(first: Store, other: Store, pick: Pick) -> bool:
    """Blocks of `other` hold the same rows as those of `first`."""
    in_order = np.array_equal(pick.row, np.arange(len(first)))
    return in_order and np.array_equal(first.plan.block, other.plan.block)


def _same_rows(first: Store, other: Store) -> IntArray:
    """Rows of `other` that hold the structures of `first`, in the order of `first`."""
    a, b = first.index, other.index
    if a.dataset_digest() == b.dataset_digest():
        return b.source_order[a.source_index]
    keys = [hash_keys(first), hash_keys(other)]
    # Repeated contents are paired in dataset order; to a teacher they are one structure.
    orders = [
        np.lexsort((index.source_index, key[:, 1], key[:, 0]))
        for index, key in zip((a, b), keys, strict=True)
    ]
    if len(a) != len(b) or (keys[0][orders[0]] != keys[1][orders[1]]).any():
        theirs = {row.tobytes() for row in b.content_hash}
        lacking = [row for row, own in enumerate(a.content_hash) if own.tobytes() not in theirs]
        said = (
            f"e.g. {a.structure_id[lacking[0]]!r} is not in the latter"
            if lacking
            else (f"{len(a)} structures against {len(b)}")
        )
        raise IdentityError(
            f"{first.path} and {other.path} do not hold the same structures: {said}. Teacher rows "
            f"would have no structures. For different structures, leave out --same-structures."
        )
    rows = np.empty(len(a), np.int64)
    rows[orders[0]] = orders[1]
    return rows
