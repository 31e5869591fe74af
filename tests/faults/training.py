"""Trainings that are killed (-9), and what their runs hold afterwards.

One process imports what a training needs, which takes longer than the training; each training is
a fork of it. Invariant: nothing but files passes from one training to the next.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cli import killing
from tests.cli.commands import settings

# A row of metrics at every other step, and a state to go on from between them.
SETTINGS = settings("training.max_steps=10", "training.eval_every=2", "training.checkpoint_every=3")
Outcome = tuple[list[dict[str, str]], dict[str, str]]


def training_command(store: Path, run: Path) -> list[object]:
    """A training that takes a moment, from a store with a teacher."""
    return ["train-student", store, "-o", run, "--strategy", "n2n", *SETTINGS]


def outcome(run: Path) -> Outcome:
    """The loss curve without wall times, and digests of the kept model and the last state."""
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for row in rows:
        del row["seconds"]
    # A kill between writing the last state and dropping the last but two leaves that one.
    last = max((run / "state").glob("step-*[0-9]"))
    files = sorted([*run.glob("*.safetensors"), *last.glob("*.safetensors")])
    return rows, {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def killed_trainings(
    store: Path, folder: Path, shares: Sequence[Sequence[float]], *, by_time: bool = False
) -> tuple[Outcome, list[tuple[bool, Outcome]]]:
    """Trainings of one configuration: one that is left in peace, and others that are killed.

    Args:
        store: trained on, with a teacher.
        folder: for the runs.
        shares: of each further training, in [0, 1], where its attempts are killed, of all touches
            of its files; the attempt after the last one is left to end.
        by_time: of the wall time of a training instead.

    Returns:
        What the undisturbed one holds; of each other whether a kill hit, and what it holds.
    """
    receiver, sender = killing._FORKS.Pipe(duplex=False)
    arguments = (str(store), str(folder), shares, by_time, sender)
    process = killing._FORKS.Process(target=_campaign, args=arguments)
    process.start()
    sender.close()
    try:
        found: Any = receiver.recv()
    finally:
        process.join()
    return found  # type: ignore[no-any-return]


def _campaign(
    store: str, folder: str, shares: Sequence[Sequence[float]], by_time: bool, sender: Any
) -> None:
    # Imported by the first step of an optimizer, for seconds.
    import torch._dynamo  # noqa: F401

    import kdcache_cli.train  # noqa: F401

    def run(path: Path, touch: int | None = None, seconds: float | None = None) -> int:
        """Touches of a training that ended, minus the signal of a killed one."""
        texts = [str(part) for part in training_command(Path(store), path)]
        forks = multiprocessing.get_context("fork")
        receiver, counts = forks.Pipe(duplex=False)
        process = forks.Process(target=killing._run, args=(texts, str(path), touch, "", counts))
        process.start()
        counts.close()
        process.join(seconds)
        process.kill()
        process.join()
        return int(process.exitcode) if process.exitcode else int(receiver.recv())

    whole = Path(folder) / "whole"
    started = time.perf_counter()
    touches = run(whole)
    seconds = time.perf_counter() - started
    found = []
    for k, attempts in enumerate(shares):
        path, hit = Path(folder) / f"run{k}", False
        for share in attempts:
            # Killed right behind its end, it is finished and refuses to be gone on with.
            if by_time:
                ended = run(path, seconds=share * seconds)
            else:
                ended = run(path, touch=1 + int(share * (touches - 1)))
            hit = hit or ended == -signal.SIGKILL
            if ended >= 0:
                break
        else:
            _finish(run, path)
        found.append((hit, outcome(path)))
    sender.send((outcome(whole), found))


def _finish(run: Any, path: Path) -> None:
    from kdcache.checkpoint import load_state

    state = load_state(path) if path.exists() else None
    if state is None or state.step < 10:
        assert run(path) >= 0
