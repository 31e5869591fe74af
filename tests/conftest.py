"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from kdcache.store import Store

# Some virtual machines name AMX among their instructions without enabling it, which kills torch's
# bfloat16 products. Read by oneDNN at the first product.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

# A loaded machine takes its time: what is slow is not wrong.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with reference data and golden files, named by KDCACHE_SHARED."""
    directory = os.environ.get("KDCACHE_SHARED")
    if not directory or not Path(directory).is_dir():
        pytest.skip("KDCACHE_SHARED does not name the directory with reference data")
    return Path(directory)


@pytest.fixture(scope="session")
def taught_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty labelled structures and a teacher, for tests that only read them."""
    # Here, not above: many tests need no torch.
    from kdcache.store import open_store
    from tests.chain import dump, make_store, make_teacher

    directory = tmp_path_factory.mktemp("taught")
    made = make_store(directory)
    dump(made, make_teacher(directory), codec="half")
    return open_store(made.path)
