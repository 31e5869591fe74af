"""Copy rows of groups of stores into the shards of one group of a new store.

Done in whatever process writes the shard; `rewrite` publishes what was written. Invariant: the
files of a shard follow from the pick and the sources alone, and a field whose files would be those
of its source is copied byte for byte, under its digest.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.fields import ENERGY, FIXED, FORCES, TAGS, FieldSpec
from kdcache.store.codecs import read_dtype
from kdcache.store.contents import shard_file
from kdcache.store.copy_file import copy_file
from kdcache.store.entries import FieldError
from kdcache.store.failures import Failures
from kdcache.store.file_limits import file_limits
from kdcache.store.files import StoreFiles
from kdcache.store.index import read_index
from kdcache.store.layout import plan_blocks, with_edges
from kdcache.store.location import StoreUrl
from kdcache.store.metadata import SCALE_SUFFIX
from kdcache.store.picking import Pick, gathered, row_numbers, shard_runs
from kdcache.store.reader import Store, open_store
from kdcache.store.shard_writer import ShardWriter
from kdcache.store.shards import new_attempt, partial_path, write_file
from kdcache.store.work import ShardRecord, WorkFolder
from kdcache.store.writer import GroupWriter
from kdcache.structures import DEFAULT_TAG

Array = npt.NDArray[Any]

PICK = "pick.npy"
# Of a source, one field: beside the shard that is filled, so much is in memory.
BLOCKS_AT_ONCE = 16
# What a source counts as that says nothing of a field which others have.
UNSAID = {TAGS.name: DEFAULT_TAG, FIXED.name: False, ENERGY.name: np.nan, FORCES.name: np.nan}


@dataclass(frozen=True)
class GroupSource:
    """A group of a store that rows are taken from.

    Attributes:
        store: its path, address or files.
        group: "structures" or "teachers/<name>".
        errors: what storing changed already, by field.
    """

    store: Path | StoreUrl | StoreFiles
    group: str
    errors: Mapping[str, FieldError]


@dataclass(frozen=True, eq=False)
class GroupCopy:
    """One group of a new store, as rows of others.

    Attributes:
        fields: as they are written.
        sources: numbered as in `pick`.
        pick: a row of a source for every structure of the new store.
    """

    fields: tuple[FieldSpec, ...]
    sources: tuple[GroupSource, ...]
    pick: Pick


@dataclass(frozen=True, eq=False)
class CopyShards:
    """The work on one group, for every process that takes part: shard to record.

    Small however large the stores are, as it travels with every shard: what grows with the number
    of structures is read from the unfinished store.

    Attributes:
        writer: of the group, but for its plan and ids.
        n_structures, atom_capacity, blocks_per_shard: of the new store.
        own_edges: the group has edges of its own.
        sources: as in `GroupCopy`.
    """

    writer: ShardWriter
    n_structures: int
    atom_capacity: int
    blocks_per_shard: int
    own_edges: bool
    sources: tuple[GroupSource, ...]

    @classmethod
    def begin(cls, writer: GroupWriter, copy: GroupCopy) -> CopyShards:
        """Leave the pick beside the journal of a group, and say the rest."""
        content = io.BytesIO()
        np.save(content, np.stack([copy.pick.source, copy.pick.row]), allow_pickle=False)
        write_file(WorkFolder(writer.path, writer.group).path / PICK, content.getvalue())
        whole = writer.shard_writer()
        return cls(
            replace(whole, plan=plan_blocks([1]), structure_id=np.empty(0, object)),
            len(copy.pick),
            whole.plan.atom_capacity,
            whole.plan.blocks_per_shard,
            whole.stored != whole.fields,
            copy.sources,
        )

    def __call__(self) -> Callable[[int], ShardRecord]:
        path, group = self.writer.path, self.writer.group
        pick = Pick(*np.load(WorkFolder(path, group).path / PICK, allow_pickle=False))
        stores = [open_store(source.store) for source in self.sources]
        index = read_index(path, self.n_structures)
        plan = plan_blocks(
            index.n_atoms,
            index.n_edges,
            atom_capacity=self.atom_capacity,
            blocks_per_shard=self.blocks_per_shard,
        )
        if self.own_edges:
            own = [s.plans[one.group].n_edges for s, one in zip(stores, self.sources, strict=True)]
            plan = with_edges(plan, gathered(pick, own))
        writer = replace(self.writer, plan=plan, structure_id=index.structure_id)
        return _Copier(writer, GroupCopy(writer.fields, self.sources, pick), stores).write


class _Copier:
    """Copies shards of one group out of open stores."""

    def __init__(self, writer: ShardWriter, copy: GroupCopy, stores: list[Store]) -> None:
        self._writer = writer
        self._copy = copy
        self._stores = stores
        self._plans = [
            store.plans[source.group] for store, source in zip(stores, copy.sources, strict=True)
        ]
        self._failures = [
            dict(zip(failures.row.tolist(), failures.reason, strict=True))
            for failures in (_failures(store, s) for store, s in self._pairs())
        ]
        self._verbatim = tuple(spec for spec in writer.stored if self._is_same(spec))
        fields = tuple(spec for spec in writer.fields if spec not in self._verbatim)
        # The counts of a teacher's own edges are written with its edges, or copied with them.
        stored = tuple(spec for spec in writer.stored if spec not in self._verbatim)
        self._changed = replace(writer, fields=fields, stored=stored)

    def write(self, shard: int) -> ShardRecord:
        arrays, squares = {}, {}
        for spec in self._changed.fields:
            arrays[spec.name], squares[spec.name] = self._gather(spec, shard)
        failures = self._failed(shard)
        if self._changed.stored:
            record = self._changed.write(shard, arrays, failures)
        else:
            record = ShardRecord(attempt=new_attempt(), sha256={}, size={}, errors={})
            record.failures.update(failures)
        try:
            for spec in self._verbatim:
                self._copy_files(spec, shard, record)
        except BaseException:
            self._writer.discard(shard, record.attempt)
            raise
        errors = {
            spec.name: self._with_recorded(spec, shard, record.errors, squares.get(spec.name))
            for spec in self._writer.stored
        }
        return record.model_copy(update={"errors": errors})

    def _failed(self, shard: int) -> dict[int, str]:
        """Reasons of structures of a new shard that a teacher gave nothing for, by new row."""
        if not any(self._failures):
            return {}
        here, pick = self._writer.plan.shard_structures(shard), self._copy.pick
        places = zip(pick.source[here].tolist(), pick.row[here].tolist(), strict=True)
        return {
            here.start + k: self._failures[source][row]
            for k, (source, row) in enumerate(places)
            if row in self._failures[source]
        }

    def _is_same(self, spec: FieldSpec) -> bool:
        """The field's files would be those of the only source, byte for byte."""
        if len(self._stores) != 1:
            return False
        store, source, plan = self._stores[0], self._copy.sources[0], self._writer.plan
        theirs = self._plans[0]
        return (
            store.fields(source.group).get(spec.name) == spec
            and np.array_equal(self._copy.pick.row, np.arange(len(store)))
            and (plan.n_blocks, plan.blocks_per_shard) == (theirs.n_blocks, theirs.blocks_per_shard)
            and plan.capacity(spec.level) == theirs.capacity(spec.level)
            and np.array_equal(plan.block, theirs.block)
        )

    def _copy_files(self, spec: FieldSpec, shard: int, record: ShardRecord) -> None:
        scales = [spec.name + SCALE_SUFFIX] if spec.codec == "compact" else []
        for name in (spec.name, *scales):
            file = shard_file(name, shard, self._writer.documents[name])
            source = f"{self._copy.sources[0].group}/{file}"
            target = f"{self._writer.group}/{file}"
            partial = partial_path(self._writer.path / target, record.attempt)
            copied = copy_file(self._stores[0], source, partial, self._limits[source])
            record.sha256[target], record.size[target] = copied.sha256, copied.size

    @cached_property
    def _limits(self) -> dict[str, int]:
        return file_limits(self._stores[0].manifest, str(self._stores[0].path))

    def _gather(self, spec: FieldSpec, shard: int) -> tuple[Array, Array]:
        """Rows of a field of one new shard, and their summed squares by source."""
        plan, sources = self._writer.plan, self._copy.sources
        n_rows = int(plan.counts(spec.level)[plan.shard_structures(shard)].sum())
        known = [s.group + "/" + spec.name for s in sources]
        specs = [store.fields(s.group).get(spec.name) for store, s in self._pairs()]
        dtype = next((read_dtype(found) for found in specs if found is not None), None)
        rows = np.empty((n_rows, *spec.shape), dtype)
        squares = np.zeros(len(sources))
        runs = shard_runs(self._copy.pick, plan, self._plans, spec.level, shard, BLOCKS_AT_ONCE)
        for run in runs:
            places = row_numbers(run.target, run.count)
            if specs[run.source] is None:
                rows[places] = UNSAID[spec.name]
                continue
            store = self._stores[run.source]
            with store.fetched([known[run.source]], run.blocks):
                values = store.read(known[run.source], run.blocks)
            taken = values[row_numbers(run.start, run.count)]
            rows[places] = taken
            if len({error.relative for error in self._recorded(spec)}) > 1:
                # Rows of structures a teacher failed on are NaN.
                squares[run.source] += np.nansum(np.square(taken, dtype=np.float64))
        return rows, squares

    def _pairs(self) -> list[tuple[Store, GroupSource]]:
        return list(zip(self._stores, self._copy.sources, strict=True))

    def _recorded(self, spec: FieldSpec) -> list[FieldError]:
        """What storing a field changed already, by source."""
        return [source.errors.get(spec.name, FieldError()) for source in self._copy.sources]

    def _with_recorded(
        self,
        spec: FieldSpec,
        shard: int,
        errors: Mapping[str, tuple[float, float, int, int]],
        squares: Array | None,
    ) -> tuple[float, float, int, int]:
        """What the sources recorded, added to what writing changed."""
        square_error, square_value, clipped, nonfinite = errors.get(spec.name, (0.0, 0.0, 0, 0))
        recorded = self._recorded(spec)
        before = [error.relative**2 for error in recorded]
        if squares is not None and len(set(before)) > 1:
            square_error += float(np.dot(before, squares))
            square_value = square_value if spec.codec != "exact" else float(squares.sum())
        elif any(before):
            # One error for all values: nothing was summed here, and any weight gives it.
            if spec.codec == "exact" or spec in self._verbatim:
                square_value = 1.0
            square_error += before[0] * square_value
        if shard == 0:  # once, not by shard
            clipped += sum(error.clipped for error in recorded)
            nonfinite += sum(error.nonfinite for error in recorded)
        return square_error, square_value, clipped, nonfinite


def _failures(store: Store, source: GroupSource) -> Failures:
    is_teacher = source.group != "structures"
    return store.failures(source.group.partition("/")[2]) if is_teacher else Failures()
