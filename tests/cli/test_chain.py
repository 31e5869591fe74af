"""The whole job by the command line, on structures of real reactions."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest

import kdcache as library
from kdcache.store import open_store
from tests.cli.commands import kdcache, settings


@pytest.mark.proof
def test_the_whole_chain_on_real_data(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "h2combustion"
    train, test = folder / "tiny_train.extxyz", folder / "tiny_test.extxyz"
    data, features = tmp_path / "data.zarr", tmp_path / "features.zarr"
    teacher, student, control = tmp_path / "teacher", tmp_path / "student", tmp_path / "control"
    learned = ("training.max_steps=300", "training.eval_every=100", "training.batch_size=16",
               "model.num_layers=2", "model.num_rbf=20", "model.cutoff=4.0", "ema=null",
               "optimizer.lr=0.003", "optimizer.weight_decay=0", "schedule.name=constant",
               "loss.energy_weight=30")  # fmt: skip
    large = settings(*learned, "model.hidden_channels=16")
    small = settings(*learned, "model.hidden_channels=8")

    said = kdcache("import", train, "-o", data, "--split", "val=0.1")
    assert "tiny_train.extxyz: energy from energy, forces from forces" in said
    assert "splits: train 360, val 40" in said
    kdcache("train-student", data, "-o", teacher, "--preset", "painn", *large)
    kdcache("dump-teacher", data, "--teacher", teacher, "-o", features)
    taught = ("train-student", features, "--preset", "painn-small", *small, "--labels", 0.1, "-o")
    kdcache(*taught, student, "--strategy", "n2n+vanilla1")
    kdcache(*taught, control, "--control")
    reports = {}
    for run in (teacher, student, control):
        kdcache("evaluate", run, test, "--json", tmp_path / "report.json")
        reports[run] = json.loads((tmp_path / "report.json").read_text())

    # Forces of zero would be off by 1200 meV/Å on these files.
    forces = {run.name: reports[run]["force_mae_mev_per_a"] for run in reports}
    assert forces["teacher"] < 700, forces
    assert forces["student"] < forces["control"], forces
    assert "teacher teacher: painn" in kdcache("inspect", features)
    described = json.loads(kdcache("inspect", features, "--json"))
    assert (described["n_structures"], described["n_labelled"]) == (400, 400)
    said = kdcache("verify", features, "--data", train)
    assert "the store is whole" in said
    assert "400 compared with the data" in said

    # What is stored beside a structure is what the teacher says of that structure in the file.
    store = open_store(features)
    energies = store.read("teachers/teacher/energy")
    calculator = library.calculator(teacher)
    frames = ase.io.read(train, ":")
    for row in (0, 7, 123, 399):
        atoms = frames[int(store.index.source_index[row])]
        atoms.calc = calculator
        np.testing.assert_allclose(atoms.get_potential_energy(), energies[row], rtol=1e-6)
