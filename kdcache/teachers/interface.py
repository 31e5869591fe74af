"""What a dump asks of a teacher.

A teacher is anything with these members: a checkpoint of ours, an outside family behind an adapter,
or a module of the user's own. The store keeps what `field_specs` names, by level alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.taps import Tap
from kdcache.structures import Batch


class Teacher(Protocol):
    """A model that turns a batch into fields of a store.

    Attributes:
        model_name: architecture, e.g. "painn".
        digest: SHA-256 (hex) over weights, configuration, units and taps: equal digests give equal
            features.
        graph_rule: the neighbours it wants in a batch.
        further_graphs: rules of other neighbour lists it wants, by name; mostly none.
        architecture: configuration, as JSON.
        references: eV by atomic number, contained in its energies.
        dtype: floating dtype it computes in.
    """

    @property
    def model_name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def graph_rule(self) -> GraphRule: ...
    @property
    def further_graphs(self) -> Mapping[str, GraphRule]: ...
    @property
    def architecture(self) -> Mapping[str, Any]: ...
    @property
    def references(self) -> Mapping[int, float]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def field_specs(self) -> tuple[FieldSpec, ...]:
        """Everything it can give, in the order it is stored."""
        ...

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        """Fields by name, rows by their level.

        Energies are absolute (references included), in float64; atomic energies sum to them.
        """
        ...


class TeacherLoader(Protocol):
    """Opens checkpoints of one kind; what an entry point of kdcache.teachers names.

    A loader may take further keywords, and is given those its signature names: `scale_file` and
    `config_file`, paths of files beside the checkpoint or None, and `allow_pickle`.
    """

    def __call__(
        self, path: str, *, device: str, dtype: torch.dtype, taps: Sequence[Tap]
    ) -> Teacher: ...
