"""The folder .work of a store that is being written: lock, identity, journal of finished shards.

Nothing in it is part of the store. Invariant: a shard is in the journal only after all its files
are on disk, and a group's folder goes only after the manifest that lists the group stands.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from kdcache.errors import IdentityError, StoreError
from kdcache.store.metadata import Json, readable
from kdcache.store.shards import PARTIAL_SUFFIX, sync_directory, write_file

WORK = ".work"
LOCK = "lock"
GROUP = "group.json"
DONE = "done"

# Where these differ, rows would meet the wrong structures or another model's features.
IDENTITIES = ("dataset", "index", "teacher")


class StoreLock:
    """The right to write to a store, held by one process at a time.

    Taken on entering a `with`; the system gives it back when the process ends, however it ends.

    Raises:
        StoreError: another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> StoreLock:
        file = self._path / WORK / LOCK
        while True:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # the holder before us cleaned up in between
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
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
        work = self._path / WORK
        # Nothing begun, nothing left: a refused writer leaves no trace in a finished store.
        if work.is_dir() and os.listdir(work) == [LOCK]:
            (work / LOCK).unlink()
            work.rmdir()
        os.close(self._descriptor)
        self._descriptor = -1


class ShardRecord(BaseModel):
    """Journal entry of one finished shard of a group.

    Attributes:
        sha256: by path within the store.
        size: bytes, likewise.
        errors: by field: square_error, square_value, clipped, nonfinite.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: dict[str, str]
    size: dict[str, int]
    errors: dict[str, tuple[float, float, int, int]]


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
            begun: Json = json.loads((self.path / GROUP).read_bytes())
        except ValueError:
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
        found: dict[int, ShardRecord] = {}
        for shard in range(n_shards):
            try:
                record = ShardRecord.model_validate_json((self.path / f"{shard}.json").read_bytes())
                sizes = {name: (self.store / name).stat().st_size for name in record.size}
            except (FileNotFoundError, ValidationError):
                continue
            if sizes == record.size:
                found[shard] = record
        return found

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
    for file in sorted((store / WORK).glob(f"**/{GROUP}")):
        group = file.parent.relative_to(store / WORK).as_posix()
        if group == "structures" or group.startswith("teachers/"):
            found[group] = len(list(file.parent.glob("[0-9]*.json")))
    return found


def remove_partials(folder: Path) -> None:
    """Remove files that a killed writer had not finished."""
    for partial in folder.rglob(f"*{PARTIAL_SUFFIX}"):
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
