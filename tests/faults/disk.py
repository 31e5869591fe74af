"""A disk that is full or broken from a chosen call on, below one folder and for this process.

Stands between Python and the system, where every write, sync, rename and new file passes.
Invariant: outside the folder, and outside the block, nothing is changed.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What needs room on a disk; all else fails because a disk is broken.
NEEDS_ROOM = ("write", "create", "mkdir")


@dataclass
class Disk:
    """Calls that change what is below a folder, the one numbered `fails_at` (from 1) failing.

    Attributes:
        folder: whose files are watched.
        fails_at: 0 for a disk that works.
        number: errno; None chooses a full disk for what needs room and a broken one for the rest.
        lasting: every later call that needs room fails as well, as on a disk that is full.
        calls: kind and path of every call so far; those of several threads in any order.
    """

    folder: Path
    fails_at: int = 0
    number: int | None = None
    lasting: bool = True
    calls: list[tuple[str, str]] = field(default_factory=list)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def call(self, kind: str, path: str) -> bool:
        """Count a call; whether it is the one that fails first."""
        with self._counting:
            self.calls.append((kind, path))
            return len(self.calls) == self.fails_at

    def fails_still(self, kind: str) -> bool:
        """The disk has failed, and what is asked for now fails too."""
        over = bool(self.fails_at) and len(self.calls) > self.fails_at
        return over and self.lasting and self._needs_room and kind in NEEDS_ROOM

    def error(self, path: str | None = None) -> OSError:
        """As the system gives it: with a path only from what was given one."""
        return OSError(self.expected, os.strerror(self.expected), path)

    @property
    def expected(self) -> int:
        """The errno that the first failure has."""
        return self.number or (errno.ENOSPC if self._needs_room else errno.EIO)

    @property
    def _needs_room(self) -> bool:
        return self.calls[self.fails_at - 1][0] in NEEDS_ROOM

    def check(self, kind: str, path: object) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if text.startswith(str(self.folder)) and (self.call(kind, text) or self.fails_still(kind)):
            raise self.error(None if kind == "fsync" else text)

    def write(self, path: str, data: Any, through: Callable[[Any], int]) -> int:
        """Write as a disk does that fills up: first a part, then nothing."""
        if not path.startswith(str(self.folder)):
            return through(data)
        if self.call("write", path):
            view = memoryview(data).cast("B")
            if self.error().errno == errno.ENOSPC and len(view) > 1:
                return through(view[: len(view) // 2])
            raise self.error()
        if self.fails_still("write"):
            raise self.error()
        return through(data)


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Within it, the system answers as `disk` says."""
    real_open, real_write, real_fsync = os.open, os.write, os.fsync
    file_open = builtins.open

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            return disk.write(str(self.name), data, super().write)

    def open_file(file: Any, mode: str = "r", buffering: int = -1, *a: Any, **more: Any) -> Any:
        watched = isinstance(file, str | os.PathLike) and str(file).startswith(str(disk.folder))
        if not watched or not set(mode) & set("wax+"):
            return file_open(file, mode, buffering, *a, **more)
        disk.check("create", file)
        raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *a, **more)

    def open_descriptor(path: Any, flags: int, *a: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            disk.check("create", path)
        return real_open(path, flags, *a, **more)

    def write(descriptor: int, data: Any) -> int:
        return disk.write(_path(descriptor), data, lambda part: real_write(descriptor, part))

    def fsync(descriptor: int) -> None:
        path = _path(descriptor)
        disk.check("fsync", path)
        if not path.startswith(str(disk.folder)):
            real_fsync(descriptor)

    def checked(kind: str, real: Callable[..., None], place: int) -> Callable[..., None]:
        def call(*a: Any, **more: Any) -> None:
            disk.check(kind, a[place])
            real(*a, **more)

        return call

    replacements: list[tuple[Any, str, Any]] = [
        (os, "open", open_descriptor),
        (os, "write", write),
        (os, "fsync", fsync),
        (os, "replace", checked("rename", os.replace, 1)),
        (os, "rename", checked("rename", os.rename, 1)),
        (os, "mkdir", checked("mkdir", os.mkdir, 0)),
        (builtins, "open", open_file),
        (io, "open", open_file),
    ]
    kept = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    for module, name, replacement in replacements:
        setattr(module, name, replacement)
    try:
        yield disk
    finally:
        for module, name, original in kept:
            setattr(module, name, original)


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
