"""Encode the fields of one shard and write its files, under the name of an attempt.

Needs no lock and no other writer: any process that can reach the store may write any shard. Who
counts, and under which name the files stand in the end, is the business of `writer`.
Invariant: the files of an attempt that failed are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import ShapeError, TeacherError
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
from kdcache.store.contents import shard_file
from kdcache.store.edges import check_edges
from kdcache.store.layout import BlockPlan
from kdcache.store.metadata import SCALE_SUFFIX, Json
from kdcache.store.shards import new_attempt, partial_path, write_shard_file
from kdcache.store.work import ShardRecord

Array = npt.NDArray[Any]
NOTHING: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards of one group; made by `GroupWriter.shard_writer`. Can be pickled.

    Attributes:
        path: of the store.
        group: "structures" or "teachers/<name>".
        plan: layout of the group.
        fields: what is given to `write`.
        stored: what is written: with a teacher's own edges, their counts as well.
        documents: zarr.json of every array, by name.
        structure_id: [n_structures] in store order, for messages.
        on_overflow, on_nonfinite: what happens to values of a teacher that cannot be stored.
    """

    path: Path
    group: str
    plan: BlockPlan
    fields: tuple[FieldSpec, ...]
    stored: tuple[FieldSpec, ...]
    documents: Mapping[str, Json]
    structure_id: npt.NDArray[Any]
    on_overflow: OnOverflow = "stop"
    on_nonfinite: OnNonfinite = "stop"

    @property
    def is_teacher(self) -> bool:
        """Features are guarded; ground truth is kept as it is."""
        return self.group != "structures"

    def write(
        self, shard: int, arrays: Mapping[str, Array], failures: Mapping[int, str] = NOTHING
    ) -> ShardRecord:
        """Encode and write all fields of one shard; safe to call from several threads.

        Args:
            shard: its number.
            arrays: by field name; the rows of the shard's structures concatenated in store order,
                [n_rows, *field shape].
            failures: why there is nothing to store for a structure, by store row: whatever
                `arrays` holds there, NaN is written, or 0 where the stored dtype has no NaN.

        Returns:
            What was written, to be handed to `GroupWriter.publish`.

        Raises:
            ShapeError: a field is missing, unknown, or of another shape or dtype.
            StoreError: edges that are none of their structure's atoms, or not in order.
            TeacherError: a value that cannot be stored, naming the structure.
        """
        check_arrays(self.fields, self.plan, shard, arrays)
        if self.stored != self.fields:
            arrays = self._with_counts(shard, arrays)
        record = ShardRecord(attempt=new_attempt(), sha256={}, size={}, errors={})
        record.failures.update(failures)
        try:
            for spec in self.stored:
                self._write_field(spec, shard, arrays[spec.name], record)
        except BaseException:
            self.discard(shard, record.attempt)
            raise
        return record

    def discard(self, shard: int, attempt: str) -> None:
        """Remove what an attempt at a shard wrote, if it is still there."""
        for name, document in self.documents.items():
            file = self.path / shard_file(f"{self.group}/{name}", shard, document)
            with suppress(OSError):
                partial_path(file, attempt).unlink()

    def _write_field(self, spec: FieldSpec, shard: int, values: Array, record: ShardRecord) -> None:
        error = EncodingError()
        absent = self._absent(spec, shard, record.failures)
        blocks = self._encoded(spec, shard, np.ascontiguousarray(values), absent, error)
        if spec.codec == "compact":
            pairs = list(blocks)
            self._write_array(spec, spec.name, shard, (pair[0] for pair in pairs), record)
            scales = (pair[1][None] for pair in pairs)
            self._write_array(spec, spec.name + SCALE_SUFFIX, shard, scales, record)
        else:
            self._write_array(spec, spec.name, shard, (pair[0] for pair in blocks), record)
        record.errors[spec.name] = astuple(error)

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

    def _absent(
        self, spec: FieldSpec, shard: int, failures: Mapping[int, str]
    ) -> npt.NDArray[np.bool_] | None:
        """[n_rows of the shard] rows that hold nothing; None where all of them hold something."""
        if not failures or spec.dtype not in FLOATS:
            return None
        structures = self.plan.shard_structures(shard)
        failed = np.isin(np.arange(structures.start, structures.stop), list(failures))
        return np.repeat(failed, self.plan.counts(spec.level)[structures])

    def _encoded(
        self,
        spec: FieldSpec,
        shard: int,
        values: Array,
        absent: npt.NDArray[np.bool_] | None,
        error: EncodingError,
    ) -> Iterator[tuple[Array, Array]]:
        """Stored values and scales (empty but for compact) of each block of a shard."""
        end = 0
        for used in self.plan.used(spec.level)[self.plan.shard_blocks(shard)]:
            start, end = end, end + int(used)
            block = values[start:end]
            if absent is None or not absent[start:end].any():
                yield self._encoded_block(spec, shard, start, block, error)
                continue
            block = np.where(_by_row(absent[start:end], block), 0, block).astype(block.dtype)
            stored, scale = self._encoded_block(spec, shard, start, block, error)
            if stored.dtype.kind == "f":
                stored[absent[start:end]] = np.nan
            yield stored, scale

    def _encoded_block(
        self, spec: FieldSpec, shard: int, start: int, block: Array, error: EncodingError
    ) -> tuple[Array, Array]:
        if self.is_teacher and spec.dtype in FLOATS:
            try:
                block = guard(block, spec.codec, self.on_overflow, self.on_nonfinite, error)
            except UnstorableValue as unstorable:
                raise self._refused(spec, shard, start, unstorable) from None
        none = np.empty(0, np.float32)
        if spec.codec == "half":
            return to_half(block, error), none
        if spec.codec == "compact":
            return to_compact(block, channels(spec), error)
        return block.astype(stored_dtype(spec), copy=False), none

    def _write_array(
        self,
        spec: FieldSpec,
        name: str,
        shard: int,
        blocks: Iterator[Array],
        record: ShardRecord,
    ) -> None:
        relative = shard_file(f"{self.group}/{name}", shard, self.documents[name])
        capacity = 1 if name != spec.name else self.plan.capacity(spec.level)
        written = write_shard_file(
            self.path / relative,
            record.attempt,
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
        structure_id = self.structure_id[structures.start + place]
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
            f"trained on it would become NaN. Record the structure as failed (--on-error skip), or "
            f"store zeros instead (--on-nonfinite zero)."
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


def _by_row(rows: npt.NDArray[np.bool_], values: Array) -> Array:
    return rows.reshape(-1, *[1] * (values.ndim - 1))
