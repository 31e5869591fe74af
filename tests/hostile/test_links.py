"""Links within a store: a local user may set them, and they are followed; none leads to a write.

A store that is fetched has none: clients of object stores and `kdcache` itself write files. So what
a link could show is what the user who set it can read anyway, and its digest must still be right.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import StoreError
from kdcache.store import open_store, verify_store
from tests.hostile.kinds import SHARDS, Kind

pytestmark = pytest.mark.hostile

RAW = SHARDS["raw"]


@pytest.fixture
def store(kinds: dict[str, Kind], tmp_path: Path) -> Path:
    kind = kinds["manifest.json"]
    kind.put(tmp_path, kind.seeds[0])
    return tmp_path / "store.zarr"


def test_a_shard_and_a_manifest_may_lie_elsewhere(store: Path, tmp_path: Path) -> None:
    before = open_store(store).read("teachers/painn/node")
    for name in (RAW, "manifest.json"):
        moved = tmp_path / name.replace("/", "_")
        shutil.move(store / name, moved)
        (store / name).symlink_to(moved)
    np.testing.assert_array_equal(open_store(store).read("teachers/painn/node"), before)
    assert verify_store(store).problems == []


@pytest.mark.parametrize("name", [RAW, "index.parquet", "structures/forces/zarr.json"])
def test_a_link_to_another_file_is_refused_without_a_word_of_it(
    name: str, store: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private.txt"
    private.write_text("password: correct horse\n" * 40)
    (store / name).unlink()
    (store / name).symlink_to(private)
    with pytest.raises(StoreError) as raised:
        open_store(store).read("teachers/painn/node")
    assert "horse" not in str(raised.value)
    assert any(name in problem for problem in verify_store(store).problems)


def test_a_link_in_a_circle_or_to_nothing_is_refused(store: Path, tmp_path: Path) -> None:
    for target in (store / RAW, tmp_path / "nothing"):
        (store / RAW).unlink(missing_ok=True)
        (store / RAW).symlink_to(target)
        with pytest.raises((StoreError, OSError)) as raised:
            open_store(store).read("teachers/painn/node")
        assert "\n" not in str(raised.value)


def test_a_pipe_in_place_of_a_shard_is_no_file_to_wait_for(store: Path) -> None:
    (store / RAW).unlink()
    os.mkfifo(store / RAW)
    with pytest.raises(StoreError, match="are expected"):
        open_store(store)
