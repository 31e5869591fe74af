"""Faults of a finished store: damaged, moved and replaced under a reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fault_rows import Row, times

from kdcache.errors import StoreError
from kdcache.store import read_manifest, verify_store
from tests.faults.damage import (
    Damage,
    damaged,
    draw,
    epoch,
    is_date,
    is_read,
    make_damageable,
    region,
    seen_by_a_training,
)


def damage(folder: Path, scale: float) -> Iterator[Row]:
    """A file gone, cut off or with one bit turned round: found by a check and by a training."""
    store = make_damageable(folder)
    path = Path(str(store.path))
    manifest, whole = (path / "manifest.json").read_bytes(), list(epoch(path))
    checked = {
        kind: Row(f"{text}: found by verify")
        for kind, text in (
            ("one bit", "one bit of a file turned round"),
            ("cut off", "a file cut off"),
            ("gone", "a file gone"),
        )
    }
    read = Row("the same, in bytes a training reads: refused before a loss")
    other = Row("the same, in other files: no number of a batch differs")
    regions: Counter[str] = Counter()
    dates = 0
    for one in draw(path, times(2000, scale), np.random.default_rng(1)):
        regions[region(store, one)] += 1
        with damaged(path, one):
            seen = seen_by_a_training(path, whole)
            if is_read(one):
                read.count(seen == "refused", one)
            else:
                other.count(seen != "other numbers", one)
            if is_date(path, one, manifest):
                dates += 1
                continue
            try:
                found = bool(verify_store(path).problems)
            except StoreError:
                found = True
            checked[one.kind].count(found, one)
    places = ", ".join(f"{n} in {name}" for name, n in regions.most_common())
    checked["one bit"].note = f"of all places: {places}"
    if dates:
        checked["one bit"].note += f"; {dates} left out, see the date below"
    yield from (*checked.values(), read, other)


def manifest_bits(folder: Path, scale: float) -> Iterator[Row]:
    """Every byte of the one file that no other file has a digest of."""
    path = Path(str(make_damageable(folder).path))
    whole = (path / "manifest.json").read_bytes()
    row = Row("one bit of each byte of manifest.json: refused when it is opened")
    dates, rng = 0, np.random.default_rng(6)
    for byte in range(0, len(whole), max(1, round(1 / scale))):
        one = Damage("manifest.json", "one bit", 8 * byte + int(rng.integers(8)))
        with damaged(path, one):
            try:
                read_manifest(path)
            except StoreError:
                row.count(True)
                continue
            if is_date(path, one, whole):
                dates += 1
            else:
                row.count(False, one)
    row.note = f"{dates} more in the date of making, which no digest covers, pass unseen"
    yield row


def replacement(folder: Path, scale: float) -> Iterator[Row]:
    """A store that is moved, and another of the same layout under its name, while it is read."""
    row = Row("a store moved or replaced while a training streams")
    for name in ("one", "other"):
        (folder / name).mkdir()
    paths = [
        Path(str(make_damageable(folder / name, seed=seed).path))
        for seed, name in enumerate(("one", "other"))
    ]
    wholes = [list(epoch(path)) for path in paths]
    rng = np.random.default_rng(2)
    n = times(100, scale)
    for k in range(n):
        batches = epoch(paths[0])
        before = int(rng.integers(1, len(wholes[0])))
        found = [next(batches) for _ in range(before)]
        away = folder / f"away{k}"
        paths[0].rename(away)
        if k % 2:
            paths[1].rename(paths[0])
            away.rename(paths[1])
        found += list(batches)
        row.count(found == wholes[0], f"after {before} batches")
        if k % 2:
            wholes.reverse()
        else:
            away.rename(paths[0])
    row.note = "moved and replaced in turn, at a random batch"
    yield row


FAULTS = [damage, manifest_bits, replacement]
