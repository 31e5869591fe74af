"""Pass a store on without its structures, where their licence forbids to.

Left out is the ground truth: numbers, positions, cells, labels, tags. What stays names no atom: the
index (ids, groups, counts, one-way content hashes), neighbour lists and the teachers' features.
Invariant: what is passed on is a store, and with the left out files it is the whole one, byte for
byte.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import StoreError
from kdcache.fields import OPTIONAL_FIELDS, STRUCTURE_FIELDS
from kdcache.progress import Progress, silent
from kdcache.store.contents import (
    ZARR,
    Plans,
    array_documents,
    expected_files,
    node_documents,
    shard_file,
)
from kdcache.store.copy_file import copy_file
from kdcache.store.entries import Withheld
from kdcache.store.file_limits import file_limits
from kdcache.store.files import inside
from kdcache.store.manifest import MANIFEST, Manifest
from kdcache.store.metadata import readable, root_document
from kdcache.store.reader import Store, open_store
from kdcache.store.rewrite import UNFINISHED_SUFFIX, refuse_existing
from kdcache.store.shards import sync_directory, write_file, write_files
from kdcache.store.signature import MAX_BYTES, SIGNATURE, read_signature
from kdcache.store.work import LOCK, WORK, StoreLock

GROUND_TRUTH = tuple(spec.name for spec in (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS))


@dataclass(frozen=True, eq=False)
class Withholding:
    """A store without its structures, as a difference to the whole one.

    Attributes:
        manifest: of what is passed on.
        left_out: files of the whole store that are not passed on.
        replaced: files that are passed on with this content.
    """

    manifest: Manifest
    left_out: frozenset[str]
    replaced: Mapping[str, bytes]

    @property
    def passed_on(self) -> list[str]:
        """Files that are passed on as they are, but for a signature."""
        return sorted(self.manifest.digests.keys() - self.replaced.keys())


def withheld(store: Store, progress: Progress = silent) -> Withholding:
    """Which files are left out of a store that is passed on without its structures.

    Reads the ground truth once, for a digest of its values.

    Raises:
        StoreError: there are no structures in it, some are left out already, or a shard is damaged.
    """
    held = store.fields("structures")
    names = [name for name in GROUND_TRUTH if name in held]
    if (part := store.manifest.withheld) is not None:
        raise StoreError(
            f"{store.path} was passed on without {', '.join(sorted(part.structures))} already. To "
            f"leave out more, put them back first: `kdcache join {store.path} DATA -o FULL`."
        )
    if not names:
        raise StoreError(f"{store.path} holds no structures that could be left out.")
    check_listing(store)
    with progress("withhold", len(names) * store.plan.n_blocks, "blocks") as advance:
        values = {}
        for name in names:
            digest = hashlib.sha256()
            for block in range(store.plan.n_blocks):
                digest.update(store.read(f"structures/{name}", [block]).tobytes())
                advance()
            values[name] = digest.hexdigest()
    manifest, root = narrowed(store.manifest, store.plans, values)
    left_out = frozenset(store.manifest.digests.keys() - manifest.digests.keys())
    return Withholding(manifest, left_out, {ZARR: root, MANIFEST: manifest.to_bytes()})


def narrowed(whole: Manifest, plans: Plans, values: Mapping[str, str]) -> tuple[Manifest, bytes]:
    """Manifest and zarr.json of a store without some fields of its structures.

    Args:
        whole: manifest of the whole store.
        plans: layout of its groups.
        values: SHA-256 of the values of each field that is left out, by name.
    """
    files = {
        file
        for array, spec, document in array_documents(whole, plans)
        if array.startswith("structures/") and spec.name in values
        for file in (
            f"{array}/{ZARR}",
            *(shard_file(array, k, document) for k in range(plans["structures"].n_shards)),
        )
    }
    left_out = {name: digest for name, digest in whole.digests.items() if name in files}
    kept = {name: digest for name, digest in whole.digests.items() if name not in files}
    part = Withheld(
        root_digest=whole.root_digest,
        structures={name: whole.structures[name] for name in values},
        digests={**left_out, ZARR: whole.digests[ZARR]},
        values=dict(values),
    )
    fields = {name: entry for name, entry in whole.structures.items() if name not in values}
    manifest = whole.model_copy(update={"structures": fields, "withheld": part})
    nodes = node_documents(manifest, plans)
    root = readable(root_document(plans["structures"], whole.format_version, nodes))
    digests = {**kept, ZARR: hashlib.sha256(root).hexdigest()}
    return manifest.model_copy(update={"digests": digests}).sealed(), root


def check_part(store: Store) -> None:
    """What a store without its structures holds is what the whole store's manifest says.

    Then a signature of the whole one is one of this part, too.

    Raises:
        StoreError: it was edited.
    """
    part = store.manifest.withheld
    if part is None:
        return
    check_listing(store)
    expected, _ = narrowed(store.manifest.whole(), store.plans, part.values)
    if expected.root_digest != store.manifest.root_digest:
        raise StoreError(
            f"{store.path} is not what is left of store {part.root_digest[:12]}… without its "
            f"structures: {store.manifest.root_digest[:12]}…, expected is "
            f"{expected.root_digest[:12]}…. It was edited. Fetch it again."
        )


def check_listing(store: Store) -> None:
    """The manifest lists the files of such a store and no others: each of them is written.

    Raises:
        StoreError: it does not.
    """
    expected = expected_files(store.manifest, store.plans)
    if wrong := sorted(expected ^ store.manifest.digests.keys()):
        raise StoreError(
            f"{store.path}: the manifest lists other files than a store of these fields has, such "
            f"as {wrong[0]!r}. It is not copied. Fetch the store again."
        )


def write_without_structures(
    store: Store, output: str | Path, progress: Progress = silent
) -> tuple[Manifest, str]:
    """Copy a store without its structures; a signature of the whole one goes with it.

    Returns:
        The manifest of what is passed on, and why no signature goes with it ("" where one does, or
        none was there).

    Raises:
        StoreError: something is at `output`, or a file of the store is damaged.
    """
    part = withheld(store, progress)
    limits = file_limits(store.manifest, str(store.path))
    with building(output, "withhold") as path:
        with progress("copy", len(part.passed_on), "files") as advance:
            for name in part.passed_on:
                copy_file(store, name, path / inside(name), limits[name])
                advance()
        unsigned = copy_signature(store, path)
        write_files({path / name: content for name, content in part.replaced.items()})
        open_store(path)
    return part.manifest, unsigned


@contextmanager
def building(output: str | Path, purpose: str) -> Iterator[Path]:
    """A folder that becomes a new store when this ends without an error, and is gone otherwise.

    What a killed attempt left of the same purpose is thrown away: such a store is made by copying.

    Raises:
        StoreError: something else is at the output or at its unfinished name.
    """
    output = refuse_existing(output)
    path = output.with_name(output.name + UNFINISHED_SUFFIX)
    mark = path / WORK / purpose
    if path.exists() and not mark.is_file() and any(path.iterdir()):
        raise StoreError(
            f"{path} exists and was not left by this command. Nothing is overwritten: name "
            f"another path, or delete it."
        )
    with StoreLock(path):
        refuse_existing(output)  # whoever held the lock before us may have made it
        write_file(mark, b"")
        kept = (path / WORK, mark, path / WORK / LOCK)
        _remove_all_but(kept, path)
        _remove_all_but(kept, path / WORK)
        try:
            yield path
            # The mark goes last: until the store has its name, a killed attempt must be known.
            _remove_all_but(kept, path / WORK)
            os.rename(path, output)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(output / WORK, ignore_errors=True)
        sync_directory(output.parent)


def _remove_all_but(kept: tuple[Path, ...], folder: Path) -> None:
    for left in folder.iterdir():
        if left not in kept:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def copy_signature(store: Store, target: Path) -> str:
    """Copy the signature of a store where it is one of the whole store, the one kind that a store
    without its structures and the joined one share.

    Returns:
        Why it is left behind; "" where it is copied, or none is there.
    """
    try:
        content = store.files.read(SIGNATURE, MAX_BYTES)
        signed = read_signature(store.files)
    except FileNotFoundError:
        return ""
    except StoreError as error:
        return f"the signature is left behind: {error}"
    whole = store.manifest.whole().root_digest
    if signed.root_digest != whole:
        return (
            f"the signature is left behind: it is of {signed.root_digest[:12]}…, the whole store "
            f"is {whole[:12]}…"
        )
    write_file(target / SIGNATURE, content)
    return ""
