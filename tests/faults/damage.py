"""A store whose files are damaged one at a time, and what a check and a training see of it.

Damage is made in place and undone. Invariant: whatever is done to a file, its bytes and its times
are afterwards what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kdcache.errors import StoreError
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.store import Store, TeacherEntry, add_teacher, open_store
from kdcache.store.shards import CRC_BYTES, index_size
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.structures import Batch
from tests.chain import CUTOFF, make_store, structures

RULE = GraphRule(CUTOFF)
# Every way a field is kept, and two that no training here reads.
FIELDS = (
    FieldSpec("node", "atom", (3,), codec="half"),
    FieldSpec("vector", "atom", (3, 2), symmetry="vector", codec="compact"),
    FieldSpec("atomic_energy", "atom", (), "float64", "eV"),
    FieldSpec("pooled", "structure", (2,), codec="half"),
    FieldSpec("other", "atom", (2,), codec="half"),
)
READ = ("node", "vector", "atomic_energy", "pooled")
UNREAD = tuple(spec.name for spec in FIELDS if spec.name not in READ)
BATCH_SIZE = 4

Kind = Literal["gone", "cut off", "one bit"]
Seen = Literal["refused", "nothing", "other numbers"]


@dataclass(frozen=True)
class Damage:
    """What is done to a file: all of it gone, cut off at a byte, or a bit turned round."""

    name: str
    kind: Kind
    place: int


def make_damageable(directory: Path, n_structures: int = 24, *, seed: int = 0) -> Store:
    """A store of several shards with neighbour lists and a teacher."""
    made = make_store(directory, found=structures(n_structures, seed), graph=RULE)
    entry = TeacherEntry.describe(
        digest="0" * 64, fields=FIELDS, model="numbers", architecture={}, graph=RULE,
        references={}, precision="float64", licence="", software={},
    )  # fmt: skip
    rng = np.random.default_rng(5 + seed)
    with add_teacher(made.path, "numbers", entry, FIELDS) as writer:
        for shard in writer.pending_shards():
            rows = writer.plan.shard_structures(shard)
            arrays = {}
            for spec in FIELDS:
                n_rows = int(writer.plan.counts(spec.level)[rows].sum())
                arrays[spec.name] = rng.normal(size=(n_rows, *spec.shape))
            writer.write_shard(shard, arrays)
        writer.commit()
    return open_store(made.path)


def draw(store: Path, n: int, rng: np.random.Generator) -> list[Damage]:
    """Damage to every file in turn, at random places."""
    names = sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())
    kinds: list[Kind] = ["one bit", "one bit", "one bit", "cut off", "gone"]
    found = []
    for i in range(n):
        name = names[i % len(names)] if i < len(names) else str(rng.choice(names))
        # Most by a bit: it is the hardest to see.
        kind = kinds[int(rng.integers(len(kinds)))]
        size = (store / name).stat().st_size
        found.append(Damage(name, kind, int(rng.integers(8 * size if kind == "one bit" else size))))
    return found


@contextmanager
def damaged(store: Path, damage: Damage) -> Iterator[None]:
    """The store, damaged within the block."""
    file = store / damage.name
    content, status = file.read_bytes(), file.stat()
    if damage.kind == "gone":
        file.unlink()
    elif damage.kind == "cut off":
        os.truncate(file, damage.place)
    else:
        flipped = bytearray(content)
        flipped[damage.place // 8] ^= 1 << damage.place % 8
        file.write_bytes(flipped)
    try:
        yield
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def region(store: Store, damage: Damage) -> str:
    """What the damaged byte is for: "data", "padding", "checksum" or "index" of a shard, or the
    file's own name."""
    array, _, shard = damage.name.partition("/c/")
    if not shard:
        return Path(damage.name).name
    size = (Path(str(store.path)) / damage.name).stat().st_size
    place = damage.place // 8 if damage.kind == "one bit" else damage.place
    n_blocks = store.plan.blocks_per_shard
    if place >= size - index_size(n_blocks):
        return "index"
    group, _, name = array.rpartition("/")
    spec = store.fields(group).get(name)
    if spec is None or spec.codec == "exact":  # compressed: all is one frame
        return "data"
    plan = store.plans[group]
    row_bytes = spec.row_size * (1 if spec.codec == "compact" else 2)
    chunk = plan.capacity(spec.level) * row_bytes + CRC_BYTES
    block = int(shard.split("/")[0]) * n_blocks + place // chunk
    within = place % chunk
    if within >= chunk - CRC_BYTES:
        return "checksum"
    return "padding" if within >= int(plan.used(spec.level)[block]) * row_bytes else "data"


def is_date(store: Path, damage: Damage, whole: bytes) -> bool:
    """Only the date of making is another, which belongs to no digest."""
    if damage.name != "manifest.json" or damage.kind != "one bit":
        return False
    try:
        found, known = json.loads((store / damage.name).read_bytes()), json.loads(whole)
        return bool(found | {"created": ""} == known | {"created": ""})
    except (ValueError, TypeError):
        return False


def digest(batch: Batch) -> str:
    """Of every number that a step sees."""
    parts: list[Any] = [
        batch.atomic_numbers, batch.positions, batch.cell, batch.pbc, batch.structure_index,
        batch.edge_index, batch.edge_shift, batch.energy, batch.forces, batch.weight,
        *(batch.teacher[name] for name in sorted(batch.teacher)),
    ]  # fmt: skip
    found = hashlib.sha256()
    for part in parts:
        found.update(part.numpy().tobytes())
    return found.hexdigest()


def window_reader(store: Store) -> WindowReader:
    """Of everything a training reads."""
    neighbors = neighbors_for(store, RULE, Path("no cache is needed"))
    return WindowReader(store, neighbors, teacher_fields=[f"numbers/{name}" for name in READ])


def epoch(store: Path) -> Iterator[str]:
    """Digests of the batches of an epoch, as a training would get them, the store opened anew."""
    opened = open_store(store)
    sampler = BlockShuffle(
        opened.index.block,
        np.arange(len(opened)),
        batch_size=BATCH_SIZE,
        seed=3,
        window_blocks=2,
    )
    with Loader([(window_reader(opened), sampler)]) as batches:
        # What is left at the end of an epoch is not visited: two epochs visit every block.
        yield from map(digest, islice(batches, 2 * (len(opened) // BATCH_SIZE)))


def seen_by_a_training(store: Path, whole: Sequence[str]) -> Seen:
    """What becomes of a training on a store whose undamaged batches are `whole`."""
    try:
        for found, expected in zip(epoch(store), whole, strict=True):
            if found != expected:
                return "other numbers"
    except StoreError:
        return "refused"
    return "nothing"


def is_read(damage: Damage) -> bool:
    """A shard that a training reads, so damage to any byte of it must be refused."""
    array, _, shard = damage.name.partition("/c/")
    return bool(shard) and array.rpartition("/")[2].partition("-")[0] not in UNREAD
