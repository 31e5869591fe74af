from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.models import build_model
from kdcache.models.taps import Tap, Taps
from tests.models.cases import (
    FLOAT64,
    assert_reproduced,
    golden_case,
    make_batch,
    molecule,
    relative_error,
)


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["slab", "batch3", "molecule_nopbc_c12"])
def test_published_outputs_are_reproduced(shared: Path, case: str, dtype: torch.dtype) -> None:
    golden = golden_case(shared / "golden" / "schnet" / case, dtype)
    taps = [Tap("node", f"i{k}", f"interactions.{k}") for k in range(3)]
    with Taps(golden.model, taps) as tapped:
        output = golden.model(golden.batch)
        increments = tapped.outputs(golden.batch)
    found = {
        "energy": output.energy,
        "forward_energy": output.energy,
        "forces": output.forces,
        "forward_forces": output.forces,
        "per_atom_energy": output.atomic_energy,
        "node_feature": output.features["node"],
        **{f"interaction_{k}": increments[f"node_i{k}"] for k in range(3)},
    }
    assert_reproduced(golden, found, dtype)


@pytest.mark.proof
def test_published_intermediates_are_reproduced(shared: Path) -> None:
    golden = golden_case(shared / "golden" / "schnet" / "slab", torch.float64)
    values = np.load(shared / "specs" / "intermediates" / "schnet_slab.npz")
    paths = {
        "rbf": ("edge", "distance_expansion"),
        "h.emb": ("node", "embedding"),
        "I0.filter_before_cutoff": ("edge", "interactions.0.mlp"),
        "I0.conv_lin1": ("node", "interactions.0.conv.lin1"),
        **{f"I{k}.conv_out": ("node", f"interactions.{k}.conv") for k in range(3)},
        "readout.lin1": ("node", "lin1"),
        "readout.ssp": ("node", "act"),
        "per_atom_energy": ("node", "lin2"),
    }
    taps = [Tap(kind, f"t{k}", path) for k, (kind, path) in enumerate(paths.values())]
    with Taps(golden.model, taps) as tapped:
        golden.model(golden.batch)
        captured = tapped.outputs(golden.batch)
    ours = np.vstack([golden.batch.edge_index.numpy(), golden.batch.edge_shift.T.numpy()])
    published = np.vstack([values["graph.edge_index"], values["graph.cell_offsets"].T])
    order = np.empty(published.shape[1], dtype=int)
    order[np.lexsort(published.astype(int))] = np.lexsort(ours.astype(int))
    for name, tap in zip(paths, taps, strict=True):
        tensor = captured[tap.field][order] if tap.kind == "edge" else captured[tap.field]
        assert relative_error(tensor, torch.tensor(values[name])) < FLOAT64, name


@pytest.mark.proof
def test_published_distillation_features_are_reproduced(shared: Path) -> None:
    golden = golden_case(shared / "specs" / "variants" / "schnet_kdmap", torch.float64)
    output = golden.model(golden.batch)
    node = output.features["node"]
    found = {
        "energy": output.energy,
        "forces": output.forces,
        "per_atom_energy": output.atomic_energy,
    }
    for name, mapping in (("node_feature", "n2n"), ("e2n_or_n2e_feature", "n2e")):
        weight, bias = (golden.weights[f"{mapping}_mapping.{part}"] for part in ("weight", "bias"))
        found[name] = torch.nn.functional.linear(node, weight, bias)
    for name, expected in golden.expected.items():
        assert relative_error(found[name], expected) < FLOAT64, name


def test_initial_weights_follow_the_specification() -> None:
    model = build_model({"name": "schnet", "hidden_channels": 64, "num_interactions": 1})
    embedding = model.state_dict()["embedding.weight"]
    assert not embedding[0].any()
    assert embedding[1:].var().item() == pytest.approx(1.0, rel=0.06)
    assert not model.state_dict()["interactions.0.lin.bias"].any()


def test_every_filter_network_is_one_under_two_names() -> None:
    model = build_model({"name": "schnet", "hidden_channels": 8, "num_interactions": 2})
    batch = make_batch([molecule(4)], model.graph_rule, torch.float32)
    before = model(batch).energy.detach()
    with torch.no_grad():
        model.get_parameter("interactions.1.mlp.2.weight").add_(0.1)
    state = model.state_dict()
    assert torch.equal(
        state["interactions.1.conv.nn.2.weight"], state["interactions.1.mlp.2.weight"]
    )
    assert not torch.equal(model(batch).energy, before)
