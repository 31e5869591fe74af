"""`kdcache export` and `kdcache import-nvalchemi`: out, in again, and a student trained of it."""

from __future__ import annotations

from pathlib import Path

import ase.io

from tests.cli.commands import kdcache, refused, settings


def test_a_store_goes_out_by_the_files_suffix(features: Path, tmp_path: Path) -> None:
    shown = kdcache("export", features, "-o", tmp_path / "a.extxyz", "--teacher", "teacher")
    assert "24 structures with teacher/energy, teacher/forces, teacher/atomic_energy" in shown
    assert "teacher_atomic_energy" in ase.io.read(tmp_path / "a.extxyz", "3").arrays
    kdcache("export", features, "-o", tmp_path / "a.parquet")
    line = refused("export", features, "-o", tmp_path / "a.dat")
    assert "--to extxyz, parquet or nvalchemi" in line


def test_students_learn_from_what_another_programs_teacher_labelled(
    features: Path, tmp_path: Path
) -> None:
    labelled, store = tmp_path / "labelled.zarr", tmp_path / "store.zarr"
    kdcache("export", features, "-o", labelled, "--to", "nvalchemi", "--teacher", "teacher")
    shown = kdcache("import-nvalchemi", labelled, "-o", store, "--name", "mace", "--cutoff", 3)
    assert "teacher mace: atomic_energy, energy, forces, node; which model it was" in shown
    for strategy in ("n2n", "vanilla2"):
        run = tmp_path / strategy
        weight = f"{strategy}=1"
        options = ["--preset", "painn", "--strategy", strategy, "--weight", weight, *settings()]
        kdcache("train-student", store, "-o", run, *options)
        header, *rows = (run / "metrics.csv").read_text().splitlines()
        column = header.split(",").index(f"train_{strategy}")
        losses = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
        assert losses
        assert min(losses) > 0
