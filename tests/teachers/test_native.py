"""Our checkpoints as teachers: what they give, and when two of them are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.checkpoint import save_potential
from kdcache.errors import ConfigError, TrainingError
from kdcache.models.taps import Tap
from kdcache.stream.window import collate
from kdcache.teachers import NativeTeacher, load_teacher
from kdcache.testing import check_teacher
from kdcache.train import train_student
from tests.chain import (
    PAINN,
    REFERENCES,
    SCHNET,
    make_potential,
    make_store,
    structures,
    student,
)
from tests.dump.test_edges import make_teacher

MODELS = pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f4", "f8"])


@MODELS
@DTYPES
def test_fields_are_as_announced(model: dict[str, object], dtype: torch.dtype) -> None:
    taps = [Tap.parse("node/msg1=message_layers.0")] if model is PAINN else []
    teacher = NativeTeacher(make_potential(model, dtype=dtype), taps)
    batch = collate(structures(12), teacher.graph_rule).to("cpu", dtype)
    computed = teacher.compute(batch)
    specs = {spec.name: spec for spec in teacher.field_specs()}
    assert specs.keys() == computed.keys()
    for name, tensor in computed.items():
        rows = 12 if specs[name].level == "structure" else batch.n_atoms
        assert tensor.shape == (rows, *specs[name].shape)
        assert tensor.dtype == getattr(torch, specs[name].dtype)
        assert not tensor.requires_grad


@MODELS
def test_energies_are_absolute_and_the_sum_of_their_atoms(model: dict[str, object]) -> None:
    potential = make_potential(model)
    chosen = structures(12)
    batch = collate(chosen, potential.graph_rule)
    computed = NativeTeacher(potential).compute(batch)
    totals = torch.zeros(12, dtype=torch.float64)
    totals.index_add_(0, batch.structure_index, computed["atomic_energy"])
    assert torch.allclose(totals, computed["energy"], rtol=0, atol=1e-5)
    left = [sum(REFERENCES[int(n)] + 0.125 for n in s.atomic_numbers) for s in chosen]
    relative = potential(batch).energy.detach().double()
    assert torch.allclose(computed["energy"] - torch.tensor(left), relative, rtol=0, atol=1e-9)


def test_a_tap_gives_what_the_module_returned() -> None:
    potential = make_potential()
    teacher = NativeTeacher(potential, [Tap.parse("vector/msg1=message_layers.0")])
    caught: list[torch.Tensor] = []
    module = potential.model.get_submodule("message_layers.0")
    with module.register_forward_hook(lambda m, i, out: caught.append(out[1])):
        computed = teacher.compute(collate(structures(12), teacher.graph_rule))
    assert torch.equal(computed["vector_msg1"], caught[0])
    plain = NativeTeacher(potential).compute(collate(structures(12), teacher.graph_rule))
    assert all(torch.equal(plain[name], computed[name]) for name in plain)


@DTYPES
def test_a_teacher_with_edges_keeps_what_it_promises_of_their_sums(dtype: torch.dtype) -> None:
    teacher = make_teacher(dtype)
    check_teacher(teacher)
    specs = {spec.name: (spec.level, spec.shape, spec.symmetry) for spec in teacher.field_specs()}
    assert specs["edge"] == ("edge", (6,), "invariant")
    assert specs["edge_to_node"] == ("atom", (6,), "invariant")
    assert specs["edge_to_vector"] == ("atom", (3, 6), "vector")


def test_digests_tell_weights_units_precision_and_taps_apart() -> None:
    def digest(**changes: object) -> str:
        return NativeTeacher(make_potential(**changes)).digest  # type: ignore[arg-type]

    other_units = make_potential()
    other_units.normalizer = other_units.normalizer.model_copy(update={"energy_shift": 0.5})
    other_references = make_potential()
    other_references.references[1] += 1e-9
    tapped = NativeTeacher(make_potential(), [Tap.parse("node/a=message_layers.0")])
    found = [
        digest(),
        digest(seed=8),
        digest(dtype=torch.float64),
        NativeTeacher(other_units).digest,
        NativeTeacher(other_references).digest,
        tapped.digest,
    ]
    assert len(set(found)) == len(found)
    assert digest() == digest()


def test_a_loaded_teacher_is_the_saved_one(tmp_path: Path) -> None:
    potential = make_potential()
    save_potential(tmp_path / "run", potential)
    batch = collate(structures(12), potential.graph_rule)
    expected = NativeTeacher(potential).compute(batch)
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        found = load_teacher("native", str(path))
        assert found.digest == NativeTeacher(potential).digest
        assert found.model_name == "painn"
        assert found.architecture["hidden_channels"] == 8
        computed = found.compute(batch)
        assert all(torch.equal(computed[name], expected[name]) for name in expected)
    exact = load_teacher("native", str(tmp_path / "run"), precision="float64")
    wide = collate(structures(12), potential.graph_rule, np.float64)
    np.testing.assert_allclose(exact.compute(wide)["forces"], expected["forces"], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("nativ", {}, "did you mean native"),
        ("native", {"precision": "float16"}, "say float32 or float64"),
        ("native", {"precision": "nn"}, "say float32 or float64"),
        ("native", {"device": "quantum"}, "no device"),
        ("native", {"taps": [Tap.parse("node/a=message_layer.0")]}, "did you mean"),
        ("native", {"taps": [Tap.parse("edge/a=message_layers.0")]}, "edge needs"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    kind: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_potential(tmp_path, make_potential())
    with pytest.raises(ConfigError, match=message):
        load_teacher(kind, str(tmp_path), **settings)  # type: ignore[arg-type]


def test_a_directory_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no trained model"):
        load_teacher("native", str(tmp_path))


def test_a_run_with_steps_left_is_named_with_its_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)
    config = student("training.max_steps=4", "training.eval_every=2")
    train_student(store.path, tmp_path / "run", config, stop_after=2)
    load_teacher("native", str(tmp_path / "run"))
    assert [r.getMessage() for r in caplog.records if "step 2 of 4" in r.getMessage()]
    caplog.clear()
    train_student(store.path, tmp_path / "run", config)
    load_teacher("native", str(tmp_path / "run"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
