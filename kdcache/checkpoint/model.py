"""The model of a run for use: its weights, and a card of everything else a prediction depends on.

Invariant: a model that was loaded has the digest its card says.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from kdcache.checkpoint.files import (
    MODEL_CARD,
    MODEL_WEIGHTS,
    read_json,
    read_tensors,
    state_directories,
    write_json,
    write_tensors,
)
from kdcache.errors import ConfigError, TrainingError, reason_of
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential

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
    write_tensors(directory / MODEL_WEIGHTS, potential.model.state_dict())
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
    card = read_json(card_path, "describes no model")
    if card.get("format") != FORMAT:
        raise TrainingError(
            f"{card_path} has format {card.get('format')!r:.60}, this version reads {FORMAT}. "
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
            f"{card_path} describes no model ({type(error).__name__}: {reason_of(error)}). It was "
            f"edited or damaged: get the files again."
        ) from error
    tensors = read_tensors(weights_path, f"does not fit the model of {MODEL_CARD}")
    try:
        potential.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise TrainingError(
            f"{weights_path} does not fit the model of {MODEL_CARD}: {reason_of(error)}. "
            f"The two files must come from one run."
        ) from error
    digest = potential_digest(potential)
    if digest != expected:
        raise TrainingError(
            f"{weights_path} has digest {digest[:12]}…, its card says {expected[:12]}…. "
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
