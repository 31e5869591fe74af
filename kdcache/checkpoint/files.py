"""The files of a run: their names, and how each is read and written.

Weights are safetensors, the rest is JSON or text; nothing is pickled. Invariant: every file is
written whole under a temporary name and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from kdcache.errors import TrainingError, reason_of
from kdcache.store.shards import write_file

MODEL_WEIGHTS = "model.safetensors"
MODEL_CARD = "model.json"
MAX_JSON_BYTES = 64 * 2**20


def state_directories(run: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    return sorted(p for p in (run / "state").glob("step-*") if not p.name.endswith(".partial"))


def read_json(path: Path, problem: str = "cannot be read") -> dict[str, Any]:
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
            f"{path} {problem}: no JSON ({reason_of(error)}). It was damaged: get it again."
        ) from error
    if not isinstance(document, dict):
        raise TrainingError(
            f"{path} {problem}: JSON without keys and values. It was damaged: get it again."
        )
    return document


def read_tensors(path: Path, problem: str = "cannot be read") -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        TrainingError: it is damaged, or of tensors that torch does not have.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{path} {problem}: no safetensors ({reason_of(error)}). It was damaged: get it again."
        ) from error
    return tensors


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON whole, under a temporary name first."""
    write_text(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text whole, under a temporary name first."""
    write_file(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors whole, under a temporary name first."""
    # Cloned: safetensors refuses tensors that share storage, as SchNet's tied keys do. Written by
    # us: its own save_file leaves a file that only its owner can read.
    write_file(path, save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))
