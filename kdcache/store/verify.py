"""Check a store to its last byte.

Unlike `open_store`, which refuses at the first disagreement, this goes on and collects them.
Invariant: a store without problems holds what its manifest says, in every file and every block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdcache.errors import IdentityError, StoreError
from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, FieldSpec
from kdcache.progress import Progress, silent
from kdcache.store.codecs import FLOATS
from kdcache.store.contents import expected_files
from kdcache.store.edges import check_edges, check_lengths
from kdcache.store.files import StoreFiles
from kdcache.store.manifest import Manifest, read_manifest
from kdcache.store.reader import Store, open_store, store_files
from kdcache.structures import Structure

FETCHED_AT_ONCE = 8  # blocks of one field
# Ground truth of a structure without labels is NaN; whatever a teacher says is finite.
LABELS = ("energy", "forces")


@dataclass(slots=True)
class VerifyReport:
    """What was checked and what is wrong.

    Attributes:
        n_files: files whose digest was computed.
        n_bytes: bytes in them.
        n_blocks: blocks of all fields that were decoded and checked.
        n_structures: structures whose content hash was computed from the stored positions.
        n_compared: structures compared with the dataset given.
        problems: one line each; empty when the store is whole.
    """

    n_files: int = 0
    n_bytes: int = 0
    n_blocks: int = 0
    n_structures: int = 0
    n_compared: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for people."""
        verdict = f"{len(self.problems)} problems" if self.problems else "the store is whole"
        compared = f", {self.n_compared:,} compared with the data" if self.n_compared else ""
        return (
            f"{verdict}: {self.n_files:,} files ({self.n_bytes / 1e6:,.1f} MB), {self.n_blocks:,} "
            f"blocks, {self.n_structures:,} structures checked{compared}"
        )


def verify_store(
    path: str | Path | StoreFiles,
    *,
    data: Iterable[Structure] | None = None,
    progress: Progress = silent,
) -> VerifyReport:
    """Check every digest, checksum, count and content hash of a store.

    Args:
        path: of the store, or its address; or its files.
        data: the dataset it is said to be made from, in its order: identity and labels are
            compared too.
        progress: shows bytes and structures.

    Raises:
        StoreError: there is no finished store to check.
    """
    files = store_files(path)
    report = VerifyReport()
    try:
        store = open_store(files)
    except StoreError as error:
        try:
            manifest = read_manifest(files)
        except FileNotFoundError:
            raise error from None
        report.problems.append(str(error))
        _check_digests(files, manifest, report, progress)
        return report
    _check_listing(store, report)
    _check_digests(files, store.manifest, report, progress)
    _check_values(store, report, progress)
    _check_own_edges(store, report)
    if all(name in store.fields("structures") for name in ("positions", "cell", "pbc")):
        _check_content(store, report, progress)
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


def _check_digests(
    files: StoreFiles, manifest: Manifest, report: VerifyReport, progress: Progress
) -> None:
    with progress("digests", len(manifest.digests), "files") as advance:
        for name, expected in sorted(manifest.digests.items()):
            advance()
            if ".." in Path(name).parts or Path(name).is_absolute():
                report.problems.append(f"the manifest names {name}, which is outside the store")
                continue
            digest = hashlib.sha256()
            try:
                for content in files.stream(name):
                    digest.update(content)
                    report.n_bytes += len(content)
            except OSError as error:
                reason = error.strerror or "it is not there"
                report.problems.append(f"{name} cannot be read: {reason}")
                continue
            except StoreError as error:
                report.problems.append(str(error))
                continue
            report.n_files += 1
            if digest.hexdigest() != expected:
                report.problems.append(
                    f"{name} has digest {digest.hexdigest()[:12]}…, the manifest says "
                    f"{expected[:12]}…"
                )


def _check_values(store: Store, report: VerifyReport, progress: Progress) -> None:
    names = [
        (f"{group}/{name}", spec)
        for group in ("structures", *(f"teachers/{t}" for t in store.teachers))
        for name, spec in store.fields(group).items()
    ]
    with progress("values", len(names) * store.plan.n_blocks, "blocks") as advance:
        for name, spec in names:
            for start in range(0, store.plan.n_blocks, FETCHED_AT_ONCE):
                blocks = range(start, min(start + FETCHED_AT_ONCE, store.plan.n_blocks))
                with _fetched(store, name, blocks):
                    for block in blocks:
                        advance()
                        try:
                            _check_block(store, name, spec, block)
                            report.n_blocks += 1
                        except StoreError as error:
                            report.problems.append(str(error))


@contextmanager
def _fetched(store: Store, name: str, blocks: range) -> Iterator[None]:
    """As `Store.fetched`; what it cannot fetch is found again, and said, block by block."""
    with ExitStack() as stack:
        with suppress(StoreError):
            stack.enter_context(store.fetched([name], blocks))
        yield


def _check_block(store: Store, name: str, spec: FieldSpec, block: int) -> None:
    values = store.read(name, [block])
    may_be_nan = name.startswith("structures/") and spec.name in LABELS
    if spec.dtype in FLOATS and len(values):
        wrong = np.isinf(values) if may_be_nan else ~np.isfinite(values)
        if wrong.any():
            raise StoreError(f"{name}, block {block}: {int(wrong.sum())} values are not finite")
    if spec.name == "edge_index" and len(values):
        plan = store.plans[name.rpartition("/")[0]]
        rows = plan.block_structures(block)
        limit = np.repeat(plan.n_atoms[rows], plan.n_edges[rows])
        if values.min() < 0 or (values >= limit[:, None]).any():
            raise StoreError(f"{name}, block {block}: an edge names an atom its structure lacks")


def _check_own_edges(store: Store, report: VerifyReport) -> None:
    """Features are matched by these edges, so each is one of its structure, in order, in reach."""
    known = {"positions", "cell"} <= set(store.fields("structures"))
    for name, teacher in store.teachers.items():
        if not teacher.has_own_edges:
            continue
        group = f"teachers/{name}"
        plan = store.plans[group]
        for block in range(plan.n_blocks):
            where, rows = f"{group}, block {block}", plan.block_structures(block)
            try:
                index = store.read(f"{group}/{EDGE_INDEX.name}", [block])
                shift = store.read(f"{group}/{EDGE_SHIFT.name}", [block])
                check_edges(index, shift, plan.n_atoms[rows], plan.n_edges[rows], where)
                if known and teacher.graph is not None:
                    check_lengths(
                        index,
                        shift,
                        plan.n_atoms[rows],
                        plan.n_edges[rows],
                        store.read("structures/positions", [block]),
                        store.read("structures/cell", [block]),
                        teacher.graph.cutoff,
                        where,
                    )
            except StoreError as error:
                if str(error) not in report.problems:
                    report.problems.append(str(error))


def _check_content(store: Store, report: VerifyReport, progress: Progress) -> None:
    wrong: list[str] = []
    labelled = 0
    with progress("content hashes", len(store.index), "structures") as advance:
        try:
            for row, structure in enumerate(store.structures("store")):
                advance()
                report.n_structures += 1
                labelled += structure.energy is not None and structure.forces is not None
                if structure.content_hash() != store.index.content_hash[row].tobytes():
                    wrong.append(f"{structure.structure_id!r} (row {row})")
        except StoreError as error:
            if str(error) not in report.problems:
                report.problems.append(str(error))
            return
    if wrong:
        report.problems.append(
            f"{len(wrong)} structures are not those the index was made of; the first is {wrong[0]}"
        )
    if {"energy", "forces"} <= set(store.fields("structures")):
        said = store.manifest.dataset.n_labelled
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
