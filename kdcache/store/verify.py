"""Check a store to its last byte, here or by a cluster.

Unlike `open_store`, which refuses at the first disagreement, this goes on and collects them.
Invariant: a store without problems holds what its manifest says, in every file and every block, and
the problems of a store and their order do not depend on who looked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.cluster import Cluster, Here
from kdcache.errors import IdentityError, StoreError
from kdcache.progress import Progress, silent
from kdcache.store.contents import ZARR, expected_files, node_documents
from kdcache.store.documents import MAX_DOCUMENT_BYTES, check_document
from kdcache.store.files import StoreFiles
from kdcache.store.index import INDEX, StoreIndex
from kdcache.store.location import StoreUrl
from kdcache.store.manifest import MAX_MANIFEST_BYTES, Manifest, read_manifest
from kdcache.store.metadata import root_document
from kdcache.store.reader import Store, open_store, store_files
from kdcache.store.scan import reference
from kdcache.store.verify_shards import CheckContent, CheckShards
from kdcache.store.withholding import check_part
from kdcache.store.work import unfinished_groups
from kdcache.structures import Structure

# Files of which one process computes the digests before it says so.
FILES_AT_ONCE = 8
SPLITS = {"train", "val", "test", ""}


@dataclass(slots=True)
class VerifyReport:
    """What was checked and what is wrong.

    Attributes:
        n_files: files whose digest was computed.
        n_bytes: bytes in them.
        n_blocks: blocks of all fields that were decoded and checked.
        n_structures: structures whose content hash was computed from the stored positions.
        n_compared: structures compared with the dataset given.
        left_out: fields of the structures that the store was passed on without.
        unfinished: teachers that were begun, one line each: readers do not see them.
        problems: one line each; empty when all that is there is right.
    """

    n_files: int = 0
    n_bytes: int = 0
    n_blocks: int = 0
    n_structures: int = 0
    n_compared: int = 0
    left_out: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for people."""
        right = "what was passed on is right" if self.left_out else "the store is whole"
        verdict = f"{len(self.problems)} problems" if self.problems else right
        left_out = f"; left out, so not checked: {', '.join(self.left_out)}"
        compared = f", {self.n_compared:,} compared with the data" if self.n_compared else ""
        return (
            f"{verdict}: {self.n_files:,} files ({self.n_bytes / 1e6:,.1f} MB), {self.n_blocks:,} "
            f"blocks, {self.n_structures:,} structures checked{compared}"
            f"{left_out if self.left_out else ''}"
        )


def verify_store(
    path: str | Path | StoreFiles,
    *,
    data: Iterable[Structure] | None = None,
    cluster: Cluster | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Check every digest, checksum, count and content hash of a store.

    Args:
        path: of the store, or its address; or its files.
        data: the dataset it is said to be made from, in its order: identity and labels are
            compared too, in this process.
        cluster: who reads the shards; None for this process.
        progress: shows files, blocks and structures.

    Raises:
        StoreError: there is no finished store to check.
    """
    files = store_files(path)
    cluster = Here() if cluster is None else cluster
    report = VerifyReport()
    try:
        store = open_store(files)
    except StoreError as error:
        try:
            manifest = read_manifest(files)
        except FileNotFoundError:
            raise error from None
        report.problems.append(str(error))
        _check_digests(files, manifest, report, cluster, progress)
        return report
    if isinstance(store.path, Path):
        report.unfinished = tuple(
            f"{group}, {done} of {store.plan.n_shards} shards are written"
            for group, done in unfinished_groups(store.path).items()
        )
    _check_listing(store, report)
    _check_left_out(store, report)
    _check_documents(store, report)
    _check_index(store.index, report)
    _check_digests(files, store.manifest, report, cluster, progress)
    _check_shards(store, report, cluster, progress)
    if all(name in store.fields("structures") for name in ("positions", "cell", "pbc")):
        _check_content(store, report, cluster, progress)
    if data is not None:
        _check_dataset(store, data, report, progress)
    return report


def _check_listing(store: Store, report: VerifyReport) -> None:
    expected, listed = expected_files(store.manifest, store.plans), set(store.manifest.digests)
    for name in sorted(expected ^ listed):
        report.problems.append(
            f"{name} has no digest in the manifest"
            if name in expected
            else f"the manifest has a digest of {name}, which is no file of this store"
        )
    for teacher in store.teachers:
        try:
            store.failures(teacher)
        except StoreError as error:
            report.problems.append(str(error))


def _check_left_out(store: Store, report: VerifyReport) -> None:
    """A store without its structures is what the whole one leaves without them, no other one."""
    part = store.manifest.withheld
    if part is None:
        return
    report.left_out = tuple(sorted(part.structures))
    if report.problems:  # of other files than it has, nothing can be told
        return
    try:
        check_part(store)
    except StoreError as error:
        report.problems.append(str(error))


def _check_documents(store: Store, report: VerifyReport) -> None:
    """The groups' zarr.json, and the root's, whose copies of all others public readers go by.

    Those of arrays were compared when the store was opened.
    """
    nodes = node_documents(store.manifest, store.plans)
    root = root_document(store.plan, store.manifest.format_version, nodes)
    groups = [name for name, document in nodes.items() if document["node_type"] == "group"]
    documents = [(f"{name}/{ZARR}", nodes[name], MAX_DOCUMENT_BYTES) for name in groups]
    for name, expected, limit in [(ZARR, root, MAX_MANIFEST_BYTES), *documents]:
        try:
            check_document(store.files, name, expected, limit)
        except StoreError as error:
            report.problems.append(str(error))


def _check_index(index: StoreIndex, report: VerifyReport) -> None:
    """Columns of the index that no layout follows from."""
    ids = index.structure_id
    if repeated := len(ids) - len(set(ids.tolist())):
        report.problems.append(f"{repeated} structures of {INDEX} have the id of another one")
    if unknown := set(index.split.tolist()) - SPLITS:
        report.problems.append(
            f"{len(unknown)} splits of {INDEX} are none, such as {min(unknown)[:40]!r}"
        )
    if wrong := int((~np.isfinite(index.weight) | (index.weight < 0)).sum()):
        report.problems.append(f"{wrong} weights of {INDEX} are negative or not finite")


class FoundDigest(NamedTuple):
    """A file that was read: bytes, and what is wrong; `read` where all of it was."""

    n_bytes: int
    read: bool
    problem: str


@dataclass(frozen=True)
class _CheckDigests:
    """Digests of some files: the k-th few of all that the manifest names."""

    files: StoreFiles | Path | StoreUrl

    def __call__(self) -> Callable[[int], list[FoundDigest]]:
        files = store_files(self.files)
        expected_of = sorted(read_manifest(files).digests.items())

        def check(few: int) -> list[FoundDigest]:
            first = few * FILES_AT_ONCE
            named = expected_of[first : first + FILES_AT_ONCE]
            return [_digest(files, name, expected) for name, expected in named]

        return check


def _check_digests(
    files: StoreFiles,
    manifest: Manifest,
    report: VerifyReport,
    cluster: Cluster,
    progress: Progress,
) -> None:
    location = files.location
    where: StoreFiles | Path | StoreUrl = files
    if not isinstance(cluster, Here):
        where = location.resolve() if isinstance(location, Path) else location
    n_files = len(manifest.digests)
    found: dict[int, list[FoundDigest]] = {}
    with progress("digests", n_files, "files") as advance:
        few = range(-(-n_files // FILES_AT_ONCE))
        for k, digests in cluster.run(_CheckDigests(where), few):
            found[k] = digests
            advance(len(digests))
    for k in sorted(found):
        for digest in found[k]:
            report.n_bytes += digest.n_bytes
            report.n_files += digest.read
            if digest.problem:
                report.problems.append(digest.problem)


def _digest(files: StoreFiles, name: str, expected: str) -> FoundDigest:
    if ".." in Path(name).parts or Path(name).is_absolute():
        return FoundDigest(0, False, f"the manifest names {name}, which is outside the store")
    digest, n_bytes = hashlib.sha256(), 0
    try:
        for content in files.stream(name):
            digest.update(content)
            n_bytes += len(content)
    except OSError as error:
        reason = error.strerror or "it is not there"
        return FoundDigest(n_bytes, False, f"{name} cannot be read: {reason}")
    except StoreError as error:
        return FoundDigest(n_bytes, False, str(error))
    found = digest.hexdigest()
    wrong = f"{name} has digest {found[:12]}…, the manifest says {expected[:12]}…"
    return FoundDigest(n_bytes, True, "" if found == expected else wrong)


def _check_shards(store: Store, report: VerifyReport, cluster: Cluster, progress: Progress) -> None:
    work = CheckShards(reference(store, cluster))
    n_fields = sum(len(store.fields(group)) for group in store.plans)
    values: list[tuple[int, int, str]] = []
    edges: list[tuple[int, int, str]] = []
    with progress("values", n_fields * store.plan.n_blocks, "blocks") as advance:
        for shard, found in cluster.run(work, range(store.plan.n_shards)):
            report.n_blocks += found.n_blocks
            values += found.values
            edges += found.edges
            advance(n_fields * len(store.plan.shard_blocks(shard)))
    found_all = [text for *_, text in (*sorted(values), *sorted(edges))]
    # A damaged list of failures is met again in every block that needs it.
    report.problems[:] = dict.fromkeys([*report.problems, *found_all])


def _check_content(
    store: Store, report: VerifyReport, cluster: Cluster, progress: Progress
) -> None:
    work = CheckContent(reference(store, cluster))
    found = {}
    with progress("content hashes", len(store.index), "structures") as advance:
        for shard, content in cluster.run(work, range(store.plan.n_shards)):
            found[shard] = content
            advance(content.n_structures)
    shards = [found[shard] for shard in sorted(found)]
    report.n_structures += sum(shard.n_structures for shard in shards)
    unread = [shard.problem for shard in shards if shard.problem]
    if unread:
        if unread[0] not in report.problems:
            report.problems.append(unread[0])
        return
    wrong = [shard for shard in shards if shard.n_wrong]
    if wrong:
        report.problems.append(
            f"{sum(shard.n_wrong for shard in wrong)} structures are not those the index was made "
            f"of; the first is {wrong[0].first_wrong}"
        )
    if {"energy", "forces"} <= set(store.fields("structures")):
        labelled, said = sum(s.n_labelled for s in shards), store.manifest.dataset.n_labelled
        if labelled != said:
            report.problems.append(f"{labelled} structures have labels, the manifest says {said}")


def _check_dataset(
    store: Store, data: Iterable[Structure], report: VerifyReport, progress: Progress
) -> None:
    hashes, ids = [], []
    energies, forces = [], []
    with progress("dataset", len(store.index), "structures") as advance:
        for structure in data:
            advance()
            hashes.append(structure.content_hash())
            ids.append(structure.structure_id)
            energies.append(structure.energy)
            forces.append(_force_digest(structure))
    report.n_compared = len(hashes)
    try:
        store.check_dataset(hashes, ids)
    except IdentityError as error:
        report.problems.append(str(error))
        return
    if not {"energy", "forces"} <= set(store.fields("structures")):
        return
    try:
        for i, stored in enumerate(store.structures("source")):
            if stored.energy != energies[i]:
                kind, theirs = "energy", f" {energies[i]} eV, in the store {stored.energy} eV"
            elif _force_digest(stored) != forces[i]:
                kind, theirs = "forces", " other than in the store"
            else:
                continue
            report.problems.append(
                f"the labels differ: structure {i}, {ids[i]!r}, has {kind}{theirs}"
            )
            return
    except StoreError as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))


def _force_digest(structure: Structure) -> bytes:
    if structure.forces is None:
        return b""
    return hashlib.sha256((structure.forces + 0.0).astype("<f8").tobytes()).digest()
