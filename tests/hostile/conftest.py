"""Warm kinds of hostile files, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.kinds import Kind, make_kinds
from tests.hostile.watch import Found, feed_many, warm_up

Feeding = Callable[[str, bytes], Found]


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """By name."""
    return make_kinds(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def warm(kinds: dict[str, Kind], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kind]:
    """A kind whose readers were used before."""
    folder, done = tmp_path_factory.mktemp("warm"), set[str]()

    def warmed(name: str) -> Kind:
        if name not in done:
            done.add(name)
            warm_up(kinds[name], folder / str(len(done)))
        return kinds[name]

    return warmed


@pytest.fixture
def fed(warm: Callable[[str], Kind], tmp_path: Path) -> Feeding:
    """Feed one file of a kind to its readers, watched; a file may take 32 MiB beside its size."""

    def feed(name: str, data: bytes) -> Found:
        return feed_many(lambda _: data, warm(name), range(1), tmp_path, max_resident=2**25)

    return feed
