"""What the manifest of a store says that was made of others: sources, licences, teachers, graph.

Reads manifests, no arrays. Invariant: no licence, source or origin of what is kept is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kdcache.errors import StoreError, did_you_mean
from kdcache.fields import GRAPH_FIELDS, N_EDGES, FieldSpec
from kdcache.store.entries import DatasetEntry, GraphEntry, Licences, TeacherEntry
from kdcache.store.index import StoreIndex
from kdcache.store.reader import Store

UNKNOWN = "unknown"


def refuse_parts(stores: Sequence[Store], what: str) -> None:
    """Stores that were passed on without their structures are completed before they are rewritten.

    Args:
        stores: whose structures are taken.
        what: is made of them.

    Raises:
        StoreError: one of them is not whole: which store its structures complete would be lost.
    """
    for store in stores:
        part = store.manifest.withheld
        if part is not None:
            raise StoreError(
                f"{store.path} was passed on without its structures, and they fit the whole of it "
                f"alone, {part.root_digest[:12]}…: {what} could never be completed. Put them back "
                f"first: `kdcache join {store.path} DATA -o FULL`."
            )


def united(texts: Iterable[str], separator: str = "; ") -> str:
    """Each text once; where some are empty and some are not, what is empty is unknown.

    Example:
        >>> united(["CC-BY-4.0", "", "CC-BY-4.0", "MIT"]), united(["", ""])
        ('CC-BY-4.0; unknown; MIT', '')
    """
    found = list(dict.fromkeys(texts))
    return separator.join(text or UNKNOWN for text in found) if any(found) else ""


def united_dataset(
    stores: Sequence[Store], index: StoreIndex, n_labelled: int, note: str
) -> DatasetEntry:
    """The dataset of a store whose structures are from these stores.

    Args:
        stores: in the order of the new dataset.
        index: of the new store.
        n_labelled: of its structures.
        note: what was done; notes of the stores follow it, each under its store's root digest.
    """
    entries = [store.manifest.dataset for store in stores]
    roots = [store.manifest.root_digest for store in stores]
    old = [
        f"{root[:12]}…: {text}"
        for root, entry in zip(roots, entries, strict=True)
        for text in entry.notes
    ]
    return DatasetEntry(
        digest=index.dataset_digest(),
        n_structures=len(index),
        n_labelled=n_labelled,
        sources=list(dict.fromkeys(name for entry in entries for name in entry.sources)),
        keys=_united_values([entry.keys for entry in entries]),
        units=_united_values([entry.units for entry in entries]),
        notes=[note, *old],
        licences=Licences(
            structures=united(entry.licences.structures for entry in entries),
            labels=united(entry.licences.labels for entry in entries),
        ),
        creator=united(entry.creator for entry in entries),
        citation=united(entry.citation for entry in entries),
    )


def united_graph(stores: Sequence[Store]) -> tuple[GraphEntry | None, str]:
    """The graph rule that all stores keep, and why there is none where some keep one."""
    graphs = [store.graph for store in stores]
    kept = [graph for graph in graphs if graph is not None]
    if not kept:
        return None, ""
    if len(kept) < len(graphs) or any(graph != kept[0] for graph in kept):
        rules = ", ".join(f"{store.path.name}: {_rule(store.graph)}" for store in stores)
        return None, f"neighbour lists are left out: the stores' rules differ ({rules})"
    truncated = [graph.truncated for graph in kept]
    known = False if all(value is False for value in truncated) else None
    return kept[0].model_copy(update={"truncated": True if True in truncated else known}), ""


def common_teachers(stores: Sequence[Store], wanted: Sequence[str] | None) -> list[str]:
    """Names of the teachers that are kept: those wanted, or all; in every store.

    Raises:
        StoreError: a store lacks one.
    """
    names = list(dict.fromkeys(name for store in stores for name in store.teachers))
    for name in names if wanted is None else wanted:
        if name not in names:
            hold = "holds" if len(stores) == 1 else "hold"
            raise StoreError(
                f"{' and '.join(str(s.path) for s in stores)} {hold} no teacher {name!r}: "
                f"{did_you_mean(name, names)}"
            )
        lacking = next((store for store in stores if name not in store.teachers), None)
        if lacking is not None:
            common = [n for n in names if all(n in store.teachers for store in stores)]
            raise StoreError(
                f"{lacking.path} has no teacher {name!r}, another store has. Some rows would have "
                f"no features. Name those all stores have (--teachers "
                f"{','.join(common) or repr('')}), or dump it for {lacking.path} first."
            )
    return names if wanted is None else list(dict.fromkeys(wanted))


def united_teacher(stores: Sequence[Store], name: str) -> TeacherEntry:
    """The record of a teacher that all stores hold, after it is known to be one.

    Raises:
        StoreError: the stores mean different models by the name, or keep other fields of it.
    """
    first, entries = stores[0], [store.teachers[name] for store in stores]
    for store, entry in zip(stores[1:], entries[1:], strict=True):
        for what in ("digest", "references", "graph"):
            ours, theirs = getattr(entries[0], what), getattr(entry, what)
            if ours != theirs:
                raise StoreError(
                    f"Teacher {name!r} has {what} {_short(ours)} in {first.path}, {_short(theirs)} "
                    f"in {store.path}: they are not one model. Features of both would be mixed. "
                    f"Leave it out (--teachers), or dump one of them again."
                )
        for field in sorted(entries[0].fields.keys() | entry.fields.keys()):
            ours, theirs = entries[0].fields.get(field), entry.fields.get(field)
            if ours != theirs:
                differ = "is missing from one of them"
                if ours is not None and theirs is not None:
                    key = next(k for k in type(ours).model_fields if _differ(ours, theirs, k))
                    differ = f"has {key} {getattr(ours, key)} and {getattr(theirs, key)}"
                raise StoreError(
                    f"Field {field} of teacher {name!r} {differ} in {first.path} and "
                    f"{store.path}. One array cannot hold both. Make them alike (kdcache convert "
                    f"--codec {field}=…), or keep other fields (--fields)."
                )
    update = {
        "licence": united(entry.licence for entry in entries),
        "precision": united((entry.precision for entry in entries), ", "),
        "software": _united_values([entry.software for entry in entries]),
    }
    return entries[0].model_copy(update=update)


def kept_fields(store: Store, teacher: str, wanted: Sequence[str] | None) -> tuple[FieldSpec, ...]:
    """Fields of a teacher that are written anew, without the counts a writer adds itself.

    Edges of its own come with the fields that belong to them.

    Raises:
        StoreError: it has none of those wanted.
    """
    fields = [
        spec
        for name, spec in store.fields(f"teachers/{teacher}").items()
        if name != N_EDGES.name and (wanted is None or name in wanted)
    ]
    own = store.teachers[teacher].has_own_edges
    if own and any(spec.level == "edge" and spec not in GRAPH_FIELDS for spec in fields):
        fields += [spec for spec in GRAPH_FIELDS if spec not in fields]
    elif own and wanted is not None:
        fields = [spec for spec in fields if spec not in GRAPH_FIELDS]
    if not fields:
        raise StoreError(
            f"Teacher {teacher!r} of {store.path} has none of the fields "
            f"{', '.join(wanted or ())}: it keeps "
            f"{', '.join(store.fields(f'teachers/{teacher}'))}. Leave the teacher out (--teachers)."
        )
    return tuple(fields)


def rounded_again(teacher: str, fields: Sequence[FieldSpec]) -> list[str]:
    """What to say of fields whose values change when their rows move to other blocks."""
    names = [spec.name for spec in fields if spec.codec == "compact"]
    if not names:
        return []
    return [
        f"{', '.join(names)} of teacher {teacher!r}: rounded once more, as scales of compact "
        f"fields belong to blocks, and these change; the recorded error says how much"
    ]


def check_wanted(stores: Sequence[Store], wanted: Sequence[str] | None) -> None:
    """Every wanted field is one of some teacher's.

    Raises:
        StoreError: with the nearest name.
    """
    known = {name for store in stores for entry in store.teachers.values() for name in entry.fields}
    for name in wanted or ():
        if name not in known:
            raise StoreError(
                f"No teacher of {' and '.join(str(store.path) for store in stores)} has a field "
                f"{name!r}: {did_you_mean(name, known)}"
            )


def _united_values(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return {
        key: united((table[key] for table in tables if key in table), ", ")[:1000] for key in keys
    }


def _rule(graph: GraphEntry | None) -> str:
    if graph is None:
        return "none"
    text = f"{graph.cutoff:g} Å"
    if graph.max_neighbors is not None:
        text += f" and {graph.max_neighbors} neighbours"
    return text + (", symmetric" if graph.symmetric else "")


def _short(value: object) -> str:
    if isinstance(value, GraphEntry) or value is None:
        return _rule(value)
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _differ(a: object, b: object, key: str) -> bool:
    return bool(getattr(a, key) != getattr(b, key))
