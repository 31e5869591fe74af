"""A finished store that tests read, and copies of it that they may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.store.sample import Sample, make_sample, write_store


@pytest.fixture(scope="session")
def sample() -> Sample:
    return make_sample()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sample: Sample) -> Path:
    """Read only."""
    return write_store(tmp_path_factory.mktemp("stores") / "finished.zarr", sample)


@pytest.fixture
def copied(tmp_path: Path, finished: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copied.zarr"))
