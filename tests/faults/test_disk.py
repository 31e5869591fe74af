"""A disk that is full, broken or read-only: one clear line, nothing harmed, and then on."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kdcache.checkpoint import save_potential
from kdcache.store import Store, verify_store
from kdcache.store.work import WORK
from kdcache_cli.main import main
from tests.chain import make_potential
from tests.cli.commands import SMALL_BLOCKS, kdcache, refused
from tests.faults.disk import Disk, failing
from tests.faults.training import outcome, training_command
from tests.faults.writing import write_data, write_store
from tests.store.sample import files_of

pytestmark = pytest.mark.fault

# Of all but writes, which fail at each.
OTHER_CALLS = 12


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.extxyz", 3)


def problems_of(store: Path) -> list[str]:
    """What is wrong with a finished store, whose next teacher may have been on its way."""
    if not (store / "manifest.json").is_file():
        return []
    found = verify_store(store).problems
    # The root document is replaced before the manifest, and is put right by going on.
    begun = (store / WORK / "teachers" / "numbers" / "group.json").is_file()
    of_root = ("zarr.json has digest", f"{store / 'zarr.json'} has consolidated_metadata")
    return [text for text in found if not (begun and text.startswith(of_root))]


def test_a_full_or_broken_disk_at_any_call_harms_nothing_and_can_be_gone_on_from(
    data: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.zarr"
    with failing(Disk(store)) as disk:
        whole = write_store(data, store).manifest.root_digest
    calls = disk.calls
    writes = [n for n, (kind, _) in enumerate(calls, 1) if kind == "write"]
    others = [n for n, (kind, _) in enumerate(calls, 1) if kind != "write"]
    # The name of an attempt may stand between a file's name and its ending.
    names = {path.rpartition("/")[2].partition(".")[0] for kind, path in calls if kind == "write"}
    assert {"0", "group", "index", "zarr", "manifest", "positions", "complete"} <= names
    for n in writes + np.random.default_rng().choice(others, OTHER_CALLS).tolist():
        shutil.rmtree(store)
        with failing(Disk(store, n)) as disk, pytest.raises(OSError, match="Errno") as raised:
            write_store(data, store)
        # Fields are written by several threads: the n-th call need not be the n-th of before.
        kind, path = disk.calls[n - 1]
        assert raised.value.errno == disk.expected, (n, kind, path)
        assert problems_of(store) == [], (n, kind, path)
        with failing(Disk(store)):
            assert write_store(data, store).manifest.root_digest == whole, (n, kind, path)
        assert not (store / WORK).exists(), (n, kind, path)
    assert verify_store(store).problems == []


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_potential(tmp_path / "teacher", make_potential())
    return tmp_path / "teacher"


def test_the_command_says_in_one_line_that_the_disk_is_full_and_goes_on_with_room(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.zarr"
    command = ["dump-teacher", data, "--teacher", teacher, "-o", store, *SMALL_BLOCKS]
    texts = [str(argument) for argument in command]
    with failing(Disk(store)) as disk:
        kdcache(*command)
    whole = {k: v for k, v in files_of(store).items() if k != "manifest.json"}
    finished = max(n for n, call in enumerate(disk.calls) if call[1].endswith("/manifest.json"))
    for n in np.linspace(1, finished, 6).astype(int).tolist():
        shutil.rmtree(store)
        with failing(Disk(store, n, number=errno.ENOSPC)):
            result = CliRunner().invoke(main, texts)
        assert result.exit_code == 2, (n, disk.calls[n - 1], result.exception)
        (line,) = result.stderr.splitlines()
        assert "No space left on device. Nothing finished is harmed. Make room" in line
        assert line.endswith("The same command goes on where this one ended.")
        kdcache(*command)
        assert {k: v for k, v in files_of(store).items() if k != "manifest.json"} == whole


def test_a_training_on_a_full_or_broken_disk_goes_on_to_the_same_run(
    taught_store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    training = training_command(Path(str(taught_store.path)), run)
    with failing(Disk(run)) as disk:
        kdcache(*training)
    whole = outcome(run)
    for n in np.random.default_rng().integers(1, len(disk.calls), 3).tolist():
        shutil.rmtree(run)
        with failing(Disk(run, n)):
            line = refused(*training)
        assert line.endswith("The same command goes on where this one ended."), (n, line)
        kdcache(*training)
        assert outcome(run) == whole, (n, disk.calls[n - 1])


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.EDQUOT, "Make room within your quota."),
        (errno.EIO, "The disk, or the server behind it, failed."),
        (errno.EROFS, "Make it writable, or name a path on another file system."),
    ],
)
def test_every_fault_of_a_disk_is_one_line_with_a_way_out(
    number: int, way_out: str, data: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.zarr"
    with failing(Disk(store, 5, number=number)):
        result = CliRunner().invoke(main, ["import", str(data), "-o", str(store)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert f": {os.strerror(number)}." in line
    assert way_out in line
    assert not store.exists()


def give_up_rights() -> None:
    """Root is denied nothing; without its capabilities it is an owner like any other."""
    if os.getuid() == 0:
        version_3, this_process = 0x20080522, 0
        header = (ctypes.c_uint32 * 2)(version_3, this_process)
        none = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def as_a_user(folder: str, texts: Sequence[str], sender: object) -> None:
    """Run a command as one whom permissions bind."""
    os.chdir(folder)
    give_up_rights()
    result = CliRunner().invoke(main, texts)
    sender.send((result.exit_code, result.stderr))  # type: ignore[attr-defined]


def run_as_a_user(folder: Path, *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of a command whose paths are within `folder`."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.faults.test_disk", "tests.cli.killing_preload"])
    receiver, sender = forks.Pipe(duplex=False)
    texts = [str(argument) for argument in arguments]
    process = forks.Process(target=as_a_user, args=(str(folder), texts, sender))
    process.start()
    sender.close()
    process.join()
    code, said = receiver.recv()
    return code, said.splitlines()


def test_a_target_that_may_not_be_written_to_is_refused_in_one_line_and_left_as_it_is(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    # A finished store, one that is unfinished, and a folder for a new one: none may be written to.
    for name, calls in (("finished.zarr", 0), ("unfinished.zarr", 40)):
        with failing(Disk(tmp_path / name, calls)):
            CliRunner().invoke(main, ["import", str(data), "-o", str(tmp_path / name)])
    for folder in (tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    before = files_of(tmp_path)
    try:
        for command in (
            ("import", "data.extxyz", "-o", "new.zarr"),
            ("import", "data.extxyz", "-o", "unfinished.zarr"),
            ("dump-teacher", "--teacher", "teacher", "--into", "finished.zarr", "--name", "a"),
            ("train-student", "finished.zarr", "-o", "run", "--preset", "painn-small"),
        ):
            code, lines = run_as_a_user(tmp_path, *command)
            assert code == 2, command
            assert len(lines) == 1, lines
            assert "Permission denied." in lines[0]
            assert files_of(tmp_path) == before
    finally:
        for folder in (tmp_path, *(p for p in tmp_path.rglob("*") if p.is_dir())):
            folder.chmod(0o755)
