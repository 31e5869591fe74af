"""A finished store that tests read, and copies of it that they may damage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.store import remote
from tests.store.sample import Sample, make_sample, write_store
from tests.store.serving import FileServer, served


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


@pytest.fixture
def server(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves a store that may be damaged, to a client that is patient in earnest alone."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("KDCACHE_STORE_CACHE", raising=False)
    with served(copied.parent) as running:
        yield running


@pytest.fixture
def url(server: FileServer) -> str:
    return f"{server.url}/copied.zarr"
