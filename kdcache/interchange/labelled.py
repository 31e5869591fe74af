"""A store with a teacher, out of a dataset that another program let a teacher label.

What is read is the Zarr layout of nvalchemi-toolkit, as its label_dataset writes it. Nobody there
says which teacher it was, so its digest is one over all that is known: the labels themselves.
Invariant: labels meet the structures they were written with, by place in the file and content hash.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.fields import Codec, FieldSpec
from kdcache.ingest import ImportOptions, check_dataset, import_dataset
from kdcache.interchange.labelled_file import EMBEDDING, FORMAT, LabelledFile
from kdcache.progress import Progress, silent
from kdcache.store import Store, TeacherEntry, add_teacher, open_store
from kdcache.store.entries import check_name
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.metadata import Json, canonical

Array = npt.NDArray[Any]

MODEL = "unknown"
SAMPLES_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class LabelledOptions:
    """How a labelled dataset becomes a store with a teacher.

    Attributes:
        name: of the teacher in the store.
        layout: order, splits, graph and licences of a new store.
        embedding: array that becomes the field "node", where the file has it.
        codec: of the embedding; energies and forces are kept exactly.
        unlabelled: accept a file without energies and forces of its own.
        licence: of the teacher's weights, as their owner states it.
    """

    name: str
    layout: ImportOptions = field(default_factory=ImportOptions)
    embedding: str = EMBEDDING
    codec: Codec = "half"
    unlabelled: bool = False
    licence: str = ""


def import_labelled(
    path: str | Path, output: str | Path, options: LabelledOptions, *, progress: Progress = silent
) -> Store:
    """Read structures and labels into a new store, and a teacher's labels beside them.

    Structures whose labels are NaN or infinite count as ones the teacher failed on. Killed, it goes
    on when it is called again.

    Args:
        path: Zarr group of nvalchemi-toolkit.
        output: where the store is made, or a finished store of the same structures.
        options: names, codecs, layout.
        progress: shows structures.

    Returns:
        The store, open.

    Raises:
        DataError: no such layout, no labels of a teacher, or arrays that do not fit each other.
        StoreError: the store has a teacher of this name already.
        IdentityError: the store was made of other structures.
    """
    check_name(options.name, "teacher")
    path, output = Path(path), local_path(output, "an import")
    file = LabelledFile(path)
    specs = file.teacher_specs(options.embedding, options.codec)
    read = replace(
        options.layout.read, format=FORMAT, unlabelled=options.unlabelled, split_key="none"
    )
    # What was read before is held against the file; a killed import is gone on with.
    if (output / MANIFEST).is_file() and not (output / ".work" / "spool").is_dir():
        check_dataset(open_store(output), [path], read, progress=progress)
    else:
        import_dataset([path], output, replace(options.layout, read=read), progress)
    store = open_store(output)
    entry = TeacherEntry.describe(
        digest=_digest(file, specs),
        fields=list(specs.values()),
        model=MODEL,
        architecture={
            "digest_is_of": "the labels: what computed them is not recorded",
            "labelled_with": "nvalchemi-toolkit",
        },
        licence=options.licence,
    )
    with add_teacher(output, options.name, entry, list(specs.values())) as writer:
        pending = writer.pending_shards()
        with progress(f"teacher {options.name}", len(pending), "shards") as advance:
            for shard in pending:
                rows = store.plan.shard_structures(shard)
                values = {
                    spec.name: file.rows(name, file.samples[store.index.source_index[rows]])
                    .reshape(-1, *spec.shape)
                    .astype(spec.dtype)
                    for name, spec in specs.items()
                }
                writer.write_shard(shard, values, _failures(store, specs, values, rows))
                advance()
        writer.commit()
    return open_store(output)


def _failures(
    store: Store, specs: dict[str, FieldSpec], values: dict[str, Array], rows: slice
) -> dict[int, str]:
    """Structures with labels that are no numbers, by store row: the teacher had none for them."""
    n_atoms = store.index.n_atoms[rows]
    found: dict[int, str] = {}
    for spec in specs.values():
        flat = values[spec.name].reshape(len(values[spec.name]), -1)
        wrong = ~np.isfinite(flat).all(axis=1)
        if spec.level == "atom":
            wrong = np.logical_or.reduceat(wrong, np.cumsum(n_atoms) - n_atoms)
        for place in np.flatnonzero(wrong).tolist():
            found.setdefault(rows.start + place, f"{spec.name} is not finite in the file")
    return found


def _digest(file: LabelledFile, specs: dict[str, FieldSpec]) -> str:
    """SHA-256 over the labels, as a teacher's digest: equal labels, equal digest."""
    known: Json = {"layout": "nvalchemi-toolkit", "arrays": [*sorted(specs)]}
    digest = hashlib.sha256(canonical(known))
    for name, spec in sorted(specs.items()):
        for first in range(0, len(file.samples), SAMPLES_AT_ONCE):
            rows = file.rows(name, file.samples[first : first + SAMPLES_AT_ONCE])
            digest.update(rows.astype(np.dtype(spec.dtype).newbyteorder("<")).tobytes())
    return digest.hexdigest()
