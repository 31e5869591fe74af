"""The library's `Progress` on a terminal, and in a log.

Everything goes to stderr: what a command prints on stdout can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from kdcache.progress import Advance

# A log of a day's training stays readable, and short steps leave nothing in it.
SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def bars(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar with rate and time left; a plain line now and then where there is no terminal."""
    shown = _bar if sys.stderr.isatty() else _lines
    with shown(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        file=sys.stderr,
        dynamic_ncols=True,
        unit_scale=total is None or total >= 10_000,
    ) as bar:

        def advance(n: int = 1, /, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(n)

        yield advance


@contextmanager
def _lines(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    done = at_last_line = 0
    last_note = ""
    last_line = time.monotonic()

    def advance(n: int = 1, /, note: str = "") -> None:
        nonlocal done, at_last_line, last_note, last_line
        done += n
        last_note = note or last_note
        elapsed = time.monotonic() - last_line
        if elapsed < SECONDS_BETWEEN_LINES:
            return
        of = f" of {total}" if total is not None else ""
        rate = (done - at_last_line) / elapsed
        ending = f", {last_note}" if last_note else ""
        click.echo(f"{label}: {done}{of} {unit}, {rate:.3g}/s{ending}", err=True)
        at_last_line, last_line = done, last_line + elapsed

    yield advance
