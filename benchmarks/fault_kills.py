"""kill -9 at random points of imports, dumps and trainings, and going on."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fault_rows import Row, times

from kdcache.checkpoint import save_potential
from kdcache.store import open_store, read_manifest, verify_store
from tests.chain import dump, make_potential, make_store, make_teacher
from tests.cli import killing
from tests.cli.commands import SMALL_BLOCKS
from tests.cli.test_kill import digests
from tests.faults.training import killed_trainings
from tests.faults.writing import write_data


def kills_of_commands(folder: Path, scale: float) -> Iterator[Row]:
    """An import, and an import with a dump, killed at a touch of a file."""
    data = write_data(folder / "few.extxyz", 14)
    save_potential(folder / "teacher", make_potential())
    store = folder / "store.zarr"
    layout = ("-o", store, *SMALL_BLOCKS, "--fields", "node,energy", "--no-graph")
    commands: dict[str, list[Any]] = {
        "import": ["import", data, "-o", store, "--cutoff", 3.0],
        "dump-teacher": ["dump-teacher", data, "--teacher", folder / "teacher", *layout],
    }
    for name, command in commands.items():
        row = Row(f"kill -9 of {name}, then the same command: same digests")
        touches = killing.run(command, store)
        expected, whole = read_manifest(store), digests(store)
        assert bool(expected.teachers) == (name == "dump-teacher")
        n = times(32, scale)
        starts = np.linspace(1, touches, n + 1)
        points = np.random.default_rng(4).uniform(starts[:-1], starts[1:]).astype(int).tolist()
        for point in points:
            shutil.rmtree(store)
            killed = killing.run(command, store, kill_at=point) == -signal.SIGKILL
            again = killing.run(command, store)
            same = read_manifest(store).root_digest == expected.root_digest
            same = same and digests(store) == whole and verify_store(store).problems == []
            finished = again >= 0 or read_manifest(store).teachers == expected.teachers
            row.count(killed and same and finished, f"touch {point} of {touches}")
        row.note = f"one point in each of {n} equal parts of {touches} touches of files"
        yield row
        shutil.rmtree(store)


def kills_of_trainings(folder: Path, scale: float) -> Iterator[Row]:
    """A training killed at a touch of its files, or at a moment, once or twice."""
    made = make_store(folder)
    dump(made, make_teacher(folder), codec="half")
    store = Path(str(open_store(made.path).path))
    rng = np.random.default_rng(5)
    for by_time, what in ((False, "touch of its files"), (True, "moment")):
        n = times(16, scale)
        shares = [[share] for share in ((np.arange(n) + rng.uniform(size=n)) / n).tolist()]
        for attempts in shares[::4]:
            attempts.append(float(rng.uniform()))
        place = folder / what.split()[0]
        place.mkdir()
        whole, found = killed_trainings(store, place, shares, by_time=by_time)
        row = Row(f"kill -9 of a training at a random {what}: same curve, same bits")
        for (_, held), attempts in zip(found, shares, strict=True):
            row.count(held == whole, attempts)
        row.note = f"{sum(hit for hit, _ in found)} hit before the end; every fourth killed twice"
        yield row


FAULTS = [kills_of_commands, kills_of_trainings]
