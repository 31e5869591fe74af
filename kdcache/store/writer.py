"""Write the shards of one group of a store: its structures, or a teacher.

Owns the order of events; bytes are the business of `shards`, values of `codecs`, the journal of
`work`. Invariant: every shard is written once and whole, and a group exists for readers only when
the manifest lists it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import ShapeError, StoreError, TeacherError
from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from kdcache.store.codecs import (
    FLOATS,
    EncodingError,
    OnNonfinite,
    OnOverflow,
    UnstorableValue,
    channels,
    guard,
    stored_dtype,
    to_compact,
    to_half,
)
from kdcache.store.contents import ZARR, group_plans, node_documents, plan_of, shard_file
from kdcache.store.edges import check_edges
from kdcache.store.index import INDEX, StoreIndex
from kdcache.store.layout import BlockPlan
from kdcache.store.manifest import (
    MANIFEST,
    PLAIN_FORMAT_VERSION,
    FieldEntry,
    FieldError,
    Manifest,
    TeacherEntry,
    read_manifest,
)
from kdcache.store.metadata import (
    SCALE_SUFFIX,
    Json,
    field_documents,
    group_document,
    readable,
    root_document,
)
from kdcache.store.shards import write_file, write_shard_file
from kdcache.store.work import ShardRecord, StoreLock, WorkFolder, remove_partials

Array = npt.NDArray[Any]


class GroupWriter:
    """Writes the shards of one group; made by `create_store` or `add_teacher`.

    A context manager. Leaving it before `commit` keeps what is written, for a later writer of the
    same group to go on from. `write_shard` may be called from several threads, each with a shard of
    its own.

    Attributes:
        path: of the store.
        group: "structures" or "teachers/<name>".
        plan: layout of the group, with a teacher's own edges where it has some.
        fields: of this group, but for the counts of such edges, which the writer adds.
    """

    def __init__(
        self,
        path: Path,
        group: str,
        plan: BlockPlan,
        index: StoreIndex,
        fields: Sequence[FieldSpec],
        manifest: Manifest,
        teacher: TeacherEntry | None,
        on_overflow: OnOverflow,
        on_nonfinite: OnNonfinite,
        lock: StoreLock | None,
    ) -> None:
        self.path = path
        self.group = group
        self.plan = plan
        self.fields = tuple(fields)
        self._index = index
        self._manifest = manifest
        self._teacher = teacher
        self._on_overflow = on_overflow
        self._on_nonfinite = on_nonfinite
        # A caller that did work of its own under .work holds the lock already.
        self._lock = StoreLock(path) if lock is None else None
        self._work = WorkFolder(path, group)
        own_edges = teacher is not None and teacher.has_own_edges
        self._stored = (*self.fields, N_EDGES) if own_edges else self.fields
        self._documents = {
            name: document
            for spec in self._stored
            for name, document in field_documents(spec, plan).items()
        }

    def __enter__(self) -> GroupWriter:
        if self._lock is not None:
            self._lock.__enter__()
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(*raised)

    def pending_shards(self) -> list[int]:
        """Shards that are still to be written, ascending."""
        done = self._work.records(self.plan.n_shards)
        return [shard for shard in range(self.plan.n_shards) if shard not in done]

    def write_shard(self, shard: int, arrays: Mapping[str, Array]) -> None:
        """Encode and write all fields of one shard.

        Args:
            shard: from `pending_shards`.
            arrays: by field name; the rows of the shard's structures concatenated in store order,
                [n_rows, *field shape].

        Raises:
            ShapeError: a field is missing, unknown, or of another shape or dtype.
            StoreError: edges that are none of their structure's atoms, or not in order.
            TeacherError: a value that cannot be stored, naming the structure.
        """
        check_arrays(self.fields, self.plan, shard, arrays)
        if self._stored != self.fields:
            arrays = self._with_counts(shard, arrays)
        record = ShardRecord(sha256={}, size={}, errors={})
        for spec in self._stored:
            error = EncodingError()
            blocks = self._encoded(spec, shard, np.ascontiguousarray(arrays[spec.name]), error)
            if spec.codec == "compact":
                pairs = list(blocks)
                self._write_array(spec, spec.name, shard, (pair[0] for pair in pairs), record)
                scales = (pair[1][None] for pair in pairs)
                self._write_array(spec, spec.name + SCALE_SUFFIX, shard, scales, record)
            else:
                self._write_array(spec, spec.name, shard, (pair[0] for pair in blocks), record)
            record.errors[spec.name] = astuple(error)
        self._work.record(shard, record)

    def commit(self) -> Manifest:
        """Check that every shard is there, write the manifest, remove the traces of writing.

        Raises:
            StoreError: shards are missing.
        """
        records = self._work.records(self.plan.n_shards)
        if len(records) < self.plan.n_shards:
            raise StoreError(
                f"{self.group} of {self.path} has {len(records)} of {self.plan.n_shards} shards. "
                f"Write the others before it is committed."
            )
        digests = {name: _sha256(content) for name, content in self._files().items()}
        for shard in range(self.plan.n_shards):
            digests |= records[shard].sha256
        manifest = self._updated(_summed_errors(self._stored, records), digests)
        write_file(self.path / ZARR, self._root(manifest))
        write_file(self.path / MANIFEST, manifest.to_bytes())
        self._work.finish()
        return manifest

    def _with_counts(self, shard: int, arrays: Mapping[str, Array]) -> dict[str, Array]:
        rows = self.plan.shard_structures(shard)
        check_edges(
            arrays[EDGE_INDEX.name],
            arrays[EDGE_SHIFT.name],
            self.plan.n_atoms[rows],
            self.plan.n_edges[rows],
            f"{self.group}, shard {shard}",
        )
        return {**arrays, N_EDGES.name: self.plan.n_edges[rows]}

    def _begin(self) -> None:
        structures = WorkFolder(self.path, "structures")
        if (self.path / MANIFEST).is_file():
            if self._is_listed() and not self._work.begun:
                raise StoreError(
                    f"{self.path} has its {self.group} already, finished. Nothing is overwritten: "
                    f"choose another "
                    + ("path." if self._teacher is None else "name, or another store.")
                )
            if self._teacher is not None:
                # A kill after the manifest and before cleaning up: the structures are finished.
                structures.discard()
        self._work.begin(self._identity())
        remove_partials(self.path / self.group)
        for name, content in self._files().items():
            write_file(self.path / name, content)

    def _is_listed(self) -> bool:
        if self._teacher is None:
            return True
        return self.group.removeprefix("teachers/") in read_manifest(self.path).teachers

    def _files(self) -> dict[str, bytes]:
        """Everything of this group but shards, the root document and the manifest."""
        nodes = [self.group]
        files = {}
        if self._teacher is None:
            nodes.append("teachers")
            files[INDEX] = self._index.to_bytes()
        files |= {f"{node}/{ZARR}": readable(group_document()) for node in nodes}
        for name, document in self._documents.items():
            files[f"{self.group}/{name}/{ZARR}"] = readable(document)
        return files

    def _identity(self) -> Json:
        manifest = self._manifest
        identity: Json = {
            "format_version": PLAIN_FORMAT_VERSION,
            "fields": {
                s.name: FieldEntry.describe(s).model_dump(mode="json") for s in self._stored
            },
            "layout": manifest.capacities.model_dump(mode="json"),
            "dataset": manifest.dataset.model_dump(mode="json"),
            "index": _sha256(self._index.to_bytes()),
        }
        if self._teacher is None:
            identity["order"] = manifest.order.model_dump(mode="json")
            identity["graph"] = manifest.graph.model_dump(mode="json") if manifest.graph else None
        else:
            identity["teacher"] = self._teacher.model_dump(mode="json", exclude={"fields"})
            identity["on_overflow"] = self._on_overflow
            identity["on_nonfinite"] = self._on_nonfinite
            if self._stored != self.fields:
                identity["edges"] = _sha256(self.plan.n_edges.astype("<i8").tobytes())
        return identity

    def _updated(self, errors: dict[str, FieldError], digests: dict[str, str]) -> Manifest:
        manifest = self._manifest
        if self._teacher is not None:
            # Read again: another teacher may have been added since this one was begun.
            manifest = read_manifest(self.path)
            name = self.group.removeprefix("teachers/")
            entry = self._teacher.model_copy(update={"errors": errors})
            manifest = manifest.with_teacher(name, entry)
        root = {ZARR: _sha256(self._root(manifest))}
        update = {
            "digests": {**manifest.digests, **digests, **root},
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        return manifest.model_copy(update=update).sealed()

    def _root(self, manifest: Manifest) -> bytes:
        plan = plan_of(manifest, self._index, str(self.path))
        nodes = node_documents(manifest, group_plans(self.path, manifest, plan))
        return readable(root_document(plan, manifest.format_version, nodes))

    def _encoded(
        self, spec: FieldSpec, shard: int, values: Array, error: EncodingError
    ) -> Iterator[tuple[Array, Array]]:
        """Stored values and scales (empty but for compact) of each block of a shard."""
        end = 0
        none = np.empty(0, np.float32)
        for used in self.plan.used(spec.level)[self.plan.shard_blocks(shard)]:
            start, end = end, end + int(used)
            block = values[start:end]
            if self._teacher is not None and spec.dtype in FLOATS:
                try:
                    block = guard(block, spec.codec, self._on_overflow, self._on_nonfinite, error)
                except UnstorableValue as unstorable:
                    raise self._refused(spec, shard, start, unstorable) from None
            if spec.codec == "half":
                yield to_half(block, error), none
            elif spec.codec == "compact":
                yield to_compact(block, channels(spec), error)
            else:
                yield block.astype(stored_dtype(spec), copy=False), none

    def _write_array(
        self,
        spec: FieldSpec,
        name: str,
        shard: int,
        blocks: Iterator[Array],
        record: ShardRecord,
    ) -> None:
        relative = shard_file(f"{self.group}/{name}", shard, self._documents[name])
        capacity = 1 if name != spec.name else self.plan.capacity(spec.level)
        written = write_shard_file(
            self.path / relative,
            blocks,
            capacity,
            self.plan.blocks_per_shard,
            spec.codec == "exact",
        )
        record.sha256[relative] = written.sha256
        record.size[relative] = written.size

    def _refused(
        self, spec: FieldSpec, shard: int, start: int, unstorable: UnstorableValue
    ) -> TeacherError:
        structures = self.plan.shard_structures(shard)
        ends = np.cumsum(self.plan.counts(spec.level)[structures])
        row = start + unstorable.row
        place = int(np.searchsorted(ends, row, side="right"))
        structure_id = self._index.structure_id[structures.start + place]
        within = row - (int(ends[place - 1]) if place else 0)
        where = "" if spec.level == "structure" else f" at {spec.level} {within}"
        if unstorable.overflow:
            return TeacherError(
                f"Structure {structure_id!r}: {spec.name}{where} is {unstorable.value:.6g}, beyond "
                f"what codec {spec.codec!r} holds. It would become infinite. Keep the field "
                f"exactly (--codec exact), or cut such values (--on-overflow clip)."
            )
        return TeacherError(
            f"Structure {structure_id!r}: {spec.name}{where} is {unstorable.value}. A student "
            f"trained on it would become NaN. Leave the structure out, or store zeros instead "
            f"(--on-nonfinite zero)."
        )


def check_arrays(
    fields: Sequence[FieldSpec], plan: BlockPlan, shard: int, arrays: Mapping[str, Array]
) -> None:
    """Arrays are the fields' rows of one shard.

    Raises:
        ShapeError: a field is missing or unknown, has another shape, or a dtype whose conversion
            would change values.
    """
    if not 0 <= shard < plan.n_shards:
        raise ShapeError(f"Shard {shard} is asked for, the store has {plan.n_shards}.")
    names = [spec.name for spec in fields]
    if sorted(arrays) != sorted(names):
        raise ShapeError(f"Shard {shard} needs fields {sorted(names)}, got {sorted(arrays)}.")
    structures = plan.shard_structures(shard)
    for spec in fields:
        values = arrays[spec.name]
        rows = int(plan.counts(spec.level)[structures].sum())
        if values.shape != (rows, *spec.shape):
            raise ShapeError(
                f"Shard {shard}: {spec.name} must be {[rows, *spec.shape]}, got "
                f"{list(values.shape)}. Rows would belong to other structures."
            )
        lossy = spec.codec != "exact" and values.dtype.kind == "f"
        if not lossy and not np.can_cast(values.dtype, np.dtype(spec.dtype), "safe"):
            raise ShapeError(
                f"Shard {shard}: {spec.name} must be {spec.dtype}, got {values.dtype}, which does "
                f"not fit it without loss. Convert it first."
            )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _summed_errors(
    fields: Sequence[FieldSpec], records: Mapping[int, ShardRecord]
) -> dict[str, FieldError]:
    """In shard order, so that sums do not depend on when a shard was written."""
    errors = {}
    for spec in fields:
        total = EncodingError()
        for shard in sorted(records):
            total.add(EncodingError(*records[shard].errors[spec.name]))
        errors[spec.name] = FieldError(
            relative=total.relative, clipped=total.clipped, nonfinite=total.nonfinite
        )
    return errors
