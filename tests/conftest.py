"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with reference data and golden files, named by KDCACHE_SHARED."""
    directory = os.environ.get("KDCACHE_SHARED")
    if not directory or not Path(directory).is_dir():
        pytest.skip("KDCACHE_SHARED does not name the directory with reference data")
    return Path(directory)
