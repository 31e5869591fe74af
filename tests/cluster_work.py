"""Work for the workers of a cluster that misbehaves on purpose; leaves a file for every attempt."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from kdcache.errors import TeacherError


@dataclass(frozen=True)
class Squares:
    """Squares of numbers, with accidents.

    Attributes:
        directory: where attempts are noted.
        deadly: numbers whose first attempt kills the process; always, where `again`.
        wrong: numbers that raise.
        full: numbers whose result does not fit the disk.
        slow: numbers whose first attempt waits until somebody else has begun another.
    """

    directory: Path
    deadly: tuple[int, ...] = ()
    again: bool = False
    wrong: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()

    def __call__(self) -> Callable[[int], int]:
        self._note("prepared")
        return self.square

    def square(self, number: int) -> int:
        """The square, if nothing happens on the way."""
        n_attempts = self._note(str(number))
        if number in self.deadly and (self.again or n_attempts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.wrong:
            raise TeacherError(f"{number} is not to be squared")
        if number in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{number}.square")
        while number in self.slow and n_attempts == 1 and self.attempts(str(number)) < 2:
            time.sleep(0.01)
        return number**2

    def attempts(self, what: str) -> int:
        """How often something was begun."""
        return len(list(self.directory.glob(f"{what}.*")))

    def _note(self, what: str) -> int:
        (self.directory / f"{what}.{os.getpid()}.{uuid4().hex}").touch()
        return self.attempts(what)
