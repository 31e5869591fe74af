"""What a run takes from a state: whether it fits, and the optimizer's part of it.

Invariant: a state that passes `check_state` can be gone on from. Nothing it says of settings is
used: those are the configuration's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kdcache.checkpoint.states import State, state_directory
from kdcache.errors import TrainingError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Rate(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    plateau_factor: Positive
    waited: Positive
    best: Finite = 0.0  # left out before the first evaluation


class _Values(BaseModel):
    """The numbers that a run takes from a state."""

    model_config = ConfigDict(strict=True)

    rate: _Rate
    summed: dict[str, int]
    seconds: Positive
    best: Finite | None


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors by "parameter number.name", and its settings as JSON values."""
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }
    # Through JSON, so that it equals what is read back.
    return tensors, {"param_groups": json.loads(json.dumps(state["param_groups"]))}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Continue from the tensors that `optimizer_state` gave, with the settings it has."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_state(run: Path, state: State, fresh: State, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that a run cannot go on from, before anything is taken from it.

    Args:
        run: its directory, for the message.
        state: as it was read.
        fresh: of the same run before its first step: what the tensors must be like.
        optimizer: of the run.

    Raises:
        TrainingError: tensors are missing or unknown, or have another shape or dtype; another
            optimizer; counts that do not belong to the step.
    """
    for problem in _problems(state, fresh, optimizer):
        raise TrainingError(
            f"{state_directory(run, state.step)} is no state of this run: {problem}. It was "
            f"damaged or is another run's: delete it to go on from the state before."
        )


def _problems(state: State, fresh: State, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What is wrong, the worst first: what follows one of them need not make sense."""
    try:
        values = _Values.model_validate(state.values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        yield f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return
    for part in ("model", "terms", "average", "optimizer"):
        if part not in state.tensors:
            yield f"it has no {part}"
    for part in ("model", "terms", "average"):
        yield from _other_tensors(part, state.tensors[part], fresh.tensors[part])
    averaged = len(fresh.tensors["average"]) > 1
    updates, expected = int(state.tensors["average"]["updates"]), state.step if averaged else 0
    if updates != expected:
        yield f"its average is one of {updates} updates, {expected} are expected"
    if not _same_settings(state.values.get("optimizer"), fresh.values["optimizer"]):
        yield "its optimizer has other parameters or settings"
    yield from _other_moments(state, optimizer)
    yield from _other_sums(state, values.summed)


def _other_tensors(
    part: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            yield f"{part} has no {name}"
        elif name not in wanted:
            yield f"{part} has {name}, which this run has not"
        elif _kind(found[name]) != _kind(wanted[name]):
            yield f"{part} {name} is {_kind(found[name])}, this run's is {_kind(wanted[name])}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _same_settings(found: Any, ours: Mapping[str, Any]) -> bool:
    """But for the rate, which every step sets, and for what another torch knows beside it."""
    try:
        groups = zip(found["param_groups"], ours["param_groups"], strict=True)
        return all(
            theirs["params"] == group["params"]
            and all(theirs.get(key, value) == value for key, value in group.items() if key != "lr")
            for theirs, group in groups
        )
    except (TypeError, KeyError, ValueError, AttributeError):  # no such lists and mappings
        return False


def _other_moments(state: State, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """A parameter has all moments or, before its first gradient, none."""
    found = state.tensors["optimizer"]
    if bool(found) != bool(state.step):
        yield f"its optimizer has {len(found)} tensors after {state.step} steps"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = ["exp_avg", "exp_avg_sq"]
    if optimizer.defaults["amsgrad"]:
        names.append("max_exp_avg_sq")
    begun = {key.partition(".")[0] for key in found}
    wanted: dict[str, Tensor] = {}
    for number, parameter in enumerate(parameters):
        if str(number) in begun:
            wanted[f"{number}.step"] = torch.zeros(())
            wanted |= {f"{number}.{name}": parameter for name in names}
    # Shapes above all: a fused step reads and writes as many values as the parameter has.
    yield from _other_tensors("optimizer", found, wanted)
    for key in wanted:
        if key.endswith(".step") and not 1 <= float(found[key]) <= state.step:
            yield f"optimizer {key} is {float(found[key]):g} after {state.step} steps"


def _other_sums(state: State, summed: Mapping[str, int]) -> Iterator[str]:
    sums = state.tensors.get("sums", {})
    if sums.keys() != summed.keys():
        yield f"it has sums of {', '.join(sums) or 'nothing'}, counts of {', '.join(summed)}"
    for name, value in sums.items():
        if value.dim() or not value.is_floating_point():
            yield f"its sum of {name} is {_kind(value)}, a single float is expected"
        if not 1 <= summed[name] <= state.step:
            yield f"{name} was summed {summed[name]} times in {state.step} steps"
