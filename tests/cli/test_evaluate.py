"""`kdcache evaluate`: the table, the file and its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import kdcache, refused, usage

NUMBERS = {
    "n_structures", "n_atoms", "energy_mae_mev", "energy_rmse_mev", "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom", "force_mae_mev_per_a", "force_rmse_mev_per_a", "force_cos", "efwt",
}  # fmt: skip


def test_the_file_holds_the_table_and_groups_add_up(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "report.json"
    said = kdcache("evaluate", teacher, data, "--json", file)
    report = json.loads(file.read_text())
    further = {"n_parameters", "training_seconds", "structures_per_second", "groups"}
    assert set(report) == NUMBERS | further
    assert set(report["groups"]) == {"even", "odd"}
    groups = report["groups"].values()
    assert all(set(group) == NUMBERS for group in groups)
    assert sum(group["n_structures"] for group in groups) == report["n_structures"] == 24
    weighted = sum(g["energy_mae_mev"] * g["n_structures"] for g in groups) / 24
    assert weighted == pytest.approx(report["energy_mae_mev"])
    rows = {line.split()[0]: line.split() for line in said.splitlines()[3:]}
    assert set(rows) == {"all", "even", "odd"}
    assert rows["all"][2] == f"{report['energy_mae_mev']:.2f}"


def test_a_store_is_evaluated_as_its_files_are(
    data: Path, features: Path, teacher: Path, tmp_path: Path
) -> None:
    reports = []
    for k, source in enumerate((data, features)):
        kdcache("evaluate", teacher, source, "--max-atoms", 9, "--json", tmp_path / f"{k}.json")
        reports.append(json.loads((tmp_path / f"{k}.json").read_text()))
    for name in NUMBERS:
        assert reports[0][name] == pytest.approx(reports[1][name])


def test_what_cannot_be_evaluated_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.extxyz").write_text("")
    command = ("evaluate", teacher)
    assert "no structures to evaluate" in refused(*command, tmp_path / "empty.extxyz")
    assert "no structures to evaluate" in refused(*command, data, "--split", "test")
    assert "--device gpu is no device" in refused(*command, data, "--device", "gpu")
    assert "'tset' is not one of" in usage(*command, data, "--split", "tset")
    assert "is a directory" in usage(*command, data, "--json", tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "TEACHER", "FEATURES", "--json"),
        ("stats", "FEATURES", "--json"),
        ("stats", "FEATURES", "--plot"),
        ("audit", "FEATURES", "--teacher", "TEACHER", "--json"),
        ("card", "FEATURES", "-o"),
        ("compare", "FEATURES", "TEACHER", "-o"),
    ],
    ids=" ".join,
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    command: tuple[str, ...],
    features: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("kdcache.store.reader.Store.read", read)
    (tmp_path / "file").touch()
    places = {"TEACHER": teacher, "FEATURES": features}
    words = [places.get(word, word) for word in command]
    line = refused(*words, tmp_path / "file" / "new" / "report.png")
    assert f"{tmp_path / 'file'}: not a directory" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
