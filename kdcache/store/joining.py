"""Put a receiver's own structures into a store that was passed on without them.

Structures are matched by content hash, so features cannot meet the wrong atoms. Invariant: a joined
store is the sender's whole one, under its root digest, or says in which fields it differs; and no
more than a shard of it is in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import IdentityError, StoreError, naming
from kdcache.fields import (
    ATOMIC_NUMBERS,
    CELL,
    ENERGY,
    FIXED,
    FORCES,
    OPTIONAL_FIELDS,
    PBC,
    POSITIONS,
    STRUCTURE_FIELDS,
    TAGS,
    FieldSpec,
)
from kdcache.progress import Progress, silent
from kdcache.store.contents import ZARR, expected_files, node_documents
from kdcache.store.copy_file import copy_file
from kdcache.store.entries import Withheld
from kdcache.store.file_limits import file_limits
from kdcache.store.files import inside
from kdcache.store.identity import ContentMatch
from kdcache.store.layout import BlockPlan
from kdcache.store.manifest import MANIFEST, Manifest
from kdcache.store.metadata import Json, field_documents, readable, root_document
from kdcache.store.reader import Store, open_store
from kdcache.store.shard_writer import ShardWriter
from kdcache.store.shards import as_bytes, publish_file, write_file
from kdcache.store.withholding import building, check_part, copy_signature
from kdcache.store.work import WORK
from kdcache.structures import DEFAULT_TAG, Structure

Array = npt.NDArray[Any]

# Of equal content hash, their values are equal: only zeros may have other signs.
HASHED = (ATOMIC_NUMBERS.name, POSITIONS.name, CELL.name, PBC.name, TAGS.name)


@dataclass(frozen=True, slots=True)
class JoinReport:
    """What was joined.

    Attributes:
        manifest: of the new store.
        is_whole: it is the sender's whole store, byte for byte.
        differing: fields whose values are not the sender's.
        n_superfluous: structures of the data that the store has no features of, or too few rows.
        first_superfluous: id of the first of them.
        unsigned: why a signature in the store is not in the joined one; "" where none is missing.
    """

    manifest: Manifest
    is_whole: bool
    differing: tuple[str, ...]
    n_superfluous: int
    first_superfluous: str
    unsigned: str = ""

    @property
    def lines(self) -> list[str]:
        """What a user should know."""
        found = []
        if self.n_superfluous:
            found.append(
                f"{self.n_superfluous} structures of the data are not in the store, or repeat one "
                f"that is, and are left out, the first is {self.first_superfluous!r}"
            )
        if self.is_whole:
            found.append("the sender's whole store, byte for byte")
        else:
            found.append(
                f"{self._difference}: the root digest is another one, and a signature of the "
                f"sender's does not hold"
            )
        return [*found, self.unsigned] if self.unsigned else found

    @property
    def _difference(self) -> str:
        own = _labels(self.differing)
        if own:
            return f"{', '.join(own)} are the data's own, other than the sender's"
        if self.differing:
            zeros = f"zeros of {', '.join(self.differing)} have other signs here"
            return f"all values are the sender's, but {zeros}"
        return "all values are the sender's, but were compressed otherwise here"


def join_store(
    store: Store,
    data: Iterable[Structure],
    output: str | Path,
    *,
    own_labels: bool = False,
    progress: Progress = silent,
) -> JoinReport:
    """Write a store anew with the structures that it was passed on without.

    Args:
        store: passed on without its structures.
        data: the receiver's copy of them, in any order, and others besides.
        output: where the new store is made.
        own_labels: accept energies, forces or fixed atoms that are not the sender's, or none; the
            new store then is another one, and its notes say so.
        progress: shows structures, shards and files.

    Raises:
        StoreError: the store lacks no structures, or does not say which; it is not what the
            sender's leaves without them; something is at `output`; a file is damaged.
        IdentityError: structures are missing or edited, the index counts other atoms of one, or the
            labels differ.
    """
    manifest = store.manifest
    if manifest.withheld is None:
        raise StoreError(_nothing_to_join(store))
    part, whole = manifest.withheld, manifest.whole()
    specs = tuple(entry.spec(name) for name, entry in sorted(part.structures.items()))
    # Shapes and dtypes are not taken from a stranger: files of these sizes are made.
    unknown = [spec.name for spec in specs if spec not in (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS)]
    if unknown or expected_files(whole, store.plans) != whole.digests.keys():
        raise StoreError(
            f"{store.path} was passed on without {', '.join(unknown) or 'files'} that no dataset "
            f"gives. Ask the sender for the whole store."
        )
    # Else features of somebody else's would pass for the sender's.
    check_part(store)
    with (
        building(output, "join") as path,
        closing(_Rows(path / WORK / "rows", specs, store.plan)) as rows,
    ):
        match, n_labelled = ContentMatch(store.index), _Labels(len(store))
        n_given = 0
        with progress("read", None, "structures") as advance:
            for structure in data:
                n_given += 1
                row = match.row(structure.content_hash(), structure.structure_id)
                if row is not None:
                    _check_count(store, row, structure)
                    rows.fill(row, structure)
                    n_labelled.fill(row, structure)
                advance()
        match.check(store.path, n_given)
        for row, same in match.repeats():
            rows.repeat(row, same)
            n_labelled.repeat(row, same)
        differing = [spec.name for spec in specs if rows.digest(spec) != part.values[spec.name]]
        if (others := _labels(differing)) and not own_labels:
            raise IdentityError(_other_labels(store, part, others, n_labelled.count))
        digests = _write_shards(path, store, whole, specs, rows, progress)
        digests |= _copy_rest(path, store, progress)
        made, unsigned = whole.digests | digests, ""
        joined = whole
        if made != whole.digests:
            joined = _another(whole, made, differing, n_labelled.count)
        else:
            unsigned = copy_signature(store, path)
        write_file(path / MANIFEST, joined.to_bytes())
        open_store(path)
    return JoinReport(
        joined,
        joined is whole,
        tuple(differing),
        match.n_superfluous,
        match.first_superfluous,
        unsigned,
    )


def _labels(names: Iterable[str]) -> list[str]:
    """Of some fields, those that a content hash says nothing of."""
    return [name for name in names if name not in HASHED]


def _check_count(store: Store, row: int, structure: Structure) -> None:
    """The index counts the atoms of the structure that its content hash stands for."""
    said = int(store.index.n_atoms[row])
    if said != structure.n_atoms:
        raise IdentityError(
            f"{store.path} has {said} atoms in structure {store.index.structure_id[row]!r}, the "
            f"data of the same contents {structure.n_atoms}: its index was edited. Features would "
            f"meet the wrong atoms. Fetch it again."
        )


def _write_shards(
    path: Path,
    store: Store,
    whole: Manifest,
    specs: tuple[FieldSpec, ...],
    rows: _Rows,
    progress: Progress,
) -> dict[str, str]:
    """Write everything that was left out; digests of it by file."""
    plan = store.plan
    documents: dict[str, Json] = {}
    for spec in specs:
        documents |= field_documents(spec, plan)
    nodes = node_documents(whole, store.plans)
    files = {
        ZARR: readable(root_document(plan, whole.format_version, nodes)),
        **{f"structures/{name}/{ZARR}": readable(value) for name, value in documents.items()},
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    for name, content in files.items():
        write_file(path / name, content)
    ids = store.index.structure_id
    writer = ShardWriter(path, "structures", plan, specs, specs, documents, ids)
    with progress("write", plan.n_shards, "shards") as advance:
        for shard in range(plan.n_shards):
            record = writer.write(shard, rows.of_shard(shard))
            for name in record.size:
                publish_file(path / name, record.attempt)
            digests |= record.sha256
            advance()
    return digests


def _copy_rest(path: Path, store: Store, progress: Progress) -> dict[str, str]:
    """Copy everything that was passed on, but for what the whole store has otherwise."""
    limits = file_limits(store.manifest, str(store.path))
    names = [name for name in store.manifest.digests if name != ZARR]
    with progress("copy", len(names), "files") as advance:
        for name in names:
            copy_file(store, name, path / inside(name), limits[name])
            advance()
    return {name: store.manifest.digests[name] for name in names}


def _another(
    whole: Manifest, digests: Mapping[str, str], differing: list[str], n_labelled: int
) -> Manifest:
    note = f"joined with structures; of {whole.root_digest} it has other "
    if _labels(differing):
        note += ", ".join(differing)
    elif differing:
        note += f"signs of zeros in {', '.join(differing)}, and the same values"
    else:
        note += "compressed bytes, and the same values"
    dataset = whole.dataset.model_copy(
        update={"notes": [*whole.dataset.notes, note], "n_labelled": n_labelled}
    )
    update = {
        "dataset": dataset,
        "digests": dict(digests),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return whole.model_copy(update=update).sealed()


class _Labels:
    """[n_structures] which rows have energy and forces."""

    def __init__(self, n_structures: int) -> None:
        self._known = np.zeros(n_structures, bool)

    @property
    def count(self) -> int:
        return int(self._known.sum())

    def fill(self, row: int, structure: Structure) -> None:
        self._known[row] = structure.energy is not None and structure.forces is not None

    def repeat(self, row: int, same: int) -> None:
        self._known[row] = self._known[same]


def _said(value: Array | None, n_atoms: int, otherwise: object, shape: tuple[int, ...]) -> Array:
    return np.full((n_atoms, *shape), otherwise) if value is None else value


# What a structure says of a field, as rows of it; as an import writes them.
SAID: Mapping[str, Any] = {
    ATOMIC_NUMBERS.name: lambda s: s.atomic_numbers,
    POSITIONS.name: lambda s: s.positions,
    CELL.name: lambda s: s.cell[None],
    PBC.name: lambda s: s.pbc[None],
    ENERGY.name: lambda s: np.array([np.nan if s.energy is None else s.energy]),
    FORCES.name: lambda s: _said(s.forces, s.n_atoms, np.nan, (3,)),
    TAGS.name: lambda s: _said(s.tags, s.n_atoms, DEFAULT_TAG, ()),
    FIXED.name: lambda s: _said(s.fixed, s.n_atoms, False, ()),
}


class _Rows:
    """Rows of every left out field in store order, on disk: data come in any order.

    Written by calls, not by mapped memory: a full disk is an error, and no signal that kills.

    Args:
        folder: for a file a field.
        specs: fields of level structure or atom.
        plan: of the store.
    """

    def __init__(self, folder: Path, specs: tuple[FieldSpec, ...], plan: BlockPlan) -> None:
        folder.mkdir(parents=True)
        self._specs = specs
        self._plan = plan
        self._counts = {spec.name: plan.counts(spec.level) for spec in specs}
        self._ends = {name: np.cumsum(counts) for name, counts in self._counts.items()}
        self._paths = {spec.name: folder / spec.name for spec in specs}
        self._descriptors = {
            name: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            for name, path in self._paths.items()
        }

    def close(self) -> None:
        """Give the files back."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def fill(self, row: int, structure: Structure) -> None:
        """Enter what a structure says."""
        for spec in self._specs:
            self._write(spec, row, SAID[spec.name](structure).astype(spec.dtype))

    def repeat(self, row: int, same: int) -> None:
        """Enter what another row says."""
        for spec in self._specs:
            self._write(spec, row, self._read(spec, self._place(spec, same)))

    def digest(self, spec: FieldSpec) -> str:
        """SHA-256 of the values, as `Withheld.values`."""
        digest = hashlib.sha256()
        for shard in range(self._plan.n_shards):
            digest.update(as_bytes(self._read(spec, self._shard_rows(spec, shard))).data)
        return digest.hexdigest()

    def of_shard(self, shard: int) -> dict[str, Array]:
        """Rows of the shard's structures, by field."""
        return {spec.name: self._read(spec, self._shard_rows(spec, shard)) for spec in self._specs}

    def _shard_rows(self, spec: FieldSpec, shard: int) -> slice:
        here = self._plan.shard_structures(shard)
        return slice(self._place(spec, here.start).start, self._place(spec, here.stop - 1).stop)

    def _place(self, spec: FieldSpec, row: int) -> slice:
        end = int(self._ends[spec.name][row])
        return slice(end - int(self._counts[spec.name][row]), end)

    def _write(self, spec: FieldSpec, row: int, values: Array) -> None:
        left, start = memoryview(values.tobytes()), self._place(spec, row).start * _row_bytes(spec)
        with naming(str(self._paths[spec.name])):
            while left:
                n_written = os.pwrite(self._descriptors[spec.name], left, start)
                left, start = left[n_written:], start + n_written

    def _read(self, spec: FieldSpec, rows: slice) -> Array:
        count = (rows.stop - rows.start) * spec.row_size
        offset = rows.start * _row_bytes(spec)
        values = np.fromfile(self._paths[spec.name], spec.dtype, count, offset=offset)
        return values.reshape(-1, *spec.shape)


def _row_bytes(spec: FieldSpec) -> int:
    return spec.row_size * np.dtype(spec.dtype).itemsize


def _nothing_to_join(store: Store) -> str:
    if POSITIONS.name in store.fields("structures"):
        return f"{store.path} holds its structures. Nothing is to be joined: use it as it is."
    return (
        f"{store.path} lacks its structures but does not say which store it is a part of: it was "
        f"made from one without them. Join that one, and make this one again."
    )


def _other_labels(store: Store, part: Withheld, differing: list[str], n_labelled: int) -> str:
    said = store.manifest.dataset.n_labelled
    return (
        f"{', '.join(differing)} of the data are not those of {part.root_digest[:12]}…, of which "
        f"{store.path} is a part ({n_labelled} of {len(store)} structures have labels, there "
        f"{said}). Students would learn other targets than the sender's. Give the sender's data "
        f"(keys, units), or keep your own under another root digest (--own-labels)."
    )
