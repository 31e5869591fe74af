"""Golden models in the layout of the Open Catalyst trainer's checkpoints, and their inputs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from kdcache.structures import Structure

GEMNET = {
    "name": "gemnet-oc", "num_spherical": 3, "num_radial": 4, "num_blocks": 1, "emb_size_atom": 4,
    "emb_size_edge": 6, "emb_size_trip_in": 4, "emb_size_trip_out": 4, "emb_size_quad_in": 4,
    "emb_size_quad_out": 4, "emb_size_aint_in": 4, "emb_size_aint_out": 4, "emb_size_rbf": 4,
    "emb_size_cbf": 4, "emb_size_sbf": 4, "num_before_skip": 1, "num_after_skip": 1,
    "num_concat": 1, "num_atom": 1, "num_output_afteratom": 1, "num_atom_emb_layers": 1,
    "num_global_out_layers": 1, "cutoff": 4.0, "cutoff_aint": 5.0, "max_neighbors": 6,
}  # fmt: skip
# OC20's: energies have a mean, forces none. Two different std show which one is used where.
NORMALIZERS = {
    "target": {"mean": torch.tensor(-0.7554), "std": torch.tensor(2.8873)},
    "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(3.5)},
}


def checkpoint_of(case: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint of a golden case: prefixed names, configuration, normalizers."""
    config = json.loads((case / "config.json").read_text())
    weights = load_file(case / "state_dict.safetensors")
    return {
        "state_dict": {f"module.module.{name}": tensor for name, tensor in weights.items()},
        "normalizers": NORMALIZERS,
        "config": {"model": config["model"], "model_attributes": config["constructor"]},
        **changes,
    }


def structures_of(case: Path) -> list[Structure]:
    inputs = np.load(case / "inputs.npz")
    bounds = np.cumsum([0, *inputs["natoms"]])
    return [
        Structure(
            structure_id=str(i),
            atomic_numbers=inputs["atomic_numbers"][a:b].astype(np.int64),
            positions=inputs["pos"][a:b].astype(np.float64),
            cell=inputs["cell"][i].astype(np.float64),
            pbc=inputs["pbc"][i].astype(bool),
            tags=inputs["tags"][a:b].astype(np.uint8),
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def expected_of(case: Path) -> dict[str, np.ndarray]:
    outputs = np.load(case / "outputs_float64.npz")
    return {name: outputs[name] for name in outputs.files}
