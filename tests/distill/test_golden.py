"""The published code's own distillation losses, from its tensors and through our student.

The published student and teacher are compared in their model units, and the teacher's vectors have
the sign its code gave them; both sides of the golden files agree on that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcache.config import StudentConfig, TermConfig
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.distill.strategies import apply_strategy
from kdcache.distill.terms import Terms, build_terms
from kdcache.fields import FieldSpec
from kdcache.models.build import build_model
from kdcache.structures import Batch, ModelOutput

pytestmark = pytest.mark.proof

PRECISIONS = {
    "float64": (torch.float64, 1e-9, "graph_float64.npz"),
    "float32": (torch.float32, 1e-6, "graph.npz"),
}
NODE, EDGE = 32, 48

# Golden name: student feature, teacher field, loss.
FEATURE_LOSSES = {
    "_node2node_distill_loss": ("node", "node", "mse"),
    "_node2node_distill_loss/use_mae": ("node", "node", "mae"),
    "_node2node_distill_loss/use_huber": ("node", "node", "huber"),
    "_edge2node_distill_loss": ("node_to_edge", "edge_to_node", "mse"),
    "_edge2node_distill_loss/use_mae": ("node_to_edge", "edge_to_node", "mae"),
    "_edge2node_distill_loss/use_huber": ("node_to_edge", "edge_to_node", "huber"),
    "_vec2vec_distill_loss": ("vector", "vector", "mse"),
}
FIELDS = (
    FieldSpec("node", "atom", (NODE,)),
    FieldSpec("node_to_edge", "atom", (EDGE,)),
    FieldSpec("edge_to_node", "atom", (EDGE,)),
    FieldSpec("vector", "atom", (3, EDGE), symmetry="vector"),
    FieldSpec("atomic_energy", "atom"),
    FieldSpec("energy", "structure"),
    FieldSpec("forces", "atom", (3,), symmetry="vector"),
)


class Golden(NamedTuple):
    """One precision of the golden case."""

    batch: Batch
    output: ModelOutput
    losses: dict[str, float]
    gradient_norms: dict[str, float]
    tolerance: float


@pytest.fixture(params=PRECISIONS)
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    precision = str(request.param)
    dtype, tolerance, graph_file = PRECISIONS[precision]
    folder = shared / "golden" / "kd" / "batch3"
    arrays = np.load(folder / f"tensors_{precision}.npz")
    graph = np.load(shared / "golden" / "painn" / "batch3" / graph_file)
    values = json.loads((folder / f"losses_{precision}.json").read_text())

    def tensor(name: str) -> Tensor:
        array = torch.from_numpy(arrays[name])
        return array.to(dtype) if array.is_floating_point() else array

    def fields(side: str, names: dict[str, str]) -> dict[str, Tensor]:
        return {ours: tensor(f"{side}.{theirs}") for ours, theirs in names.items()}

    outputs = {"energy": "energy", "forces": "forces", "atomic_energy": "per_atom_energy"}
    teacher = {
        "node": "node_feature",
        "edge_to_node": "e2n_feature",
        "vector": "vector_feature",
        **outputs,
    }
    student = {"node": "node_feature", "node_to_edge": "n2e_feature", "vector": "vector_feature"}
    batch = Batch(
        atomic_numbers=tensor("atomic_numbers"),
        positions=tensor("pos"),
        cell=tensor("cell"),
        pbc=tensor("pbc"),
        structure_index=tensor("batch"),
        n_structures=3,
        edge_index=torch.from_numpy(graph["edge_index"]),
        edge_shift=torch.from_numpy(graph["cell_offsets"]).to(dtype),
        energy=tensor("y"),
        forces=tensor("force"),
        teacher={f"gemnet/{k}": v for k, v in fields("teacher", teacher).items()},
    )
    output = ModelOutput(**fields("student", outputs), features=fields("student", student))
    return Golden(batch, output, values["losses"], values["student_grad_norm"], tolerance)


def bind(*terms: TermConfig, student_fields: tuple[FieldSpec, ...] = FIELDS) -> Terms:
    return build_terms(
        terms,
        student_fields=student_fields,
        teacher_fields={"gemnet": {spec.name: spec for spec in FIELDS}},
        clock=Clock(1),
        seed=0,
    )


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_losses_are_the_published_ones(golden: Golden, name: str) -> None:
    student, teacher, loss = FEATURE_LOSSES[name]
    terms = bind(TermConfig(name="x", student=student, teacher=teacher, loss=loss))
    value = terms(golden.output, golden.batch, 0).total.item()
    assert value == pytest.approx(golden.losses[name], rel=golden.tolerance, abs=0)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [("vanilla1", "regular"), ("vanilla2", "_per_atom_energy_distill_loss")],
)
def test_vanilla_losses_are_the_published_ones(golden: Golden, strategy: str, name: str) -> None:
    config = apply_strategy(StudentConfig(), strategy, weights={strategy: 1.0})
    value = bind(*config.terms)(golden.output, golden.batch, 0).total.item()
    assert value == pytest.approx(golden.losses[name], rel=golden.tolerance, abs=0)


def test_default_ground_truth_loss_is_the_published_one(golden: Golden) -> None:
    loss = GroundTruthLoss(StudentConfig().loss, Clock(1))(golden.output, golden.batch, 0)
    judged = golden.losses["base_L0"]
    assert loss.total.item() == pytest.approx(judged, rel=golden.tolerance, abs=0)


@pytest.mark.parametrize("name", ["n2n", "v2v", "vanilla1", "vanilla2", "ground truth"])
def test_our_painn_gets_the_published_losses_and_gradient_norms(
    golden: Golden, shared: Path, name: str
) -> None:
    """The whole student: published weights in our PaiNN, published maps as our projections."""
    weights = load_file(shared / "golden" / "kd" / "batch3" / "student_state_dict.safetensors")
    constructor = {"hidden_channels": 64, "num_layers": 3, "num_rbf": 32, "cutoff": 12.0}
    model = build_model({"name": "painn", **constructor, "num_elements": 83})
    own = {key: value for key, value in weights.items() if "_mapping." not in key}
    model.load_state_dict(own)
    dtype = golden.batch.positions.dtype
    model.to(dtype)
    output = model(golden.batch)
    if name == "ground truth":
        key = "base_L0"
        loss = GroundTruthLoss(StudentConfig().loss, Clock(1))(output, golden.batch, 0)
        maps: list[Tensor] = []
    else:
        key = {
            "n2n": "_node2node_distill_loss",
            "v2v": "_vec2vec_distill_loss",
            "vanilla1": "regular",
            "vanilla2": "_per_atom_energy_distill_loss",
        }[name]
        config = apply_strategy(StudentConfig(), name, weights={name: 1.0})
        terms = bind(*config.terms, student_fields=model.field_specs()).to(dtype)
        projection = terms.get_submodule("terms.0.student_projection")
        mapping = {"n2n": "n2n_mapping.", "v2v": "v2v_mapping."}.get(name)
        if mapping:
            projection.load_state_dict(
                {k.removeprefix(mapping): v for k, v in weights.items() if k.startswith(mapping)}
            )
        maps = list(terms.parameters())
        loss = terms(output, golden.batch, 0)
    # In float32 the two codes add up in another order, and the gradient amplifies it.
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    assert loss.total.item() == pytest.approx(golden.losses[key], rel=tolerance)
    gradients = torch.autograd.grad(loss.total, [*model.parameters(), *maps], allow_unused=True)
    squares = sum(g.double().pow(2).sum().item() for g in gradients if g is not None)
    assert squares**0.5 == pytest.approx(golden.gradient_norms[key], rel=tolerance)
