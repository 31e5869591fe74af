"""Open Catalyst files by the command line: frames, a teacher of theirs, students, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.store import open_store
from kdcache.teachers import save_open_catalyst
from tests.cli.commands import kdcache, refused, settings
from tests.readers.lmdb_files import first_records
from tests.teachers.open_catalyst_files import GEMNET

TAUGHT = ("model.cutoff=4.0", "references.mode=least_squares", "training.max_steps=4",
          "training.eval_every=2", "training.checkpoint_every=2")  # fmt: skip


@pytest.fixture(scope="module")
def frames(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some frames of both shards, as files of their own."""
    folder = tmp_path_factory.mktemp("s2ef")
    for name, count in (("data.0000.lmdb", 4), ("data.0001.lmdb", 5)):
        first_records(shared / "data" / "oc20_lmdb" / name, folder / name, count)
    return folder


@pytest.fixture(scope="module")
def oc_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GemNet-OC of random weights, its factors those of a fit of nothing: 1."""
    model = build_model({**GEMNET, "num_elements": 83, "qint_tags": (0, 1, 2)}, seed=5)
    for name, tensor in model.state_dict().items():
        if name.endswith("scale_factor"):
            tensor.fill_(1.0)
    path = tmp_path_factory.mktemp("teacher") / "oc20.pt"
    save_open_catalyst(path, Potential(model, Normalizer(energy_scale=2.8873), {}))
    return path


def test_pickles_need_permission(frames: Path, tmp_path: Path) -> None:
    line = refused("import", frames, "-o", tmp_path / "a.zarr")
    assert "--allow-pickle" in line
    assert not (tmp_path / "a.zarr").exists()


def test_scale_factors_come_from_a_file_beside_the_checkpoint(
    frames: Path, oc_teacher: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(oc_teacher, weights_only=True)
    state = checkpoint["state_dict"]
    scales = {n.removeprefix("module.").removesuffix(".scale_factor"): float(t)
              for n, t in state.items() if "scale_factor" in n}  # fmt: skip
    checkpoint["state_dict"] = {n: t for n, t in state.items() if "scale_factor" not in n}
    torch.save(checkpoint, tmp_path / "bare.pt")
    (tmp_path / "scales.json").write_text(json.dumps(scales))
    dump = ("dump-teacher", frames / "data.0000.lmdb", "--allow-pickle", "--teacher-format", "ocp",
            "--fields", "energy", "--teacher")  # fmt: skip
    line = refused(*dump, tmp_path / "bare.pt", "-o", tmp_path / "a.zarr")
    assert "--scale-file" in line
    kdcache(*dump, tmp_path / "bare.pt", "-o", tmp_path / "a.zarr",
            "--scale-file", tmp_path / "scales.json")  # fmt: skip
    kdcache(*dump, oc_teacher, "-o", tmp_path / "b.zarr")
    energies = [open_store(tmp_path / f"{n}.zarr").read("teachers/teacher/energy") for n in "ab"]
    np.testing.assert_array_equal(*energies)
    line = refused("dump-teacher", frames, "--teacher", tmp_path, "--scale-file", "s.pt",
                   "-o", tmp_path / "c.zarr")  # fmt: skip
    assert "--teacher-format" in line


@pytest.mark.proof
def test_the_chain_on_real_frames_of_oc20(frames: Path, oc_teacher: Path, tmp_path: Path) -> None:
    data, features = tmp_path / "data.zarr", tmp_path / "features.zarr"
    said = kdcache("import", frames, "--allow-pickle", "-o", data, "--split", "val=0.2")
    assert "data.0000.lmdb: energy from y, forces from force, tags from tags" in said
    assert "fixed atoms from fixed" in said
    dumped = kdcache("dump-teacher", data, "--teacher", oc_teacher, "--teacher-format", "ocp",
                     "-o", features)  # fmt: skip
    rows = {line.split()[0] for line in dumped.splitlines()[2:-1]}
    assert {"node", "edge_to_node", "edge_to_vector", "energy", "forces"} <= rows
    store = open_store(features)
    n_fixed = int(store.read("structures/fixed").sum())
    assert 0 < n_fixed < int(store.index.n_atoms.sum())
    assert set(np.unique(store.read("structures/tags"))) == {0}
    assert "the store is whole" in kdcache("verify", features, "--data", frames, "--allow-pickle")
    for strategy in ("n2n", "e2n", "v2v"):
        run = tmp_path / strategy
        kdcache("train-student", features, "-o", run, "--strategy", strategy, *settings(*TAUGHT))
    said = kdcache("evaluate", tmp_path / "n2n", frames, "--allow-pickle",
                   "--json", tmp_path / "free.json")  # fmt: skip
    assert f"forces without {n_fixed} of" in said
    kdcache("evaluate", tmp_path / "n2n", frames, "--allow-pickle", "--all-atoms",
            "--json", tmp_path / "all.json")  # fmt: skip
    free, whole = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("free", "all"))
    assert free["force_mae_mev_per_a"] != whole["force_mae_mev_per_a"]
    assert free["energy_mae_mev"] == whole["energy_mae_mev"]
