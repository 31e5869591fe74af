"""Write the shards of one group of a store: its structures, or a teacher.

Owns the order of events and who may write; a shard's files are the business of `shard_writer`, the
journal of `work`. Invariant: every shard counts once and whole, and a group exists for readers only
when the manifest lists it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kdcache.errors import StoreError, TeacherError
from kdcache.fields import N_EDGES, FieldSpec
from kdcache.store.codecs import EncodingError, OnNonfinite, OnOverflow
from kdcache.store.contents import ZARR, group_plans, node_documents, plan_of
from kdcache.store.entries import FieldEntry, FieldError, TeacherEntry
from kdcache.store.failures import FAILURES, Failures
from kdcache.store.index import INDEX, StoreIndex
from kdcache.store.layout import BlockPlan
from kdcache.store.manifest import MANIFEST, PLAIN_FORMAT_VERSION, Manifest, read_manifest
from kdcache.store.metadata import (
    Json,
    field_documents,
    group_document,
    readable,
    root_document,
)
from kdcache.store.shard_writer import NOTHING, ShardWriter
from kdcache.store.shards import publish_file, write_file, write_files
from kdcache.store.work import ShardRecord, StoreLock, WorkFolder, remove_partials

Array = npt.NDArray[Any]


class GroupWriter:
    """Writes the shards of one group; made by `create_store` or `add_teacher`.

    A context manager. Leaving it before `commit` keeps what is written, for a later writer of the
    same group to go on from. Several processes may write one group, each with a writer of its own,
    where all of them were made `shared`: they `claim` shards, and the last one commits.

    Attributes:
        path: of the store.
        group: "structures" or "teachers/<name>".
        plan: layout of the group, with a teacher's own edges where it has some.
        fields: of this group, but for the counts of such edges, which the writer adds.
    """

    def __init__(
        self,
        path: Path,
        group: str,
        plan: BlockPlan,
        index: StoreIndex,
        fields: Sequence[FieldSpec],
        manifest: Manifest,
        teacher: TeacherEntry | None,
        on_overflow: OnOverflow,
        on_nonfinite: OnNonfinite,
        lock: StoreLock | None,
        shared: bool = False,
    ) -> None:
        self.path = path
        self.group = group
        self.plan = plan
        self.fields = tuple(fields)
        self._index = index
        self._manifest = manifest
        self._teacher = teacher
        self._on_overflow = on_overflow
        self._on_nonfinite = on_nonfinite
        # A caller that did work of its own under .work holds the lock already.
        self._lock = StoreLock(path, shared=shared) if lock is None else None
        self._shared = shared
        self._work = WorkFolder(path, group)
        own_edges = teacher is not None and teacher.has_own_edges
        self._stored = (*self.fields, N_EDGES) if own_edges else self.fields
        self._documents = {
            name: document
            for spec in self._stored
            for name, document in field_documents(spec, plan).items()
        }
        self._shards = self.shard_writer()

    def __enter__(self) -> GroupWriter:
        if self._lock is not None:
            self._lock.__enter__()
        try:
            with self._step():
                self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(*raised)

    def _step(self) -> AbstractContextManager[None]:
        return self._work.step() if self._shared else nullcontext()

    def claim(self, shard: int) -> AbstractContextManager[bool]:
        """Within it and where it gives True, no other shared writer writes this shard."""
        return self._work.claim(shard)

    def pending_shards(self) -> list[int]:
        """Shards that are still to be written, ascending."""
        if self._is_done():
            return []
        done = self._work.records(self.plan.n_shards)
        return [shard for shard in range(self.plan.n_shards) if shard not in done]

    def shard_writer(self) -> ShardWriter:
        """What writes the files of a shard, here or in another process; see `publish`."""
        teacher = self._teacher is not None
        return ShardWriter(
            path=self.path,
            group=self.group,
            plan=self.plan,
            fields=self.fields,
            stored=self._stored,
            documents=self._documents,
            structure_id=self._index.structure_id,
            on_overflow=self._on_overflow if teacher else "stop",
            on_nonfinite=self._on_nonfinite if teacher else "stop",
        )

    def publish(self, shard: int, record: ShardRecord) -> None:
        """Give the files of an attempt their names, and enter the shard into the journal.

        Args:
            shard: of which `record` tells; published once.
            record: from `ShardWriter.write`.

        Raises:
            FileNotFoundError: files of the attempt are not there.
        """
        for name in record.size:
            publish_file(self.path / name, record.attempt)
        self._work.record(shard, record)

    def write_shard(
        self, shard: int, arrays: Mapping[str, Array], failures: Mapping[int, str] = NOTHING
    ) -> None:
        """Write and publish all fields of one shard; arguments and errors of `ShardWriter.write`.

        May be called from several threads, each with a shard of its own.
        """
        self.publish(shard, self._shards.write(shard, arrays, failures))

    def commit_if_whole(self) -> int:
        """Of shared writers, one commits when the last shard is written.

        Returns:
            Shards that other writers have yet to write; 0 where the group is finished.
        """
        with self._step():
            if self._is_done():
                return 0
            records = self._work.records(self.plan.n_shards)
            if len(records) == self.plan.n_shards:
                self._commit(records)
            return self.plan.n_shards - len(records)

    def commit(self) -> Manifest:
        """Check that every shard is there, write the manifest, remove the traces of writing.

        Raises:
            StoreError: shards are missing.
            TeacherError: the teacher failed on every structure.
        """
        records = self._work.records(self.plan.n_shards)
        if len(records) < self.plan.n_shards:
            raise StoreError(
                f"{self.group} of {self.path} has {len(records)} of {self.plan.n_shards} shards. "
                f"Write the others before it is committed."
            )
        return self._commit(records)

    def _commit(self, records: Mapping[int, ShardRecord]) -> Manifest:
        files = self._files()
        reasons = {
            row: text for record in records.values() for row, text in record.failures.items()
        }
        if len(reasons) == len(self._index):
            raise TeacherError(
                f"The teacher failed on all {len(reasons)} structures ({reasons[0]}), so there is "
                f"nothing to learn from. Correct it, and delete {self._work.path} to begin anew."
            )
        if reasons:
            # Before the manifest that lists it, like every other file of the group.
            failures = Failures.of(reasons, self._index).to_bytes()
            files[f"{self.group}/{FAILURES}"] = failures
            write_file(self.path / self.group / FAILURES, failures)
        digests = {name: _sha256(content) for name, content in files.items()}
        for shard in range(self.plan.n_shards):
            digests |= records[shard].sha256
        manifest = self._updated(_summed_errors(self._stored, records), len(reasons), digests)
        remove_partials(self.path, self.group)
        root, listing = self._root(manifest), manifest.to_bytes()
        write_files({self.path / ZARR: root, self.path / MANIFEST: listing})
        if self._shared:
            self._work.discard()  # others still hold the lock in .work: the last removes it
        else:
            self._work.finish()
        return manifest

    def _begin(self) -> None:
        structures = WorkFolder(self.path, "structures")
        if self._is_done() and self._is_this_teacher():
            return  # what several share was finished before this one came
        if (self.path / MANIFEST).is_file():
            if self._is_listed() and not self._work.begun:
                raise StoreError(
                    f"{self.path} has its {self.group} already, finished. Nothing is overwritten: "
                    f"choose another "
                    + ("path." if self._teacher is None else "name, or another store.")
                )
            if self._teacher is not None:
                # A kill after the manifest and before cleaning up: the structures are finished.
                structures.discard()
        self._work.begin(self._identity())
        if not self._shared:  # those of others may be under way
            remove_partials(self.path, self.group)
        for name, content in self._files().items():
            write_file(self.path / name, content)

    def _is_done(self) -> bool:
        """A shared writer other than this one has committed, and cleaned up."""
        return self._shared and not self._work.begun and self._is_listed()

    def _is_this_teacher(self) -> bool:
        name, ours = self.group.removeprefix("teachers/"), self._teacher
        theirs = read_manifest(self.path).teachers[name]
        return ours is not None and (ours.digest, ours.fields) == (theirs.digest, theirs.fields)

    def _is_listed(self) -> bool:
        if self._teacher is None:
            return True
        return self.group.removeprefix("teachers/") in read_manifest(self.path).teachers

    def _files(self) -> dict[str, bytes]:
        """Everything of this group but shards, the root document and the manifest."""
        nodes = [self.group]
        files = {}
        if self._teacher is None:
            nodes.append("teachers")
            files[INDEX] = self._index.to_bytes()
        files |= {f"{node}/{ZARR}": readable(group_document()) for node in nodes}
        for name, document in self._documents.items():
            files[f"{self.group}/{name}/{ZARR}"] = readable(document)
        return files

    def _identity(self) -> Json:
        manifest = self._manifest
        identity: Json = {
            "format_version": PLAIN_FORMAT_VERSION,
            "fields": {
                s.name: FieldEntry.describe(s).model_dump(mode="json") for s in self._stored
            },
            "layout": manifest.capacities.model_dump(mode="json"),
            "dataset": manifest.dataset.model_dump(mode="json"),
            "index": _sha256(self._index.to_bytes()),
        }
        if self._teacher is None:
            identity["order"] = manifest.order.model_dump(mode="json")
            identity["graph"] = manifest.graph.model_dump(mode="json") if manifest.graph else None
        else:
            identity["teacher"] = self._teacher.model_dump(mode="json", exclude={"fields"})
            identity["on_overflow"] = self._on_overflow
            identity["on_nonfinite"] = self._on_nonfinite
            if self._stored != self.fields:
                identity["edges"] = _sha256(self.plan.n_edges.astype("<i8").tobytes())
        return identity

    def _updated(
        self, errors: dict[str, FieldError], n_failed: int, digests: dict[str, str]
    ) -> Manifest:
        manifest = self._manifest
        if self._teacher is not None:
            # Read again: another teacher may have been added since this one was begun.
            manifest = read_manifest(self.path)
            name = self.group.removeprefix("teachers/")
            entry = self._teacher.model_copy(update={"errors": errors, "n_failed": n_failed})
            manifest = manifest.with_teacher(name, entry)
        root = {ZARR: _sha256(self._root(manifest))}
        update = {
            "digests": {**manifest.digests, **digests, **root},
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        return manifest.model_copy(update=update).sealed()

    def _root(self, manifest: Manifest) -> bytes:
        plan = plan_of(manifest, self._index, str(self.path))
        nodes = node_documents(manifest, group_plans(self.path, manifest, plan))
        return readable(root_document(plan, manifest.format_version, nodes))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _summed_errors(
    fields: Sequence[FieldSpec], records: Mapping[int, ShardRecord]
) -> dict[str, FieldError]:
    """In shard order, so that sums do not depend on when a shard was written."""
    errors = {}
    for spec in fields:
        total = EncodingError()
        for shard in sorted(records):
            total.add(EncodingError(*records[shard].errors[spec.name]))
        errors[spec.name] = FieldError(
            relative=total.relative, clipped=total.clipped, nonfinite=total.nonfinite
        )
    return errors
