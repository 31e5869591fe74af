"""Open Catalyst checkpoints: units, averaged weights, scale factors, and what is refused."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kdcache.errors import ConfigError, ShapeError, TeacherError
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.stream.window import collate
from kdcache.teachers import load_teacher, read_open_catalyst, save_open_catalyst
from kdcache.teachers.open_catalyst_config import hyperparameters_from
from tests.chain import PAINN, SCHNET, make_potential, structures
from tests.teachers.open_catalyst_files import GEMNET, checkpoint_of, expected_of, structures_of

CASES = [
    "golden/painn/batch3",
    "golden/painn/slab",
    "golden/schnet/slab",
    "golden/gemnet_oc/batch3",
    "golden/gemnet_oc/slab",
    "specs/variants/painn_codes_bessel",
    "specs/variants/schnet_kdmap",
    "specs/variants/gem_cutoffs_sph",
    "specs/variants/gem_bessel_noquad",
]


def saved(path: Path, checkpoint: object) -> Path:
    torch.save(checkpoint, path)
    return path


def small(name: str = "painn", **changes: Any) -> Potential:
    """A model without references, factors fitted, in units of its own."""
    model = build_model({**{"painn": PAINN, "schnet": SCHNET, "gemnet-oc": GEMNET}[name]}, seed=3)
    if name == "schnet":
        model = build_model({**SCHNET, "max_neighbors": 50}, seed=3)
    with torch.no_grad():
        for k, (key, tensor) in enumerate(model.state_dict().items()):
            if key.endswith("scale_factor"):
                tensor.fill_(1.0 + k / 64)
    units = Normalizer(energy_scale=2.5, energy_shift=-0.75, force_scale=3.5)
    return Potential(model, units, {}).eval()


def contents(potential: Potential, path: Path) -> dict[str, Any]:
    """A checkpoint of ours, to be changed."""
    save_open_catalyst(path, potential)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def refusal(path: Path, error: type[Exception] = TeacherError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        read_open_catalyst(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.proof
@pytest.mark.parametrize("name", CASES)
def test_energies_and_forces_of_published_models_come_out_in_ev(
    name: str, shared: Path, tmp_path: Path
) -> None:
    case = shared / name
    path = saved(tmp_path / "oc.pt", checkpoint_of(case))
    teacher = load_teacher("ocp", str(path), precision="float64")
    batch = collate(
        structures_of(case), teacher.graph_rule, np.float64, further=teacher.further_graphs
    )
    computed = teacher.compute(batch)
    expected = expected_of(case)
    mean, std, force_std = (float(np.float32(v)) for v in (-0.7554, 2.8873, 3.5))
    energy = expected["energy"].reshape(-1) * std + mean
    np.testing.assert_allclose(computed["energy"].numpy(), energy, rtol=1e-9)
    forces = expected["forces"] * force_std
    scale = np.abs(forces).max()
    np.testing.assert_allclose(computed["forces"].numpy(), forces, rtol=0, atol=1e-8 * scale)
    # The mean is of a structure, so its atoms share it out.
    totals = torch.zeros(batch.n_structures, dtype=torch.float64)
    totals.index_add_(0, batch.structure_index, computed["atomic_energy"])
    np.testing.assert_allclose(totals.numpy(), energy, rtol=1e-9)


@pytest.mark.proof
def test_every_published_configuration_is_understood(shared: Path) -> None:
    files = sorted((shared / "golden" / "keys").glob("*/*__*.json"))
    assert len(files) == 18
    for file in files:
        described = json.loads(file.read_text())
        values = hyperparameters_from(described["model"], described["config"], 83, file.name)
        assert values["cutoff"] == described["config"]["cutoff"]


@pytest.mark.proof
def test_the_trainers_two_files_hold_one_model(shared: Path) -> None:
    directory = shared / "golden" / "checkpoint"
    best = read_open_catalyst(directory / "best_checkpoint.pt")
    resumed = read_open_catalyst(directory / "checkpoint.pt")
    raw = torch.load(directory / "checkpoint.pt", weights_only=True)["state_dict"]
    assert best.normalizer == resumed.normalizer
    assert (best.normalizer.energy_scale, best.normalizer.force_scale) == (1.5, 1.5)
    assert best.normalizer.energy_shift == pytest.approx(0.1)
    for name, averaged in resumed.model.state_dict().items():
        if name.endswith("scale_factor"):
            continue
        # Averaged weights of steps 4 and 6 are near each other, raw ones are not.
        torch.testing.assert_close(averaged, best.model.state_dict()[name], rtol=0, atol=1e-5)
    moved = max(
        float((raw[f"module.{name}"] - tensor).abs().max())
        for name, tensor in resumed.model.state_dict().items()
        if f"module.{name}" in raw
    )
    assert moved > 1e-3


@pytest.mark.proof
def test_a_file_that_does_not_say_its_model_needs_its_configuration(
    shared: Path, tmp_path: Path
) -> None:
    directory = shared / "golden" / "checkpoint"
    teacher, scales = directory / "teacher_gemnet_oc.pt", directory / "gemnet_scale.pt"
    assert "--teacher-config" in refusal(teacher, scale_file=scales)
    student = torch.load(directory / "checkpoint.pt", weights_only=True)
    arguments = student["config"]["teacher_model_attributes"]
    config = tmp_path / "gemnet.yml"
    config.write_text(yaml.safe_dump({"model": {"name": "gemnet_oc", **arguments}}))
    message = refusal(teacher, config_file=config)
    assert "lacks 28 of 28 scale factors" in message
    assert "--scale-file" in message
    potential = read_open_catalyst(teacher, scale_file=scales, config_file=config)
    written = torch.load(scales, weights_only=True)
    own = potential.model.state_dict()
    assert len(written) == 28
    for name, value in written.items():
        assert float(own[f"{name}.scale_factor"]) == float(value)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet-oc"])
def test_a_model_of_ours_comes_back_equal_from_their_layout(name: str, tmp_path: Path) -> None:
    potential = small(name)
    save_open_catalyst(tmp_path / "oc.pt", potential)
    found = load_teacher("ocp", str(tmp_path / "oc.pt"))
    assert found.references == {}
    chosen = structures(8)
    batch = collate(chosen, potential.graph_rule, further=potential.further_graphs)
    ours, theirs = potential.predict(batch), found.compute(batch)
    assert torch.equal(ours.energy, theirs["energy"])
    assert torch.equal(ours.forces, theirs["forces"])
    for feature, values in ours.features.items():
        assert torch.equal(values, theirs[feature])


def test_references_and_strange_models_have_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no place for"):
        save_open_catalyst(tmp_path / "oc.pt", make_potential())
    unlimited = Potential(build_model(SCHNET), Normalizer(), {})
    with pytest.raises(TeacherError, match="keeps 50 neighbours"):
        save_open_catalyst(tmp_path / "oc.pt", unlimited)
    gradient = Potential(build_model({**PAINN, "direct_forces": False}), Normalizer(), {})
    with pytest.raises(TeacherError, match="no forces by gradient"):
        save_open_catalyst(tmp_path / "oc.pt", gradient)


def shadowed(potential: Potential, path: Path) -> dict[str, Any]:
    """A resume file: maps of the student first, raw weights, averaged ones in a nameless list."""
    checkpoint = contents(potential, path)
    maps = {"module.n2n_mapping.weight": torch.full((2, 8), 0.5)}
    checkpoint["state_dict"] = {**maps, **checkpoint["state_dict"]}
    if potential.model.name == "schnet":
        checkpoint["state_dict"]["module.atomic_mass"] = torch.ones(100)
    parameters = [p for n, p in potential.model.named_parameters() if not n.endswith("factor")]
    averaged = [torch.zeros(2, 8), *(p.detach() * 2 + 1 for p in parameters if p.requires_grad)]
    checkpoint["ema"] = {"decay": 0.999, "num_updates": None, "shadow_params": averaged}
    return checkpoint


@pytest.mark.parametrize("name", ["painn", "schnet", "gemnet-oc"])
def test_averaged_weights_find_their_names(name: str, tmp_path: Path) -> None:
    potential = small(name)
    path = saved(tmp_path / "oc.pt", shadowed(potential, tmp_path / "first.pt"))
    found = dict(read_open_catalyst(path).model.named_parameters())
    for key, raw in potential.model.named_parameters():
        if raw.requires_grad and not key.endswith("scale_factor"):
            assert torch.equal(found[key], raw * 2 + 1), key
        else:
            assert torch.equal(found[key], raw), key


def test_averaged_weights_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    checkpoint = shadowed(small(), tmp_path / "first.pt")
    checkpoint["ema"]["shadow_params"].pop()
    assert "best_checkpoint.pt" in refusal(saved(tmp_path / "oc.pt", checkpoint))


@pytest.mark.parametrize("home", ["state", "dict", "pt", "json"])
def test_scale_factors_are_found_in_each_of_their_homes(home: str, tmp_path: Path) -> None:
    potential = small("gemnet-oc")
    checkpoint = contents(potential, tmp_path / "first.pt")
    state = checkpoint["state_dict"]
    scales = {
        name.removeprefix("module.").removesuffix(".scale_factor"): tensor
        for name, tensor in state.items()
        if name.endswith(".scale_factor")
    }
    options: dict[str, Any] = {}
    if home != "state":
        checkpoint["state_dict"] = {n: t for n, t in state.items() if "scale_factor" not in n}
        assert "scale factors" in refusal(saved(tmp_path / "without.pt", checkpoint))
        # Written, and never fitted: 0 is no factor either.
        unfitted = {n: t * 0 if "scale_factor" in n else t for n, t in state.items()}
        path = saved(tmp_path / "unfitted.pt", {**checkpoint, "state_dict": unfitted})
        assert "scale factors" in refusal(path)
    if home == "dict":
        checkpoint["scale_dict"] = scales
    elif home == "pt":
        options["scale_file"] = saved(tmp_path / "scales.pt", scales)
    elif home == "json":
        written = {
            "comment": "as the trainer writes it",
            **{n: float(t) for n, t in scales.items()},
        }
        options["scale_file"] = tmp_path / "scales.json"
        options["scale_file"].write_text(json.dumps(written))
    found = read_open_catalyst(saved(tmp_path / "oc.pt", checkpoint), **options)
    for name, tensor in potential.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_factors_that_disagree_or_belong_elsewhere_are_refused(tmp_path: Path) -> None:
    checkpoint = contents(small(), tmp_path / "first.pt")
    path = saved(tmp_path / "oc.pt", checkpoint)
    other = saved(tmp_path / "other.pt", {"upd_out_scalar_scale_1": 7.0})
    assert "One of them is of another training" in refusal(path, scale_file=other)
    foreign = saved(tmp_path / "foreign.pt", {"upd_out_scalar_scale_9": 7.0})
    assert "upd_out_scalar_scale_9" in refusal(path, scale_file=foreign)
    assert "no scale file" in refusal(path, scale_file=saved(tmp_path / "list.pt", [1.0]))
    assert "no file" in refusal(path, scale_file=tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rbf": {"name": "gaussian", "trainable": True}}, "rbf.trainable = True"),
        ({"direct_forces": False}, "direct_forces = False"),
        ({"regress_forces": False}, "regress_forces = False"),
        ({"num_targets": 2}, "num_targets = 2"),
        ({"new_option": 3}, "new_option = 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    checkpoint = contents(small(), tmp_path / "first.pt")
    checkpoint["config"]["model_attributes"] |= changed
    assert said in refusal(saved(tmp_path / "oc.pt", checkpoint))


def test_other_models_missing_sizes_and_misfits_are_refused(tmp_path: Path) -> None:
    def changed(**attributes: Any) -> Path:
        checkpoint = contents(small(), tmp_path / "first.pt")
        checkpoint["config"]["model_attributes"] |= attributes
        return saved(tmp_path / "oc.pt", checkpoint)

    checkpoint = contents(small(), tmp_path / "first.pt")
    checkpoint["config"]["model"] = "painn_2"
    assert "did you mean painn?" in refusal(saved(tmp_path / "oc.pt", checkpoint))
    checkpoint = contents(small(), tmp_path / "first.pt")
    del checkpoint["config"]["model_attributes"]["cutoff"]
    assert "does not say cutoff" in refusal(saved(tmp_path / "oc.pt", checkpoint))
    assert "hyperparameters" in refusal(changed(num_layers=3), ConfigError)
    assert "hyperparameters" in refusal(changed(num_rbf=16), ShapeError)
    assert "no 'state_dict'" in refusal(saved(tmp_path / "oc.pt", {"model": 1}))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and so on")
    assert "Get it again" in refusal(tmp_path / "damaged.pt")


@pytest.mark.parametrize(
    ("normalizers", "said"),
    [
        ({"target": {"mean": 0.0, "std": 0.0}}, "no units"),
        ({"target": {"std": 1.0}}, "without mean and std"),
        ({"energy": {"mean": 0.0, "std": 1.0}}, "normalizer 'energy'"),
        ({"grad_target": {"mean": 0.5, "std": 1.0}}, "adds 0.5 to every force"),
    ],
)
def test_units_that_make_no_sense_are_refused(
    normalizers: dict[str, Any], said: str, tmp_path: Path
) -> None:
    checkpoint = contents(small(), tmp_path / "first.pt")
    checkpoint["normalizers"] = normalizers
    assert said in refusal(saved(tmp_path / "oc.pt", checkpoint))


def test_without_normalizers_outputs_are_units(tmp_path: Path) -> None:
    checkpoint = contents(small(), tmp_path / "first.pt")
    checkpoint["normalizers"] = {}
    path = saved(tmp_path / "oc.pt", checkpoint)
    assert read_open_catalyst(path).normalizer == Normalizer()


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class Tracker(list[int]):
    """An object of a trainer's own class."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_of_a_trainer_need_permission_and_become_stand_ins(
    zipped: bool, tmp_path: Path
) -> None:
    potential = small()
    checkpoint = contents(potential, tmp_path / "first.pt")
    checkpoint["val_metrics"] = {"mae": np.float64(0.25), "all": Tracker([1, 2])}
    checkpoint["config"]["cmd"] = {"checkpoint_dir": pathlib.PurePosixPath("/somewhere")}
    path = tmp_path / "oc.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert "--allow-pickle" in message
    assert "besides tensors" in message
    found = read_open_catalyst(path, allow_pickle=True)
    for name, tensor in potential.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*is deprecated")
@pytest.mark.parametrize("kind", ["pickle", "script", "text"])
def test_of_another_file_no_advice_to_load_it_unsafely_is_passed_on(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.pt"
    if kind == "script":
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    else:
        path.write_bytes(b"\x80\x02nonsense" if kind == "pickle" else b"hello world")
    message = refusal(path)
    assert "is no complete file of torch.save" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_checkpoint_is_refused_by_name_and_not_run(zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    checkpoint = contents(small(), tmp_path / "first.pt")
    checkpoint["config"]["cmd"] = Hostile(mark)
    path = tmp_path / "oc.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    for allow_pickle in (False, True):
        assert "posix.system" in refusal(path, allow_pickle=allow_pickle)
        assert not mark.exists()


def test_files_beside_a_checkpoint_go_to_kinds_that_take_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scale-file"):
        load_teacher("native", "run", scale_file="scales.pt")
    with pytest.raises(ConfigError, match="--teacher-config"):
        load_teacher("native", "run", config_file="model.yml")
