"""The states of a run: points from which it continues, the newest two of them kept.

Owns their folders and which run they are of; whether their contents fit is `resuming`'s.
Invariant: a state is written whole and renamed, so a killed run leaves the last complete one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdcache.checkpoint.files import (
    MODEL_CARD,
    read_json,
    read_tensors,
    state_directories,
    write_json,
    write_tensors,
)
from kdcache.config import parse_yaml
from kdcache.errors import ConfigError, TrainingError
from kdcache.store.shards import sync_directory

# What a run that is killed before its first state leaves: imported files, neighbour lists.
BEFORE_STATE = ("data.zarr", "graph")
# What shells and queues write beside a run before it begins.
LOGS = (".txt", ".log", ".out", ".err")


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
    target = state_directory(run, state.step)
    partial = root / f"{target.name}.partial"
    for left in root.glob("*.partial"):  # of a run that was killed while it wrote
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    for part, tensors in state.tensors.items():
        write_tensors(partial / f"{part}.safetensors", tensors)
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


def refuse_foreign_run(run: Path, *, beside: Iterable[Path] = ()) -> None:
    """Refuse a directory that holds something, but no run.

    Args:
        run: its path; may be missing. Hidden files and logs in it do not count.
        beside: what may lie in it as well, such as caches that were put there; itself, where such
            files lie straight in it.

    Raises:
        TrainingError: naming the first file that is not a run's.
    """
    if not run.is_dir() or (run / MODEL_CARD).is_file() or (run / "state").is_dir():
        return
    known = [path.resolve() for path in (*(run / name for name in BEFORE_STATE), *beside)]
    if run.resolve() in known:
        return
    for path in sorted(run.iterdir()):
        if path.name.startswith(".") or path.suffix in LOGS:
            continue
        if any(k.is_relative_to(path.resolve()) for k in known):
            continue
        raise TrainingError(
            f"{run} holds {path.name} and no run. A run would be mixed with what is there: name "
            f"another path, or an empty directory."
        )


def state_directory(run: Path, step: int) -> Path:
    """Where the state after so many steps is."""
    return run / "state" / f"step-{step:09d}"


def load_state(run: Path) -> State | None:
    """The newest complete state of a run, or None.

    Raises:
        TrainingError: it is damaged, or says another step than its name.
    """
    found = state_directories(run)
    if not found:
        return None
    values = read_json(found[-1] / "state.json")
    tensors = {path.stem: read_tensors(path) for path in sorted(found[-1].glob("*.safetensors"))}
    step = values.pop("step", None)
    if type(step) is not int or found[-1] != state_directory(run, step):
        raise TrainingError(
            f"{found[-1] / 'state.json'} says step {step!r:.60}. It was damaged: delete "
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
    seconds = read_json(found[-1] / "state.json").get("seconds")
    return seconds if isinstance(seconds, float) else float("nan")
