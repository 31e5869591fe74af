"""The rows and the picture the demo ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.demo.report import draw, read_curve, rows

METRICS = {"force_cos": 0.9, "efwt": 0.01, "n_parameters": 100, "training_seconds": 2.0,
           "structures_per_second": 50.0}  # fmt: skip
EVALUATIONS = {
    "teacher": {"energy_mae_mev": 20.0, "force_mae_mev_per_a": 30.0, **METRICS},
    "control": {"energy_mae_mev": 100.0, "force_mae_mev_per_a": 90.0, **METRICS},
    "n2n": {"energy_mae_mev": 60.0, "force_mae_mev_per_a": 105.0, **METRICS},
}


def test_rows_keep_their_order_and_close_their_gap() -> None:
    found = rows(EVALUATIONS)
    assert [row.name for row in found] == ["teacher", "control", "n2n"]
    assert [row.gap_closed_energy for row in found] == [1.0, 0.0, 0.5]
    assert found[2].gap_closed_force == pytest.approx(-0.25)
    assert set(found[0].as_dict()) >= {
        "name", "energy_mae_mev", "force_mae_mev_per_a", "force_cos", "efwt",
        "gap_closed_energy", "gap_closed_force",
    }  # fmt: skip


def test_picture_is_a_png_of_curves_and_bars(tmp_path: Path) -> None:
    curve = tmp_path / "metrics.csv"
    curve.write_text(
        "step,val_energy_mae_mev,val_force_mae_mev_per_a\n10,200,100\n20,,\n30,150,80\n"
    )
    assert read_curve(curve, "val_energy_mae_mev") == ([10.0, 30.0], [200.0, 150.0])
    picture = tmp_path / "demo.png"
    draw(picture, rows(EVALUATIONS), dict.fromkeys(EVALUATIONS, curve))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000
