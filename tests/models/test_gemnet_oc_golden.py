"""GemNet-OC against outputs, graphs and state dicts of the published code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.models import Model, build_model
from kdcache.models.gemnet_oc import GemNetOC
from kdcache.models.geometry import edge_vectors
from kdcache.models.taps import Tap, Taps
from kdcache.structures import Batch, Graph
from tests.models.cases import (
    FLOAT64,
    Golden,
    assert_reproduced,
    golden_case,
    relative_error,
)

PUBLISHED_GRAPHS = {"a2a": "a2a_graph", "aeaint": "a2ee2a_graph", "qint": "qint_graph"}


def with_published_graphs(golden: Golden) -> Batch:
    """The case's batch with the graphs, and the order of edges, of the published code."""
    graph = np.load(golden.directory / "graph_float64.npz")
    dtype = golden.batch.positions.dtype

    def read(name: str) -> Graph:
        # Offsets there are of the target's image, ours of the source's.
        shift = -graph[f"{name}.cell_offset"]
        return Graph(torch.tensor(graph[f"{name}.edge_index"]), torch.tensor(shift).to(dtype))

    main = read("main_graph")
    return replace(
        golden.batch,
        edge_index=main.edge_index,
        edge_shift=main.edge_shift,
        graphs={ours: read(theirs) for ours, theirs in PUBLISHED_GRAPHS.items()},
    )


def block_states(model: Model, batch: Batch) -> dict[str, Tensor]:
    """Features of every block by the names of the golden files, through taps."""
    taps = [Tap("node", "h0", "atom_emb"), Tap("edge", "m0", "edge_emb")]
    names = ["block_h_0", "block_m_0"]
    for k in range(len(model.out_blocks)):
        taps += [
            Tap("node", f"e{k}", f"out_blocks.{k}.x_E"),
            Tap("edge", f"f{k}", f"out_blocks.{k}.x_F"),
        ]
        names += [f"out_xE_{k}", f"out_xF_{k}"]
    for k in range(len(model.int_blocks)):
        taps += [
            Tap("node", f"h{k + 1}", f"int_blocks.{k}.h"),
            Tap("edge", f"m{k + 1}", f"int_blocks.{k}.m"),
        ]
        names += [f"block_h_{k + 1}", f"block_m_{k + 1}"]
    with Taps(model, taps) as tapped, torch.no_grad():
        model(batch)
        found = tapped.outputs(batch)
    return {name: found[tap.field] for name, tap in zip(names, taps, strict=True)}


def edge_keys(graph: Graph) -> set[tuple[int, ...]]:
    rows = torch.cat([graph.edge_index.T, graph.edge_shift.round().long()], dim=1)
    return {tuple(row) for row in rows.tolist()}


def reduced(batch: Batch, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Edge features summed into atoms, plain and times unit vectors (the paper's Eqs. 5 and 6)."""
    vector = torch.nn.functional.normalize(edge_vectors(batch), dim=-1)
    target = batch.edge_index[1]
    plain = edge.new_zeros(batch.n_atoms, edge.shape[1]).index_add(0, target, edge)
    turning = edge.new_zeros(batch.n_atoms, 3, edge.shape[1])
    return plain, turning.index_add(0, target, vector.unsqueeze(-1) * edge.unsqueeze(1))


@pytest.mark.proof
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["molecule", "batch3", "slab"])
def test_published_outputs_are_reproduced_in_the_published_order_of_edges(
    shared: Path, case: str, dtype: torch.dtype
) -> None:
    golden = golden_case(shared / "golden" / "gemnet_oc" / case, dtype)
    batch = with_published_graphs(golden)
    with torch.no_grad():
        output = golden.model(batch)
    edge = output.features["edge"]
    to_node, to_vector = reduced(batch, edge)
    found = {
        "energy": output.energy,
        "forces": output.forces,
        "forward_energy": output.energy,
        "forward_forces": output.forces,
        "per_atom_energy": output.atomic_energy,
        "node_feature": output.features["node"],
        "edge_feature": edge,
        "e2n_feature": to_node,
        # The published vectors point from source to target, ours, as the paper's, the other way.
        "vector_feature": -to_vector,
        **block_states(golden.model, batch),
    }
    assert_reproduced(golden, found, dtype)


@pytest.mark.proof
@pytest.mark.parametrize("case", ["molecule", "batch3", "slab"])
def test_our_search_finds_the_published_graphs(shared: Path, case: str) -> None:
    golden = golden_case(shared / "golden" / "gemnet_oc" / case, torch.float64)
    published = with_published_graphs(golden)
    ours = golden.batch
    assert edge_keys(Graph(ours.edge_index, ours.edge_shift)) == edge_keys(
        Graph(published.edge_index, published.edge_shift)
    )
    for name in ("a2a", "aeaint"):
        assert edge_keys(ours.graphs[name]) == edge_keys(published.graphs[name])
    assert isinstance(golden.model, GemNetOC)
    middle = golden.model._middle_edges(ours)
    chosen = Graph(torch.stack([middle.source, middle.target]), middle.shift)
    assert edge_keys(chosen) == edge_keys(published.graphs["qint"])
    with torch.no_grad():
        output = golden.model(ours)
    for name, tensor in (
        ("energy", output.energy),
        ("forces", output.forces),
        ("node_feature", output.features["node"]),
    ):
        assert relative_error(tensor, golden.expected[name]) < FLOAT64, name


@pytest.mark.proof
@pytest.mark.parametrize("case", ["gem_bessel_noquad", "gem_cutoffs_sph"])
def test_other_options_reproduce_the_published_code(shared: Path, case: str) -> None:
    golden = golden_case(shared / "specs" / "variants" / case, torch.float64)
    outputs = np.load(golden.directory / "outputs_float64.npz")
    batch = golden.batch
    published = Graph(torch.tensor(outputs["edge_index"]), torch.tensor(-outputs["cell_offsets"]))
    assert edge_keys(published) == edge_keys(Graph(batch.edge_index, batch.edge_shift))
    batch = replace(batch, edge_index=published.edge_index, edge_shift=published.edge_shift)
    with torch.no_grad():
        output = golden.model(batch)
    states = block_states(golden.model, batch)
    code_is_x1 = case == "gem_bessel_noquad"
    node = states["out_xE_1"] if code_is_x1 else output.features["node"]
    edge = states["out_xF_1"] if code_is_x1 else output.features["edge"]
    to_node, to_vector = reduced(batch, edge)
    atomic_energy = output.atomic_energy
    if not golden.model.hyperparameters.extensive:
        # Published before the mean, so that they do not sum to the energy.
        n_atoms = torch.bincount(batch.structure_index)
        atomic_energy = atomic_energy * n_atoms[batch.structure_index]
    found = {
        "energy": output.energy,
        "forces": output.forces,
        "per_atom_energy": atomic_energy,
        "node_feature": node,
        "edge_feature": edge,
        "e2n_or_n2e_feature": to_node,
        "vector_feature": -to_vector,
    }
    for name, tensor in found.items():
        assert relative_error(tensor, golden.expected[name]) < FLOAT64, name


@pytest.mark.proof
@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gemnet-oc-oc20", "gemnet_oc__oc20"),
        ("gemnet-oc-small-oc20", "gemnet_oc_small__oc20"),
        ("gemnet-oc-coll", "gemnet_oc__coll"),
    ],
)
def test_names_shapes_and_ties_at_the_papers_sizes_are_the_published_ones(
    shared: Path, preset: str, published: str
) -> None:
    with torch.device("meta"):  # no numbers are needed
        model = build_model({"name": preset})
    state = model.state_dict(keep_vars=True)
    listed = json.loads((shared / "golden" / "keys" / "main" / f"{published}.json").read_text())
    assert {name: list(t.shape) for name, t in state.items()} == {
        name: entry["shape"] for name, entry in listed["keys"].items()
    }
    for names in listed["tied_keys"]:
        assert len({id(state[name]) for name in names}) == 1, names
    assert sum(p.numel() for p in model.parameters()) == listed["num_trainable"]
    branch = shared / "golden" / "keys" / "distill_branch" / f"{published}.json"
    factors = set(state) - set(json.loads(branch.read_text())["keys"])
    assert factors == {f"{name}.scale_factor" for name in model.scale_modules()}
