"""The plan of a store with the same structures in other codecs or other blocks.

Reads manifests, no features; `rewrite` carries the plan out. Invariant: a field that keeps its
codec keeps its values bit for bit, but for a compact one whose blocks change: its scales belong to
blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import CODECS, GRAPH_FIELDS, Codec, FieldSpec
from kdcache.store.codecs import FLOATS, OnOverflow
from kdcache.store.copy_shards import GroupCopy, GroupSource
from kdcache.store.index import index_from_plan
from kdcache.store.layout import plan_blocks
from kdcache.store.picking import pick_rows
from kdcache.store.provenance import kept_fields, refuse_parts, rounded_again
from kdcache.store.reader import Store
from kdcache.store.rewrite import Rewrite, TeacherCopy
from kdcache.store.scan import location


def plan_conversion(
    store: Store,
    codecs: Mapping[str, Codec] | None = None,
    features: Codec | None = None,
    *,
    atom_capacity: int | None = None,
    blocks_per_shard: int | None = None,
    on_overflow: OnOverflow = "stop",
) -> Rewrite:
    """The same structures and teachers, stored otherwise. Order and dataset stay.

    From exact over half to compact values only lose: "exact" of a half field is float32 of the
    rounded values, and the error recorded for them stays.

    Args:
        store: to convert.
        codecs: by field of any teacher, or by teacher/field.
        features: codec of every other field of floats without a unit.
        atom_capacity, blocks_per_shard: None for those of `store`.
        on_overflow: values beyond float16 where a field becomes "half".

    Raises:
        ConfigError: no such field or codec, a field that only "exact" can hold, or nothing changes.
        StoreError: a layout that does not hold the largest structure; or `store` was passed on
            without its structures.
    """
    refuse_parts([store], "a store of it in other codecs or blocks")
    plan = plan_blocks(
        store.index.n_atoms,
        store.index.n_edges,
        atom_capacity=atom_capacity or store.plan.atom_capacity,
        blocks_per_shard=blocks_per_shard or store.plan.blocks_per_shard,
    )
    codecs = dict(codecs or {})
    _check_codecs(store, codecs)
    whole = pick_rows(np.arange(len(store)))
    teachers, notes = {}, []
    changed = (plan.atom_capacity, plan.blocks_per_shard) != (
        store.plan.atom_capacity,
        store.plan.blocks_per_shard,
    )
    for name, entry in store.teachers.items():
        group = f"teachers/{name}"
        old = kept_fields(store, name, None)
        fields = tuple(_converted(spec, name, codecs, features) for spec in old)
        changed = changed or fields != old
        kept = [after for before, after in zip(old, fields, strict=True) if before == after]
        if not np.array_equal(plan.block, store.plan.block):
            notes += rounded_again(name, kept)
        source = GroupSource(location(store), group, entry.errors)
        own = store.plans[group].n_edges if entry.has_own_edges else None
        teachers[name] = TeacherCopy(entry, GroupCopy(fields, (source,), whole), own)
    if not changed:
        raise ConfigError(
            f"{store.path} is stored like this already. Name another codec (--codec) or layout "
            f"(--block-atoms, --shard-blocks)."
        )
    index = store.index
    dataset = store.manifest.dataset
    note = f"converted from {store.manifest.root_digest}"
    return Rewrite(
        index=index_from_plan(
            plan,
            structure_id=index.structure_id,
            content_hash=index.content_hash,
            source_index=index.source_index,
            origin=index.origin,
            split=index.split,
            group=index.group,
            weight=index.weight,
        ),
        plan=plan,
        dataset=dataset.model_copy(update={"notes": [*dataset.notes, note]}),
        graph=store.graph,
        seed=store.manifest.order.seed,
        structures=GroupCopy(
            tuple(store.fields("structures").values()),
            (GroupSource(location(store), "structures", {}),),
            whole,
        ),
        teachers=teachers,
        on_overflow=on_overflow,
        notes=tuple(notes),
    )


def parse_codecs(texts: Sequence[str]) -> tuple[dict[str, Codec], Codec | None]:
    """Codecs by field, and that of all other features: "node=compact,vector=exact" or "half".

    Raises:
        ConfigError: no codec, or a field twice.

    Example:
        >>> parse_codecs(["node=compact,painn/vector=exact", "half"])
        ({'node': 'compact', 'painn/vector': 'exact'}, 'half')
    """
    found: dict[str, Codec] = {}
    features: Codec | None = None
    for part in ",".join(texts).split(","):
        name, equals, codec = part.strip().rpartition("=")
        known = next((c for c in CODECS if c == codec.strip()), None)
        if known is None:
            raise ConfigError(
                f"--codec {part.strip()}: {codec.strip()!r} is no codec: "
                f"{did_you_mean(codec.strip(), CODECS)}"
            )
        name = name.strip()
        if name in found or (not equals and features is not None):
            raise ConfigError(f"--codec {part.strip()}: {name or 'all'} is named twice. Say one.")
        if equals:
            found[name] = known
        else:
            features = known
    return found, features


def _check_codecs(store: Store, codecs: Mapping[str, Codec]) -> None:
    known = {
        key: spec
        for teacher in store.teachers
        for name, spec in store.fields(f"teachers/{teacher}").items()
        for key in (name, f"{teacher}/{name}")
    }
    for name, codec in codecs.items():
        if name not in known:
            raise ConfigError(
                f"{store.path} has no teacher's field {name!r}: {did_you_mean(name, known)}"
            )
        spec = known[name]
        if codec != "exact" and (spec.dtype not in FLOATS or spec in GRAPH_FIELDS):
            raise ConfigError(
                f"Field {name} is {spec.dtype}, which codec {codec!r} cannot keep: it is for "
                f"floating-point features. Leave it exact."
            )


def _converted(
    spec: FieldSpec, teacher: str, codecs: Mapping[str, Codec], features: Codec | None
) -> FieldSpec:
    chosen = codecs.get(f"{teacher}/{spec.name}", codecs.get(spec.name))
    # As a dump does: quantities with a unit are kept exactly unless they are named.
    if chosen is None and features is not None and spec.dtype in FLOATS and not spec.unit:
        chosen = features
    return spec if chosen is None else replace(spec, codec=chosen)
