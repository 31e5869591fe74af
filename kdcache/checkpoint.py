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
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from kdcache.config import parse_yaml
from kdcache.errors import ConfigError, TrainingError, printable
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.store.shards import sync_directory, write_file

MODEL_WEIGHTS = "model.safetensors"
MODEL_CARD = "model.json"
FORMAT = 1
MAX_JSON_BYTES = 64 * 2**20
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
    card = _read_json(card_path, "describes no model")
    if card.get("format") != FORMAT:
        raise TrainingError(
            f"{card_path} has format {_line(card.get('format'))}, this version reads {FORMAT}. "
            f"Update kdcache to use it."
        )
    try:
        with _no_larger_than(weights_path):
            model = build_model(dict(card["model"]), seed=0)
        references = {int(k): float(v) for k, v in card["references"].items()}
        potential = Potential(model, Normalizer.from_json(card["normalizer"]), references)
        potential = potential.to(DTYPES[card["dtype"]])
        expected = str(card["digest"])
    # Sizes that are in range one by one may be too much for numpy, scipy or torch together.
    except (
        ConfigError, ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError,
        RuntimeError, ArithmeticError,
    ) as error:  # fmt: skip
        raise TrainingError(
            f"{card_path} describes no model ({type(error).__name__}: {_line(error)}). It was "
            f"edited or damaged: get the files again."
        ) from error
    tensors = _read_tensors(weights_path, f"does not fit the model of {MODEL_CARD}")
    try:
        potential.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise TrainingError(
            f"{weights_path} does not fit the model of {MODEL_CARD}: {_line(error)}. "
            f"The two files must come from one run."
        ) from error
    digest = potential_digest(potential)
    if digest != expected:
        raise TrainingError(
            f"{weights_path} has digest {digest[:12]}…, its card says {_line(expected[:12])}…. "
            f"The weights were changed or damaged after training: get the files again."
        )
    return potential.to(device).eval()


@contextmanager
def _no_larger_than(weights: Path) -> Iterator[None]:
    """Within it, what is built must be small enough to be in a file of weights.

    Hyperparameters may each be in range and give a hundred gigabytes together. torch registers a
    parameter before it is filled, and memory that nobody filled is not taken.
    """
    room, thread = weights.stat().st_size, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal room
        if parameter is None or threading.get_ident() != thread:
            return
        # Half at least of the float32 it is built in; a name takes some bytes as well.
        room -= 2 * parameter.numel() + len(name)
        if room < 0:
            raise ValueError(f"its sizes do not fit into the {weights.stat().st_size} bytes beside")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _read_json(path: Path, problem: str = "cannot be read") -> dict[str, Any]:
    """The object in a JSON file of a run.

    Raises:
        TrainingError: too large, no JSON, or another value.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        document = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(
            f"{path} {problem}: no JSON ({_line(error)}). It was damaged: get it again."
        ) from error
    if not isinstance(document, dict):
        raise TrainingError(
            f"{path} {problem}: JSON without keys and values. It was damaged: get it again."
        )
    return document


def _read_tensors(path: Path, problem: str = "cannot be read") -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        TrainingError: it is damaged, or of tensors that torch does not have.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} {problem}: no safetensors ({_line(error)}). It was damaged: get it again."
        ) from error
    return tensors


def _line(value: object) -> str:
    """What a file or a library says, as the printable beginning of a line."""
    line = " ".join(str(value).split())[:150]
    return printable(line)


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
    """The newest complete state of a run, or None.

    Raises:
        TrainingError: it is damaged.
    """
    found = state_directories(run)
    if not found:
        return None
    values = _read_json(found[-1] / "state.json")
    tensors = {path.stem: _read_tensors(path) for path in sorted(found[-1].glob("*.safetensors"))}
    step = values.pop("step", None)
    if type(step) is not int or step < 0:
        raise TrainingError(
            f"{found[-1] / 'state.json'} says step {_line(step)}. It was damaged: delete "
            f"{found[-1]} to go on from the state before."
        )
    return State(step, tensors, values)


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
        wanted: "configuration" in YAML and "store", a digest of what it learns from, of the run to
            be continued.

    Raises:
        TrainingError: naming the first setting that differs, with both values.
    """
    found = state.values.get("identity")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), str) for key in ("store", "configuration")
    ):
        raise TrainingError(
            f"The state of {run} does not say what it was started on. It was damaged: delete it to "
            f"go on from the one before."
        )
    try:
        had, has = (_flat(parse_yaml(side["configuration"], str(run))) for side in (found, wanted))
    except ConfigError as error:
        raise TrainingError(f"The state of {run} is damaged: {error}") from error
    for key in dict.fromkeys([*has, *had]):
        # A setting that is null counts as left out: a later version may know more of them.
        if had.get(key) != has.get(key):
            raise TrainingError(
                f"{run} was started with {key} = {had.get(key)}, now it is {has.get(key)}. Going "
                f"on would mix two runs. Give the setting it had, or name another directory."
            )
    # What a run learns from depends on its terms, so the configuration is compared first.
    if found["store"] != wanted["store"]:
        raise TrainingError(
            f"{run} was started on store {found['store'][:12]}…, the one given is "
            f"{wanted['store'][:12]}…. Going on would mix two datasets. Give the store it was "
            f"started on, or name another directory."
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
    seconds = _read_json(found[-1] / "state.json").get("seconds")
    return float(seconds) if isinstance(seconds, int | float) else float("nan")


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
