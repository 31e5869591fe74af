"""Sizes and choices of a GemNet-OC, by the names of the published configurations.

Owns the neighbour rules that follow from them.
Invariant: cutoffs and limits that are left out take the values of the published code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from kdcache.errors import ConfigError
from kdcache.graphs import GraphRule
from kdcache.models.interface import Hyperparameters
from kdcache.models.radial import EnvelopeName, RadialName

CircularName = Literal["spherical_harmonics", "gaussian"]
SphericalName = Literal["legendre_outer", "spherical_harmonics", "gaussian_outer"]


class GemNetOCHyperparameters(Hyperparameters):
    """Sizes and choices of a GemNet-OC. Defaults suit small molecules and materials.

    Attributes:
        num_spherical: S, functions of an angle.
        num_radial: R, functions of a distance.
        num_blocks: interaction blocks.
        emb_size_atom, emb_size_edge: A and M, width of atoms' and edges' features.
        emb_size_trip_in, emb_size_trip_out: width of an edge's message before and after the sum
            over triplets, between edges and between atoms and edges.
        emb_size_quad_in, emb_size_quad_out: likewise over quadruplets.
        emb_size_aint_in, emb_size_aint_out: likewise from atom to atom.
        emb_size_rbf, emb_size_cbf, emb_size_sbf: width that radial, circular and spherical
            functions are mapped to.
        num_before_skip, num_after_skip, num_concat: residual layers of edges before and after the
            skip connection, and after the concatenation with atoms.
        num_atom: residual layers from edges to atoms, and of edges in output blocks.
        num_output_afteratom: residual layers of atoms in output blocks.
        num_atom_emb_layers: residual layers of atoms in interaction blocks.
        num_global_out_layers: residual layers over all output blocks.
        cutoff: Å, of the main graph, whose edges carry features.
        cutoff_qint, cutoff_aeaint, cutoff_aint: Å, of the graphs of quadruplets (their middle
            edge), between atoms and edges, and between atoms; None takes the cutoff, for
            cutoff_aint the largest of the others.
        max_neighbors: nearest neighbours kept per atom in the main graph, made symmetric; None
            keeps all.
        max_neighbors_qint, max_neighbors_aeaint, max_neighbors_aint: of the other graphs; None as
            for cutoffs.
        rbf: radial basis.
        rbf_spherical: the one that goes with angles; None takes rbf.
        envelope: how radial bases go to zero at their cutoff.
        envelope_exponent: of the polynomial envelope.
        cbf: basis of an angle.
        sbf: basis of a quadruplet's angles.
        scale_basis: bases are multiplied by fitted factors.
        quad_interaction, atom_edge_interaction, edge_atom_interaction, atom_interaction: which
            messages there are besides those between edges.
        qint_tags: quadruplets go through edges with an atom of these tags (1 surface, 2 adsorbate);
            where a batch has no tags, every atom counts as 2.
        direct_forces: forces from a head of their own; False takes the energy's gradient.
        forces_coupled: an edge and its reverse pull with equal magnitude.
        extensive: the energy is the sum of atomic energies; False takes their mean.
        output_init: initial weights of the two last layers.
        num_elements: elements from hydrogen on that have an embedding. Published models: 83.
        scale_factors: fitted scale factors by module, or the JSON file that `kdcache fit-scales`
            wrote, which is read at once; None leaves them unfitted, which is identity.
    """

    num_spherical: int = Field(default=7, ge=2, le=16)
    num_radial: int = Field(default=64, ge=2, le=4096)
    num_blocks: int = Field(default=3, ge=1, le=64)
    emb_size_atom: int = Field(default=128, ge=1, le=8192)
    emb_size_edge: int = Field(default=256, ge=1, le=8192)
    emb_size_trip_in: int = Field(default=64, ge=1, le=4096)
    emb_size_trip_out: int = Field(default=64, ge=1, le=4096)
    emb_size_quad_in: int = Field(default=32, ge=1, le=4096)
    emb_size_quad_out: int = Field(default=32, ge=1, le=4096)
    emb_size_aint_in: int = Field(default=64, ge=1, le=4096)
    emb_size_aint_out: int = Field(default=64, ge=1, le=4096)
    emb_size_rbf: int = Field(default=16, ge=1, le=1024)
    emb_size_cbf: int = Field(default=16, ge=1, le=1024)
    emb_size_sbf: int = Field(default=32, ge=1, le=1024)
    num_before_skip: int = Field(default=2, ge=0, le=64)
    num_after_skip: int = Field(default=2, ge=0, le=64)
    num_concat: int = Field(default=1, ge=0, le=64)
    num_atom: int = Field(default=3, ge=0, le=64)
    num_output_afteratom: int = Field(default=3, ge=0, le=64)
    num_atom_emb_layers: int = Field(default=2, ge=0, le=64)
    num_global_out_layers: int = Field(default=2, ge=0, le=64)
    cutoff: float = Field(default=6.0, gt=0.0, le=100.0)
    cutoff_qint: float | None = Field(default=None, gt=0.0, le=100.0)
    cutoff_aeaint: float | None = Field(default=None, gt=0.0, le=100.0)
    cutoff_aint: float | None = Field(default=None, gt=0.0, le=100.0)
    max_neighbors: int | None = Field(default=30, ge=1)
    max_neighbors_qint: int | None = Field(default=8, ge=1)
    max_neighbors_aeaint: int | None = Field(default=20, ge=1)
    max_neighbors_aint: int | None = Field(default=1000, ge=1)
    rbf: RadialName = "gaussian"
    rbf_spherical: RadialName | None = None
    envelope: EnvelopeName = "polynomial"
    envelope_exponent: int = Field(default=5, ge=3, le=32)
    cbf: CircularName = "spherical_harmonics"
    sbf: SphericalName = "legendre_outer"
    scale_basis: bool = False
    quad_interaction: bool = True
    atom_edge_interaction: bool = True
    edge_atom_interaction: bool = True
    atom_interaction: bool = True
    qint_tags: tuple[int, ...] = (1, 2)
    direct_forces: bool = True
    forces_coupled: bool = False
    extensive: bool = True
    output_init: Literal["he_orthogonal", "zeros"] = "he_orthogonal"
    num_elements: int = Field(default=100, ge=1, le=118)
    scale_factors: dict[str, float] | None = None

    @field_validator("scale_factors", mode="before")
    @classmethod
    def _file_is_read(cls, value: object) -> object:
        # The values are kept, not the path: a checkpoint must not need the file again.
        return read_scale_factors(value) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _bernstein_is_finite(self) -> Self:
        if "bernstein" in (self.rbf, self.rbf_spherical) and self.num_radial > 128:
            # The binomial coefficients leave float32 at 130.
            raise ValueError(f"num_radial is {self.num_radial}, and bernstein takes at most 128")
        return self

    @model_validator(mode="after")
    def _atoms_see_farthest(self) -> Self:
        if not self.atom_interaction:
            return self
        widest = self.atom_graph
        for name, rule in (("", self.main_graph), ("_qint", self.quad_graph),
                           ("_aeaint", self.atom_edge_graph)):  # fmt: skip
            # The published code cuts the other graphs out of this one.
            if rule.cutoff > widest.cutoff:
                raise ValueError(
                    f"cutoff{name} is {rule.cutoff} and cutoff_aint {widest.cutoff}, which must "
                    "be the largest"
                )
        return self

    @property
    def main_graph(self) -> GraphRule:
        """Rule of the graph whose edges carry features."""
        return GraphRule(self.cutoff, self.max_neighbors, self.max_neighbors is not None)

    @property
    def quad_graph(self) -> GraphRule:
        """Rule of the middle edges of quadruplets, before the choice by tags."""
        if not self.quad_interaction:
            return GraphRule(self.cutoff, self.max_neighbors)
        return self._rule(self.cutoff_qint, self.max_neighbors_qint)

    @property
    def atom_edge_graph(self) -> GraphRule:
        """Rule of the edges between which atoms and main edges exchange messages."""
        if not (self.atom_edge_interaction or self.edge_atom_interaction):
            return GraphRule(self.cutoff, self.max_neighbors)
        return self._rule(self.cutoff_aeaint, self.max_neighbors_aeaint)

    @property
    def atom_graph(self) -> GraphRule:
        """Rule of the messages from atom to atom."""
        others = (self.main_graph, self.quad_graph, self.atom_edge_graph)
        cutoff = self.cutoff_aint if self.atom_interaction else None
        if cutoff is None:
            cutoff = max(rule.cutoff for rule in others)
        limit = self.max_neighbors_aint if self.atom_interaction else None
        if limit is None:
            limits = [rule.max_neighbors for rule in others if rule.max_neighbors is not None]
            limit = max(limits) if len(limits) == len(others) else None
        return GraphRule(cutoff, limit)

    def _rule(self, cutoff: float | None, limit: int | None) -> GraphRule:
        return GraphRule(
            self.cutoff if cutoff is None else cutoff,
            self.max_neighbors if limit is None else limit,
        )


def read_scale_factors(path: str | Path) -> dict[str, float]:
    """Fitted scale factors from a JSON file of module names and numbers; a comment is ignored.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"scale factors {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"scale factors {path} are no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"scale factors {path} hold a {type(values).__name__}, not numbers by module name. "
            "Give the file that kdcache fit-scales wrote."
        )
    values.pop("comment", None)
    factors = {}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"scale factors {path}: {name} is {value!r}, not a number.")
        factors[name.removesuffix(".scale_factor")] = float(value)
    return factors
