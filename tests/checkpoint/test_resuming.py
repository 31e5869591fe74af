"""A run goes on from a state of its own, and from no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdcache.checkpoint import (
    State,
    load_optimizer_state,
    load_state,
    optimizer_state,
    save_state,
)
from kdcache.config import OptimizerConfig
from kdcache.errors import TrainingError
from kdcache.optim import build_optimizer
from kdcache.store import Store
from kdcache.train import train_student
from tests.chain import student
from tests.store.sample import files_of


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
    saved: dict[str, dict[str, Tensor]] = {"model": first.state_dict(), "optimizer": tensors}
    save_state(tmp_path, State(3, saved, {"optimizer": values}))
    found = load_state(tmp_path)
    assert found is not None
    second, optimizer = fresh()
    second.load_state_dict(found.tensors["model"])
    load_optimizer_state(optimizer, found.tensors["optimizer"])
    steps(second, optimizer, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


CONFIG = student("ema=0.99", "training.eval_every=2", "training.max_steps=4", strategy="n2n")


@pytest.fixture(scope="module")
def stopped(taught_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with states after 0 and 3 steps, one step after an evaluation."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train_student(taught_store.path, run, CONFIG, stop_after=3)
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def edit_values(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = run / "state" / "step-000000003" / "state.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(run: Path, part: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = run / "state" / "step-000000003" / f"{part}.safetensors"
    tensors: dict[str, Tensor] = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(store: Store, run: Path) -> str:
    """The line a run is refused with; nothing of it is touched."""
    before = files_of(run)
    with pytest.raises(TrainingError) as raised:
        train_student(store.path, run, CONFIG)
    assert files_of(run) == before
    message = str(raised.value)
    assert "delete" in message
    return message


def first(tensors: Mapping[str, Tensor], end: str = "") -> str:
    """A matrix's name."""
    return next(k for k in sorted(tensors) if k.endswith(end) and tensors[k].dim() == 2)


def replace_first(tensors: dict[str, Tensor], end: str, value: Callable[[Tensor], Tensor]) -> None:
    name = first(tensors, end)
    tensors[name] = value(tensors[name])


@pytest.mark.parametrize("part", ["model", "terms", "average", "optimizer"])
def test_a_state_without_a_part_is_refused(part: str, taught_store: Store, run: Path) -> None:
    (run / "state" / "step-000000003" / f"{part}.safetensors").unlink()
    assert f"it has no {part}." in refusal(taught_store, run)


@pytest.mark.parametrize("part", ["model", "terms", "average", "optimizer"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "has no"),
        (lambda t: t[:1].clone(), "this run's is float32 ["),
        (lambda t: t.T.reshape(-1).clone(), "this run's is float32 ["),
        (lambda t: t.double(), "is float64 ["),
    ],
)
def test_tensors_of_another_model_are_refused(
    part: str,
    value: Callable[[Tensor], Tensor] | None,
    said: str,
    taught_store: Store,
    run: Path,
) -> None:
    if value is None:
        edit_tensors(run, part, lambda t: t.pop(first(t)))
    else:
        edit_tensors(run, part, lambda t: replace_first(t, "", value))
    message = refusal(taught_store, run)
    assert f": {part} " in message
    assert said in message


@pytest.mark.parametrize("part", ["model", "terms", "average", "optimizer"])
def test_tensors_that_a_run_has_not_are_refused(part: str, taught_store: Store, run: Path) -> None:
    edit_tensors(run, part, lambda t: t.update({"99.exp_avg": torch.zeros(3)}))
    assert f"{part} has 99.exp_avg, which this run has not" in refusal(taught_store, run)


MOMENTS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.clear(), "its optimizer has 0 tensors after 3 steps"),
    (lambda t: t.update({"0.step": torch.tensor(7.0)}), "optimizer 0.step is 7 after 3 steps"),
    (lambda t: t.update({"0.step": torch.tensor(0.0)}), "optimizer 0.step is 0 after 3 steps"),
    (lambda t: t.update({"0.step": torch.tensor(float("nan"))}), "0.step is nan after 3 steps"),
    (lambda t: t.update({"0.step": torch.ones(2)}), "optimizer 0.step is float32 [2]"),
    (lambda t: t.pop("0.max_exp_avg_sq"), "optimizer has no 0.max_exp_avg_sq"),
    (lambda t: t.update({"00.step": t.pop("0.step")}), "optimizer has no 0.step"),
    (lambda t: t.update(step=torch.ones(())), "optimizer has step, which"),
]


@pytest.mark.parametrize(("change", "said"), MOMENTS)
def test_moments_of_another_optimizer_are_refused(
    change: Callable[[dict[str, Tensor]], object], said: str, taught_store: Store, run: Path
) -> None:
    edit_tensors(run, "optimizer", change)
    assert said in refusal(taught_store, run)


SETTINGS: list[Callable[[dict[str, Any]], object]] = [
    lambda v: v.pop("optimizer"),
    lambda v: v.update(optimizer=[]),
    lambda v: v["optimizer"].clear(),
    lambda v: v["optimizer"]["param_groups"].clear(),
    lambda v: v["optimizer"].update(param_groups="ab"),
    lambda v: v["optimizer"]["param_groups"].append({"params": [0]}),
    lambda v: v["optimizer"]["param_groups"][0].pop("params"),
    lambda v: v["optimizer"]["param_groups"][0]["params"].pop(),
    lambda v: v["optimizer"]["param_groups"][0].update(betas=[0.5, 0.5]),
    lambda v: v["optimizer"]["param_groups"][0].update(amsgrad=False),
]


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_of_another_optimizer_are_refused(
    change: Callable[[dict[str, Any]], object], taught_store: Store, run: Path
) -> None:
    edit_values(run, change)
    assert "its optimizer has other parameters or settings" in refusal(taught_store, run)


VALUES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda v: v.pop("rate"), "rate: Field required"),
    (lambda v: v["rate"].pop("waited"), "rate.waited: Field required"),
    (lambda v: v["rate"].update(plateau_factor=float("nan")), "rate.plateau_factor: "),
    (lambda v: v["rate"].update(best="low"), "rate.best: "),
    (lambda v: v.pop("summed"), "summed: Field required"),
    (lambda v: v["summed"].pop("loss"), "it has sums of"),
    (lambda v: v["summed"].update(loss=4), "loss was summed 4 times in 3 steps"),
    (lambda v: v["summed"].update(loss=0), "loss was summed 0 times in 3 steps"),
    (lambda v: v["summed"].update(loss=1.5), "summed.loss: "),
    (lambda v: v.update(seconds=-1.0), "seconds: "),
    (lambda v: v.update(seconds="1"), "seconds: "),
    (lambda v: v.pop("best"), "best: Field required"),
    (lambda v: v.update(best=float("inf")), "best: "),
]


@pytest.mark.parametrize(("change", "said"), VALUES)
def test_numbers_that_are_none_of_the_run_are_refused(
    change: Callable[[dict[str, Any]], object], said: str, taught_store: Store, run: Path
) -> None:
    edit_values(run, change)
    assert said in refusal(taught_store, run)


@pytest.mark.parametrize("updates", [2, -1])
def test_an_average_of_other_steps_is_refused(updates: int, taught_store: Store, run: Path) -> None:
    edit_tensors(run, "average", lambda t: t.update(updates=torch.tensor(updates)))
    said = f"its average is one of {updates} updates, 3 are expected"
    assert said in refusal(taught_store, run)


def test_a_sum_that_is_no_number_is_refused(taught_store: Store, run: Path) -> None:
    edit_tensors(run, "sums", lambda t: t.update(loss=torch.ones(2)))
    assert "its sum of loss is float32 [2]" in refusal(taught_store, run)


def test_without_its_newest_state_a_run_goes_on_from_the_one_before(
    taught_store: Store, stopped: Path, run: Path
) -> None:
    """The way out that a refusal names: nothing is lost but three steps."""
    edit_tensors(run, "model", dict.clear)
    refusal(taught_store, run)
    shutil.rmtree(run / "state" / "step-000000003")
    whole = train_student(taught_store.path, stopped.parent / "whole", CONFIG)
    found = train_student(taught_store.path, run, CONFIG)
    assert whole is not None
    assert found is not None
    assert found.validation == whole.validation
    ours, theirs = load_state(run), load_state(stopped.parent / "whole")
    assert ours is not None
    assert theirs is not None
    for name, tensor in theirs.tensors["model"].items():
        assert torch.equal(ours.tensors["model"][name], tensor)


def test_a_rate_and_settings_of_another_torch_are_no_other_optimizer(
    taught_store: Store, run: Path
) -> None:
    """The rate is a function of the step; and one torch writes settings that another has not."""
    edit_values(run, lambda v: v["optimizer"]["param_groups"][0].update(lr=7.0, later=True))
    edit_values(run, lambda v: v["optimizer"]["param_groups"][0].pop("differentiable"))
    assert train_student(taught_store.path, run, CONFIG) is not None


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ('{"notes": {"validation": {"rmse": 1.0}}}', "does not tell the errors of the model"),
        ('{"notes": {"validation": 3}}', "does not tell the errors of the model"),
        ("{}", r"errors of the model it describes \('notes'\)"),
        ("[]", "describes no model"),
    ],
)
def test_a_card_without_the_errors_of_its_model_is_said_when_training_ends(
    notes: str, said: str, taught_store: Store, run: Path
) -> None:
    edit_values(run, lambda v: v.update(best=-1.0))  # no better model is found and kept
    (run / "model.json").write_text(notes)
    with pytest.raises(TrainingError, match=said):
        train_student(taught_store.path, run, CONFIG)
    state = load_state(run)
    assert state is not None
    assert state.step == 4
