"""Models of other libraries on our graphs, to be timed beside ours."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from dataclasses import replace

import torch
from systems import model_batch
from torch import Tensor, nn
from torch_geometric.nn.models import SchNet

from kdcache.models import Model, build_model
from kdcache.models.geometry import edge_vectors
from kdcache.models.traced import TracedModel
from kdcache.structures import Batch

EnergyForces = Callable[[], tuple[Tensor, Tensor]]


def torch_geometric_schnet(size: str) -> tuple[nn.Module, EnergyForces]:
    """torch-geometric's SchNet, given our graph; its forces are taken as ours are."""
    ours = build_model({"name": f"schnet-{size}"})
    sizes = ours.hyperparameters.model_dump()
    batch = model_batch(ours, size)
    distance = torch.zeros(0)
    model = SchNet(
        **{k: v for k, v in sizes.items() if k != "max_neighbors"},
        interaction_graph=lambda *_: (batch.edge_index, distance),
    )

    def compute() -> tuple[Tensor, Tensor]:
        nonlocal distance
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            moved = _with_gradient(batch)
            distance = torch.linalg.vector_norm(edge_vectors(moved), dim=-1)
            energy = model(batch.atomic_numbers, moved.positions, batch.structure_index)
            (gradient,) = torch.autograd.grad(energy.sum(), moved.positions, create_graph=keep)
        return energy, -gradient

    return model, compute


def schnetpack_painn(size: str) -> tuple[nn.Module, EnergyForces]:
    """SchNetPack's PaiNN with its own energy head and gradient forces, given our graph."""
    from torch.utils.data import dataloader

    # Releases up to 2.0 import a name that torch has dropped, for a type annotation.
    if not hasattr(dataloader, "T_co"):
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]
    schnetpack = importlib.import_module("schnetpack")
    ours = gradient_painn(size)
    sizes, batch = ours.hyperparameters.model_dump(), model_batch(ours, size)
    model = schnetpack.model.NeuralNetworkPotential(
        representation=schnetpack.representation.PaiNN(
            n_atom_basis=sizes["hidden_channels"],
            n_interactions=sizes["num_layers"],
            radial_basis=schnetpack.nn.GaussianRBF(sizes["num_rbf"], sizes["cutoff"]),
            cutoff_fn=schnetpack.nn.CosineCutoff(sizes["cutoff"]),
        ),
        input_modules=[schnetpack.atomistic.PairwiseDistances()],
        output_modules=[
            schnetpack.atomistic.Atomwise(sizes["hidden_channels"], output_key="energy"),
            schnetpack.atomistic.Forces(),
        ],
    )
    source, target = batch.edge_index
    cell = batch.cell[batch.structure_index[source]]
    inputs = {
        "_atomic_numbers": batch.atomic_numbers,
        "_idx_i": target,
        "_idx_j": source,
        "_idx_m": batch.structure_index,
        "_offsets": (batch.edge_shift.unsqueeze(-1) * cell).sum(1),
        "_n_atoms": torch.bincount(batch.structure_index),
    }

    def compute() -> tuple[Tensor, Tensor]:
        model.train(torch.is_grad_enabled())  # decides whether its forces can be differentiated
        with torch.enable_grad():
            output = model({**inputs, "_positions": batch.positions.detach().clone()})
        return output["energy"], output["forces"]

    return model, compute


def gradient_painn(size: str) -> Model:
    """The published small PaiNN, with gradient forces."""
    name = "painn-small-oc20" if size == "oc20" else "painn-small-coll"
    return build_model({"name": name, "direct_forces": False})


def own(model: Model, size: str, compiled: bool = False) -> tuple[nn.Module, EnergyForces]:
    """One of our models, as it is or as `training.compile` compiles it."""
    batch = model_batch(model, size)
    predict = TracedModel(model, model) if compiled else model

    def compute() -> tuple[Tensor, Tensor]:
        output = predict(batch)
        return output.energy, output.forces

    return model, compute


def _with_gradient(batch: Batch) -> Batch:
    return replace(batch, positions=batch.positions.detach().requires_grad_())
