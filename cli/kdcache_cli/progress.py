"""tqdm behind the library's `Progress`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from kdcache.progress import Advance


@contextmanager
def bars(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar with rate and time left; plain lines now and then where there is no terminal."""
    interactive = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        mininterval=0.1 if interactive else 15.0,
        file=sys.stderr,
        dynamic_ncols=True,
        unit_scale=total is None or total >= 10_000,
    ) as bar:

        def advance(n: int = 1, /, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(n)

        yield advance
