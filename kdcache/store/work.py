"""The folder .work of a store that is being written: lock, identity, journal of finished shards.

Nothing in it is part of the store. Invariant: a shard is in the journal only after all its files
are on disk, and a group's folder goes only after the manifest that lists the group stands.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from kdcache.errors import IdentityError, StoreError
from kdcache.store.metadata import Json, readable
from kdcache.store.shards import PARTIAL_SUFFIX, sync_directory, write_file

WORK = ".work"
LOCK = "lock"
STEP = "step.lock"
GROUP = "group.json"
DONE = "done"
SECONDS_TO_LOOK = 2.0

# Where these differ, rows would meet the wrong structures or another model's features.
IDENTITIES = ("dataset", "index", "teacher")


class StoreLock:
    """The right to write to a store, held by one process, or shared by those that divide the work.

    Taken on entering a `with`; the system gives it back when the process ends, however it ends.
    Between machines this needs a file system that keeps locks between them.

    Args:
        path: of the store.
        shared: with others that share it, all of which claim shards one by one.

    Raises:
        StoreError: another process holds it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._shared = shared
        self._descriptor = -1

    def __enter__(self) -> StoreLock:
        file = self._path / WORK / LOCK
        patience = time.monotonic() + SECONDS_TO_LOOK
        while True:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the holder before us cleaned up in between
            try:
                kind = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if self._shared and time.monotonic() < patience:
                    # Another part looks, for a moment alone, whether it is the last.
                    time.sleep(0.02)
                    continue
                raise StoreError(
                    f"Another process is writing to {self._path}. Two would write over each other: "
                    f"wait until it ends."
                ) from None
            # A finished writer removes the file: a lock on a removed file protects nothing.
            if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                self._descriptor = descriptor
                return self
            os.close(descriptor)

    def __exit__(self, *raised: object) -> None:
        # Nothing begun, nothing left: a refused writer leaves no trace in a finished store.
        work = self._path / WORK
        if self._is_last():
            left = {path.name for path in work.rglob("*") if not path.is_dir()}
            if left <= {LOCK, STEP}:
                shutil.rmtree(work, ignore_errors=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_last(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class ShardRecord(BaseModel):
    """Journal entry of one finished shard of a group.

    Attributes:
        attempt: in the names of its files, until they are published.
        sha256: by path within the store.
        size: bytes, likewise.
        errors: by field: square_error, square_value, clipped, nonfinite.
        failures: why the teacher gave nothing for a structure, by store row.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    attempt: str
    sha256: dict[str, str]
    size: dict[str, int]
    errors: dict[str, tuple[float, float, int, int]]
    failures: dict[int, str] = {}


@dataclass(frozen=True)
class WorkFolder:
    """What is known of one group while it is written: .work/<group>/."""

    store: Path
    group: str

    @property
    def path(self) -> Path:
        return self.store / WORK / self.group

    @property
    def begun(self) -> bool:
        """The group's writing began and was not cleaned up."""
        return (self.path / GROUP).is_file()

    def begin(self, identity: Mapping[str, JsonValue]) -> None:
        """Record what is being written, or check that it is what was begun.

        Raises:
            IdentityError: another dataset or teacher was begun.
            StoreError: the same one was begun otherwise (fields, layout, policies).
        """
        if not self.begun:
            write_file(self.path / GROUP, readable(identity))
            return
        try:
            begun: Json = dict(json.loads((self.path / GROUP).read_bytes()))
        except (ValueError, TypeError, RecursionError):
            raise StoreError(
                f"{self.path / GROUP} is damaged, so {self.group} cannot be gone on with. Delete "
                f"{self.path} to begin anew."
            ) from None
        wanted: Json = json.loads(readable(identity))
        for key in sorted(wanted.keys() | begun.keys(), key=lambda k: (k not in IDENTITIES, k)):
            if wanted.get(key) == begun.get(key):
                continue
            place, old, new = _first_difference(key, begun.get(key), wanted.get(key))
            kind = IdentityError if key in IDENTITIES else StoreError
            raise kind(
                f"{self.store} holds an unfinished {self.group} with another {place}: begun with "
                f"{_short(old)}, now {_short(new)}. Shards of both would be mixed. Go on with what "
                f"was begun, or delete {self.path} to begin anew."
            )

    def record(self, shard: int, record: ShardRecord) -> None:
        """Enter a shard whose files are all on disk."""
        write_file(self.path / f"{shard}.json", record.model_dump_json().encode())

    def records(self, n_shards: int) -> dict[int, ShardRecord]:
        """Finished shards whose files are still there, by number."""
        found = {shard: self._finished(shard) for shard in range(n_shards)}
        return {shard: record for shard, record in found.items() if record is not None}

    def _finished(self, shard: int) -> ShardRecord | None:
        try:
            record = ShardRecord.model_validate_json((self.path / f"{shard}.json").read_bytes())
            sizes = {name: (self.store / name).stat().st_size for name in record.size}
        except (FileNotFoundError, ValidationError):
            return None
        return record if sizes == record.size else None

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """The right to write a shard, among those that share the store's lock.

        Gives False where another process has it, or where there is nothing left to do. The system
        takes it back when the process ends, so that the shards of the dead are free again.
        """
        try:
            descriptor = os.open(self.path / f"{shard}.claim", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the last of the others has finished the group and cleaned up
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield self.begun and self._finished(shard) is None
        finally:
            os.close(descriptor)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within it, no other process that shares the store's lock begins or commits."""
        descriptor = os.open(self.store / WORK / STEP, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Remove the folder, and .work with it when no other group is being written."""
        self.discard()
        if not unfinished_groups(self.store):
            shutil.rmtree(self.store / WORK, ignore_errors=True)
        sync_directory(self.store)

    def discard(self) -> None:
        """Remove the folder alone."""
        done = self.store / WORK / DONE
        shutil.rmtree(done, ignore_errors=True)
        if self.path.exists():
            # One rename, so that a kill here leaves no half-removed journal to go on from.
            os.rename(self.path, done)
            shutil.rmtree(done)


def unfinished_groups(store: Path) -> dict[str, int]:
    """Finished shards of every group that is being written or was left, by group."""
    found = {}
    with suppress(FileNotFoundError):  # cleaned up while we look
        for file in sorted((store / WORK).glob(f"**/{GROUP}")):
            group = file.parent.relative_to(store / WORK).as_posix()
            if group == "structures" or group.startswith("teachers/"):
                found[group] = len(list(file.parent.glob("[0-9]*.json")))
    return found


def refuse_unfinished(store: Path, then: str) -> None:
    """A store in which nothing is being written, or was left half-written.

    Args:
        store: its path.
        then: what is to be done with the whole one, for the message.

    Raises:
        StoreError: a group of it is unfinished.
    """
    busy = ", ".join(unfinished_groups(store))
    if busy:
        raise StoreError(
            f"{store} has an unfinished {busy}. Run the command that was interrupted again, then "
            f"{then}."
        )


def remove_partials(store: Path, group: str) -> None:
    """Remove files of the store and of one group that a killed writer had not finished."""
    for found in (
        store.glob(f"*{PARTIAL_SUFFIX}"),
        (store / "teachers").glob(f"*{PARTIAL_SUFFIX}"),  # its zarr.json comes with the structures
        (store / group).rglob(f"*{PARTIAL_SUFFIX}"),
        (store / WORK / group).glob(f"*{PARTIAL_SUFFIX}"),
    ):
        for partial in found:
            partial.unlink(missing_ok=True)


def _first_difference(
    place: str, old: JsonValue, new: JsonValue
) -> tuple[str, JsonValue, JsonValue]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _first_difference(f"{place} {key}", old.get(key), new.get(key))
    return place, old, new


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}…"
