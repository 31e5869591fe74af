"""Stores to be moved, and servers on this machine to move them from and to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.store import remote
from tests.sharing.counting import CountingServer, counted
from tests.store.conftest import copied, finished, sample  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is patient in earnest alone, and no cache but those a test names."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.delenv("KDCACHE_STORE_CACHE", raising=False)


@pytest.fixture
def server(copied: Path) -> Iterator[CountingServer]:  # noqa: F811
    """Serves a store that may be damaged, as copied.zarr."""
    with counted(copied.parent) as running:
        yield running


@pytest.fixture
def url(server: CountingServer) -> str:
    return f"{server.url}/copied.zarr"
