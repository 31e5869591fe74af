"""A dataset: files and globs, read one structure after the other, as often as one likes.

Owns finding files and readers, ids and the check of every structure; formats are the readers'.
Invariant: structures come in the order the files were named, each checked, each with an id, and
all of files that nobody wrote to meanwhile.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import cast

from kdcache.errors import DataError, KdcacheError
from kdcache.readers.interface import Reader, ReadOptions, place
from kdcache.readers.labels import LabelKeys
from kdcache.registry import lookup
from kdcache.store import is_store
from kdcache.store.location import is_url, store_location
from kdcache.store.manifest import MANIFEST
from kdcache.structures import Structure, check_structure

ENTRY_POINTS = "kdcache.readers"
# Every other suffix is for ASE to recognise.
FORMAT_OF_SUFFIX = {
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".npz": "npz",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".parquet": "parquet",
    ".db": "ase-db",
    ".lmdb": "ocp-lmdb",
    ".zarr": "store",
}
COMPRESSED = (".gz", ".bz2", ".xz")
LMDB_LOCK = "lock.mdb"

Source = str | PathLike[str]
# What tells a file from another one, or from what it was: name, bytes, time (ns) and inode.
FileState = tuple[str, int, int, int]
States = tuple[tuple[FileState, ...], ...]


@dataclass
class Dataset:
    """Structures of one or several files; iterate as often as needed, nothing is kept.

    Attributes:
        paths: the files, in order.
        options: how they are read.
        recipe: what is made of them, where structures do not come as they are; identifies an
            import beside the files.
        keys: which keys the labels were taken from, filled while iterating.
        counts: structures read of each file, filled while iterating.
    """

    paths: tuple[Path, ...]
    options: ReadOptions = field(default_factory=ReadOptions)
    recipe: str = ""
    keys: LabelKeys = field(default_factory=LabelKeys)
    counts: list[int] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """File names, without directories."""
        return tuple(path.name for path in self.paths)

    @property
    def notes(self) -> list[str]:
        """One line per file read so far: which keys its labels came from."""
        return [
            f"{name}: " + ", ".join(f"{quantity} from {key}" for quantity, key in taken.items())
            for name, taken in self.keys.by_file.items()
        ]

    def __iter__(self) -> Iterator[Structure]:
        """Every structure, checked, with an id.

        Raises:
            DataError: a structure or file that cannot be used, named by file and place; or a file
                that changed while it, or one after it, was read.
            UnitError: an unknown unit, or none where the format has none.
        """
        self.keys.taken.clear()
        self.counts.clear()
        before = self.states()
        for path, stem in zip(self.paths, _stems(self.paths), strict=True):
            self.counts.append(0)
            try:
                for index, structure in enumerate(self._read(path)):
                    if not structure.structure_id:
                        structure.structure_id = f"{stem}:{index}"
                    check_structure(
                        structure, place(path, index), unlabelled=self.options.unlabelled
                    )
                    self.counts[-1] += 1
                    yield structure
            except KdcacheError:
                # Half of a file that is being written looks damaged; that it changed says more.
                self.check_unchanged(before)
                raise
            self.check_unchanged(before)

    def states(self) -> States:
        """What `check_unchanged` compares, of every file; nothing of what is on a server."""
        return tuple(_states(path) for path in self.paths)

    def check_unchanged(self, before: States) -> None:
        """The files are what they were; one that was only touched counts as changed.

        Args:
            before: `states` then.

        Raises:
            DataError: naming the first that is not.
        """
        for path, then, now in zip(self.paths, before, self.states(), strict=True):
            if then == now:
                continue
            name, reason = _difference(then, now)
            raise DataError(
                f"{path / name} changed while the dataset was read: {reason}. Structures of two "
                f"versions would be mixed. Repeat the command when nothing writes to it."
            )

    def where(self, number: int) -> str:
        """File and place of the structure that came as `number`, counted over all files.

        Raises:
            IndexError: it has not been read yet.
        """
        for path, count in zip(self.paths, self.counts, strict=False):
            if number < count:
                return place(path, number)
            number -= count
        raise IndexError(f"structure {number} has not been read yet")

    def _read(self, path: Path) -> Iterator[Structure]:
        name = self.options.format or format_of(path)
        reader = cast(Reader, lookup(ENTRY_POINTS, name, allow_import=True))
        return reader(path, self.options, self.keys)


def read_structures(
    sources: Source | Sequence[Source], options: ReadOptions | None = None
) -> Dataset:
    """A dataset of files and globs, not read yet.

    Args:
        sources: one or several files, stores or their addresses, globs ("data/*.extxyz",
            sorted by name) or directories of LMDB shards.
        options: format, keys, units.

    Raises:
        DataError: no such file, a glob without a match, or a file named twice.
        UnitError: an unknown unit.
    """
    options = options or ReadOptions()
    # A misspelt unit should not wait for the first file.
    options.factors()
    if isinstance(sources, str | PathLike):
        sources = [sources]
    paths = [path for source in sources for path in _expand(source, options.format)]
    if not paths:
        raise DataError("No files were named. Name at least one dataset file.")
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(
                f"{path} is named twice, and its structures would count twice. Name it once; a "
                "glob may already match it."
            )
        seen.add(path.resolve())
    return Dataset(tuple(paths), options)


def format_of(path: Path) -> str:
    """The reader a file's suffix asks for, looking through .gz, .bz2 and .xz."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    if is_store(path):
        return "store"
    return FORMAT_OF_SUFFIX.get(suffix, "ase")


def _states(path: Path) -> tuple[FileState, ...]:
    """Of a file; of everything in a directory that its reader reads."""
    if (path / MANIFEST).is_file():
        # A store's manifest has a digest of all else.
        files = [path / MANIFEST]
    elif path.is_dir():
        # Readers of an LMDB write their names into its lock.
        inside = (file for file in path.rglob("*") if file.is_file())
        files = sorted(file for file in inside if file.name != LMDB_LOCK)
    else:
        files = [path]
    found = []
    for file in files:
        with suppress(FileNotFoundError, NotADirectoryError):
            status = file.stat()
            name = "" if file == path else file.relative_to(path).as_posix()
            found.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _difference(then: Sequence[FileState], now: Sequence[FileState]) -> tuple[str, str]:
    """Name of the first file that differs, and how."""
    had, has = ({state[0]: state for state in states} for states in (then, now))
    name = next(n for n in sorted({*had, *has}) if had.get(n) != has.get(n))
    if name not in has:
        return name, "it is gone"
    if name not in had:
        return name, "it was not there before"
    (_, size, _, inode), (_, new_size, _, new_inode) = had[name], has[name]
    if size != new_size:
        return name, f"it had {size} bytes, now {new_size}"
    if inode != new_inode:
        return name, "another file took its name"
    return name, "it was written to, or touched"


def _expand(source: Source, reader: str | None) -> list[Path]:
    if is_url(source):
        store_location(source)
        return [Path(source)]
    path = Path(source).expanduser()
    # A file may well be called "a[1].xyz": what exists is no pattern.
    if path.exists():
        if path.is_dir() and format_of(path) == "ase":
            shards = sorted(path.glob("*.lmdb"))
            if shards:
                return shards
            if reader is not None and ":" in reader:  # somebody's own, who knows what it reads
                return [path]
            raise DataError(f"{path} is a directory. Name its files, e.g. '{path / '*.extxyz'}'.")
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path} does not exist. Check the path.")
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{path} matches no file. Check the pattern.")
    return found


def _stems(paths: Sequence[Path]) -> list[str]:
    """Names structures are numbered under; the second file called train is "train#2"."""
    counts: dict[str, int] = {}
    stems = []
    for path in paths:
        stem = Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem
        counts[stem] = counts.get(stem, 0) + 1
        stems.append(stem if counts[stem] == 1 else f"{stem}#{counts[stem]}")
    return stems
