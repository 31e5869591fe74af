"""Models and states on disk: what is written comes back, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcache.checkpoint import (
    State,
    check_identity,
    load_optimizer_state,
    load_potential,
    load_state,
    optimizer_state,
    potential_digest,
    save_potential,
    save_state,
    state_directories,
    training_seconds,
)
from kdcache.config import OptimizerConfig
from kdcache.errors import TrainingError
from kdcache.optim import build_optimizer
from kdcache.stream.window import collate
from tests.chain import PAINN, SCHNET, make_potential, structures


@pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f4", "f8"])
def test_a_saved_potential_predicts_the_same(
    model: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    potential = make_potential(model, dtype=dtype)
    save_potential(tmp_path, potential, {"step": 7})
    loaded = load_potential(tmp_path)
    assert not loaded.training
    assert loaded.references == potential.references
    assert loaded.normalizer == potential.normalizer
    assert potential_digest(loaded) == potential_digest(potential)
    batch = collate(structures(12), potential.graph_rule).to("cpu", dtype)
    expected, found = potential.predict(batch), loaded.predict(batch)
    assert torch.equal(found.energy, expected.energy)
    assert torch.equal(found.forces, expected.forces)
    assert json.loads((tmp_path / "model.json").read_text())["notes"] == {"step": 7}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def damaged(directory: Path, **changes: object) -> None:
    save_potential(directory, make_potential())
    card = json.loads((directory / "model.json").read_text())
    (directory / "model.json").write_text(json.dumps({**card, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"digest": "0" * 64}, "its card says 000000000000…"),
        ({"dtype": "set_num_threads"}, "describes no model"),
        ({"normalizer": {"energy_scale": -1.0}}, "describes no model"),
        ({"model": 3}, "describes no model"),
        ({"model": {"name": "painn", "hidden_channels": 7}}, "describes no model"),
        ({"references": {"H": 1.0}}, "describes no model"),
        ({"references": {"1": 0.5}}, "changed or damaged"),
    ],
)
def test_a_card_that_was_changed_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    damaged(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message):
        load_potential(tmp_path)


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    save_potential(tmp_path, make_potential())
    weights = tmp_path / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    with pytest.raises(TrainingError, match="changed or damaged"):
        load_potential(tmp_path)
    weights.write_bytes(whole[:-100])
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_potential(tmp_path)
    save_potential(tmp_path / "other", make_potential({**PAINN, "hidden_channels": 4}))
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(TrainingError, match="does not fit the model"):
        load_potential(tmp_path)


def test_a_card_that_is_no_json_or_missing_is_refused(tmp_path: Path) -> None:
    save_potential(tmp_path, make_potential())
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(TrainingError, match="describes no model"):
        load_potential(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(TrainingError, match="holds no trained model"):
        load_potential(tmp_path)


def state(step: int) -> State:
    tensors = {"model": {"w": torch.full((2, 2), float(step))}, "terms": {}}
    return State(step, tensors, {"seconds": 0.5 * step, "identity": {}})


def test_the_newest_state_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path) is None
    assert training_seconds(tmp_path) != training_seconds(tmp_path)  # NaN
    for step in (0, 8, 9, 10, 100):
        save_state(tmp_path, state(step))
    assert [path.name for path in state_directories(tmp_path)] == [
        "step-000000010",
        "step-000000100",
    ]
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 100
    assert found.tensors["terms"] == {}
    assert torch.equal(found.tensors["model"]["w"], torch.full((2, 2), 100.0))
    assert found.values == {"seconds": 50.0, "identity": {}}
    assert training_seconds(tmp_path) == 50.0


def test_a_state_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    save_state(tmp_path, state(3))
    half = tmp_path / "state" / "step-000000004.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 3
    save_state(tmp_path, state(5))
    assert not half.exists()


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_an_optimizer_goes_on_bitwise(weight_decay: float, tmp_path: Path) -> None:
    settings = OptimizerConfig(weight_decay=weight_decay)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        return module, build_optimizer([module], settings)

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for k in which:
            optimizer.zero_grad()
            module(torch.full((2, 4), float(k + 1))).square().mean().backward()
            optimizer.step()

    whole, optimizer = fresh()
    steps(whole, optimizer, range(6))
    first, optimizer = fresh()
    steps(first, optimizer, range(3))
    tensors, values = optimizer_state(optimizer)
    saved = {"model": first.state_dict(), "optimizer": tensors}
    save_state(tmp_path, State(3, saved, {"optimizer": values}))
    found = load_state(tmp_path)
    assert found is not None
    second, optimizer = fresh()
    second.load_state_dict(found.tensors["model"])
    load_optimizer_state(optimizer, found.tensors["optimizer"], found.values["optimizer"])
    steps(second, optimizer, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_setting_that_is_null_counts_as_left_out() -> None:
    run = Path("run")
    had = State(0, {}, {"identity": {"store": "a", "configuration": "{x: {y: 1, old: null}}"}})
    check_identity(run, had, {"store": "a", "configuration": "{x: {y: 1, new: null}}"})
    with pytest.raises(TrainingError, match=r"x\.y = 1, now it is None"):
        check_identity(run, had, {"store": "a", "configuration": "{x: {}}"})
    with pytest.raises(TrainingError, match=r"x\.z = None, now it is 0"):
        check_identity(run, had, {"store": "a", "configuration": "{x: {z: 0, y: 1}}"})
