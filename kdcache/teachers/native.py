"""Our own checkpoints as teachers, with any inner module as a further feature.

Owns the translation of a `Potential` into fields; reading the checkpoint is `kdcache.checkpoint`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.checkpoint import load_potential, potential_card, potential_digest
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.potential import Potential
from kdcache.models.taps import Tap, Taps
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure


class NativeTeacher:
    """A trained potential of ours.

    Args:
        potential: in eval mode, on the device and in the precision of the dump.
        taps: inner modules whose outputs are stored as well.
    """

    def __init__(self, potential: Potential, taps: Sequence[Tap] = ()) -> None:
        self.potential = potential
        self._taps = Taps(potential.model, taps)
        self._tap_specs = self._probe()

    @property
    def model_name(self) -> str:
        return self.potential.model.name

    @property
    def digest(self) -> str:
        taps = json.dumps([[t.kind, t.name, t.path] for t in self._taps.taps])
        precision = str(self.dtype)
        whole = f"{potential_digest(self.potential)};{precision};{taps}"
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def graph_rule(self) -> GraphRule:
        return self.potential.graph_rule

    @property
    def architecture(self) -> Mapping[str, Any]:
        return dict(potential_card(self.potential)["model"])

    @property
    def references(self) -> Mapping[int, float]:
        return self.potential.references

    @property
    def dtype(self) -> torch.dtype:
        return next(self.potential.parameters()).dtype

    def field_specs(self) -> tuple[FieldSpec, ...]:
        name = str(self.dtype).removeprefix("torch.")
        own = tuple(
            # Energies hold their references, so they are float64 whatever the weights are.
            replace(spec, dtype="float64" if spec.unit == "eV" else name)
            for spec in self.potential.model.field_specs()
        )
        return own + self._tap_specs

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), self._taps as tapped:
            output = self.potential.predict(batch)
            fields = {
                "energy": output.energy,
                "forces": output.forces,
                "atomic_energy": output.atomic_energy,
                **output.features,
                **tapped.outputs(batch),
            }
        return {name: tensor.detach() for name, tensor in fields.items()}

    def _probe(self) -> tuple[FieldSpec, ...]:
        """The widths of the taps, from three atoms in a row."""
        if not self._taps.taps:
            return ()
        element = min(self.potential.references, default=1)
        probe = Structure(
            structure_id="probe",
            atomic_numbers=np.full(3, element),
            positions=np.diag([0.0, 1.0, 0.0]) + np.diag([0.0, 0.0, 1.0]),
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, bool),
        )
        device = next(self.potential.parameters()).device
        computed = self.compute(collate([probe], self.graph_rule).to(device, self.dtype))
        return tuple(
            FieldSpec(
                tap.field,
                "edge" if tap.kind == "edge" else "atom",
                tuple(computed[tap.field].shape[1:]),
                str(self.dtype).removeprefix("torch."),
                symmetry="vector" if tap.kind == "vector" else "invariant",
            )
            for tap in self._taps.taps
        )


def load_native(
    path: str, *, device: str, dtype: torch.dtype, taps: Sequence[Tap] = ()
) -> NativeTeacher:
    """A teacher from a run directory that `train-student` wrote.

    Args:
        path: run directory, or the model.safetensors in it.
        device: where it computes.
        dtype: floating dtype it computes in.
        taps: inner modules to store as well.

    Raises:
        TrainingError: no model there, or a damaged one.
        ConfigError: a tap names no module, or one that gives no such feature.
    """
    return NativeTeacher(load_potential(path, device=device).to(dtype), taps)
