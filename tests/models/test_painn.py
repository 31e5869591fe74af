from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.models import build_model
from kdcache.models.painn import PaiNN
from kdcache.models.taps import Tap, Taps
from kdcache.structures import Batch
from tests.models.cases import (
    FLOAT64,
    Golden,
    assert_reproduced,
    crystal,
    golden_case,
    make_batch,
    molecule,
    relative_error,
)


def layer_states(golden: Golden) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scalars and vectors after message (M1, M2, …) and update (U1, …) layers, scaled."""
    n_layers = len(golden.model.message_layers)
    taps = []
    for i in range(n_layers):
        taps += [
            Tap("node", f"m{i + 1}", f"message_layers.{i}"),
            Tap("vector", f"m{i + 1}", f"message_layers.{i}"),
            Tap("node", f"u{i + 1}", f"upd_out_scalar_scale_{i}"),
            Tap("vector", f"u{i + 1}", f"update_layers.{i}"),
            Tap("node", f"unscaled{i + 1}", f"update_layers.{i}"),
        ]
    with Taps(golden.model, taps) as tapped:
        golden.model(golden.batch)
        found = tapped.outputs(golden.batch)
    scalars = {k.removeprefix("node_"): v.detach() for k, v in found.items() if k[0] == "n"}
    vectors = {k.removeprefix("vector_"): v.detach() for k, v in found.items() if k[0] == "v"}
    return scalars, vectors


def layer_increments(golden: Golden) -> dict[str, Tensor]:
    """What each layer adds, by the names of the golden files."""
    scalars, vectors = layer_states(golden)
    x = golden.model.atom_emb(golden.batch.atomic_numbers).detach()
    vector = torch.zeros_like(vectors["m1"])
    increments = {}
    for i in range(len(golden.model.message_layers)):
        increments[f"msg_dx_{i}"] = scalars[f"m{i + 1}"] * math.sqrt(2.0) - x
        increments[f"msg_dvec_{i}"] = vectors[f"m{i + 1}"] - vector
        increments[f"upd_dx_{i}"] = scalars[f"unscaled{i + 1}"] - scalars[f"m{i + 1}"]
        increments[f"upd_dvec_{i}"] = vectors[f"u{i + 1}"] - vectors[f"m{i + 1}"]
        x, vector = scalars[f"u{i + 1}"], vectors[f"u{i + 1}"]
    return increments


def edge_features(batch: Batch, vector: Tensor) -> Tensor:
    source, target = batch.edge_index
    return (vector[source] * vector[target]).sum(1)


def published_edge_order(golden: Golden) -> Tensor:
    """Our edge row of each published one, matched by source, target and shift."""
    graph = np.load(golden.directory / "graph_float64.npz")
    published = np.vstack([graph["edge_index"], graph["cell_offsets"].T.astype(int)])
    ours = np.vstack([golden.batch.edge_index.numpy(), golden.batch.edge_shift.T.numpy()])
    order = np.empty(published.shape[1], dtype=int)
    order[np.lexsort(published)] = np.lexsort(ours.astype(int))
    return torch.tensor(order)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["slab", "batch3", "molecule"])
def test_published_outputs_are_reproduced(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = golden_case(shared / "golden" / "painn" / case, dtype)
    output = golden.model(golden.batch)
    vector = output.features["vector"]
    found = {
        "energy": output.energy,
        "forces": output.forces,
        "forward_energy": output.energy,
        "forward_forces": output.forces,
        "per_atom_energy": output.atomic_energy,
        "node_feature": output.features["node"],
        "vector_feature": vector,
        "edge_feature": edge_features(golden.batch, vector)[published_edge_order(golden)],
        **layer_increments(golden),
    }
    assert_reproduced(golden, found, dtype)


@pytest.mark.proof
def test_published_intermediates_are_reproduced(shared: Path) -> None:
    golden = golden_case(shared / "golden" / "painn" / "slab", torch.float64)
    values = np.load(shared / "specs" / "intermediates" / "painn_slab.npz")
    order = published_edge_order(golden)
    model = golden.model
    assert isinstance(model, PaiNN)
    pieces = model._edge_inputs(golden.batch)
    direction = torch.cat([piece.direction for piece in pieces], dim=1)
    unit = direction[..., 0].T * math.sqrt(model.hyperparameters.hidden_channels)
    scalars, vectors = layer_states(golden)
    blocks = "out_forces.output_network"
    paths = {
        "L0.msg.layernorm": ("node", "message_layers.0.x_layernorm"),
        "L0.msg.xh": ("node", "message_layers.0.x_proj"),
        "L0.msg.rbfh": ("edge", "message_layers.0.rbf_proj"),
        "L0.upd.xvec_proj": ("node", "update_layers.0.xvec_proj"),
        "x.emb": ("node", "atom_emb"),
        **{f"head.block{k}.update_net": ("node", f"{blocks}.{k}.update_net") for k in (0, 1)},
        **{f"head.block{k}.x_out": ("node", f"{blocks}.{k}") for k in (0, 1)},
        **{f"head.block{k}.v_out": ("vector", f"{blocks}.{k}") for k in (0, 1)},
    }
    taps = [Tap(kind, f"t{k}", path) for k, (kind, path) in enumerate(paths.values())]
    with Taps(model, taps) as tapped:
        output = model(golden.batch)
        captured = tapped.outputs(golden.batch)
    found = {name: captured[tap.field] for name, tap in zip(paths, taps, strict=True)}
    found["L0.msg.rbfh"] = found["L0.msg.rbfh"][order]
    found["rbf"] = torch.cat([piece.radial for piece in pieces])[order]
    found["graph.vector"] = unit[order]
    for i in range(3):
        found[f"L{i}.x_after_message"] = scalars[f"m{i + 1}"]
        found[f"L{i}.x_after_update"] = scalars[f"u{i + 1}"]
        found[f"L{i}.vec_after_message"] = vectors[f"m{i + 1}"]
        found[f"L{i}.vec_after_update"] = vectors[f"u{i + 1}"]
    found["per_atom_energy"] = output.atomic_energy
    for name, tensor in found.items():
        # The filters were kept in float32.
        limit = 2e-7 if values[name].dtype == np.float32 else FLOAT64
        assert relative_error(tensor, torch.tensor(values[name])) < limit, name


@pytest.mark.proof
def test_layer_codes_and_other_bases_reproduce_the_published_distillation_features(
    shared: Path,
) -> None:
    golden = golden_case(shared / "specs" / "variants" / "painn_codes_bessel", torch.float64)
    scalars, vectors = layer_states(golden)
    codes = ("m1", "u1", "m3", "u3")  # U3_m1_U1_M3, sorted by layer, message first
    node = torch.cat([scalars[code] for code in codes], dim=-1)
    vector = torch.cat([vectors[code] for code in codes], dim=-1)
    edge = edge_features(golden.batch, vector)

    def mapped(name: str, feature: Tensor) -> Tensor:
        bias = golden.weights.get(f"{name}_mapping.bias")
        return torch.nn.functional.linear(feature, golden.weights[f"{name}_mapping.weight"], bias)

    output = golden.model(golden.batch)
    found = {
        "node_feature": mapped("n2n", node),
        "e2n_or_n2e_feature": mapped("n2e", node),
        "vector_feature": mapped("v2v", vector),
        "energy": output.energy,
        "forces": output.forces,
        "per_atom_energy": output.atomic_energy,
    }
    for name, tensor in found.items():
        assert relative_error(tensor, golden.expected[name]) < FLOAT64, name
    # Edges of this case are published without shifts: compare them as a set of rows.
    rows = [
        torch.sort(t[:, 0]).values for t in (mapped("e2e", edge), golden.expected["edge_feature"])
    ]
    assert relative_error(rows[0], rows[1]) < FLOAT64


def test_zero_scale_factor_is_identity_and_others_multiply() -> None:
    model = build_model({"name": "painn", "hidden_channels": 8, "num_layers": 1})
    batch = make_batch([molecule(4)], model.graph_rule, torch.float32)
    plain = model(batch).features["node"]
    scale = model.state_dict()["upd_out_scalar_scale_0.scale_factor"]
    assert scale.shape == ()
    assert scale == 0.0
    scale.fill_(1.0)
    assert torch.equal(model(batch).features["node"], plain)
    scale.fill_(0.5)
    assert torch.equal(model(batch).features["node"], 0.5 * plain)


def test_initial_weights_follow_the_specification() -> None:
    model = build_model({"name": "painn", "hidden_channels": 64, "num_layers": 2})
    state = model.state_dict()
    embedding = state["atom_emb.embeddings.weight"]
    assert embedding.abs().max() <= math.sqrt(3.0)
    assert embedding.var().item() == pytest.approx(1.0, rel=0.05)
    weight = state["update_layers.1.xvec_proj.2.weight"]
    bound = math.sqrt(6.0 / sum(weight.shape))
    assert 0.99 * bound < weight.abs().max() <= bound
    biases = [t for name, t in state.items() if name.endswith("bias")]
    assert len(biases) > 10
    assert not any(bias.any() for bias in biases)
    assert (state["message_layers.0.x_layernorm.weight"] == 1).all()


def test_forward_pass_compiles_as_one_graph_for_all_sizes() -> None:
    model = build_model({"name": "painn", "hidden_channels": 8, "num_layers": 2, "num_rbf": 4})
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=True)
    # Not two structures at first: torch would take their number for the two rows of edge_index.
    for structures in (
        [molecule(5)] * 4,
        [molecule(6), molecule(4), crystal(), molecule(1), molecule(7)],
        [molecule(3), molecule(8)],
        [crystal(), molecule(2), molecule(9)],
        [molecule(4)] * 7,
    ):
        batch = make_batch(structures, model.graph_rule, torch.float32)
        found, expected = compiled(batch), model(batch)
        torch.testing.assert_close(found.forces, expected.forces)
        torch.testing.assert_close(found.energy, expected.energy)
    assert len(graphs) == 1
