"""A program that writes a store and kills itself at a file-system event: run by test_resume.

Arguments: path of the store; number of the event to die before, or 0 to live and print how many
events there were. Events are what the interpreter's audit hook sees of opened, renamed, made and
removed files, so every step that changes the disk is a possible death.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from kdcache.store import add_teacher, open_store
from kdcache.store.work import WorkFolder
from tests.store.sample import (
    TEACHER,
    Sample,
    begin_structures,
    make_sample,
    teacher_entry,
    write_all,
)

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def write(path: Path, sample: Sample) -> None:
    """Write the store, going on with whatever is there."""
    if not (path / "manifest.json").exists() or WorkFolder(path, "structures").begun:
        write_all(begin_structures(path, sample), sample)
    work = WorkFolder(path, "teachers/painn")
    if "painn" not in open_store(path).teachers or work.begun:
        write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample)


def main() -> None:
    path, last = Path(sys.argv[1]), int(sys.argv[2])
    sample = make_sample()
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(path)):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write(path, sample)
    print(seen)


if __name__ == "__main__":
    main()
