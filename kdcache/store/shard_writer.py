"""Encode the fields of one shard and write its files, under the name of an attempt.

Needs no lock and no other writer: any process that can reach the store may write any shard. Who
counts, and under which name the files stand in the end, is the business of `writer`.
Invariant: the files of an attempt that failed are gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import ShapeError, TeacherError
from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, N_EDGES, FieldSpec
from kdcache.processors import n_processors
from kdcache.store.codecs import (
    FLOATS,
    EncodingError,
    OnNonfinite,
    OnOverflow,
    UnstorableValue,
    channels,
    guard,
    pieces,
    stored_dtype,
    to_compact,
    to_half,
)
from kdcache.store.contents import shard_file
from kdcache.store.edges import check_edges
from kdcache.store.layout import BlockPlan
from kdcache.store.metadata import SCALE_SUFFIX, Json
from kdcache.store.shards import Written, new_attempt, partial_path, write_shard_file
from kdcache.store.work import ShardRecord

Array = npt.NDArray[Any]
NOTHING: Mapping[int, str] = MappingProxyType({})
# Fields encoded at once. Each has a thread that encodes and one that digests and writes: more than
# there are processors for would take them from a teacher that computes on the same. What they hold
# is bounded: of each field PARTS_AHEAD + 2 parts, of 1 MB for codec half, of a block for others.
MOST_FIELDS = 4


@dataclass(slots=True)
class _WrittenField:
    """What writing a field of one shard found out: its files, and the scales of its blocks."""

    error: EncodingError = field(default_factory=EncodingError)
    files: dict[str, Written] = field(default_factory=dict)
    scales: list[Array] = field(default_factory=list)


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
        attempt = new_attempt()

        def write_field(spec: FieldSpec) -> _WrittenField:
            return self._write_field(spec, shard, arrays[spec.name], attempt, failures)

        at_once = min(MOST_FIELDS, max(1, n_processors() // 2))
        try:
            with ThreadPoolExecutor(at_once, thread_name_prefix="kdcache-encode") as pool:
                written = list(pool.map(write_field, self.stored))
        except BaseException:
            self.discard(shard, attempt)
            raise
        files = {name: file for found in written for name, file in found.files.items()}
        return ShardRecord(
            attempt=attempt,
            sha256={name: file.sha256 for name, file in files.items()},
            size={name: file.size for name, file in files.items()},
            errors={
                spec.name: astuple(found.error)
                for spec, found in zip(self.stored, written, strict=True)
            },
            failures=dict(failures),
        )

    def discard(self, shard: int, attempt: str) -> None:
        """Remove what an attempt at a shard wrote, if it is still there."""
        for name, document in self.documents.items():
            file = self.path / shard_file(f"{self.group}/{name}", shard, document)
            with suppress(OSError):
                partial_path(file, attempt).unlink()

    def _write_field(
        self,
        spec: FieldSpec,
        shard: int,
        values: Array,
        attempt: str,
        failures: Mapping[int, str],
    ) -> _WrittenField:
        absent = self._absent(spec, shard, failures)
        written = _WrittenField()
        blocks = self._blocks(spec, shard, np.ascontiguousarray(values), absent, written)
        self._write_array(spec, spec.name, shard, blocks, attempt, written)
        if spec.codec == "compact":
            scales = ([scale[None]] for scale in written.scales)
            self._write_array(spec, spec.name + SCALE_SUFFIX, shard, scales, attempt, written)
        return written

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

    def _blocks(
        self,
        spec: FieldSpec,
        shard: int,
        values: Array,
        absent: npt.NDArray[np.bool_] | None,
        written: _WrittenField,
    ) -> Iterator[Iterator[Array]]:
        """Stored values of each block of a shard, encoded as they are asked for."""
        end = 0
        for used in self.plan.used(spec.level)[self.plan.shard_blocks(shard)]:
            start, end = end, end + int(used)
            yield self._parts(spec, shard, slice(start, end), values, absent, written)

    def _parts(
        self,
        spec: FieldSpec,
        shard: int,
        rows: slice,
        values: Array,
        absent: npt.NDArray[np.bool_] | None,
        written: _WrittenField,
    ) -> Iterator[Array]:
        """Stored values of one block; of codec half in pieces, as each value stands alone."""
        n_rows = rows.stop - rows.start
        cuts = pieces(n_rows, math.prod(spec.shape)) if spec.codec == "half" else [slice(0, n_rows)]
        for cut in cuts:
            start, stop = rows.start + cut.start, rows.start + cut.stop
            part = values[start:stop]
            if absent is None or not absent[start:stop].any():
                yield self._encoded(spec, shard, start, part, written)
                continue
            part = np.where(_by_row(absent[start:stop], part), 0, part).astype(part.dtype)
            stored = self._encoded(spec, shard, start, part, written)
            if stored.dtype.kind == "f":
                stored[absent[start:stop]] = np.nan
            yield stored

    def _encoded(
        self, spec: FieldSpec, shard: int, start: int, part: Array, written: _WrittenField
    ) -> Array:
        error = written.error
        if self.is_teacher and spec.dtype in FLOATS:
            try:
                part = guard(part, spec.codec, self.on_overflow, self.on_nonfinite, error)
            except UnstorableValue as unstorable:
                raise self._refused(spec, shard, start, unstorable) from None
        if spec.codec == "half":
            return to_half(part, error)
        if spec.codec == "compact":
            stored, scale = to_compact(part, channels(spec), error)
            written.scales.append(scale)
            return stored
        return part.astype(stored_dtype(spec), copy=False)

    def _write_array(
        self,
        spec: FieldSpec,
        name: str,
        shard: int,
        blocks: Iterable[Iterable[Array]],
        attempt: str,
        written: _WrittenField,
    ) -> None:
        relative = shard_file(f"{self.group}/{name}", shard, self.documents[name])
        capacity = 1 if name != spec.name else self.plan.capacity(spec.level)
        written.files[relative] = write_shard_file(
            self.path / relative,
            attempt,
            blocks,
            capacity,
            self.plan.blocks_per_shard,
            spec.codec == "exact",
        )

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
