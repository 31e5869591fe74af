"""A dataset into a store: one pass over the files, then shards in a permuted order.

Owns order, splits and what the manifest says of the dataset; reading, neighbour lists and bytes are
others'. Invariant: the same files and options give the same digests, however often the import was
killed, and memory grows with the number of structures only (a few hundred bytes each).
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import DataError, IdentityError, StoreError
from kdcache.fields import GRAPH_FIELDS, OPTIONAL_FIELDS, STRUCTURE_FIELDS, FieldSpec
from kdcache.graphs import Edges, GraphRule, neighbor_list
from kdcache.progress import Progress, silent
from kdcache.readers import Dataset, ReadOptions, read_structures
from kdcache.readers.dataset import Source, States
from kdcache.splits import check_fractions, choose_splits
from kdcache.spool import Spool, SpoolWriter, open_spool
from kdcache.store import Store, create_store, open_store
from kdcache.store.entries import DatasetEntry, GraphEntry, Licences
from kdcache.store.index import index_from_plan
from kdcache.store.layout import plan_blocks
from kdcache.store.location import is_url, local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.work import WORK, StoreLock, unfinished_groups
from kdcache.structures import IntArray, Structure, dataset_digest

# Atoms one thread searches neighbours for at a time: fewer would be all hand-over, and a few such
# tasks with their lists (some hundred bytes per atom and dozens of neighbours) stay small.
ATOMS_PER_TASK = 4096


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How a dataset becomes a store.

    Attributes:
        read: format, keys and units of the files.
        seed: of the order structures are written in, and of the splits.
        split: fractions held out, e.g. {"val": 0.05, "test": 0.1}, of the structures that the
            dataset does not hold out itself.
        split_groups: hold out whole groups, so that a trajectory is on one side.
        graph: keep neighbour lists under this rule.
        atom_capacity: atoms per block; None chooses.
        blocks_per_shard: None chooses.
        licence_structures: of the structures, as their owner states it.
        licence_labels: of energies and forces.
        threads: for the neighbour search; the result does not depend on it.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    seed: int = 0
    split: Mapping[str, float] = field(default_factory=dict)
    split_groups: bool = False
    graph: GraphRule | None = None
    atom_capacity: int | None = None
    blocks_per_shard: int | None = None
    licence_structures: str = ""
    licence_labels: str = ""
    threads: int = 2


def import_dataset(
    sources: Source | Sequence[Source] | Dataset,
    output: str | Path,
    options: ImportOptions | None = None,
    progress: Progress = silent,
    *,
    accept: Callable[[Structure], object] = lambda _: None,
) -> Store:
    """Read a dataset into a new store, or go on with an import that was killed.

    Args:
        sources: files, globs or stores, or a dataset made of them.
        output: where the store is made.
        options: keys, units, order, splits, graph.
        progress: shows structures read and written.
        accept: is given every structure as it is read, and raises where it must not be imported.

    Returns:
        The finished store, open.

    Raises:
        DataError: a structure that cannot be used, an id that occurs twice, no structures, or a
            file that changed meanwhile.
        UnitError: an unknown unit, or none where the format has none.
        ConfigError: splits that leave nothing to train on.
        StoreError: `output` is a finished store or something else.
        IdentityError: `output` is an unfinished store of another dataset.
    """
    options = options or ImportOptions()
    output = local_path(output, "an import")
    check_fractions(options.split)
    dataset = sources if isinstance(sources, Dataset) else read_structures(sources, options.read)
    states = dataset.states()
    identity = _identity(dataset, states, options)
    directory = output / WORK / "spool"
    # Refused now, not after hours of reading.
    _refuse_foreign(output)
    with StoreLock(output) as lock:
        spool = open_spool(directory, identity)
        if spool is not None and _is_finished(output):
            # Killed between the last two steps: all that is left to do is to clean up.
            _discard(output, directory)
            return open_store(output)
        if spool is None:
            _refuse_other(output)
            try:
                writer = SpoolWriter(directory)
                spool = _fill(writer, dataset, identity, states, options, progress, accept)
            except BaseException:
                # Half a spool is worth nothing, and the next attempt may be of other files.
                _discard(output, directory)
                raise
        _write(spool, dataset, states, output, options, lock, progress)
    return open_store(output)


def check_dataset(
    store: Store,
    sources: Source | Sequence[Source],
    read: ReadOptions,
    *,
    progress: Progress = silent,
) -> None:
    """Refuse a store that was made from another dataset than `sources`.

    Raises:
        IdentityError: naming the first structure that differs.
        DataError: a structure that cannot be used.
    """
    hashes, ids = [], []
    with progress("check the dataset", len(store.index), "structures") as advance:
        for structure in read_structures(sources, read):
            hashes.append(structure.content_hash())
            ids.append(structure.structure_id)
            advance()
    store.check_dataset(hashes, ids)


def _fill(
    writer: SpoolWriter,
    dataset: Dataset,
    identity: Mapping[str, Any],
    states: States,
    options: ImportOptions,
    progress: Progress,
    accept: Callable[[Structure], object],
) -> Spool:
    """Read everything once."""
    first: dict[str, int] = {}
    with writer, progress("read", None, "structures") as advance:
        for structure, edges in _with_neighbors(dataset, options.graph, options.threads):
            number = len(first)
            seen = first.setdefault(structure.structure_id, number)
            if seen != number:
                raise DataError(
                    f"{dataset.where(number)} and {dataset.where(seen)} are both called "
                    f"{structure.structure_id!r}, and features are matched by id. Name another "
                    "key (--id-key), or none."
                )
            accept(structure)
            writer.append(structure, edges)
            advance(1)
        if not first:
            hold = "holds" if len(dataset.names) == 1 else "hold"
            raise DataError(f"{', '.join(dataset.names)} {hold} no structures. Name other files.")
        # Identity and structures are of the same files: they are the same still.
        dataset.check_unchanged(states)
        return writer.finish(identity, dataset.notes, dataset.keys.of_dataset())


def _with_neighbors(
    structures: Iterable[Structure], rule: GraphRule | None, threads: int
) -> Iterator[tuple[Structure, Edges | None]]:
    """Structures in order, each with its neighbour list if a rule is given."""
    if rule is None:
        for structure in structures:
            yield structure, None
        return

    def search(task: list[Structure]) -> list[tuple[Structure, Edges | None]]:
        return [(s, neighbor_list(s.positions, s.cell, s.pbc, rule)) for s in task]

    waiting: deque[Future[list[tuple[Structure, Edges | None]]]] = deque()
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for task in _tasks(structures):
            waiting.append(pool.submit(search, task))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _tasks(structures: Iterable[Structure]) -> Iterator[list[Structure]]:
    """Consecutive structures of about `ATOMS_PER_TASK` atoms together."""
    task: list[Structure] = []
    n_atoms = 0
    for structure in structures:
        task.append(structure)
        n_atoms += structure.n_atoms
        if n_atoms >= ATOMS_PER_TASK:
            yield task
            task, n_atoms = [], 0
    if task:
        yield task


def _write(
    spool: Spool,
    dataset: Dataset,
    states: States,
    output: Path,
    options: ImportOptions,
    lock: StoreLock,
    progress: Progress,
) -> None:
    """Everything that follows from the spool: splits, order, layout, shards, manifest."""
    split, notes = _splits(spool, options)
    # PCG64 draws the same permutation on every machine; the manifest records the seed.
    generator = np.random.Generator(np.random.PCG64(options.seed))
    order: IntArray = generator.permutation(len(spool)).astype(np.int64)
    plan = plan_blocks(
        spool.n_atoms[order],
        spool.n_edges[order],
        atom_capacity=options.atom_capacity,
        blocks_per_shard=options.blocks_per_shard,
    )
    index = index_from_plan(
        plan,
        structure_id=spool.structure_id[order],
        content_hash=spool.content_hash[order],
        source_index=order,
        origin=spool.origin[order],
        split=split[order],
        group=spool.group[order],
        weight=spool.weight[order],
    )
    optional = [spec for spec in OPTIONAL_FIELDS if spec.name in spool.optional]
    fields: tuple[FieldSpec, ...] = (*STRUCTURE_FIELDS, *optional)
    graph = None
    if options.graph is not None:
        fields += GRAPH_FIELDS
        graph = GraphEntry.describe(options.graph, spool.truncated)
    with create_store(
        output,
        index=index,
        plan=plan,
        fields=fields,
        dataset=_entry(spool, dataset, options, notes),
        graph=graph,
        seed=options.seed,
        lock=lock,
    ) as writer:
        pending = writer.pending_shards()
        shards = [order[plan.shard_structures(shard)] for shard in pending]
        with progress("write", sum(map(len, shards)), "structures") as advance:
            for shard, rows in zip(pending, shards, strict=True):
                writer.write_shard(shard, {spec.name: spool.read(spec, rows) for spec in fields})
                advance(len(rows))
        try:
            # Of a file that is no longer what was read, nobody could check the store afterwards.
            dataset.check_unchanged(states)
        except DataError as error:
            raise DataError(
                f"{error} {output} holds shards of the version before: delete it first."
            ) from None
        writer.commit()


def _entry(
    spool: Spool, dataset: Dataset, options: ImportOptions, notes: list[str]
) -> DatasetEntry:
    read = options.read
    energy, length = read.energy_unit or "eV", read.length_unit or "Å"
    return DatasetEntry(
        digest=dataset_digest([spool.content_hash.tobytes()]),
        n_structures=len(spool),
        n_labelled=int(spool.labelled.sum()),
        sources=list(dataset.names),
        keys=spool.keys,
        units={
            "energy": energy,
            "length": length,
            "forces": read.forces_unit or f"{energy}/{length}",
        },
        notes=[*spool.notes, *notes],
        licences=Licences(structures=options.licence_structures, labels=options.licence_labels),
    )


def _splits(spool: Spool, options: ImportOptions) -> tuple[npt.NDArray[Any], list[str]]:
    """[n_structures] splits in dataset order, and what to say about them."""
    hashes = [row.tobytes() for row in spool.content_hash]
    notes = []
    repeated = len(hashes) - len(set(hashes))
    if repeated:
        notes.append(f"{repeated} structures repeat the contents of another one, to the last bit")
    split = spool.split
    if options.split:
        units = hashes
        if options.split_groups:
            if not any(spool.group):
                raise DataError(
                    "no structure has a group, so whole groups cannot be held out. Name their key "
                    "(--group-key)."
                )
            units = [g.encode() if g else h for g, h in zip(spool.group, hashes, strict=True)]
        split = choose_splits(split.tolist(), units, options.split, options.seed)
    names, counts = np.unique(split.astype(str), return_counts=True)
    if any(names):
        parts = [f"{name or 'unnamed'} {count}" for name, count in zip(names, counts, strict=True)]
        notes.append("splits: " + ", ".join(parts))
    return split, notes


def _identity(dataset: Dataset, states: States, options: ImportOptions) -> dict[str, Any]:
    """What a spool depends on. Files count by name, size and time: it never outlives an import."""
    files: list[list[str | int | None]] = []
    for path, found in zip(dataset.paths, states, strict=True):
        # Without inodes: an import may go on from a copy of its files.
        sizes_and_times: list[int | None] = [n for _, size, time, _ in found for n in (size, time)]
        name = str(path) if is_url(path) else path.name
        # Of what is on a server nothing is known; its own digests tell it apart.
        files.append([name, *(sizes_and_times or [None, None])])
    return {
        "files": files,
        "read": asdict(options.read),
        "recipe": dataset.recipe,
        "graph": options.graph.to_json() if options.graph is not None else None,
    }


def _refuse_foreign(output: Path) -> None:
    """Only what is missing, empty or was left by an import may be written to."""
    if _is_finished(output) and not (output / WORK / "spool").is_dir():
        raise StoreError(
            f"{output} is a finished store, and nothing is overwritten. Name another path."
        )
    if output.is_file() or (
        output.is_dir() and not (output / WORK).is_dir() and any(output.iterdir())
    ):
        raise StoreError(
            f"{output} exists and is no unfinished import, and nothing is overwritten. Name "
            "another path."
        )


def _is_finished(output: Path) -> bool:
    return (output / MANIFEST).is_file() and "structures" not in unfinished_groups(output)


def _refuse_other(output: Path) -> None:
    """Shards of an import whose spool is not ours cannot be gone on with."""
    if (output / MANIFEST).exists() or unfinished_groups(output):
        raise IdentityError(
            f"{output} holds an unfinished import of other files, keys or units. Shards of both "
            f"would be mixed. Repeat the command that began it, or delete {output}."
        )


def _discard(output: Path, directory: Path) -> None:
    """Remove a spool, and what else is left of an import that wrote no shard yet."""
    shutil.rmtree(directory, ignore_errors=True)
    if not unfinished_groups(output):
        shutil.rmtree(output / WORK, ignore_errors=True)
        with suppress(OSError):
            output.rmdir()
