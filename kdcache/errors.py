"""The one exception family of kdcache.

Every error a user can cause is a `KdcacheError` whose message says what disagrees, with both
values, what it would have caused and the way out. The command line prints it and exits 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# As many names as an error line bears; the modules of a model are hundreds.
LISTED = 20
LONGEST_LINE = 2000
LONGEST_REASON = 300


def printable(text: str) -> str:
    """A text without what moves a terminal's cursor or changes its colours."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


class KdcacheError(Exception):
    """Base of every error that kdcache raises on purpose.

    Its message is one line a terminal can show, whatever a stranger's file put into it.
    """

    def __init__(self, message: str = "") -> None:
        line = printable(message)
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…")


class DataError(KdcacheError):
    """A dataset file or one structure in it cannot be used."""


class UnitError(DataError):
    """A unit is unknown, or is one of another quantity."""


class ConfigError(KdcacheError):
    """A configuration is inconsistent or names something unknown."""


class ShapeError(KdcacheError):
    """Two arrays that belong together do not fit each other."""


class StoreError(KdcacheError):
    """A store is damaged, unfinished, of another format or would be overwritten."""


class IdentityError(StoreError):
    """Features and data do not belong together."""


class TeacherError(KdcacheError):
    """A teacher cannot be loaded, or its features cannot be stored."""


class DeviceError(TeacherError):
    """The GPU a teacher computes on no longer does; another process, or another GPU, may."""


class TrainingError(KdcacheError):
    """A training run cannot start, go on or be resumed."""


class ClusterError(KdcacheError):
    """Those who share the work are gone, or die of it."""


class ContractError(KdcacheError):
    """A teacher, model or reader of somebody's own does not do what its interface promises."""


def reason_of(error: BaseException) -> str:
    """What the error of a library says, as part of a line: printable, bounded, without a last stop.

    All its lines in one, because some libraries name the trouble in the first and some in the last.

    Example:
        >>> reason_of(ValueError("expected a list,   found a number."))
        'expected a list, found a number'
        >>> reason_of(EOFError())
        'EOFError'
    """
    # What torch raises in C++ ends in the stack it was raised from.
    text = str(error).partition("\nException raised from ")[0]
    said = printable(" ".join(text.split())) or type(error).__name__
    return said.rstrip(". ") if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known name, or all of them.

    Example:
        >>> did_you_mean("pain", ["painn", "schnet"])
        'did you mean painn? (known: painn, schnet)'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listed = ", ".join(names[:LISTED]) if names else "none"
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED} more"
    return f"did you mean {near[0]}? (known: {listed})" if near else f"known: {listed}"


def named(error: OSError, where: str) -> OSError:
    """An error of the system that says which file it is about."""
    return OSError(error.errno, error.strerror, where)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Reading and writing an open file fail without its name; within this, with it."""
    try:
        yield
    except OSError as error:
        raise named(error, where) from None
