"""One pass of a teacher over the structures of a store, its features written beside them.

Reading, computing and writing overlap on threads. Batches are cut within a block, so the bytes of
a shard depend on the store's order and the teacher alone, not on where a killed dump went on;
bitwise on one machine with one number of threads, as floating-point sums go.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import kdcache
from kdcache.errors import ConfigError, StoreError, TeacherError, did_you_mean
from kdcache.fields import GRAPH_FIELDS, Codec, FieldSpec, Level
from kdcache.ingest import ImportOptions, check_dataset, import_dataset
from kdcache.progress import Progress, silent
from kdcache.store import BlockPlan, GroupWriter, Store, TeacherEntry, add_teacher, open_store
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.work import WORK, unfinished_groups
from kdcache.stream.neighbors import count_edges, further_neighbors, neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.window import Array, Window, atom_bounded, make_batch
from kdcache.teachers import Teacher


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """What of a teacher is stored, and how.

    Attributes:
        name: group of the store the fields go to.
        fields: which of the teacher's fields; None for all but whole edges, which take some fifty
            times the room of the others: their sums at the atoms are kept instead.
        codec: of features; quantities with a unit are always kept exactly.
        max_atoms: atoms in one batch.
        on_overflow: a feature beyond float16: "stop", or "clip" it to the largest float16.
        on_nonfinite: NaN or infinity: "stop", or "zero".
        licence: of the teacher's weights, as its owner states it.
        device: where the teacher computes.
        threads: for neighbour lists.
    """

    name: str
    fields: Sequence[str] | None = None
    codec: Codec = "half"
    max_atoms: int = 4096
    on_overflow: Literal["stop", "clip"] = "stop"
    on_nonfinite: Literal["stop", "zero"] = "stop"
    licence: str = ""
    device: str = "cpu"
    threads: int = 2


@dataclass(frozen=True, slots=True)
class DumpReport:
    """What a finished dump wrote.

    Attributes:
        n_structures, n_atoms: of the store.
        n_bytes: on disk, the teacher's fields only.
        seconds: wall time of this call.
        computed: structures computed by this call; fewer than all after a resume.
        entry: the teacher as the manifest records it, with the error of every field.
    """

    n_structures: int
    n_atoms: int
    n_bytes: int
    seconds: float
    computed: int
    entry: TeacherEntry


def choose_fields(
    specs: Sequence[FieldSpec], wanted: Sequence[str] | None, codec: Codec
) -> tuple[FieldSpec, ...]:
    """The specs to store, features in `codec`, quantities with a unit exactly.

    Whole edges, kept when they are asked for, bring edge_index and edge_shift with them.

    Raises:
        ConfigError: a name the teacher does not give.
    """
    known = {spec.name: spec for spec in specs}
    whole = [name for name, spec in known.items() if spec.level != "edge"]
    names = whole if wanted is None else list(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            raise ConfigError(f"The teacher has no field {name}: {did_you_mean(name, known)}")
    if not names:
        raise ConfigError(
            f"No fields are chosen, so there is nothing to dump. Known: {list(known)}"
        )
    chosen = tuple(
        replace(known[name], codec="exact" if known[name].unit else codec) for name in names
    )
    return chosen + GRAPH_FIELDS if _has_edges(chosen) else chosen


def _has_edges(specs: Sequence[FieldSpec]) -> bool:
    return any(spec.level == "edge" for spec in specs)


def dump_teacher(
    store_path: str | Path,
    teacher: Teacher,
    options: DumpOptions,
    *,
    graph_cache: Path,
    progress: Progress = silent,
) -> DumpReport:
    """Compute the fields of every structure of a store and write them as one more teacher.

    Args:
        store_path: a finished store; a dump of the same teacher that was killed is gone on with.
        teacher: on `options.device`.
        options: which fields, and how they are kept.
        graph_cache: directory for neighbour lists the store does not keep.
        progress: shows structures and rate.

    Raises:
        StoreError: the store already has a teacher of this name, or is unfinished.
        IdentityError: the unfinished dump of this name is of another teacher or other fields.
        ConfigError: a field the teacher does not give.
        TeacherError: a feature overflows float16 or is not finite, naming the structure; or has
            rows of something else.
    """
    started = time.perf_counter()
    specs = choose_fields(teacher.field_specs(), options.fields, options.codec)
    store = open_store(local_path(store_path, "a dump"))
    neighbors = neighbors_for(
        store, teacher.graph_rule, graph_cache, threads=options.threads, progress=progress
    )
    further = further_neighbors(
        store, teacher.further_graphs, graph_cache, threads=options.threads, progress=progress
    )
    dtype = np.float64 if teacher.dtype == torch.float64 else np.float32
    reader = WindowReader(store, neighbors, further, labels=False, dtype=dtype)
    entry = _entry(teacher, specs, options)
    with add_teacher(
        store_path,
        options.name,
        entry,
        specs,
        # Places are laid out before anything is computed, so the edges are counted first.
        n_edges=count_edges(store, neighbors) if _has_edges(specs) else None,
        on_overflow=options.on_overflow,
        on_nonfinite=options.on_nonfinite,
    ) as writer:
        computed = _run(store, teacher, reader, specs, options, writer, progress)
        manifest = writer.commit()
    return DumpReport(
        n_structures=len(store.index),
        n_atoms=int(store.index.n_atoms.sum()),
        n_bytes=_disk_size(Path(store_path) / "teachers" / options.name),
        seconds=time.perf_counter() - started,
        computed=computed,
        entry=manifest.teachers[options.name],
    )


def _run(
    store: Store,
    teacher: Teacher,
    reader: WindowReader,
    specs: Sequence[FieldSpec],
    options: DumpOptions,
    writer: GroupWriter,
    progress: Progress,
) -> int:
    pending = writer.pending_shards()
    plan = store.plan
    shards = [plan.shard_structures(shard) for shard in pending]
    n_pending = sum(int(rows.stop - rows.start) for rows in shards)
    with (
        ThreadPoolExecutor(1, thread_name_prefix="kdcache-read") as reading,
        ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as writing,
        progress(f"dump {options.name}", n_pending, "structures") as advance,
    ):
        written: Future[Any] | None = None
        # One is filled while the other is written.
        room = [_ShardRows(writer.plan, pending), _ShardRows(writer.plan, pending)]
        for k, shard in enumerate(pending):
            rows = room[k % 2]
            rows.begin()
            for window in _shard_windows(store, reader, shard, reading):
                _compute(teacher, window, specs, options, rows)
                advance(len(window.rows))
            if written is not None:
                written.result()  # at most one shard waits: memory stays bounded
            written = writing.submit(writer.write_shard, shard, rows.arrays())
        if written is not None:
            written.result()
    return n_pending


def _shard_windows(
    store: Store, reader: WindowReader, shard: int, pool: ThreadPoolExecutor
) -> Iterator[Window]:
    """The blocks of a shard one by one, the next read while one is computed."""
    blocks = store.plan.shard_blocks(shard)
    ahead: Future[Window] | None = None
    for block in blocks:
        window = ahead.result() if ahead else reader.read(np.array([block]))
        following = block + 1
        ahead = pool.submit(reader.read, np.array([following])) if following in blocks else None
        yield window


class _ShardRows:
    """Fields of one shard, filled from its first row on.

    The memory serves shard after shard: fresh memory for each takes longer to get, page by page,
    than to fill, and that on the thread which runs the teacher.
    """

    def __init__(self, plan: BlockPlan, shards: Sequence[int]) -> None:
        self._plan = plan
        self._shards = shards
        self._memory: dict[str, Array] = {}
        self._filled: dict[str, int] = {}

    def begin(self) -> None:
        """Start anew; what `arrays` gave before is overwritten."""
        self._filled = {}

    def append(self, spec: FieldSpec, values: Array) -> None:
        """Further rows of a field."""
        if spec.name not in self._memory:
            most = max(self._n_rows(spec.level, shard) for shard in self._shards)
            self._memory[spec.name] = np.empty((most, *spec.shape), values.dtype)
        start = self._filled.get(spec.name, 0)
        self._filled[spec.name] = start + len(values)
        self._memory[spec.name][start : start + len(values)] = values

    def arrays(self) -> dict[str, Array]:
        """What was filled in since `begin`."""
        return {name: self._memory[name][:n_rows] for name, n_rows in self._filled.items()}

    def _n_rows(self, level: Level, shard: int) -> int:
        return int(self._plan.counts(level)[self._plan.shard_structures(shard)].sum())


def _compute(
    teacher: Teacher,
    window: Window,
    specs: Sequence[FieldSpec],
    options: DumpOptions,
    rows: _ShardRows,
) -> None:
    for run in atom_bounded(window.n_atoms, options.max_atoms):
        batch = make_batch([window.gather(np.arange(run.start, run.stop))])
        computed = teacher.compute(batch.to(options.device))
        n_rows = {"structure": batch.n_structures, "atom": batch.n_atoms, "edge": batch.n_edges}
        for spec in specs:
            if spec in GRAPH_FIELDS:
                continue
            values, shape = computed[spec.name], [n_rows[spec.level], *spec.shape]
            if list(values.shape) != shape:
                raise TeacherError(
                    f"{teacher.model_name} gave {spec.name} as {list(values.shape)} for a batch "
                    f"where it must be {shape}: rows would belong to others. Correct the teacher."
                )
            rows.append(spec, values.cpu().numpy())
    for spec in GRAPH_FIELDS if _has_edges(specs) else ():
        # The lists that the batches were cut from, so rows belong to edges by construction.
        rows.append(spec, window.arrays[spec.name].astype(spec.dtype))


def _entry(teacher: Teacher, specs: Sequence[FieldSpec], options: DumpOptions) -> TeacherEntry:
    return TeacherEntry.describe(
        digest=teacher.digest,
        fields=specs,
        model=teacher.model_name,
        architecture=dict(teacher.architecture),
        graph=teacher.graph_rule,
        references=dict(teacher.references),
        precision=str(teacher.dtype).removeprefix("torch."),
        licence=options.licence,
        software={
            "kdcache": kdcache.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )


def _disk_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def open_or_import(
    data: Sequence[str],
    path: Path,
    options: ImportOptions,
    *,
    name: str,
    new: bool,
    progress: Progress = silent,
) -> Path:
    """The store a dump goes into: a new one of `data`, or an existing one checked against it.

    Args:
        data: files, globs or a store; may be empty for an existing store.
        path: of the store.
        options: how `data` is read and laid out.
        name: of the teacher about to be dumped.
        new: the caller wants a new store; one that an interrupted dump of the same data left is
            gone on with.

    Raises:
        StoreError: a new store is wanted, and there is one with teachers already.
        IdentityError: the store was made from other data.
    """
    path = local_path(path, "a dump")
    # A spool beside a manifest: the import was killed while it cleaned up, and has that to do.
    cleaned = not (data and (path / WORK / "spool").is_dir())
    finished = (path / MANIFEST).is_file() and cleaned
    if not finished:
        if not new:
            open_store(path)  # says what is missing
        import_dataset(data, path, options, progress=progress)
        return path
    store = open_store(path)
    # Killed between its manifest and the last cleaning up, a dump is gone on with as well.
    begun = f"teachers/{name}" in unfinished_groups(path)
    if new and store.teachers and not begun:
        raise StoreError(
            f"{path} exists and holds teachers {sorted(store.teachers)}. It is not overwritten: "
            f"name another store, or add to it with --into {path} --name {name}."
        )
    if data and not _is_same(data, path):
        check_dataset(store, data, options.read, progress=progress)
    return path


def _is_same(data: Sequence[str], path: Path) -> bool:
    return len(data) == 1 and Path(data[0]).resolve() == path.resolve()
