"""`kdcache audit` says in a table, in JSON and by its exit whether features are their teacher's."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from kdcache_cli.main import main
from tests.cli.commands import kdcache, settings, usage


def test_an_untouched_store_passes(features: Path, teacher: Path, tmp_path: Path) -> None:
    report = tmp_path / "audit.json"
    shown = kdcache("audit", features, "--teacher", teacher, "--sample", 10, "--json", report)
    assert "10 of 24 structures computed once more" in shown
    assert "the teacher has the digest the store records" in shown
    found = json.loads(report.read_text())
    assert found["problems"] == []
    assert found["same_teacher"] is True
    assert set(found["fields"]) == {"energy", "forces", "atomic_energy", "node", "vector"}


def test_another_teacher_fails(features: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "other"
    kdcache("train-student", data, "-o", run, "--preset", "painn", *settings("training.seed=5"))
    found = CliRunner().invoke(main, ["audit", str(features), "--teacher", str(run)])
    assert found.exit_code == 2
    assert "the store records" in found.stdout
    assert "wrong: node: " in found.stderr
    last = found.stderr.splitlines()[-1]
    assert last.startswith(f"kdcache: {features}: 5 of 5 fields of teacher are not")


def test_a_tolerance_is_a_number(features: Path, teacher: Path) -> None:
    for option in ("--tolerance", "--symmetry-limit"):
        command = ("audit", features, "--teacher", teacher, option)
        assert f"'{option}': nan is no number" in usage(*command, "nan")
        assert "is not in the range" in usage(*command, 0)


def test_options_that_only_writing_needs_are_none_of_its_own(features: Path) -> None:
    assert "--codec" in usage("audit", features, "--teacher", "t", "--codec", "half")
