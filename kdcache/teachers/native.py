"""Our own checkpoints as teachers, with any inner module as a further feature.

Owns the translation of a `Potential` into fields; reading the checkpoint is `kdcache.checkpoint`'s.
Invariant: every edge feature has its two sums at the atoms beside it, `name_to_node` and
`name_to_vector`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.checkpoint import (
    load_potential,
    potential_card,
    potential_digest,
    state_directories,
)
from kdcache.config import load_config
from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.edges import TO_NODE, TO_VECTOR, edge_to_node, edge_to_vector
from kdcache.models.potential import Potential
from kdcache.models.taps import Tap, Taps
from kdcache.stream.probe import tap_specs
from kdcache.structures import Batch

log = logging.getLogger(__name__)


class NativeTeacher:
    """A trained potential of ours.

    Args:
        potential: in eval mode, on the device and in the precision of the dump.
        taps: inner modules whose outputs are stored as well.
    """

    def __init__(self, potential: Potential, taps: Sequence[Tap] = ()) -> None:
        self.potential = potential
        self._taps = Taps(potential.model, taps)
        by_edge = [s.name for s in potential.model.field_specs() if s.level == "edge"]
        self._edge_fields = (*by_edge, *(tap.field for tap in taps if tap.kind == "edge"))
        self._tap_specs = tap_specs(potential, taps)

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
    def further_graphs(self) -> Mapping[str, GraphRule]:
        return self.potential.further_graphs

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
        given = own + self._tap_specs
        return given + tuple(part for spec in given for part in _reductions(spec))

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse elements that it does not know; see `Potential.check_elements`."""
        self.potential.check_elements(atomic_numbers)

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
            for name in self._edge_fields:
                # Here, on the teacher's device: whole edges are fifty times as much to copy.
                fields[name + TO_NODE] = edge_to_node(fields[name], batch)
                fields[name + TO_VECTOR] = edge_to_vector(fields[name], batch)
        return {name: tensor.detach() for name, tensor in fields.items()}


def _reductions(spec: FieldSpec) -> tuple[FieldSpec, ...]:
    """The two sums at the atoms of an edge feature; none of anything else."""
    if spec.level != "edge":
        return ()
    vector = replace(
        spec, name=spec.name + TO_VECTOR, level="atom", shape=(3, *spec.shape), symmetry="vector"
    )
    return replace(spec, name=spec.name + TO_NODE, level="atom"), vector


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
    teacher = NativeTeacher(load_potential(path, device=device).to(dtype), taps)
    _warn_of_unfinished(Path(path))
    return teacher


def _warn_of_unfinished(run: Path) -> None:
    """One line where the run has steps left: its model is the best so far, not the last word."""
    run = run if run.is_dir() else run.parent
    states = state_directories(run)
    if not states:
        return
    step = json.loads((states[-1] / "state.json").read_text())["step"]
    try:
        last = load_config(run / "config.yaml").training.max_steps
    except ConfigError:
        return  # no settings beside it, or of another version: a teacher all the same
    if step < last:
        log.warning(
            "%s is a run that stopped at step %d of %d, so its model is half-trained and all that "
            "learn from it follow it. Finish the training first, or go on if that is meant.",
            run,
            step,
            last,
        )
