"""One dataset, teacher and store with its features, made by the commands once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.commands import SMALL_BLOCKS, dataset, kdcache, settings, write_structures


@pytest.fixture(autouse=True, scope="session")
def _threads() -> Iterator[None]:
    """Commands set the number of threads of the whole process; give it back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_structures(tmp_path_factory.mktemp("data") / "data.extxyz", dataset())


@pytest.fixture(scope="session")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "teacher"
    kdcache("train-student", data, "-o", run, "--preset", "painn", *settings())
    return run


@pytest.fixture(scope="session")
def features(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("features") / "features.zarr"
    kdcache("dump-teacher", data, "--teacher", teacher, "-o", store, *SMALL_BLOCKS)
    return store
