"""A command in a process of its own that is killed (-9) at its n-th touch of a store's files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Forked from a process that has imported torch already: twenty runs take seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.cli.killing_preload"])

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "shutil.rmtree"}


def run(
    arguments: Sequence[object], store: Path, kill_at: int | None = None, renaming_to: str = ""
) -> int:
    """Run a command to its end, or to the touch it is killed at.

    Args:
        arguments: of kdcache.
        store: whose files are watched.
        kill_at: which touch (open, rename, remove, …, counted from 1); None lets it end.
        renaming_to: count only renames to files of this name.

    Returns:
        The touches of a command that ended, minus the signal's number of a killed one.
    """
    receiver, sender = _FORKS.Pipe(duplex=False)
    texts = [str(argument) for argument in arguments]
    process = _FORKS.Process(target=_run, args=(texts, str(store), kill_at, renaming_to, sender))
    process.start()
    sender.close()
    process.join()
    if process.exitcode:
        return int(process.exitcode)
    return int(receiver.recv())


def _run(
    texts: list[str], store: str, kill_at: int | None, renaming_to: str, sender: object
) -> None:
    from kdcache_cli.main import main

    touches = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touches
        if event not in TOUCHES or not any(str(v).startswith(store) for v in arguments[:2]):
            return
        if renaming_to and not (event == "os.rename" and str(arguments[1]).endswith(renaming_to)):
            return
        touches += 1
        if touches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    main(texts, standalone_mode=False)
    sender.send(touches)  # type: ignore[attr-defined]
