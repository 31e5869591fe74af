"""How long work shows itself without kdcache printing anything.

A pipeline asks for a bar and advances it; the command line passes one drawn by tqdm, a script may
pass none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Move a bar on by `n` units; `note` stands at its end (a loss, a rate)."""

    def __call__(self, n: int = 1, /, note: str = "") -> None: ...


class Progress(Protocol):
    """Open a bar of `total` units, or of unknown length with None."""

    def __call__(
        self, label: str, total: int | None, unit: str
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A `Progress` that shows nothing."""

    def advance(n: int = 1, /, note: str = "") -> None:
        del n, note

    yield advance
