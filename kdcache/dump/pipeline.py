"""One pass of a teacher over the structures of a store, its features written beside them.

Reading, computing and writing overlap: on threads here, in every worker of a cluster, or in every
part of a dump that several processes share. Invariant: the bytes of a store do not depend on who
computed which shard, nor on where a killed dump went on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch

from kdcache.cluster import HERE, ClusterOptions, open_cluster
from kdcache.dump.compute import ShardComputer, ShardRows
from kdcache.dump.options import (
    DumpOptions,
    DumpReport,
    Part,
    TeacherSource,
    choose_fields,
    has_edges,
)
from kdcache.dump.software import software
from kdcache.dump.workers import PrepareDump, write_counts
from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.progress import Advance, Progress, silent
from kdcache.store import GroupWriter, Store, TeacherEntry, add_teacher, open_store
from kdcache.store.failures import Failures
from kdcache.store.files import disk_size
from kdcache.store.location import local_path
from kdcache.store.manifest import read_manifest
from kdcache.store.signature import SIGNATURE, refuse_signed
from kdcache.stream.neighbors import count_edges
from kdcache.teachers import Teacher


def dump_teacher(
    store_path: str | Path,
    teacher: Teacher,
    options: DumpOptions,
    *,
    source: TeacherSource | None = None,
    cluster: ClusterOptions = HERE,
    part: Part | None = None,
    wait_for_others: Callable[[], object] = lambda: None,
    remove_signature: bool = False,
    progress: Progress = silent,
) -> DumpReport:
    """Compute the fields of every structure of a store and write them as one more teacher.

    Args:
        store_path: a finished store; a dump of the same teacher that was killed is gone on with.
        teacher: on `options.device`; with a cluster only asked what it is, so a CPU will do.
        options: which fields, and how they are kept.
        source: where workers of a cluster load the teacher from; not needed otherwise.
        cluster: whose workers compute; by default this process.
        part: of several processes that share the dump, each of which calls this function; the last
            to end finishes the store.
        wait_for_others: called by a part when it finds nothing more to do, before it reports.
        remove_signature: of a signed store, whose signature would be of another content.
        progress: shows structures and rate.

    Raises:
        StoreError: the store already has a teacher of this name, is unfinished, or is signed.
        IdentityError: the unfinished dump of this name is of another teacher or other fields.
        ConfigError: a field the teacher does not give, or a cluster and no source.
        TeacherError: a feature overflows float16 or is not finite, naming the structure; rows of
            something else; or the teacher fails on a structure, or on all of them.
        ClusterError: the cluster is gone.
    """
    started = time.perf_counter()
    path = local_path(store_path, "a dump")
    specs = choose_fields(teacher.field_specs(), options.fields, options.codec)
    store = open_store(path)
    if options.name not in store.teachers and not remove_signature:
        refuse_signed(path, store.manifest.root_digest)
    entry = _entry(teacher, specs, options)
    if options.compute_threads is not None:
        torch.set_num_threads(options.compute_threads)
    computer = ShardComputer(store, teacher, specs, options, options.device)
    # Places are laid out before anything is computed, so the edges are counted first.
    n_edges = count_edges(store, computer.neighbors) if has_edges(specs) else None
    with add_teacher(
        path,
        options.name,
        entry,
        specs,
        n_edges=n_edges,
        on_overflow=options.on_overflow,
        on_nonfinite=options.on_nonfinite,
        shared=part is not None,
    ) as writer:
        # Not of a store that another part has finished, whose signature is of this content. First
        # of all: a kill leaves a store that is not signed, not one signed wrongly.
        if options.name not in read_manifest(path).teachers:
            (path / SIGNATURE).unlink(missing_ok=True)
        pending = writer.pending_shards()
        total = _n_structures(store, pending)
        with progress(f"dump {options.name}", total, "structures") as advance:
            if not cluster.is_here:
                if source is None or part is not None:
                    raise ConfigError(
                        "Workers of a cluster load the teacher themselves, and share its shards "
                        "without parts: give a source and no part."
                    )
                if n_edges is not None:
                    write_counts(path, options.name, n_edges)
                prepare = PrepareDump(str(path.resolve()), source, options, entry)
                computed = _by_workers(cluster, prepare, writer, pending, advance)
            elif part is None:
                computed = _run(computer, writer, pending, _everything, advance)
            else:
                computed = _as_part(part, computer, writer, advance)
        left = 0
        if part is None:
            writer.commit()
        else:
            writer.commit_if_whole()
            wait_for_others()
            left = writer.commit_if_whole()
    return _report(path, options.name, entry, computed, left, started)


def _everything(_: int) -> AbstractContextManager[bool]:
    return nullcontext(True)


def _run(
    computer: ShardComputer,
    writer: GroupWriter,
    shards: Sequence[int],
    claim: Callable[[int], AbstractContextManager[bool]],
    advance: Advance,
) -> list[int]:
    """Compute shards one after the other, each written while the next is computed.

    Returns:
        Those that were computed: not those that could not be claimed.
    """
    computed: list[int] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="kdcache-read") as reading,
        ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as writing,
        ExitStack() as claims,
    ):
        # One is filled while the other is written; a claim ends when its shard is on disk.
        room = [ShardRows(writer.plan), ShardRows(writer.plan)]
        written: tuple[Future[None], ExitStack] | None = None
        for shard in shards:
            mine = claims.enter_context(ExitStack())
            if not mine.enter_context(claim(shard)):
                mine.close()
                continue
            rows = room[len(computed) % 2]
            computer.compute(shard, rows, reading, advance)
            if written is not None:
                _finish(*written)  # at most one shard waits: memory stays bounded
            task = writing.submit(writer.write_shard, shard, rows.arrays(), rows.failures)
            written = task, mine
            computed.append(shard)
        if written is not None:
            _finish(*written)
    return computed


def _finish(task: Future[None], claim: ExitStack) -> None:
    task.result()
    claim.close()


def _as_part(
    part: Part, computer: ShardComputer, writer: GroupWriter, advance: Advance
) -> list[int]:
    """What one part computes: its own shards, then whatever no other part is at."""
    computed: list[int] = []
    while True:
        taken = _run(computer, writer, part.order(writer.pending_shards()), writer.claim, advance)
        computed += taken
        # A part that died meanwhile has left its shards to the others.
        if not taken:
            return computed


def _by_workers(
    cluster: ClusterOptions,
    prepare: PrepareDump,
    writer: GroupWriter,
    shards: Sequence[int],
    advance: Advance,
) -> list[int]:
    """Have the workers of a cluster write shards, and publish each as its record comes in."""
    structures = writer.plan.shard_structures
    if not shards:
        return []
    with open_cluster(cluster) as workers:
        for shard, record in workers.run(prepare, shards):
            writer.publish(shard, record)
            rows = structures(shard)
            advance(rows.stop - rows.start)
    return list(shards)


def _n_structures(store: Store, shards: Sequence[int]) -> int:
    rows = [store.plan.shard_structures(shard) for shard in shards]
    return sum(int(each.stop - each.start) for each in rows)


def _report(
    path: Path, name: str, entry: TeacherEntry, computed: Sequence[int], left: int, started: float
) -> DumpReport:
    store = open_store(path)
    failures = store.failures(name) if name in store.teachers else Failures()
    return DumpReport(
        n_structures=len(store.index),
        n_atoms=int(store.index.n_atoms.sum()),
        n_bytes=disk_size(path / "teachers" / name),
        seconds=time.perf_counter() - started,
        computed=_n_structures(store, computed),
        failed=dict(zip(failures.structure_id.tolist(), failures.reason.tolist(), strict=True)),
        left_to_others=left,
        entry=store.teachers.get(name, entry),
    )


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
        software=software(every=options.all_software),
    )
