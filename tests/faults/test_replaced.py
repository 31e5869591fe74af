"""A store that is moved, replaced or removed while it is read: never two stores in one stream."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import StoreError
from kdcache.store import Store, open_store
from kdcache.store.files import LocalFiles
from tests.faults.damage import epoch, make_damageable

pytestmark = pytest.mark.fault


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_damageable(tmp_path / "one")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_training_streams_on_from_the_store_it_opened(
    after: int, store: Store, tmp_path: Path
) -> None:
    path = Path(str(store.path))
    other = Path(str(make_damageable(tmp_path / "other", seed=1).path))
    assert {p.relative_to(path) for p in path.rglob("*")} == {
        p.relative_to(other) for p in other.rglob("*")
    }
    whole, others = list(epoch(path)), list(epoch(other))
    assert not set(whole) & set(others)
    batches = epoch(path)
    found = [next(batches) for _ in range(after + 1)]
    path.rename(tmp_path / "moved.zarr")
    found.append(next(batches))
    # Another store of the same layout takes its name.
    other.rename(path)
    assert found + list(batches) == whole
    assert list(epoch(path)) == others
    assert list(epoch(tmp_path / "moved.zarr")) == whole


def test_a_store_that_is_removed_is_missed_under_the_name_it_had(
    store: Store, tmp_path: Path
) -> None:
    path = Path(str(store.path))
    other = Path(str(make_damageable(tmp_path / "other", seed=1).path))
    store.read("structures/positions")
    shutil.rmtree(path)
    other.rename(path)
    with pytest.raises(StoreError, match=f"^{path}/structures/positions/c/0/0 is missing"):
        store.read("structures/positions")


def test_a_file_that_may_not_be_read_is_named_in_full(store: Store) -> None:
    name = "structures/positions/zarr.json"
    files = LocalFiles(Path(str(store.path)))
    Path(files.where(name)).unlink()
    os.symlink("zarr.json", files.where(name))
    for ask in (files.size, files.open, lambda name: files.read(name, 9)):
        with pytest.raises(OSError, match="symbolic links") as raised:
            ask(name)
        assert raised.value.filename == files.where(name)


def test_one_read_opens_one_file_and_asks_for_nothing_else(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.read("structures/positions")
    asked: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            asked.append(name)
            return real(*arguments, **options)

        return call

    for name in ("open", "stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    store.read("structures/positions", np.arange(store.plan.blocks_per_shard))
    assert asked == ["open"]


def test_stores_that_are_no_longer_used_are_closed(store: Store) -> None:
    open_store(store.path)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        open_store(store.path)
        LocalFiles(Path("no such store"))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_process_reads_on_and_so_does_its_parent(store: Store, tmp_path: Path) -> None:
    whole = store.read("structures/positions")
    Path(str(store.path)).rename(tmp_path / "moved.zarr")
    child = os.fork()
    if child == 0:
        found = store.read("structures/positions")
        os._exit(0 if np.array_equal(found, whole) else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(store.read("structures/positions"), whole)
