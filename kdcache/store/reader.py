"""Open a store, read its fields by block, and its structures as records.

Owns what is checked before anything is read, and decoding; bytes are the business of `arrays`.
Never writes. Invariant: an open store is finished, whole, and laid out as its index says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError, did_you_mean
from kdcache.fields import FieldSpec, Level
from kdcache.store import identity, records
from kdcache.store.arrays import ArrayReader, fitting
from kdcache.store.cache import CachedFiles, StoreCache
from kdcache.store.codecs import from_compact, read_dtype
from kdcache.store.contents import (
    ZARR,
    array_documents,
    array_reader,
    check_meaning,
    group_plans,
    groups,
    plan_of,
)
from kdcache.store.documents import check_document, read_checked
from kdcache.store.entries import GraphEntry, TeacherEntry
from kdcache.store.failures import FAILURES, Failures, largest_failures, parse_failures
from kdcache.store.files import LocalFiles, StoreFiles
from kdcache.store.index import INDEX, StoreIndex, largest_index, parse_index
from kdcache.store.layout import BlockPlan
from kdcache.store.location import StoreUrl, is_url, store_location
from kdcache.store.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_manifest
from kdcache.store.metadata import SCALE_SUFFIX
from kdcache.store.remote import RemoteFiles
from kdcache.store.work import unfinished_groups
from kdcache.store.zipped import ZipFiles, is_zip
from kdcache.structures import Structure

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Store:
    """A finished store, open for reading; made by `open_store`. Safe to read from several threads.

    Attributes:
        files: of the store, by name.
        manifest: its description.
        index: a row per structure, in store order.
        plan: where each structure lies.
    """

    files: StoreFiles
    manifest: Manifest
    index: StoreIndex
    plan: BlockPlan
    _plans: dict[str, BlockPlan] = field(repr=False)
    _groups: dict[str, dict[str, FieldSpec]] = field(repr=False)
    _arrays: dict[str, ArrayReader] = field(repr=False)
    _failed: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def path(self) -> Path | StoreUrl:
        """Where the store is."""
        return self.files.location

    @property
    def teachers(self) -> Mapping[str, TeacherEntry]:
        """Teachers by name."""
        return self.manifest.teachers

    @property
    def graph(self) -> GraphEntry | None:
        """Rule of the neighbour list the store keeps, equal to a `GraphRule` of the same values."""
        return self.manifest.graph

    def fields(self, group: str) -> Mapping[str, FieldSpec]:
        """Fields by name of "structures" or "teachers/<name>".

        Raises:
            StoreError: there is no such group.
        """
        if group not in self._groups:
            raise StoreError(
                f"{self.path} has no group {group!r}: {did_you_mean(group, self._groups)}"
            )
        return self._groups[group]

    @property
    def plans(self) -> Mapping[str, BlockPlan]:
        """The layout of every group by its name; a teacher's may have edges of its own."""
        return self._plans

    def spec(self, name: str) -> FieldSpec:
        """The field called e.g. "structures/forces" or "teachers/painn/node".

        Raises:
            StoreError: there is no such field.
        """
        group, _, short = name.rpartition("/")
        fields = self.fields(group)
        part = self.manifest.withheld
        if group == "structures" and part is not None and short in part.structures:
            raise records.absent(self, [short])
        if short not in fields:
            raise StoreError(
                f"{self.path}: {group} has no field {short!r}: {did_you_mean(short, fields)}"
            )
        return fields[short]

    def failures(self, teacher: str) -> Failures:
        """Structures that a teacher gave nothing for, whose rows in its fields mean nothing.

        Raises:
            StoreError: there is no such teacher, or their file is damaged.
        """
        self.fields(f"teachers/{teacher}")
        n_failed = self.teachers[teacher].n_failed
        if not n_failed:
            return Failures()
        name = f"teachers/{teacher}/{FAILURES}"
        try:
            content = self.files.read(name, largest_failures(n_failed))
        except FileNotFoundError:
            raise StoreError(
                f"{self.files.where(name)} is missing, which names the {n_failed} structures this "
                f"teacher failed on. Fetch it again."
            ) from None
        return parse_failures(content, self.files.where(name), n_failed, self.index)

    def failed_rows(
        self, group: str, level: Level, rows: slice | npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.bool_]:
        """[n_rows] which rows of a level belong to structures that the group's teacher failed on.

        Args:
            group: "structures", where there are none, or "teachers/<name>".
            level: whose rows are meant.
            rows: of structures, in store order.

        Raises:
            StoreError: as `failures`, whose file is read once.
        """
        if group not in self._failed:
            failed = np.zeros(len(self), bool)
            if group != "structures":
                failed[self.failures(group.removeprefix("teachers/")).row] = True
            self._failed[group] = failed
        return np.repeat(self._failed[group][rows], self._plans[group].counts(level)[rows])

    def read(
        self,
        name: str,
        blocks: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        *,
        check: bool = True,
        out: Array | None = None,
    ) -> Array:
        """Values of a field in some blocks, without padding.

        Args:
            name: e.g. "structures/forces" or "teachers/painn/node".
            blocks: block numbers; None for all. Adjacent ones are read at once.
            check: compare checksums (10 GB/s) of what is read.
            out: [at least as many rows, *field shape] contiguous, of the dtype returned; its
                first rows are filled and returned. Saves half the time of a half field.

        Returns:
            [rows, *field shape], the rows of the blocks' structures in the order of `blocks`; a
            half field as float16, a compact one as float32, an exact one in its own dtype.

        Raises:
            StoreError: no such field or block; a shard is missing, truncated or damaged.
            ShapeError: `out` does not fit.
        """
        spec = self.spec(name)
        chosen = np.arange(self.plan.n_blocks) if blocks is None else np.array(blocks, np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < self.plan.n_blocks):
            raise StoreError(
                f"Blocks {int(chosen.min())}…{int(chosen.max())} of {name} are asked for, the "
                f"store has blocks 0…{self.plan.n_blocks - 1}."
            )
        array = self._arrays[name]
        if spec.codec != "compact":
            stored = array.allocate(chosen, out)
            array.read(chosen, stored, check)
            return stored
        stored = array.allocate(chosen)
        array.read(chosen, stored, check)
        scales = self._arrays[name + SCALE_SUFFIX]
        scale = scales.allocate(chosen)
        scales.read(chosen, scale, check)
        values = fitting(stored.shape, read_dtype(spec), out)
        ends = np.cumsum(array.used[chosen])
        for i, end in enumerate(ends.tolist()):
            rows = slice(end - int(array.used[chosen[i]]), end)
            from_compact(stored[rows], scale[i], values[rows])
        return values

    @contextmanager
    def fetched(
        self, names: Iterable[str], blocks: Sequence[int] | npt.NDArray[np.integer[Any]]
    ) -> Iterator[None]:
        """Within it, these blocks of all these fields are on their way or there.

        From a server they are asked for at once, so that `read` waits once and not once a field,
        and so from a disk, as long as it is one that reads meet. What a server sent is held until
        the end: as many bytes as are stored.

        Raises:
            StoreError: no such field; a shard is missing or its index is damaged.
        """
        chosen = np.array(blocks, np.int64)
        if not self.files.asks_ahead or not len(chosen):
            with self.files.fetched(()):
                yield
            return
        # `read` says which block does not exist.
        chosen = chosen[(chosen >= 0) & (chosen < self.plan.n_blocks)]
        arrays = []
        for name in dict.fromkeys(names):
            scales = [name + SCALE_SUFFIX] if self.spec(name).codec == "compact" else []
            arrays += [self._arrays[array] for array in (name, *scales)]
        unread = [(array, shard) for array in arrays for shard in array.unread_shards(chosen)]
        self.files.each(lambda one: one[0].bounds(one[1]), unread)
        with self.files.fetched([part for array in arrays for part in array.ranges(chosen)]):
            yield

    def structure(self, row: int) -> Structure:
        """The structure in a row of the index.

        Raises:
            StoreError: no such row, or positions are not part of the store.
        """
        if not 0 <= row < len(self.index):
            raise StoreError(f"{self.path} has rows 0…{len(self.index) - 1}, not {row}.")
        return next(records.iterate_structures(self, np.array([row])))

    def structures(self, order: Literal["source", "store"] = "source") -> Iterator[Structure]:
        """All structures, in dataset order or in store order, in bounded memory.

        Raises:
            StoreError: positions are not part of the store, or a shard is damaged.
        """
        rows = self.index.source_order if order == "source" else np.arange(len(self.index))
        return records.iterate_structures(self, rows)

    def check_dataset(self, content_hashes: Sequence[bytes], structure_ids: Sequence[str]) -> None:
        """The store was made from this dataset.

        Args:
            content_hashes: `Structure.content_hash` of each structure, in dataset order.
            structure_ids: their ids, for the message.

        Raises:
            IdentityError: naming the first structure that differs, and whether the dataset is
                another one, reordered or edited.
        """
        identity.check_dataset(self.path, self.index, content_hashes, structure_ids)


def open_store(
    path: str | Path | StoreFiles,
    *,
    cache: str | Path | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a finished store, and refuse what is none.

    Args:
        path: of the store; or its address: https://, s3://, gs://, az://; or its files.
        cache: directory in which files of a remote store are kept, checked against their digests;
            default the one KDCACHE_STORE_CACHE names, if any. Several processes may share it.
        cache_bytes: at most so much is kept there; default KDCACHE_STORE_CACHE_SIZE, or 20 GB.

    Raises:
        StoreError: nothing or something else is there; the store is unfinished, of a newer format,
            or a file is missing, truncated or not what the manifest says. Shards of a remote store
            are looked at when they are first read.
        ConfigError: a size of a cache that is none.
    """
    files = store_files(path)
    try:
        manifest = read_manifest(files)
    except FileNotFoundError:
        raise StoreError(_why_no_store(files)) from None
    kept = StoreCache.chosen(cache, cache_bytes) if files.is_remote else None
    if kept is not None:
        files = CachedFiles(files, kept, manifest.digests)
    while True:
        try:
            return _open(files, manifest)
        except StoreError:
            # A dump may have added its teacher between our reading of two files.
            before, manifest = manifest, read_manifest(files)
            if manifest == before:
                raise


def _open(files: StoreFiles, manifest: Manifest) -> Store:
    n_structures = manifest.dataset.n_structures
    index = parse_index(
        read_checked(files, INDEX, manifest, largest_index(n_structures)),
        files.where(INDEX),
        n_structures,
    )
    # A kill between the last two files of a commit leaves the root one teacher ahead of the
    # manifest. Its writer puts that right when it is run again, and must be able to open the store.
    if not _unfinished(files):
        read_checked(files, ZARR, manifest, MAX_MANIFEST_BYTES)
    where = str(files.location)
    plan = plan_of(manifest, index, where)
    digest = index.dataset_digest()
    if digest != manifest.dataset.digest:
        raise StoreError(
            f"{where}: the manifest says dataset {manifest.dataset.digest[:12]}…, the index holds "
            f"{digest[:12]}…. Rows would meet the wrong structures. Fetch the store again."
        )
    check_meaning(manifest, where)
    plans = group_plans(files, manifest, plan)
    arrays, documents = {}, []
    for name, spec, document in array_documents(manifest, plans):
        documents.append((f"{name}/{ZARR}", document))
        plan_of_group = plans[name.rpartition("/")[0]]
        arrays[name] = array_reader(files, name, spec, document, plan_of_group)
    files.each(lambda one: check_document(files, *one), documents)
    if not files.is_remote:
        for array in arrays.values():
            array.check_files()
    return Store(files, manifest, index, plan, plans, groups(manifest), arrays)


def is_store(path: str | Path) -> bool:
    """Whether a store may lie there: an address, a directory with a manifest, or a packed store."""
    is_packed = str(path).lower().endswith(".zip") and is_zip(path)
    return is_url(path) or is_packed or (Path(path) / MANIFEST).is_file()


def store_files(path: str | Path | StoreFiles) -> StoreFiles:
    """The files of the store at a path or an address.

    Raises:
        StoreError: an address that is none, a file that is no packed store, or the package for
            remote stores is missing.
    """
    if not isinstance(path, str | Path):
        return path
    if is_zip(path):
        return ZipFiles(Path(path))
    location = store_location(path)
    if isinstance(location, StoreUrl):
        return RemoteFiles(location)
    if location.is_file():
        raise StoreError(
            f"{location} is a file and no kdcache store: a store is a directory, or a zip that "
            f"`kdcache pack` wrote. Make a store with `kdcache import DATA -o STORE`."
        )
    return LocalFiles(location)


def _unfinished(files: StoreFiles) -> dict[str, int]:
    """Groups that are being written: nobody writes to a server."""
    return unfinished_groups(files.location) if isinstance(files.location, Path) else {}


def _why_no_store(files: StoreFiles) -> str:
    path = files.location
    if not isinstance(path, Path):
        return (
            f"{files.where(MANIFEST)} is not there: {path} is no finished store. Check the address."
        )
    if not path.exists():
        return f"{path} does not exist. Make a store with `kdcache import DATA -o {path}`."
    begun = unfinished_groups(path)
    if "structures" in begun:
        return (
            f"{path} is unfinished: {begun['structures']} shards of its structures are written. "
            f"Run the command that was interrupted again; it goes on from there."
        )
    if (path / ".work").is_dir():
        return (
            f"{path} is unfinished: its dataset was still being read. Run the command that was "
            f"interrupted again."
        )
    if any((path / name).exists() for name in (ZARR, ".zgroup", ".zarray")):
        return (
            f"{path} is Zarr but no kdcache store: it has no {MANIFEST}. Structures and features "
            f"could not be matched. Make a store with `kdcache import`."
        )
    return f"{path} is no kdcache store: it has no {MANIFEST}."
