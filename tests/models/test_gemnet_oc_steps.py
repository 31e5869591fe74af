"""GemNet-OC step by step: paths, angles, bases and layers against tensors of the published code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.models.gemnet_oc import GemNetOC
from kdcache.models.gemnet_oc.bases import SphericalBasis
from kdcache.models.gemnet_oc.blocks import BlockInputs
from kdcache.models.gemnet_oc.inputs import Edges
from kdcache.models.gemnet_oc.mixing import QuadrupletAngles
from kdcache.models.taps import Tap, Taps
from kdcache.structures import Batch, Graph
from tests.models.cases import golden_case, relative_error
from tests.models.test_gemnet_oc_golden import with_published_graphs

FLOAT64 = 1e-9
# What was kept in float32.
ROUNDED = 2e-7
Y1 = math.sqrt(3.0 / (4.0 * math.pi))  # Y_10 is this times the cosine


class Steps:
    """A golden case, in the published order of edges, with what our model makes on the way."""

    def __init__(self, shared: Path, case: str) -> None:
        golden = golden_case(shared / "golden" / "gemnet_oc" / case, torch.float64)
        assert isinstance(golden.model, GemNetOC)
        self.model: GemNetOC = golden.model
        self.batch: Batch = with_published_graphs(golden)
        self.published = np.load(shared / "specs" / "intermediates" / f"gemnet_oc_{case}.npz")
        with torch.no_grad():
            self.main = Edges.of(self.batch, Graph(self.batch.edge_index, self.batch.edge_shift))
            self.between = self.model._further(self.batch, "aeaint")
            self.middle = self.model._middle_edges(self.batch)
            self.radial = self.model.radial_basis(self.main.distance)
            self.inputs: BlockInputs = self.model.block_inputs(self.batch, self.main, self.radial)
        assert self.inputs.quadruplets is not None
        self.angles: QuadrupletAngles = self.inputs.quadruplets.angles

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.published[name])

    def agrees(self, name: str, found: Tensor) -> None:
        """The first rows of `found`, as many as were kept, are the published ones."""
        expected = self[name]
        limit = ROUNDED if expected.dtype == torch.float32 else FLOAT64
        assert relative_error(found[: len(expected)], expected) < limit, name


@pytest.fixture(params=["molecule", "slab"])
def steps(shared: Path, request: pytest.FixtureRequest) -> Steps:
    return Steps(shared, request.param)


def triplet_modules(steps: Steps) -> Iterator[tuple[str, Edges, Edges, Any]]:
    model, main, between = steps.model, steps.main, steps.between
    yield "e2e", main, main, model.cbf_basis_tint
    yield "a2e", between, main, model.cbf_basis_aeint
    yield "e2a", main, between, model.cbf_basis_eaint


@pytest.mark.proof
def test_triplets_are_the_published_set_with_the_published_angles(steps: Steps) -> None:
    for name, inner, outer, basis in triplet_modules(steps):
        mask, functions = steps.model._triplets(inner, outer, basis)
        out, slot = mask.nonzero().unbind(1)
        ingoing = inner.slots.edge[outer.target[out], slot]
        found = set(zip(out.tolist(), ingoing.tolist(), strict=True))
        out, ingoing = steps[f"trip.{name}.out"], steps[f"trip.{name}.in"]
        assert len(found) == int(mask.sum())
        assert found == set(zip(out.tolist(), ingoing.tolist(), strict=True)), name
        here = functions[out, inner.slots.slot[ingoing]]
        steps.agrees(f"raw.{name}.cir", here)
        steps.agrees(f"angle.{name}.cosphi", here[:, 1] / Y1)


@pytest.mark.proof
def test_quadruplets_are_the_published_set_with_the_published_angles(steps: Steps) -> None:
    paths, slots, source = steps.angles.paths, steps.main.slots, steps.middle.source
    target = steps.middle.target
    for name, mask, atom, main_edge, middle_edge in (
        ("triplet_in", paths.inner, source, "in", "out"),
        ("triplet_out", paths.outer, target, "out", "in"),
    ):
        middle, slot = mask.nonzero().unbind(1)
        edges = slots.edge[atom[middle], slot]
        expected = (steps[f"quad.{name}.{middle_edge}"], steps[f"quad.{name}.{main_edge}"])
        assert set(zip(middle.tolist(), edges.tolist(), strict=True)) == set(
            zip(*(t.tolist() for t in expected), strict=True)
        ), name
    through = steps["quad.triplet_in.out"][steps["quad.trip_in_to_quad"]]
    inner = steps["quad.triplet_in.in"][steps["quad.trip_in_to_quad"]]
    outer = steps["quad.triplet_out.out"][steps["quad.trip_out_to_quad"]]
    partners = paths.partners(slots.edge, source)
    assert int(partners.sum()) == len(through)
    assert partners[through, slots.slot[outer], slots.slot[inner]].all()

    # Each published quadruplet is one of ours: compare where they stand.
    at_outer, at_inner = (through, slots.slot[outer]), (through, slots.slot[inner])
    steps.agrees("angle.qint.cosphi_cab_per_quad", steps.angles.outer_cosine[at_outer])
    (a, b), (c, d) = steps.angles.outer_azimuth, steps.angles.inner_azimuth
    cosine = a[at_outer] * c[at_inner] + b[at_outer] * d[at_inner]
    kept = steps["angle.qint.dihedral_per_quad"]
    assert relative_error(cosine[: len(kept)], torch.cos(kept)) < FLOAT64
    sine = b[at_outer] * c[at_inner] - a[at_outer] * d[at_inner]
    polar = steps.angles.outer_cosine[at_outer]
    functions = spherical_functions(steps.model.sbf_basis_qint, polar, cosine, sine)
    steps.agrees("raw.sbf.sph", functions)
    of_inner = (steps["quad.triplet_in.out"], slots.slot[steps["quad.triplet_in.in"]])
    steps.agrees("angle.qint_abd.cosphi", steps.angles.inner_cosine[of_inner])
    quad = steps.inputs.quadruplets
    assert quad is not None
    steps.agrees("basis.qint.cir", quad.circular[of_inner].detach())
    counts = torch.bincount(
        through * slots.width + slots.slot[inner], minlength=paths.inner.numel()
    )
    assert torch.equal(quad.times(), counts)


@pytest.mark.proof
def test_bases_and_their_embeddings_are_the_published_ones(steps: Steps) -> None:
    model, inputs = steps.model, steps.inputs
    assert torch.equal(inputs.reverse, steps["graph.id_swap"])
    assert inputs.atom_to_edge is not None
    assert inputs.edge_to_atom is not None
    assert inputs.quadruplets is not None
    assert inputs.pairs is not None
    with torch.no_grad():
        between = model.radial_basis_aeaint(steps.between.distance)
        a2a = model._further(steps.batch, "a2a")
        found = {
            "raw.radial_basis": steps.radial,
            "raw.radial_basis_aeaint": between,
            "raw.radial_basis_aint": model.radial_basis_aint(a2a.distance),
            "raw.qint_abd.rad": model.cbf_basis_qint.radial_basis(steps.middle.distance),
            "basis.e2e.rad": inputs.edge_to_edge.radial,
            "basis.a2e.rad": inputs.atom_to_edge.radial,
            "basis.e2a.rad": inputs.edge_to_atom.radial,
            "basis.qint.rad": inputs.quadruplets.radial,
            "basis.atom_update": inputs.radial_atom,
            "basis.output": inputs.radial_out,
            "basis.e2e.cir_rad_W1": model.mlp_cbf_tint(steps.radial),
            "basis.a2e.cir_rad_W1": model.mlp_cbf_aeint(steps.radial),
            "basis.qint.sph_rad_W1": model.mlp_sbf_qint(steps.radial),
        }
        for name, tensor in found.items():
            steps.agrees(name, tensor)
        # Ours take the images of a neighbour together: compare what does not tell them apart.
        sums = inputs.pairs.weights.sum(-1)
        assert relative_error(sums, steps["basis.a2a.rad_padded"].sum(-1)) < FLOAT64
        counts = torch.bincount(a2a.source, minlength=steps.batch.n_atoms)
        assert torch.equal(inputs.pairs.times(), counts)
        for name, mixing in (
            ("e2e", inputs.edge_to_edge.mixing),
            ("a2e", inputs.atom_to_edge.mixing),
            ("e2a", inputs.edge_to_atom.mixing),
        ):
            counts = torch.bincount(steps[f"trip.{name}.in"], minlength=len(mixing.inner.slot))
            assert torch.equal(mixing.times(), counts)


@pytest.mark.proof
def test_layers_are_the_published_ones(steps: Steps) -> None:
    block = "int_blocks.0"
    paths = {
        "h.0": ("node", "atom_emb"),
        "m.0": ("edge", "edge_emb"),
        "out0.after_scale_sum": ("node", "out_blocks.0.scale_sum"),
        "int0.e2e.5_after_scale_cbf_sum": ("edge", f"{block}.trip_interaction"),
        "int0.quad.6_after_scale_sbf_sum": ("edge", f"{block}.quad_interaction"),
        "int0.a2e.1_dense_ba": ("node", f"{block}.atom_edge_interaction.dense_ba"),
        "int0.a2e.5_after_scale_cbf_sum": ("edge", f"{block}.atom_edge_interaction"),
        "int0.e2a.5_after_scale_cbf_sum": ("node", f"{block}.edge_atom_interaction.scale_cbf_sum"),
        "int0.e2a.8_out": ("node", f"{block}.edge_atom_interaction"),
        "int0.a2a.1_down": ("node", f"{block}.atom_interaction.down_projection"),
        "int0.a2a.3_after_scale_rbf_sum": ("node", f"{block}.atom_interaction.scale_rbf_sum"),
        "int0.a2a.4_out": ("node", f"{block}.atom_interaction"),
        "int0.atom_update.after_scale_sum": ("node", f"{block}.atom_update.scale_sum"),
        "int0.atom_update.out": ("node", f"{block}.atom_update"),
        "final.x_E": ("node", "out_mlp_E"),
        "final.x_F": ("edge", "out_mlp_F"),
        "final.per_atom_energy": ("node", "out_energy"),
        "final.F_st": ("edge", "out_forces"),
    }
    for k in range(3):
        paths[f"out{k}.x_E"] = ("node", f"out_blocks.{k}.x_E")
        paths[f"out{k}.x_F"] = ("edge", f"out_blocks.{k}.x_F")
    for k in range(2):
        paths[f"h.{k + 1}"] = ("node", f"int_blocks.{k}.h")
        paths[f"m.{k + 1}"] = ("edge", f"int_blocks.{k}.m")
    taps = [Tap(kind, f"t{i}", path) for i, (kind, path) in enumerate(paths.values())]  # type: ignore[arg-type]
    with Taps(steps.model, taps) as tapped, torch.no_grad():
        steps.model(steps.batch)
        captured = tapped.outputs(steps.batch)
    for name, tap in zip(paths, taps, strict=True):
        steps.agrees(name, captured[tap.field])


def spherical_functions(
    basis: SphericalBasis, polar: Tensor, cosine: Tensor, sine: Tensor
) -> Tensor:
    """[n, S²], all functions of each of n pairs of angles, by the cosine of φ and by θ."""
    first = basis.polar(polar)
    second = basis.dihedral(cosine, sine).T
    if basis.columns is None:
        return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(1)
    return first * second[:, basis.columns]


def test_spherical_harmonics_are_orthonormal() -> None:
    # Gauss-Legendre in cos φ, equidistant in θ: exact for these degrees. On half the circle, which
    # is all a dihedral has, sines and cosines are not orthogonal: take each with its own kind.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    theta = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    polar = torch.tensor(nodes)[:, None].expand(8, 16).flatten()
    cosine, sine = torch.cos(theta).repeat(8), torch.sin(theta).repeat(8)
    basis = SphericalBasis(4, "spherical_harmonics", torch.nn.Identity(), scaled=False)
    values = spherical_functions(basis, polar, cosine, sine)
    weight = (torch.tensor(weights)[:, None] * (2 * math.pi / 16)).expand(8, 16).flatten()
    gram = values.T @ (weight[:, None] * values)
    orders = [m for degree in range(4) for m in [*range(degree + 1), *range(-degree, 0)]]
    signs = torch.tensor([m >= 0 for m in orders])
    for kind in (signs, ~signs):
        expected = torch.eye(int(kind.sum()), dtype=torch.float64)
        torch.testing.assert_close(gram[kind][:, kind], expected, atol=1e-12, rtol=0)
    # l = 1 in the order m = 0, 1, -1: z, x, |y|.
    flat = (1.0 - polar.square()).sqrt()
    cartesian = torch.stack([polar, flat * cosine, flat * sine.abs()], dim=-1)
    torch.testing.assert_close(values[:, 1:4], Y1 * cartesian)
