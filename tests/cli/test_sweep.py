"""`kdcache sweep`: a file in, runs and one table out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kdcache_cli.main import main
from tests.cli.commands import TINY, kdcache, refused, write_structures
from tests.readers.identity import numbered_structure

GRID: dict[str, Any] = {
    "preset": "painn-small",
    "strategies": ["control", {"name": "n2n", "weights": {"n2n": [0.1, 1]}}],
    "grid": {"training.seed": [0, 1]},
}


def write(path: Path, features: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({"store": str(features), **GRID, **changes}))
    return path


def options(*texts: str) -> list[str]:
    return ["--processes", "1", *(part for text in (*TINY, *texts) for part in ("--set", text))]


def test_a_sweep_prints_one_table_and_says_it_again(features: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.yaml", features)
    command = ("sweep", file, "-o", tmp_path / "sweep", *options())
    said = kdcache(*command)
    lines = said.splitlines()
    assert lines[0].startswith("errors on split val  λ n2n  runs")
    assert [line.split()[0] for line in lines[3:]] == ["control", "n2n", "n2n", "teacher", "6"]
    assert "±" in lines[3]
    assert lines[-1].startswith("6 of 6 runs; ")
    assert (tmp_path / "sweep" / "n2n,lambda.n2n=1,training.seed=1" / "model.json").is_file()
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").read_text().splitlines()))
    assert [row["lambda.n2n"] for row in rows] == ["", "", "0.1", "0.1", "1.0", "1.0"]
    assert kdcache(*command) == said


def test_errors_on_a_file(features: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "sweep.yaml", features, strategies=["control"], grid={})
    command = ("sweep", file, "-o", tmp_path / "sweep", *options())
    made = [numbered_structure(s, periodic=False) for s in range(30, 35)]
    data = write_structures(tmp_path / "new.extxyz", made)
    assert kdcache(*command, "--data", data).startswith("errors on new.extxyz")
    assert "Give one of them" in refused(*command, "--data", data, "--split", "val")
    assert "is a run" in refused(*command, "--data", tmp_path / "sweep" / "control")
    assert "no labelled structures of split test" in refused(*command, "--split", "test")


def test_a_failed_run_makes_exit_code_1(features: Path, tmp_path: Path) -> None:
    grid = {"optimizer.lr": [1e20, 1e-3]}
    file = write(tmp_path / "sweep.yaml", features, strategies=["control"], grid=grid)
    command = ["sweep", str(file), "-o", str(tmp_path / "sweep"), *options("clip_norm=null")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.startswith("failed: control,optimizer.lr=1e+20: ")
    assert len(result.stderr.splitlines()) == 1
    assert "control" in result.stdout
    assert "1 of 2 runs" in result.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": {"training.sed": [0]}}, "did you mean seed?"),
        ({"stratgies": []}, "did you mean strategies?"),
        ({"strategies": ["n3n"]}, "did you mean n2n?"),
        ({"store": "none.zarr"}, "none.zarr does not exist"),
        ({"base": "none.yaml"}, "none.yaml cannot be read"),
        ({"preset": "pain-small"}, "did you mean painn-small?"),
    ],
)
def test_a_refused_sweep_leaves_nothing(
    changes: dict[str, Any], said: str, features: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "sweep.yaml", features, **changes)
    assert said in refused("sweep", file, "-o", tmp_path / "sweep", *options())
    assert not (tmp_path / "sweep").exists()
