"""Runs on disk: the model for use, and everything needed to continue the run.

Weights and optimizer state are safetensors, the rest JSON; nothing is pickled.
Invariant: every file is written whole under a temporary name and renamed, so a killed run leaves
the last complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kdcache.errors import ConfigError, TrainingError
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.store.shards import sync_directory, write_file

MODEL_WEIGHTS = "model.safetensors"
MODEL_CARD = "model.json"
FORMAT = 1
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def potential_card(potential: Potential) -> dict[str, Any]:
    """Everything but the weights that a prediction depends on, as JSON values."""
    return {
        "format": FORMAT,
        "model": {"name": potential.model.name, **potential.model.hyperparameters.model_dump()},
        "normalizer": potential.normalizer.to_json(),
        "references": {str(k): v for k, v in sorted(potential.references.items())},
        "dtype": str(next(potential.parameters()).dtype).removeprefix("torch."),
    }


def potential_digest(potential: Potential) -> str:
    """SHA-256 (hex) over the card and every weight: the identity of a teacher or student."""
    digest = hashlib.sha256(json.dumps(potential_card(potential), sort_keys=True).encode())
    for name, tensor in sorted(potential.model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_potential(
    directory: Path, potential: Potential, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a model for use into `directory`: model.safetensors and model.json.

    Args:
        directory: a run; made if missing.
        potential: in the state to be kept (EMA weights swapped in).
        notes: further JSON values for the card, such as metrics and the store's digest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    card = {
        **potential_card(potential),
        "digest": potential_digest(potential),
        "notes": notes or {},
    }
    _write_tensors(directory / MODEL_WEIGHTS, potential.model.state_dict())
    write_json(directory / MODEL_CARD, card)


def load_potential(path: str | Path, *, device: str = "cpu") -> Potential:
    """The model of a run, in eval mode.

    Args:
        path: a run directory, or a directory holding model.safetensors and model.json.
        device: where to put it.

    Raises:
        TrainingError: no model there, a newer format, or weights that do not fit the card.
    """
    directory = Path(path)
    if directory.name in (MODEL_WEIGHTS, MODEL_CARD):
        directory = directory.parent
    card_path, weights_path = directory / MODEL_CARD, directory / MODEL_WEIGHTS
    if not card_path.is_file() or not weights_path.is_file():
        raise TrainingError(_why_no_model(directory))
    try:
        card = json.loads(card_path.read_text())
        if card["format"] != FORMAT:
            raise TrainingError(
                f"{card_path} has format {card['format']}, this version reads {FORMAT}. "
                f"Update kdcache to use it."
            )
        potential = Potential(
            build_model(dict(card["model"]), seed=0),
            Normalizer.from_json(card["normalizer"]),
            {int(k): float(v) for k, v in card["references"].items()},
        ).to(DTYPES[card["dtype"]])
        expected = str(card["digest"])
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise TrainingError(
            f"{card_path} describes no model ({type(error).__name__}: {reason}). It was edited or "
            f"damaged: get the files again."
        ) from error
    try:
        potential.model.load_state_dict(load_file(weights_path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{weights_path} does not fit the model of {MODEL_CARD}: {reason}. "
            f"The two files must come from one run."
        ) from error
    digest = potential_digest(potential)
    if digest != expected:
        raise TrainingError(
            f"{weights_path} has digest {digest[:12]}…, its card says {expected[:12]}…. "
            f"The weights were changed or damaged after training: get the files again."
        )
    return potential.to(device).eval()


def _why_no_model(directory: Path) -> str:
    if not directory.exists():
        return f"{directory} does not exist. Name the directory that train-student wrote with -o."
    if state_directories(directory):
        return (
            f"{directory} is a run without a model yet: one is kept at each evaluation. Go on with "
            f"its training first."
        )
    return (
        f"{directory} holds no trained model ({MODEL_CARD} and {MODEL_WEIGHTS} are missing). Name "
        f"the directory that train-student wrote with -o."
    )


@dataclass(frozen=True, slots=True)
class State:
    """A point from which a run continues.

    Attributes:
        step: steps taken.
        tensors: by part ("model", "average", "terms", "optimizer", "sums"), then by name.
        values: everything else, as JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_state(run: Path, state: State, *, keep: int = 2) -> None:
    """Write a state to `run`/state/step-…, and drop all but the newest `keep`."""
    root = run / "state"
    target = root / f"step-{state.step:09d}"
    partial = root / f"{target.name}.partial"
    for left in root.glob("*.partial"):  # of a run that was killed while it wrote
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    for part, tensors in state.tensors.items():
        _write_tensors(partial / f"{part}.safetensors", tensors)
    write_json(partial / "state.json", {"step": state.step, **state.values})
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    sync_directory(root)
    for old in state_directories(run)[:-keep]:
        shutil.rmtree(old)


def check_run_directory(run: Path) -> None:
    """Refuse a path that a run must not be written to.

    Raises:
        TrainingError: a file, or a store: a run in it would be taken for a part of it.
    """
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is a file, and a run is a directory. Name another path.")
    if any((run / name).exists() for name in ("manifest.json", "zarr.json", ".work")):
        raise TrainingError(f"{run} is a store, and a run is written beside it. Name another path.")


def state_directories(run: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    return sorted(p for p in (run / "state").glob("step-*") if not p.name.endswith(".partial"))


def load_state(run: Path) -> State | None:
    """The newest complete state of a run, or None."""
    found = state_directories(run)
    if not found:
        return None
    values = json.loads((found[-1] / "state.json").read_text())
    tensors = {path.stem: load_file(path) for path in sorted(found[-1].glob("*.safetensors"))}
    return State(values.pop("step"), tensors, values)


def state_to_go_on_from(run: Path, identity: Mapping[str, str], max_steps: int) -> State | None:
    """The newest state of a run, None for a new one.

    Args:
        run: its directory.
        identity: as for `check_identity`.
        max_steps: of the run.

    Raises:
        TrainingError: of another configuration or other data, finished, or a model without a state.
    """
    state = load_state(run)
    if state is not None:
        check_identity(run, state, identity)
        if state.step >= max_steps:
            raise TrainingError(
                f"{run} is finished: {state.step} of {max_steps} steps. Name another directory, or "
                f"evaluate it."
            )
    elif (run / MODEL_CARD).exists():
        raise TrainingError(
            f"{run} holds a trained model but no checkpoint to go on from; training would "
            f"overwrite it. Name another directory."
        )
    return state


def check_identity(run: Path, state: State, wanted: Mapping[str, str]) -> None:
    """Refuse to go on with a state of another configuration or other data.

    Args:
        run: for the message.
        state: as `load_state` gave it.
        wanted: "configuration" in YAML and "store", a digest, of the run to be continued.

    Raises:
        TrainingError: naming the first setting that differs, with both values.
    """
    found: Mapping[str, str] = state.values["identity"]
    if found["store"] != wanted["store"]:
        raise TrainingError(
            f"{run} was started on store {found['store'][:12]}…, the one given is "
            f"{wanted['store'][:12]}…. Going on would mix two datasets. Give the store it was "
            f"started on, or name another directory."
        )
    had, has = (_flat(yaml.safe_load(side["configuration"])) for side in (found, wanted))
    for key in dict.fromkeys([*has, *had]):
        # A setting that is null counts as left out: a later version may know more of them.
        if had.get(key) != has.get(key):
            raise TrainingError(
                f"{run} was started with {key} = {had.get(key)}, now it is {has.get(key)}. Going "
                f"on would mix two runs. Give the setting it had, or name another directory."
            )


def _flat(settings: object, prefix: str = "") -> dict[str, object]:
    """Leaves of nested settings by dotted key."""
    if isinstance(settings, Mapping):
        items: list[tuple[str, object]] = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list):
        items = [(str(place), value) for place, value in enumerate(settings)]
    else:
        return {prefix.removesuffix("."): settings}
    leaves: dict[str, object] = {}
    for key, value in items:
        leaves |= _flat(value, f"{prefix}{key}.")
    return leaves


def training_seconds(run: Path) -> float:
    """Wall time the newest state of a run took to reach, validation left out; NaN without one."""
    found = state_directories(run)
    if not found:
        return float("nan")
    return float(json.loads((found[-1] / "state.json").read_text())["seconds"])


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors by "parameter number.name", and its settings as JSON values."""
    state = optimizer.state_dict()
    tensors = {
        f"{number}.{name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Continue from what `optimizer_state` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON whole, under a temporary name first."""
    write_text(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text whole, under a temporary name first."""
    write_file(path, text.encode())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Cloned: safetensors refuses tensors that share storage, as SchNet's tied keys do. Written by
    # us: its own save_file leaves a file that only its owner can read.
    write_file(path, save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))
