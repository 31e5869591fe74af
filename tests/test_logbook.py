"""metrics.csv: one row per evaluation, each once, whatever happened in between."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import ConfigError
from kdcache.logbook import Logbook


def rows(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


def test_rows_of_different_columns_share_one_table(tmp_path: Path) -> None:
    with Logbook(tmp_path) as book:
        book.add({"step": 1, "loss": 0.1})
        book.add({"step": 2, "loss": 1e-12, "val": 3.0})
        book.add({"step": 3, "val": float("nan")})
    assert rows(tmp_path) == [
        {"step": "1", "loss": "0.1", "val": ""},
        {"step": "2", "loss": "1e-12", "val": "3"},
        {"step": "3", "loss": "", "val": "nan"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_float32_comes_back_from_its_digits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).lognormal(size=200).astype(np.float32)
    with Logbook(tmp_path) as book:
        for step, value in enumerate(values):
            book.add({"step": step, "loss": float(value)})
    found = np.array([float(row["loss"]) for row in rows(tmp_path)], np.float32)
    np.testing.assert_array_equal(found, values)


def test_rows_beyond_the_checkpoint_are_cut_when_a_run_goes_on(tmp_path: Path) -> None:
    with Logbook(tmp_path) as book:
        for step in (2, 4, 6):
            book.add({"step": step, "loss": 1.0})
    with Logbook(tmp_path, step=4) as book:
        book.add({"step": 5, "loss": 2.0})
    assert [row["step"] for row in rows(tmp_path)] == ["2", "4", "5"]


def test_a_new_run_in_an_old_directory_starts_its_table_anew(tmp_path: Path) -> None:
    with Logbook(tmp_path) as book:
        book.add({"step": 2, "loss": 1.0})
    with Logbook(tmp_path, step=0) as book:
        book.add({"step": 1, "loss": 3.0})
    assert rows(tmp_path) == [{"step": "1", "loss": "3"}]


def test_tensorboard_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install 'kdcache\\[tensorboard\\]'"):
        Logbook(tmp_path, tensorboard=True)
