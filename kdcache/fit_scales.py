"""Fit a GemNet-OC's scale factors, so that every layer starts with the variance of its input.

Owns which structures are looked at and the order of fitting; where factors sit is the model's.
Invariant: factors are fitted one after the other in the order of the forward pass, each with those
before it in place, on the initial weights that training with the same seed starts from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.checkpoint import write_text
from kdcache.errors import ConfigError, DataError
from kdcache.models import Model
from kdcache.models.gemnet_oc import GemNetOC
from kdcache.models.gemnet_oc.layers import ScaleFactor
from kdcache.progress import Progress, silent
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure


def fit_scale_factors(
    model: Model, batches: Sequence[Batch], *, progress: Progress = silent
) -> dict[str, float]:
    """Fit every scale factor of a model, in place.

    Factors of bases (scale_basis) have no reference and stay identity.

    Args:
        model: a gemnet-oc with its initial weights, on the batches' device.
        batches: by the model's graph_rule and further_graphs; some hundred structures are enough.
        progress: shows the factors.

    Returns:
        Factors by module name, in the order they were fitted; √(variance of the reference over
        variance of the output), each a mean over channels.

    Raises:
        ConfigError: a model without scale factors to fit.
        DataError: no batch reaches a factor, for example without quadruplets.

    Source: Gasteiger et al. 2022 (GemNet-OC), as the Open Catalyst Project fits them.
    """
    if not isinstance(model, GemNetOC):
        raise ConfigError(
            f"{model.name} has no scale factors to fit; gemnet-oc has. Train it without."
        )
    modules = model.scale_modules()
    for module in modules.values():
        module.scale_factor.zero_()
    fitted: dict[str, float] = {}
    order = _execution_order(model, modules, batches)
    with progress("scale factors", len(order), "factors") as advance:
        for name in order:
            module, measured = modules[name], _Measured()
            module.observer = measured
            try:
                for batch in batches:
                    _run_until_measured(model, batch)
            finally:
                module.observer = None
            fitted[name] = _ratio(name, measured)
            module.scale_factor.fill_(fitted[name])
            advance(1, note=f"{name} {fitted[name]:.3f}")
    return fitted


def sample_batches(
    model: Model,
    structures: Iterable[Structure],
    *,
    n_structures: int,
    batch_size: int,
    seed: int = 0,
) -> list[Batch]:
    """Batches of structures chosen at random, all of them where there are fewer.

    Args:
        model: whose neighbour lists and dtype they get.
        structures: read once, in any number.
        n_structures: how many to keep.
        batch_size: structures in a batch.
        seed: of the choice.

    Raises:
        DataError: no structures.
    """
    generator = np.random.default_rng(seed)
    kept: list[Structure] = []
    for seen, structure in enumerate(structures):
        # Vitter 1985, algorithm R: every structure is kept with the same probability.
        if seen < n_structures:
            kept.append(structure)
        elif (place := int(generator.integers(seen + 1))) < n_structures:
            kept[place] = structure
    if not kept:
        raise DataError("There are no structures to fit scale factors on. Check the file.")
    weight = next(model.parameters())
    dtype = np.float64 if weight.dtype == torch.float64 else np.float32
    return [
        collate(
            kept[first : first + batch_size],
            model.graph_rule,
            dtype,
            further=model.further_graphs,
        ).to(weight.device)
        for first in range(0, len(kept), batch_size)
    ]


def write_scale_factors(path: str | Path, factors: dict[str, float], comment: str = "") -> None:
    """Factors into a JSON file, as `model.scale_factors` takes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"comment": comment, **factors} if comment else dict(factors)
    write_text(path, json.dumps(written, indent=1) + "\n")


class _Told(Exception):
    """Ends a forward pass: what comes after the factor being fitted does not matter to it."""


@dataclass
class _Measured:
    """Sums over batches of what one factor has been told: variances, times rows of the output."""

    output: float = 0.0
    reference: float = 0.0

    def __call__(
        self, scaled: Tensor, reference: Tensor, times: Tensor | None, counted: Tensor | None
    ) -> None:
        rows = len(scaled) if counted is None else int(counted.sum())
        of_reference = _variance(reference, times)
        of_output = _variance(scaled, counted)
        if of_reference is not None and of_output is not None:
            self.output += rows * of_output
            self.reference += rows * of_reference
        raise _Told


@dataclass(frozen=True)
class _Note:
    """Notes that a factor was asked for."""

    order: list[str]
    name: str

    def __call__(self, *told: object) -> None:
        if self.name not in self.order:
            self.order.append(self.name)


def _execution_order(
    model: Model, modules: dict[str, ScaleFactor], batches: Sequence[Batch]
) -> list[str]:
    order: list[str] = []
    for name, module in modules.items():
        module.observer = _Note(order, name)
    try:
        with torch.no_grad():
            model(batches[0])
    finally:
        for module in modules.values():
            module.observer = None
    return order


def _run_until_measured(model: Model, batch: Batch) -> None:
    with suppress(_Told), torch.no_grad():
        model(batch)


def _variance(rows: Tensor, times: Tensor | None) -> float | None:
    """Mean over channels of the unbiased variance over rows, each counted `times`; None of one."""
    rows = rows.detach().double()
    times = rows.new_ones(len(rows)) if times is None else times.double()
    total = float(times.sum())
    if total < 2.0:
        return None
    column = times.unsqueeze(-1)
    mean = (column * rows).sum(0) / total
    square = (column * (rows - mean).square()).sum(0) / (total - 1.0)
    return float(square.mean())


def _ratio(name: str, measured: _Measured) -> float:
    if measured.output <= 0.0 or measured.reference <= 0.0:
        raise DataError(
            f"no structure reaches {name}: its factor cannot be fitted on what never happens, such "
            "as quadruplets in molecules of three atoms. Fit on larger structures, or switch that "
            "interaction off."
        )
    return math.sqrt(measured.reference / measured.output)
