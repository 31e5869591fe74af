"""`kdcache compare` as a user runs it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kdcache.checkpoint import save_potential
from kdcache.store import Store
from tests.chain import SCHNET, make_potential
from tests.cli.commands import kdcache, refused


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "other"
    save_potential(path, make_potential(seed=3))
    return path


def test_table_csv_and_picture(taught_store: Store, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "similarity"
    shown = kdcache(
        "compare", taught_store.path, run, "--baseline", run, "--tap", "node/m=message_layers.0",
        "--max-structures", 10, "--device", "cpu", "-o", out,
    )  # fmt: skip
    assert "unbiased" in shown
    assert "+0.0000" in shown
    assert "3 pairs of layers over 10 structures" in shown
    with (out / "cka.csv").open() as file:
        assert [line["b"] for line in csv.DictReader(file)] == ["node", "node_m", "vector"]
    assert (out / "cka.png").is_file()


def test_what_does_not_fit_is_refused_in_one_line(
    taught_store: Store, run: Path, tmp_path: Path
) -> None:
    save_potential(tmp_path / "schnet", make_potential(SCHNET))
    assert "hold no structures" in refused("compare", run, tmp_path / "schnet")
    line = refused("compare", taught_store.path, run, "--tap", "node/m")
    assert "not written kind/name=path" in line
    line = refused("compare", taught_store.path, run, "-o", taught_store.path)
    assert "is a store or a run" in line
    assert "is a run" in refused("compare", taught_store.path, run, "--data", run)
