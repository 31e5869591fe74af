"""What computed fields must satisfy, whatever computes them.

Owns the comparisons and their wording; what a teacher or a model promises beside its fields is
`checks`'. Invariant: values are compared without their references, which would hide any error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import ContractError
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.stream.window import collate, reference_table
from kdcache.structures import Batch, FloatArray, Structure

Compute = Callable[[Batch], Mapping[str, Tensor]]

# Rounding of a small model in float32 and float64, relative to a field's largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
# A turn about no special axis, so that no component stays where it was.
_AXIS, _ANGLE = np.array([2.0, -1.0, 2.0]) / 3.0, 1.1


def require(kept: bool, broken: str, value: object) -> None:
    """Raise ContractError with what is broken and the value that shows it, unless it is kept."""
    if not kept:
        raise ContractError(f"{broken} {value}")


@dataclass(frozen=True)
class FieldCheck:
    """Something that computes fields of a batch, and how exactly they must agree.

    Attributes:
        compute: fields of a batch by name.
        specs: what they must be, by name.
        rule: neighbours that batches are made with.
        dtype: floating dtype of the computation.
        device: where batches are put.
        references: eV by atomic number, taken off energies before they are compared.
        tolerance: relative to a field's largest value.
    """

    compute: Compute
    specs: Mapping[str, FieldSpec]
    rule: GraphRule
    further: Mapping[str, GraphRule]
    dtype: torch.dtype
    device: str
    references: Mapping[int, float]
    tolerance: float

    def check(self, structures: list[Structure]) -> None:
        """Everything that holds for a structure wherever and beside whatever it stands.

        Raises:
            ContractError: the first thing that does not.
        """
        structures = [*structures, *_lonely(structures[0], self.rule.cutoff)]
        whole = self.run(structures)
        self.compare(whole, self.run(structures), "computed a second time")
        parts = [self.run([structure]) for structure in structures]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in self.specs}
        self.compare(whole, joined, "computed one structure at a time")
        shift = np.array([1.7, -0.9, 2.3])
        moved = [replace(s, positions=s.positions + shift) for s in structures]
        self.compare(whole, self.run(moved), "after a translation")
        turn = _rotation()
        turned = [
            replace(s, positions=s.positions @ turn.T, cell=s.cell @ turn.T) for s in structures
        ]
        expected = {
            name: np.einsum("ij,nj...->ni...", turn, values)
            if self.specs[name].symmetry == "vector"
            else values
            for name, values in whole.items()
        }
        self.compare(expected, self.run(turned), "after a rotation")
        self.check_permutation(structures, whole)
        self.check_sums(structures, whole)

    def run(self, structures: list[Structure]) -> dict[str, FloatArray]:
        """Fields of a batch without their references, after what one call must satisfy."""
        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        batch = collate(structures, self.rule, dtype, further=self.further).to(self.device)
        before = {f.name: getattr(batch, f.name) for f in fields(batch)}
        copies = {k: v.clone() for k, v in before.items() if isinstance(v, Tensor)}
        found = self.compute(batch)
        for name, copy in copies.items():
            now = getattr(batch, name)
            require(
                now is before[name] and torch.equal(now.nan_to_num(), copy.nan_to_num()),
                "compute changed the batch it was given:",
                name,
            )
        require(
            set(found) == set(self.specs),
            f"field_specs names {sorted(self.specs)}, computed were",
            sorted(found),
        )
        rows = {"structure": batch.n_structures, "atom": batch.n_atoms, "edge": batch.n_edges}
        values = {}
        for name, spec in self.specs.items():
            tensor = found[name].detach().cpu()
            shape = (rows[spec.level], *spec.shape)
            require(
                tuple(tensor.shape) == shape,
                f"{name} must have shape {shape}, got",
                tuple(tensor.shape),
            )
            given = str(tensor.dtype).removeprefix("torch.")
            require(given == spec.dtype, f"{name} must be {spec.dtype}, got", given)
            array = tensor.double().numpy()
            require(bool(np.isfinite(array).all()), "NaN or infinity in", name)
            values[name] = array - self.reference(spec, batch)
        return values

    def reference(self, spec: FieldSpec, batch: Batch) -> FloatArray:
        """What of a field is reference energies: so large that no disagreement would show."""
        table = reference_table(self.references)
        per_atom: FloatArray = table[batch.atomic_numbers.cpu().numpy()]
        if spec.name == "atomic_energy":
            return per_atom
        if spec.name == "energy":
            owners = batch.structure_index.cpu().numpy()
            return np.bincount(owners, per_atom, batch.n_structures).astype(np.float64)
        return np.zeros(())

    def check_permutation(self, structures: list[Structure], whole: dict[str, FloatArray]) -> None:
        generator = np.random.default_rng(1)
        orders = [np.roll(generator.permutation(s.n_atoms), 1) for s in structures]
        shuffled = [
            replace(s, atomic_numbers=s.atomic_numbers[order], positions=s.positions[order])
            for s, order in zip(structures, orders, strict=True)
        ]
        first = np.cumsum([0, *(s.n_atoms for s in structures)])[:-1]
        order = np.concatenate([a + b for a, b in zip(first, orders, strict=True)])
        # Edges are listed by their atoms, so theirs would come in another order.
        kept = {name: v for name, v in whole.items() if self.specs[name].level != "edge"}
        expected = {
            name: values[order] if self.specs[name].level == "atom" else values
            for name, values in kept.items()
        }
        self.compare(expected, self.run(shuffled), "with the atoms in another order")

    def check_sums(self, structures: list[Structure], whole: dict[str, FloatArray]) -> None:
        if {"energy", "atomic_energy"} <= set(self.specs):
            owners = np.repeat(np.arange(len(structures)), [s.n_atoms for s in structures])
            sums = np.bincount(owners, whole["atomic_energy"], len(structures))
            found = {"energy": sums.astype(np.float64)}
            self.compare({"energy": whole["energy"]}, found, "as the sum of atomic_energy")

    def compare(
        self, expected: dict[str, FloatArray], found: dict[str, FloatArray], when: str
    ) -> None:
        for name, values in expected.items():
            scale = max(float(np.abs(values).max(initial=0.0)), 1e-6)
            off = np.abs(found[name] - values)
            if values.size and off.max() > self.tolerance * scale:
                place = np.unravel_index(int(off.argmax()), off.shape)
                raise ContractError(
                    f"{name} {when} is {found[name][place]:.9g} at {[int(i) for i in place]}, "
                    f"expected {values[place]:.9g} (symmetry {self.specs[name].symmetry}, "
                    f"tolerance {self.tolerance * scale:.1g})"
                )


def _lonely(like: Structure, cutoff: float) -> list[Structure]:
    """One atom, and two out of each other's reach."""
    far = np.array([[0.0, 0.0, 0.0], [2.5 * cutoff, 0.0, 0.0]])
    numbers = np.resize(like.atomic_numbers, 2)
    return [
        Structure(
            structure_id=f"{n} out of reach",
            atomic_numbers=numbers[:n],
            positions=far[:n],
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, bool),
        )
        for n in (1, 2)
    ]


def _rotation() -> FloatArray:
    x, y, z = _AXIS
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    turn: FloatArray = np.eye(3) + np.sin(_ANGLE) * cross + (1 - np.cos(_ANGLE)) * cross @ cross
    return turn
