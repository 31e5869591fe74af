"""Faults of the disk that is written to: full, broken, read-only."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from fault_rows import Row, times

from kdcache.checkpoint import save_potential
from kdcache.store import verify_store
from kdcache_cli.main import main
from tests.chain import dump, make_potential, make_store, make_teacher
from tests.cli.commands import SMALL_BLOCKS
from tests.faults.disk import NEEDS_ROOM, Disk, failing
from tests.faults.test_disk import problems_of
from tests.faults.training import outcome, training_command
from tests.faults.writing import write_data, write_store
from tests.store.sample import files_of

ONE_LINE = 1


def calls(folder: Path, scale: float) -> Iterator[Row]:
    """Each call of an import and a teacher that changes a disk fails in turn."""
    data, store = write_data(folder / "data.extxyz"), folder / "store.zarr"
    with failing(Disk(store)) as disk:
        whole = write_store(data, store).manifest.root_digest
    full = Row("disk full from the n-th write, new file or folder on (ENOSPC)")
    broken = Row("the n-th sync or rename fails (EIO)")
    step = max(1, round(1 / scale))
    for n in range(1, len(disk.calls) + 1, step):
        shutil.rmtree(store)
        raised = None
        with failing(Disk(store, n)) as failed:
            try:
                write_store(data, store)
            except OSError as error:
                raised = error.errno
        kind, path = failed.calls[n - 1]
        row = full if kind in NEEDS_ROOM else broken
        unharmed = problems_of(store) == []
        with failing(Disk(store)):
            same = write_store(data, store).manifest.root_digest == whole
        survived = raised == failed.expected and unharmed and same
        survived = survived and verify_store(store).problems == []
        row.count(survived, f"call {n}, {kind} {path}")
    full.note = f"every {kind_of(step)}call of import and teacher; then with room: same digests"
    broken.note = "likewise"
    yield from (full, broken)


def kind_of(step: int) -> str:
    return "" if step == 1 else f"{step}th "


def command_of(folder: Path, store: Path) -> list[str]:
    data = write_data(folder / "data.extxyz")
    save_potential(folder / "teacher", make_potential())
    command = ["dump-teacher", data, "--teacher", folder / "teacher", "-o", store, *SMALL_BLOCKS]
    return [str(argument) for argument in command]


def is_refused(texts: Sequence[str], reason: str) -> tuple[bool, str]:
    """Whether a command ends with exit code 2 and one line that gives the reason."""
    result = CliRunner().invoke(main, texts)
    lines = result.stderr.splitlines()
    good = result.exit_code == 2 and len(lines) == ONE_LINE and reason in lines[0]
    return good, f"{result.exit_code}: {result.stderr}"


def commands(folder: Path, scale: float) -> Iterator[Row]:
    """The same through the command line, with every error that a disk knows."""
    store = folder / "store.zarr"
    texts = command_of(folder, store)
    with failing(Disk(store)) as disk:
        CliRunner().invoke(main, texts)
    whole = without_date(store)
    finished = max(n for n, call in enumerate(disk.calls) if call[1].endswith("/manifest.json"))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        row = Row(f"dump-teacher, {os.strerror(number).lower()} ({errno.errorcode[number]})")
        for n in np.linspace(1, finished, times(15, scale)).astype(int).tolist():
            shutil.rmtree(store)
            with failing(Disk(store, n, number=number)):
                good, said = is_refused(texts, os.strerror(number))
            again = CliRunner().invoke(main, texts)
            same = again.exit_code == 0 and without_date(store) == whole
            row.count(good and same, f"call {n} {disk.calls[n - 1]}: {said} {again.output}")
        row.note = "exit code 2 and one line; again: same digests"
        yield row


def trainings(folder: Path, scale: float) -> Iterator[Row]:
    """Calls of a training that change a disk fail in turn; gone on with, it is the same run."""
    made = make_store(folder)
    dump(made, make_teacher(folder), codec="half")
    run = folder / "run"
    texts = [str(part) for part in training_command(Path(str(made.path)), run)]
    with failing(Disk(run)) as disk:
        CliRunner().invoke(main, texts)
    whole = outcome(run)
    row = Row("train-student, disk full or broken at the n-th call of its run")
    for n in np.linspace(1, len(disk.calls), times(60, scale)).astype(int).tolist():
        shutil.rmtree(run, ignore_errors=True)
        reason = "No space left" if disk.calls[n - 1][0] in NEEDS_ROOM else "Input/output error"
        with failing(Disk(run, n)):
            good, said = is_refused(texts, reason)
        again = CliRunner().invoke(main, texts)
        # The last call of all syncs a run that is complete, and then says so.
        done = again.exit_code == 0 or (n == len(disk.calls) and "is finished" in again.output)
        same = done and outcome(run) == whole
        row.count(good and same, f"call {n} {disk.calls[n - 1]}: {said} {again.output}")
    row.note = f"of {len(disk.calls)} calls; exit code 2 and one line; again: same curve, same bits"
    yield row


def without_date(store: Path) -> dict[str, bytes]:
    return {k: v for k, v in files_of(store).items() if k != "manifest.json"}


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system in memory of its own; a CalledProcessError where one may not be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def real_disks(folder: Path, scale: float) -> Iterator[Row]:
    """File systems that are full, and one that is read-only, as the system makes them."""
    full = Row("a real file system filled up (tmpfs), dump-teacher")
    frozen = Row("a real read-only file system, import and dump-teacher")
    try:
        with mounted(folder / "large", "64m") as disk:
            whole_store = disk / "store.zarr"
            texts = command_of(folder, whole_store)
            CliRunner().invoke(main, texts)
            whole = without_date(whole_store)
            used = int(shutil.disk_usage(disk).used)
    except subprocess.CalledProcessError:
        full.note = frozen.note = "not tried: no file system may be mounted here"
        yield from (full, frozen)
        return
    page = 4096
    n = times(30, scale)
    for k, pages in enumerate(np.linspace(2, used // page - 1, n).astype(int).tolist()):
        with mounted(folder / f"small{k}", str(pages * page)) as disk:
            texts = command_of(folder, disk / "store.zarr")
            good, said = is_refused(texts, "No space left on device")
            remount(disk, "size=64m")
            again = CliRunner().invoke(main, texts)
            same = again.exit_code == 0 and without_date(disk / "store.zarr") == whole
            full.count(good and same, f"{pages} pages: {said} {again.output}")
    full.note = f"{n} sizes up to {used // 1024} kB; then made larger: same digests"
    with mounted(folder / "frozen", "64m") as disk:
        begun, finished = disk / "begun.zarr", disk / "finished.zarr"
        CliRunner().invoke(main, command_of(folder, finished))
        with failing(Disk(begun, 200)):
            CliRunner().invoke(main, command_of(folder, begun))
        before = files_of(disk)
        remount(disk, "ro")
        for texts in (
            ["import", str(folder / "data.extxyz"), "-o", str(disk / "new.zarr")],
            command_of(folder, disk / "new.zarr"),
            command_of(folder, begun),
            ["dump-teacher", "--teacher", str(folder / "teacher"), "--into", str(finished),
             "--name", "second"],
        ):  # fmt: skip
            good, said = is_refused(texts, "Read-only file system")
            frozen.count(good and files_of(disk) == before, f"{texts}: {said}")
        remount(disk, "rw")
    frozen.note = "a new store, an unfinished and a finished one; nothing written"
    yield from (full, frozen)


def permissions(folder: Path, scale: float) -> Iterator[Row]:
    """Folders that may not be written to, for a process that is bound by it."""
    from tests.faults.test_disk import as_a_user

    row = Row("folders without the right to write, import, dump and training")
    data, store = write_data(folder / "data.extxyz"), folder / "finished.zarr"
    save_potential(folder / "teacher", make_potential())
    CliRunner().invoke(main, ["import", str(data), "-o", str(store)])
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for one in folders:
        one.chmod(0o555)
    before = files_of(folder)
    forks = multiprocessing.get_context("forkserver")
    for texts in (
        ["import", "data.extxyz", "-o", "new.zarr"],
        ["dump-teacher", "--teacher", "teacher", "--into", "finished.zarr", "--name", "second"],
        ["train-student", "finished.zarr", "-o", "run", "--preset", "painn-small"],
    ):
        receiver, sender = forks.Pipe(duplex=False)
        process = forks.Process(target=as_a_user, args=(str(folder), texts, sender))
        process.start()
        sender.close()
        said: Any = receiver.recv()
        process.join()
        code, lines = said[0], said[1].splitlines()
        good = code == 2 and len(lines) == ONE_LINE and "Permission denied." in lines[0]
        row.count(good and files_of(folder) == before, (texts, said))
    for one in folders:
        one.chmod(0o755)
    row.note = "exit code 2 and one line; nothing written"
    yield row


FAULTS = [calls, commands, trainings, real_disks, permissions]
