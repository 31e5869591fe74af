"""Small batches for model tests, and the golden cases of the published implementation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcache.graphs import GraphRule, neighbor_list
from kdcache.models import Model, build_model
from kdcache.models.gemnet_oc import GemNetOCHyperparameters
from kdcache.models.weights import load_weights
from kdcache.structures import Batch, Graph

FLOAT64, FLOAT32 = 1e-9, 5e-6
# Atomic energies cancel in the sum.
FLOAT32_ENERGY = 2e-5


@dataclass(frozen=True)
class Atoms:
    """A structure as a model sees it."""

    atomic_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray

    def moved(self, positions: np.ndarray, cell: np.ndarray | None = None) -> Atoms:
        return Atoms(self.atomic_numbers, positions, self.cell if cell is None else cell, self.pbc)


def molecule(n_atoms: int, seed: int = 0) -> Atoms:
    """Random atoms, none closer than 0.8 Å, without a cell."""
    rng = np.random.default_rng(seed)
    positions = np.zeros((0, 3))
    while len(positions) < n_atoms:
        point = rng.uniform(0.0, 1.2 * n_atoms ** (1 / 3) + 0.5, 3)
        if len(positions) == 0 or np.linalg.norm(positions - point, axis=1).min() > 0.8:
            positions = np.vstack([positions, point])
    numbers = rng.integers(1, 10, n_atoms)
    return Atoms(numbers, positions, np.zeros((3, 3)), np.zeros(3, dtype=bool))


def crystal(seed: int = 0) -> Atoms:
    """Three atoms in a small skew cell: atoms see several images of each other and themselves."""
    rng = np.random.default_rng(seed)
    cell = np.array([[3.1, 0.2, 0.0], [1.4, 2.9, 0.1], [-0.6, 0.5, 3.4]])
    positions = np.array([[0.1, 0.2, 0.1], [0.4, 0.6, 0.5], [0.8, 0.1, 0.8]]) @ cell
    positions = positions + rng.normal(scale=0.05, size=(3, 3))
    return Atoms(np.array([29, 8, 1]), positions, cell, np.ones(3, dtype=bool))


def make_batch(
    structures: Sequence[Atoms],
    rule: GraphRule,
    dtype: torch.dtype = torch.float64,
    further: Mapping[str, GraphRule] | None = None,
) -> Batch:
    """A batch with our own neighbour lists."""
    sizes = [len(s.atomic_numbers) for s in structures]
    first = np.cumsum([0, *sizes])

    def graph(rule: GraphRule) -> Graph:
        lists = [neighbor_list(s.positions, s.cell, s.pbc, rule) for s in structures]
        parts = [e.edge_index + p for e, p in zip(lists, first, strict=False)]
        return Graph(
            torch.tensor(np.concatenate(parts, axis=1), dtype=torch.int64),
            torch.tensor(np.concatenate([e.edge_shift for e in lists]), dtype=dtype),
        )

    main = graph(rule)
    return Batch(
        atomic_numbers=torch.tensor(np.concatenate([s.atomic_numbers for s in structures])),
        positions=torch.tensor(np.concatenate([s.positions for s in structures]), dtype=dtype),
        cell=torch.tensor(np.stack([s.cell for s in structures]), dtype=dtype),
        pbc=torch.tensor(np.stack([s.pbc for s in structures])),
        structure_index=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        n_structures=len(sizes),
        edge_index=main.edge_index,
        edge_shift=main.edge_shift,
        graphs={name: graph(its_rule) for name, its_rule in (further or {}).items()},
    )


@dataclass(frozen=True)
class Golden:
    """One case: the model with published weights, its input with our graph, and what it gave."""

    model: Model
    batch: Batch
    expected: dict[str, Tensor]
    weights: dict[str, Tensor]
    directory: Path


def golden_case(directory: Path, dtype: torch.dtype) -> Golden:
    """Read a case; the graph is searched by us, by the rule of the case."""
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "state_dict.safetensors")
    model = build_model(_model_config(config["model"], config["constructor"])).to(dtype)
    load_weights(model, weights)
    inputs = np.load(directory / "inputs.npz")
    bounds = np.cumsum([0, *inputs["natoms"]])
    structures = [
        Atoms(
            inputs["atomic_numbers"][a:b],
            inputs["pos"][a:b].astype(np.float64),
            inputs["cell"][i].astype(np.float64),
            inputs["pbc"][i],
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    precision = "float64" if dtype == torch.float64 else "float32"
    outputs = np.load(directory / f"outputs_{precision}.npz")
    expected = {name: torch.tensor(outputs[name]) for name in outputs.files}
    batch = make_batch(structures, model.graph_rule, dtype, model.further_graphs)
    if model.further_graphs:
        batch = replace(batch, tags=torch.tensor(inputs["tags"], dtype=torch.uint8))
    return Golden(model, batch, expected, weights, directory)


def _model_config(name: str, constructor: dict[str, object]) -> dict[str, object]:
    """Our hyperparameters from the constructor arguments of the published code."""
    if name == "schnet":
        names = ("hidden_channels", "num_filters", "num_interactions", "num_gaussians", "cutoff")
        limit = 50 if constructor["use_pbc"] else None  # 50 is fixed there
        sizes = {key: constructor[key] for key in names}
        return {"name": "schnet", "max_neighbors": limit, **sizes}
    if name == "gemnet_oc":
        return _gemnet_config(constructor)
    names = ("hidden_channels", "num_layers", "num_rbf", "cutoff", "max_neighbors")
    sizes = {key: constructor[key] for key in names}
    rbf, envelope = constructor["rbf"], constructor["envelope"]
    assert isinstance(rbf, dict)
    assert isinstance(envelope, dict)
    return {
        "name": "painn",
        "num_elements": 83,
        "rbf": rbf["name"],
        "envelope": envelope["name"],
        **sizes,
    }


def _gemnet_config(constructor: dict[str, object]) -> dict[str, object]:
    nested = {key: constructor[key] for key in ("rbf", "envelope", "cbf", "sbf")}
    chosen = {key: value["name"] for key, value in nested.items() if isinstance(value, dict)}
    known = set(GemNetOCHyperparameters.model_fields) - {"output_init"}
    sizes = {key: value for key, value in constructor.items() if key in known}
    return {"name": "gemnet-oc", "num_elements": 83, **sizes, **chosen}


def assert_reproduced(golden: Golden, found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Every published output and no other, each within its limit."""
    assert found.keys() == golden.expected.keys()
    for name, expected in golden.expected.items():
        limit = FLOAT64 if dtype == torch.float64 else FLOAT32
        if dtype == torch.float32 and name.endswith("energy") and "atom" not in name:
            limit = FLOAT32_ENERGY
        assert relative_error(found[name], expected) < limit, name


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    expected = expected.to(found.dtype)
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found.detach() - expected).abs().max() / scale)
