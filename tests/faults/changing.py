"""Files that are written to while something else reads them, at a chosen structure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from kdcache.progress import Advance, silent


class During:
    """A progress bar that does something once, when so many structures were read or written; at 0,
    before the first."""

    def __init__(self, label: str, after: int, work: Callable[[], object]) -> None:
        self.label, self.left, self.work = label, after, work

    def __call__(self, label: str, total: int | None, unit: str) -> During:
        return self if label == self.label else silent(label, total, unit)  # type: ignore[return-value]

    def __enter__(self) -> Advance:
        if self.left == 0:
            self.work()
        return self.advance

    def __exit__(self, *raised: object) -> None: ...

    def advance(self, n: int = 1, /, note: str = "") -> None:
        if self.left > 0 and self.left <= n:
            self.work()
        self.left -= n


def long_ago(path: Path) -> Path:
    """Files that were written well before the test, as all are."""
    for file in (path, *path.rglob("*")):
        os.utime(file, (1e9, 1e9))
    return path


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(path.read_bytes()[-500:])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"1.4", b"1.5"))


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    os.replace(other, path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "appended to": (append, r"it had \d+ bytes, now \d+"),
    "cut off": (truncate, r"it had \d+ bytes, now \d+"),
    "rewritten to the same size": (rewrite, "it was written to, or touched"),
    "replaced by a copy": (replace, "another file took its name"),
    "removed": (Path.unlink, "it is gone"),
    "touched": (Path.touch, "it was written to, or touched"),
}
