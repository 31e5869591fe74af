"""manifest.json: what a store holds, where it comes from, under which licences, and its digests.

Owns the whole of it, its root digest, and reading it; what it is made of stands in `entries`.
Invariant: written last and whole, so a store with a manifest is a finished store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from kdcache.errors import StoreError
from kdcache.store.entries import (
    Capacities,
    Count,
    DatasetEntry,
    FieldEntry,
    FieldName,
    GraphEntry,
    Line,
    OrderEntry,
    Part,
    RelativePath,
    Sha256,
    TeacherEntry,
    TeacherName,
    Withheld,
    left_out,
)
from kdcache.store.files import LocalFiles, StoreFiles
from kdcache.store.metadata import canonical, readable

FORMAT_VERSION = 2
# What is written until a teacher with edges of its own is added: older programs read it.
PLAIN_FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20


class Manifest(Part):
    """All of manifest.json.

    Attributes:
        digests: SHA-256 of every file of the store but the manifest, by path within it.
        root_digest: SHA-256 of the canonical JSON of everything else but `created`.
        created: date and time (UTC); not part of the identity.
        withheld: what is left out, None in a whole store.
    """

    format_version: int
    capacities: Capacities
    dataset: DatasetEntry
    order: OrderEntry
    graph: GraphEntry | None
    n_atoms: Count
    n_edges: Count
    structures: dict[FieldName, FieldEntry]
    teachers: dict[TeacherName, TeacherEntry]
    digests: dict[RelativePath, Sha256]
    root_digest: Sha256
    created: Line
    withheld: Withheld | None = None

    @model_serializer(mode="wrap")
    def _without_default(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out of a whole store's, so that older readers know every key."""
        return left_out(plain(self), withheld=None)

    def sealed(self) -> Manifest:
        """A copy whose root digest is that of its content."""
        return self.model_copy(update={"root_digest": self.content_digest()})

    def with_teacher(self, name: str, entry: TeacherEntry) -> Manifest:
        """A copy with one more teacher, of the lowest format that can hold it; not sealed.

        Raises:
            StoreError: structures are withheld.
        """
        self.refuse_withheld(f"a teacher {name!r}")
        version = FORMAT_VERSION if entry.has_own_edges else self.format_version
        teachers = {**self.teachers, name: entry}
        return self.model_copy(update={"teachers": teachers, "format_version": version})

    def whole(self) -> Manifest:
        """The manifest from before anything was withheld: itself where nothing was."""
        if self.withheld is None:
            return self
        update = {
            "structures": self.structures | self.withheld.structures,
            "digests": self.digests | self.withheld.digests,
            "root_digest": self.withheld.root_digest,
            "withheld": None,
        }
        return self.model_copy(update=update)

    def refuse_withheld(self, what: str) -> None:
        """Only a whole store is changed.

        Raises:
            StoreError: this one is not.
        """
        if self.withheld is not None:
            raise StoreError(
                f"The store {self.root_digest[:12]}… was passed on without its structures, and "
                f"with {what} it would no longer be part of {self.withheld.root_digest[:12]}…, "
                f"which its structures complete. Put them back first: "
                f"`kdcache join STORE DATA -o FULL`."
            )

    def content_digest(self) -> str:
        """What `root_digest` must be."""
        document = self.model_dump(mode="json", exclude={"root_digest", "created"})
        return hashlib.sha256(canonical(document)).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content."""
        return readable(self.model_dump(mode="json"))


def read_manifest(store: Path | StoreFiles) -> Manifest:
    """The manifest of a store, given by its path or its files.

    Raises:
        FileNotFoundError: there is none.
        StoreError: too large, no JSON, of a newer format, with unknown or wrong entries, or not
            what its root digest says.
    """
    files = LocalFiles(store) if isinstance(store, Path) else store
    file = files.where(MANIFEST)
    content = files.read(MANIFEST, MAX_MANIFEST_BYTES)
    try:
        document = json.loads(content.decode())
        version = document["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(
            f"{file} is not a kdcache manifest ({type(error).__name__}: {error}). The directory is "
            f"another program's, or damaged."
        ) from None
    if type(version) is not int or not PLAIN_FORMAT_VERSION <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise StoreError(
            f"{files.location} has format version {version}, this kdcache reads "
            f"{PLAIN_FORMAT_VERSION} to {FORMAT_VERSION}. "
            + ("Install a newer kdcache." if newer else "It was not written by kdcache.")
        )
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(
            f"{file} does not follow format {version}: {where}: {first['msg']}. It was "
            f"edited or damaged; fetch it again."
        ) from None
    if manifest.content_digest() != manifest.root_digest:
        raise StoreError(
            f"{file} says its digest is {manifest.root_digest[:12]}…, its content has "
            f"{manifest.content_digest()[:12]}…: it was edited or damaged. Fetch it again."
        )
    part, whole = manifest.withheld, manifest.whole()
    if part is not None and part.values.keys() != part.structures.keys():
        raise StoreError(
            f"{file} withholds {', '.join(part.structures)} and tells values of "
            f"{', '.join(part.values)}: it was edited or damaged. Fetch it again."
        )
    if part is not None and whole.content_digest() != whole.root_digest:
        raise StoreError(
            f"{file} says it is part of store {whole.root_digest[:12]}…, with what is withheld it "
            f"is {whole.content_digest()[:12]}…: it was edited or damaged. Fetch it again."
        )
    return manifest
