"""State who made a finished store, what to cite, and under which licences it is.

Rewrites the manifest alone, by one rename. Invariant: no array, index or digest of a file changes;
the root digest does, because it stands for what is stated here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from kdcache.errors import ConfigError, did_you_mean
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST, Manifest, read_manifest
from kdcache.store.metadata import canonical
from kdcache.store.reader import open_store
from kdcache.store.shards import write_file
from kdcache.store.signature import SIGNATURE, refuse_signed
from kdcache.store.work import StoreLock, refuse_unfinished


@dataclass(frozen=True, slots=True)
class Annotation:
    """What is stated; None leaves what stands there, "" takes it back.

    Attributes:
        creator: who made the store.
        citation: what to cite: free text, a DOI.
        licence_structures, licence_labels: SPDX expressions, or free text.
        licence_teachers: of the weights, by teacher.
    """

    creator: str | None = None
    citation: str | None = None
    licence_structures: str | None = None
    licence_labels: str | None = None
    licence_teachers: Mapping[str, str] = field(default_factory=dict)


def annotate_store(
    path: str | Path, annotation: Annotation, *, remove_signature: bool = False
) -> Manifest:
    """State provenance and licences of a finished store.

    Args:
        path: of the store.
        annotation: what changes.
        remove_signature: of a signed store, whose signature would be of another content.

    Returns:
        The new manifest, with another root digest; the old one where nothing changes.

    Raises:
        ConfigError: a text that is too long, no such teacher.
        StoreError: no finished store, one that is signed, or one without its structures.
    """
    path = local_path(path, "a manifest")
    open_store(path).manifest.refuse_withheld("other provenance or licences")
    with StoreLock(path):
        # Not before: whoever held the lock may have added a teacher, which would be lost.
        old = read_manifest(path)
        refuse_unfinished(path, "annotate")
        manifest = _annotated(path, old, annotation)
        if manifest == old:
            return old
        if not remove_signature:
            refuse_signed(path, old.root_digest)
        # First: a kill in between leaves a store that is not signed, not one signed wrongly.
        (path / SIGNATURE).unlink(missing_ok=True)
        write_file(path / MANIFEST, manifest.to_bytes())
    return manifest


def _annotated(path: Path, old: Manifest, annotation: Annotation) -> Manifest:
    """The manifest with what is stated; itself where that changes nothing."""
    document = old.model_dump(mode="json")
    dataset, teachers = document["dataset"], document["teachers"]
    for key in ("creator", "citation"):
        if (text := getattr(annotation, key)) is not None:
            dataset[key] = _one_text(text)
    for key in ("structures", "labels"):
        if (text := getattr(annotation, f"licence_{key}")) is not None:
            dataset["licences"][key] = _one_text(text)
    for name, text in annotation.licence_teachers.items():
        if name not in teachers:
            raise ConfigError(f"{path} has no teacher {name!r}: {did_you_mean(name, teachers)}")
        teachers[name]["licence"] = _one_text(text)
    try:
        stated = Manifest.model_validate_json(canonical(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg']}. A manifest is a few pages.") from None
    stated = stated.sealed()
    if stated.root_digest == old.root_digest:
        return old
    return stated.model_copy(update={"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")})


def _one_text(text: str) -> str:
    return " ".join(text.split())
