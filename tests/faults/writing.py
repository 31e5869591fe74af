"""A dataset imported and a teacher written, in one call that goes on with whatever is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.progress import Progress, silent
from kdcache.readers import ReadOptions
from kdcache.store import Store, TeacherEntry, add_teacher, open_store
from kdcache.store.work import WORK, WorkFolder
from kdcache.structures import Structure
from tests.chain import CUTOFF, structures, write_xyz

FIELDS = (
    FieldSpec("node", "atom", (2,), codec="half"),
    FieldSpec("pooled", "structure", (1,), codec="compact"),
)
RULE = GraphRule(CUTOFF)
OPTIONS = ImportOptions(
    ReadOptions(id_key="name"), graph=RULE, atom_capacity=8, blocks_per_shard=2, threads=1
)


def write_data(path: Path, n: int = 6, *, seed: int = 0) -> Path:
    """A file of a few structures."""
    found: list[Structure] = structures(n, seed)
    return write_xyz(path, found, split=False)


def write_store(
    data: Path,
    path: Path,
    *,
    progress: Progress = silent,
    between: Callable[[], None] | None = None,
) -> Store:
    """Import and add a teacher, each going on where it was interrupted.

    Args:
        data: a file.
        path: of the store.
        progress: of the import.
        between: called when the structures are finished.
    """
    if not (path / "manifest.json").is_file() or (path / WORK / "spool").is_dir():
        import_dataset(data, path, OPTIONS, progress)
    if between is not None:
        between()
    if "numbers" not in open_store(path).teachers or WorkFolder(path, "teachers/numbers").begun:
        entry = TeacherEntry.describe(
            digest="0" * 64, fields=FIELDS, model="numbers", architecture={}, graph=RULE,
            references={}, precision="float64", licence="", software={},
        )  # fmt: skip
        with add_teacher(path, "numbers", entry, FIELDS) as writer:
            for shard in writer.pending_shards():
                writer.write_shard(shard, _rows(writer.plan.shard_structures(shard), writer.plan))
            writer.commit()
    return open_store(path)


def _rows(rows: slice, plan: object) -> dict[str, np.ndarray]:
    found = {}
    for spec in FIELDS:
        counts = plan.counts(spec.level)  # type: ignore[attr-defined]
        first, n = int(counts[: rows.start].sum()), int(counts[rows].sum())
        numbers = np.arange(first, first + n, dtype=np.float64)[:, None]
        found[spec.name] = np.repeat(numbers, spec.row_size, axis=1)
    return found
