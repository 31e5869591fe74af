"""What is moved: the files that make a store at its new place, all of one or a part of it.

Owns names, sizes and digests; moving is the business of `transfer`. Invariant: every name is one
that a store of this manifest has, none is taken from a file, and every size is bounded by the
layout before a byte is fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import ConfigError, StoreError
from kdcache.fields import N_EDGES
from kdcache.sharing.held import HeldFiles
from kdcache.store.contents import ZARR, expected_files, groups, node_documents
from kdcache.store.entries import TeacherEntry
from kdcache.store.file_limits import file_limits
from kdcache.store.manifest import PLAIN_FORMAT_VERSION, Manifest, read_manifest
from kdcache.store.metadata import readable, root_document
from kdcache.store.provenance import check_wanted, common_teachers, kept_fields
from kdcache.store.reader import Store, open_store
from kdcache.store.signature import MAX_BYTES, SIGNATURE, read_signature
from kdcache.store.withholding import check_part, withheld
from kdcache.store.work import unfinished_groups


@dataclass(frozen=True)
class Parcel:
    """A file on its way.

    Attributes:
        name: within the store.
        size: bytes.
        sha256: it must have, in hex.
        where: it comes from, for messages.
        begins_anywhere: `stream` may begin within the file at no cost.
        stream: its bytes from one on.
    """

    name: str
    size: int
    sha256: str
    where: str
    begins_anywhere: bool
    stream: Callable[[int], Iterator[bytes]]


@dataclass(frozen=True, eq=False)
class Shipment:
    """A store that is moved.

    Attributes:
        files: of the source.
        manifest: of the store that arrives.
        made: content of files that are made here, by name.
        sizes: bytes of every file but the manifest, by name.
        signature: content of its signature.json, where there is one.
        notes: what a user should know, a line each.
    """

    files: HeldFiles
    manifest: Manifest
    made: Mapping[str, bytes]
    sizes: Mapping[str, int]
    signature: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(self.sizes.values())

    def parcel(self, name: str) -> Parcel:
        """A file of it."""
        return Parcel(
            name,
            self.sizes[name],
            self.manifest.digests[name],
            self.files.where(name),
            name not in self.made and self.files.begins_anywhere,
            lambda start: self._stream(name, start),
        )

    def _stream(self, name: str, start: int) -> Iterator[bytes]:
        if name in self.made:
            return iter([self.made[name]])
        return self.files.stream(name, start)


def ship(
    files: HeldFiles,
    *,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    without_structures: bool = False,
) -> Shipment:
    """A store, or a part of it, ready to be moved.

    A part keeps all structures and their files byte for byte; manifest and root zarr.json are made
    anew, so its root digest is another.

    Args:
        files: of a finished store.
        teachers: kept; None for all.
        fields: of the teachers that are kept; None for all.
        without_structures: leave out structures and labels, for receivers that have them.

    Raises:
        ConfigError: a part of the teachers, and without structures.
        StoreError: no finished store, a teacher or field it lacks, files that it cannot have, or a
            part of a store that was passed on without its structures, or one of these that is not
            what the whole store leaves without them.
    """
    manifest = _read(files)
    if manifest.withheld is not None:
        check_part(open_store(files))  # else edited features would be passed on as the sender's
    if without_structures:
        if teachers is not None or fields is not None:
            raise ConfigError(
                "A part of the teachers' fields is moved with its structures, or all of them "
                "without. Make the part first (kdcache subset), then move that without structures."
            )
        rest = withheld(open_store(files))
        return shipment_of(files, rest.manifest, rest.replaced)
    if teachers is None and fields is None:
        return shipment_of(files, manifest, {})
    manifest.refuse_withheld("some of its teachers' fields alone")
    return shipment_of(files, *_part(open_store(files), teachers, fields))


def shipment_of(files: HeldFiles, manifest: Manifest, made: Mapping[str, bytes]) -> Shipment:
    """Files that make a store under a manifest which may not be the source's.

    Args:
        files: of the source.
        manifest: of the store that arrives; each of its files is one of the source, or made here.
        made: content of these, by name.

    Raises:
        StoreError: files that no such store has, that are missing or too large.
    """
    limits = file_limits(manifest, str(files.location))
    names = [name for name in manifest.digests if name not in made]
    found = dict(zip(names, files.each(lambda name: _size(files, name), names), strict=True))
    for name, size in found.items():
        if size > limits[name]:
            raise StoreError(
                f"{files.where(name)} has {size} bytes, its layout allows {limits[name]}. It is "
                f"not fetched: it would fill the disk with what cannot be read."
            )
    sizes = {name: len(made[name]) if name in made else found[name] for name in manifest.digests}
    signature, notes = _signature(files, manifest)
    return Shipment(files, manifest, made, sizes, signature, (*notes, *_left_behind(files)))


def _read(files: HeldFiles) -> Manifest:
    try:
        return read_manifest(files)
    except FileNotFoundError:
        open_store(files)  # says why this is no store
        raise


def _left_behind(files: HeldFiles) -> list[str]:
    """What was being written into the source when it was looked at."""
    if not isinstance(files.location, Path):
        return []
    known = groups(_read(files))
    return [
        f"{group} is unfinished and stays behind: finish its dump first, if it is to go along"
        for group in unfinished_groups(files.location)
        if group not in known
    ]


def _signature(files: HeldFiles, manifest: Manifest) -> tuple[bytes | None, tuple[str, ...]]:
    """signature.json of the source, unless it is of another store than the one that arrives."""
    try:
        content = files.read(SIGNATURE, MAX_BYTES)
        signed = read_signature(files)
    except FileNotFoundError:
        return None, ()
    except StoreError as error:  # some services deny what is not there
        return None, (f"no signature is taken along: {error}",)
    if signed.root_digest not in (manifest.root_digest, manifest.whole().root_digest):
        return None, ("the signature is left behind: it is of another store than the one moved",)
    return content, ()


def _part(
    store: Store, teachers: Sequence[str] | None, fields: Sequence[str] | None
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of some teachers and fields of a store, and the files it has of its own."""
    old = store.manifest
    check_wanted([store], fields)
    entries = {
        name: _with_fields(store, name, fields) for name in common_teachers([store], teachers)
    }
    had_edges = any(entry.has_own_edges for entry in old.teachers.values())
    has_edges = any(entry.has_own_edges for entry in entries.values())
    said = "; ".join(f"{name}: {', '.join(entry.fields)}" for name, entry in entries.items())
    note = f"part of {old.root_digest}: all structures with " + (said or "no teacher")
    dataset = old.dataset.model_copy(update={"notes": [note, *old.dataset.notes]})
    update = {
        "teachers": entries,
        "dataset": dataset,
        "format_version": PLAIN_FORMAT_VERSION
        if had_edges and not has_edges
        else old.format_version,
    }
    manifest = old.model_copy(update=update)
    root = readable(
        root_document(store.plan, manifest.format_version, node_documents(manifest, store.plans))
    )
    digests = {name: old.digests.get(name, "") for name in expected_files(manifest, store.plans)}
    digests[ZARR] = hashlib.sha256(root).hexdigest()
    return manifest.model_copy(update={"digests": digests}).sealed(), {ZARR: root}


def _with_fields(store: Store, teacher: str, wanted: Sequence[str] | None) -> TeacherEntry:
    entry = store.teachers[teacher]
    if wanted is None:
        return entry
    names = {spec.name for spec in kept_fields(store, teacher, wanted)}
    if entry.has_own_edges and any(entry.fields[name].level == "edge" for name in names):
        names.add(N_EDGES.name)
    fields = {name: field for name, field in entry.fields.items() if name in names}
    errors = {name: error for name, error in entry.errors.items() if name in names}
    return entry.model_copy(update={"fields": fields, "errors": errors})


def _size(files: HeldFiles, name: str) -> int:
    try:
        return files.size(name)
    except FileNotFoundError:
        changed = " since: it was replaced" if files.has_changed() else ""
        raise StoreError(
            f"{files.where(name)} is missing{changed}. The store is incomplete; nothing is moved."
        ) from None
