"""A file of a store that is gone, cut off or has one bit turned round: who sees it, and when."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import StoreError
from kdcache.store import Store, open_store, verify_store
from tests.faults.damage import (
    damaged,
    draw,
    epoch,
    is_date,
    is_read,
    make_damageable,
    region,
    seen_by_a_training,
    window_reader,
)

pytestmark = pytest.mark.fault

PLACES = 220


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_damageable(tmp_path_factory.mktemp("damage"))


def test_no_damage_passes_the_check_and_none_reaches_a_loss(store: Store) -> None:
    path = Path(str(store.path))
    manifest, whole = (path / "manifest.json").read_bytes(), list(epoch(path))
    assert len(set(whole)) == len(whole)
    rng, regions = np.random.default_rng(), Counter[str]()
    damages = draw(path, PLACES, rng)
    while not any(region(store, damage) == "padding" for damage in damages):
        damages += draw(path, PLACES, rng)
    for damage in damages:
        where = region(store, damage)
        regions[where] += 1
        with damaged(path, damage):
            seen = seen_by_a_training(path, whole)
            # Bytes of padding, of fields nobody asked for and of descriptions may differ unseen.
            assert seen == "refused" or (seen == "nothing" and not is_read(damage)), damage
            if is_date(path, damage, manifest):
                continue
            try:
                problems = verify_store(path).problems
            except StoreError as error:
                problems = [str(error)]
            assert problems, damage
            named = any(damage.name in problem for problem in problems)
            assert named or "/c/" not in damage.name, (damage, problems)
    wanted = {"data", "padding", "index", "zarr.json", "index.parquet", "manifest.json"}
    assert wanted <= regions.keys()
    assert verify_store(path).problems == []
    assert list(epoch(path)) == whole


def test_damage_after_a_store_was_opened_reaches_no_loss_either(store: Store) -> None:
    path, blocks = Path(str(store.path)), np.arange(store.plan.n_blocks)
    half = len(blocks) // 2
    reader = window_reader(open_store(path))
    whole = [reader.read(np.array([block])).arrays for block in blocks]
    damages = [d for d in draw(path, PLACES // 2, np.random.default_rng()) if "/c/" in d.name]
    refused = 0
    for damage in damages:
        reading = window_reader(open_store(path))
        for block in blocks[:half]:
            reading.read(np.array([block]))
        with damaged(path, damage):
            for block in blocks[half:]:
                try:
                    found = reading.read(np.array([block])).arrays
                except StoreError:
                    refused += 1
                    continue
                for name, values in found.items():
                    expected = whole[block][name]
                    assert np.array_equal(values, expected, equal_nan=values.dtype.kind == "f"), (
                        damage
                    )
    assert refused > len(damages) // 10
