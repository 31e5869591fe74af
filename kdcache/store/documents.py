"""Hold the documents of a store against what they must say.

Bytes against the manifest's digest, and each zarr.json against the one that follows from the
fields. Invariant: a zarr.json that passes is the one expected but for its spelling.
"""

from __future__ import annotations

import hashlib
import json

from kdcache.errors import StoreError, reason_of
from kdcache.store.files import StoreFiles
from kdcache.store.manifest import Manifest
from kdcache.store.metadata import Json

MAX_DOCUMENT_BYTES = 2**20


def read_checked(files: StoreFiles, name: str, manifest: Manifest, limit: int) -> bytes:
    """A file whose digest is what the manifest says.

    Raises:
        StoreError: it is missing, larger than `limit`, or has another digest.
    """
    content = _read(files, name, limit)
    digest, expected = hashlib.sha256(content).hexdigest(), manifest.digests.get(name, "none")
    if digest != expected:
        raise StoreError(
            f"{files.where(name)} has digest {digest[:12]}…, the manifest says {expected[:12]}…: "
            f"it was edited or damaged. Fetch it again."
        )
    return content


def check_document(
    files: StoreFiles, name: str, expected: Json, limit: int = MAX_DOCUMENT_BYTES
) -> None:
    """The zarr.json called `name` is the one expected.

    Raises:
        StoreError: it is missing, larger than `limit`, no JSON, or says something else: naming the
            first place where it does, with both values.
    """
    file = files.where(name)
    try:
        found = json.loads(_read(files, name, limit).decode())
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} is no JSON ({reason_of(error)}). Fetch it again.") from None
    if found == expected:
        return
    place, ours, theirs = _first_difference(found, expected)
    said = f"{file} has {place[:200]} {ours}" if place else f"{file} is {ours}"
    raise StoreError(
        f"{said}, the manifest gives {theirs}. Other readers would read other values. Fetch it "
        f"again."
    )


def _read(files: StoreFiles, name: str, limit: int) -> bytes:
    try:
        return files.read(name, limit)
    except FileNotFoundError:
        raise StoreError(
            f"{files.where(name)} is missing: the store is incomplete. Fetch it again."
        ) from None


def _first_difference(found: object, expected: object) -> tuple[str, str, str]:
    """Where two documents that differ do so first, and what each has there."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return "", _short(found), _short(expected)
    differing = (
        key
        for key in sorted(found.keys() | expected.keys())
        if key not in found or key not in expected or found[key] != expected[key]
    )
    key = next(differing)
    if key not in found:
        return key, "nothing", _short(expected[key])
    if key not in expected:
        return key, _short(found[key]), "nothing"
    place, ours, theirs = _first_difference(found[key], expected[key])
    return f"{key} {place}".rstrip(), ours, theirs


def _short(value: object) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:  # read at its limit, written beyond it
        text = "nested too deeply to be shown"
    return text if len(text) <= 80 else f"{text[:77]}…"
