"""Unpickle what a stranger wrote, as far as that can be done without running it.

A pickle names functions and calls them; here a name reaches only what a table allows, and any other
is refused. Formats and files are the callers'.
Invariant: nothing is imported by a name that a pickle holds.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from kdcache.errors import DataError, KdcacheError, printable, reason_of


class ForbiddenGlobalError(DataError):
    """A pickle names something that no table allows.

    Attributes:
        name: "module.name" as the pickle writes it.
    """

    def __init__(self, name: str) -> None:
        name = printable(name[:100])
        super().__init__(
            f"its pickle names {name}, which such a file has no use for and which could run code. "
            "Nothing of it was run: do not trust the file."
        )
        self.name = name


class Function:
    """A function as a pickle may call it, and nothing else: its attributes cannot be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> NoReturn:
        raise ForbiddenGlobalError("an attribute of a function")


class _SealedType(type):
    """Classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise ForbiddenGlobalError(f"attribute {name} of a class")


class Record(metaclass=_SealedType):
    """Stands for an object of somebody's class: what the pickle says it consists of.

    Attributes:
        state: attributes by name.
    """

    state: dict[str, Any]

    def __new__(cls, *arguments: object, **named: object) -> Record:
        record = super().__new__(cls)
        record.state = {}
        return record

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.state = {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stand-in is not to be pickled")


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler for which only the names of a table exist.

    Args:
        file: with the pickle.
        allowed: what a pickle gets for (module, name).
    """

    def __init__(
        self, file: Any, allowed: Mapping[tuple[str, str], object], **settings: Any
    ) -> None:
        super().__init__(file, **settings)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise ForbiddenGlobalError(f"{module}.{name}") from None


def load_restricted(data: bytes, allowed: Mapping[tuple[str, str], object]) -> object:
    """The object in a pickle that names nothing but what is allowed.

    Args:
        data: the pickle.
        allowed: what it gets for (module, name).

    Raises:
        ForbiddenGlobalError: it names something else; nothing of it was run.
        DataError: it is damaged.
    """
    try:
        return RestrictedUnpickler(io.BytesIO(data), allowed).load()
    except KdcacheError:
        raise
    # A damaged pickle raises whatever its opcodes run into: EOFError, KeyError, TypeError, ...
    except Exception as error:
        raise DataError(
            f"it is no complete pickle ({reason_of(error)}). Get the file again."
        ) from error


def refused_name(error: Exception) -> str | None:
    """The global that torch's own restricted unpickler refused, read off its message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else None
