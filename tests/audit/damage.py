"""Stores whose values are wrong and whose digests are right, as a faulty writer leaves them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.store import Store, open_store, verify_store
from kdcache.store.shards import publish_file, write_shard_file
from tests.store.test_verify import reseal

Change = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


def damaged(
    store: Store, copy: Path, field: str, change: Change, shard: int = 0, *, whole: bool = True
) -> Store:
    """A copy of a store in which the blocks of one shard of a field are changed.

    `verify` finds nothing, unless it is no longer `whole`.
    """
    shutil.copytree(str(store.path), copy)
    found = open_store(copy)
    spec, plan = found.spec(field), found.plans[field.rpartition("/")[0]]
    blocks = [found.read(field, [block]) for block in plan.shard_blocks(shard)]
    file = (copy / field / "c" / str(shard)).joinpath(*["0"] * len(spec.shape))
    write_shard_file(
        file,
        "attempt",
        [[np.ascontiguousarray(change(values), values.dtype)] for values in blocks],
        plan.capacity(spec.level),
        plan.blocks_per_shard,
        spec.codec == "exact",
    )
    publish_file(file, "attempt")
    reseal(copy)
    assert (verify_store(copy).problems == []) == whole
    return open_store(copy)
