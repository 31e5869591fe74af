"""`kdcache train-student`: from options to the configuration of a run, and going on with it."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.store import open_store
from tests.cli.commands import dataset, kdcache, refused, settings, usage, write_structures
from tests.dump.test_edges import make_teacher


def configuration(run: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((run / "config.yaml").read_text()))


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_preset_then_file_then_set_decide(features: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    file.write_text("optimizer: {lr: 0.01, weight_decay: 0.5}\nloss: {energy_weight: 7}\n")
    run = tmp_path / "run"
    said = kdcache("train-student", features, "-o", run, "--preset", "painn-small-oc20",
                   "--config", file, *settings("optimizer.lr=0.02"))  # fmt: skip
    found = configuration(run)
    assert found["model"]["name"] == "painn"
    assert found["model"]["hidden_channels"] == 8
    assert found["loss"]["energy_weight"] == 7
    assert found["optimizer"]["weight_decay"] == 0.5
    assert found["optimizer"]["lr"] == 0.02
    assert said.startswith(f"{run}: 6 steps in ")
    assert "validation: energy" in said


def test_strategy_weight_labels_and_teacher_become_terms(features: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kdcache("train-student", features, "-o", run, "--preset", "painn-small",
            "--strategy", "n2n+vanilla2", "--weight", "n2n=5", "--labels", "0.25",
            "--teacher", "teacher", *settings())  # fmt: skip
    found = configuration(run)
    terms = {term["name"]: term for term in found["terms"]}
    assert sorted(terms) == ["n2n", "vanilla2"]
    assert terms["n2n"]["weight"] == 5
    assert terms["vanilla2"]["weight"] == 100  # Table 8, PaiNN to PaiNN-small
    assert terms["n2n"]["teacher_name"] == "teacher"
    assert found["data"]["labels"] == 0.25
    assert float(metrics(run)[-1]["train_n2n"]) > 0


def test_a_teacher_with_edges_gives_their_sums_under_the_weights_of_a_published_row(
    data: Path, tmp_path: Path
) -> None:
    store, run = tmp_path / "edges.zarr", tmp_path / "run"
    kdcache("import", data, "-o", store)
    teacher = make_teacher(references={})
    dump_teacher(store, teacher, DumpOptions("edgy", threads=1))
    command = ("train-student", store, "-o", run, "--strategy", "n2n,e2n,v2v", "--stop-after", 1)
    assert "No published weights for edgenet/painn" in refused(*command, *settings())
    line = refused(*command, "--published", "gemnet-oc/painn/coal", *settings())
    assert "did you mean gemnet-oc/painn/coll" in line
    kdcache(*command, "--published", "gemnet-oc/painn/coll", *settings())
    terms = {term["name"]: term for term in configuration(run)["terms"]}
    found = {name: (term["teacher"], term["weight"]) for name, term in terms.items()}
    assert found == {
        "n2n": ("node", 1000),
        "e2n": ("edge_to_node", 10),
        "v2v": ("edge_to_vector", 100),
    }


def test_control_is_the_same_run_without_terms(features: Path, tmp_path: Path) -> None:
    command = ("train-student", features, "--strategy", "v2v", *settings(), "-o")
    kdcache(*command, tmp_path / "v2v")
    kdcache(*command, tmp_path / "control", "--control")
    taught, control = configuration(tmp_path / "v2v"), configuration(tmp_path / "control")
    assert taught.pop("terms")
    assert control.pop("terms") == []
    assert control == taught


def test_a_stopped_run_goes_on_with_the_same_command(features: Path, tmp_path: Path) -> None:
    command = ("train-student", features, "-o", tmp_path / "run", *settings())
    said = kdcache(*command, "--stop-after", 4)
    assert said == f"{tmp_path / 'run'}: stopped. The same command without --stop-after goes on.\n"
    line = refused(*command, "--set", "optimizer.lr=0.5")
    assert "optimizer.lr" in line
    assert "0.5" in line
    assert "6 steps" in kdcache(*command)
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["3", "6"]
    assert "is finished: 6 of 6 steps" in refused(*command)


def test_a_state_of_another_model_is_refused_and_the_one_before_gone_on_from(
    features: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train-student", features, "-o", run, *settings())
    kdcache(*command, "--stop-after", 4)
    model = run / "state" / "step-000000004" / "model.safetensors"
    save_file({"weight": torch.ones(3)}, model)
    line = refused(*command)
    assert "model has no " in line
    assert f"{model.parent} is no state of this run" in line
    shutil.rmtree(model.parent)
    assert "6 steps" in kdcache(*command)


def test_files_are_imported_beside_the_run_and_watched(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train-student", "-o", run, *settings())
    kdcache(*command, data, "--stop-after", 3)
    assert len(open_store(run / "data.zarr")) == 24
    changed = dataset()
    changed[3] = replace(changed[3], positions=changed[3].positions + 0.5)
    other = write_structures(tmp_path / "other" / "data.extxyz", changed)
    line = refused(*command, other)
    assert "begun with other data" in line
    assert "structure 3" in line
    kdcache(*command, data)


def test_a_wrong_key_does_not_block_the_right_one(data: Path, tmp_path: Path) -> None:
    command = ("train-student", data, "-o", tmp_path / "run", *settings())
    assert "did you mean energy?" in refused(*command, "--energy-key", "enrgy")
    kdcache(*command)


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--preset", "pain-small"), "did you mean painn-small?"),
    (("--strategy", "n3n"), "did you mean n2n?"),
    (("--strategy", "n2n,hipnn"), "stands alone"),
    (("--strategy", "n2n", "--teacher", "techer"), "did you mean teacher?"),
    (("--strategy", "n2n", "--weight", "v2v=3"), "v2v"),
    (("--strategy", "n2n", "--weight", "n2n"), "STRATEGY=NUMBER"),
    (("--strategy", "n2n", "--weight", "n2n=1", "--weight", "n2n=2"), "twice"),
    (("--strategy", "n2n", "--weight", "n2n=-1"), "0 or more"),
    (("--weight", "n2n=3"), "belongs to a --strategy"),
    (("--teacher", "teacher"), "belongs to a --strategy"),
    (("--preset", "schnet", "--strategy", "v2v"), "--weight v2v="),
    (("--labels", "2"), "data.labels"),
    (("--set", "trainig.max_steps=4"), "did you mean training?"),
    (("--set", "training.max_step=4"), "did you mean max_steps?"),
    (("--set", "training.max_steps=many"), "'many'"),
    (("--set", "training.max_steps"), "expected key=value"),
    (("--set", "model.hiden_channels=4"), "did you mean hidden_channels?"),
    (("--set", "training.device=gpu"), "training.device gpu is no device"),
    (("--config", "none.yaml"), "none.yaml cannot be read"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_a_refused_run_leaves_nothing(
    options: tuple[str, ...], said: str, features: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert said in refused("train-student", features, "-o", run, *settings(), *options)
    assert not run.exists()


def test_a_strategy_needs_a_teacher_in_the_store(data: Path, tmp_path: Path) -> None:
    kdcache("import", data, "-o", tmp_path / "data.zarr")
    command = ("train-student", tmp_path / "data.zarr", "-o", tmp_path / "run", *settings())
    assert "no teacher" in refused(*command, "--strategy", "n2n")
    assert "-1 is not in the range" in usage(*command, "--stop-after", -1)


def test_files_without_a_teacher_are_not_imported_for_terms_that_need_one(
    data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("train-student", data, "-o", run, *settings())
    for options in (("--strategy", "n2n"), ("--strategy", "n2n", "--teacher", "teacher")):
        line = refused(*command, *options)
        assert f"Term n2n needs a teacher, and what is imported from {data} has none" in line
        assert "kdcache dump-teacher" in line
        assert not run.exists()
    missing = ("train-student", tmp_path / "no.zarr", "-o", run, "--strategy", "n2n")
    assert "no.zarr" in refused(*missing, *settings())
    term = "terms=[{name: t, student: node, teacher: node, loss: mse, weight: 1}]"
    assert "Term t needs a teacher" in refused(*command, "--set", term)
    assert not run.exists()
    kdcache(*command, "--strategy", "n2n", "--weight", "n2n=0")


def test_a_teacher_dumped_into_what_was_imported_is_learnt_from(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kdcache("import", data, "-o", run / "data.zarr")
    kdcache("dump-teacher", "--into", run / "data.zarr", "--teacher", teacher)
    kdcache("train-student", data, "-o", run, "--strategy", "n2n", *settings())


def test_a_directory_of_other_things_is_no_run(features: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".gitkeep").touch()
    (run / "slurm-1.out").touch()
    (run / "notes.md").touch()
    command = ("train-student", features, "-o", run, *settings())
    assert f"{run} holds notes.md and no run" in refused(*command)
    assert sorted(path.name for path in run.iterdir()) == [".gitkeep", "notes.md", "slurm-1.out"]
    (run / "notes.md").unlink()
    # What the command was told to put there, and what a kill leaves before the first state.
    for left in ("data.zarr", "graph", "cache/store"):
        (run / left).mkdir(parents=True)
    caches = ("--graph-cache", run / "lists", "--store-cache", run / "cache" / "store")
    assert "holds cache and no run" in refused(*command)
    kdcache(*command, *caches, "--stop-after", 3)
    (run / "notes.md").touch()  # beside a run, whatever one likes
    kdcache(*command, *caches)


def test_unlabelled_structures_are_labelled_by_the_teacher(teacher: Path, tmp_path: Path) -> None:
    structures = dataset()
    for s in range(0, 24, 2):
        structures[s] = replace(structures[s], energy=None, forces=None)
    data = write_structures(tmp_path / "half.extxyz", structures)
    store = tmp_path / "half.zarr"
    command = ("dump-teacher", data, "--teacher", teacher, "-o", store)
    assert "--unlabelled" in refused(*command)
    kdcache(*command, "--unlabelled")
    found = open_store(store)
    assert found.manifest.dataset.n_labelled == 12
    assert np.isfinite(found.read("teachers/teacher/forces")).all()
    run = tmp_path / "run"
    kdcache("train-student", store, "-o", run, "--strategy", "vanilla1", *settings())
    last = metrics(run)[-1]
    assert np.isfinite(float(last["train_loss"]))
    assert float(last["train_vanilla1_energy"]) > 0


def test_without_any_label_a_control_has_nothing_to_learn(teacher: Path, tmp_path: Path) -> None:
    structures = [replace(s, energy=None, forces=None) for s in dataset()]
    data, store = write_structures(tmp_path / "none.extxyz", structures), tmp_path / "none.zarr"
    kdcache("dump-teacher", data, "--teacher", teacher, "-o", store, "--unlabelled")
    command = ("train-student", store, *settings("references.mode=none"), "-o")
    assert "label" in refused(*command, tmp_path / "control", "--control")
    assert "has no energy" in refused("evaluate", teacher, store, "--unlabelled")
    kdcache(*command, tmp_path / "run", "--strategy", "n2n")
