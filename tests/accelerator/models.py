"""Every student on the pretend device: forward with taps, the loss of a step, its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch

from kdcache.config import LossConfig
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.stream.probe import find_block_taps
from kdcache.structures import Batch
from kdcache.student import TappedPotential
from tests.accelerator import pretend
from tests.chain import PAINN, SCHNET
from tests.models.cases import Atoms, crystal, make_batch, molecule
from tests.models.test_gemnet_oc import SMALL

GEMNET: Mapping[str, object] = {**SMALL, "num_blocks": 1, "num_spherical": 3}
MODELS: dict[str, Mapping[str, object]] = {
    "schnet": SCHNET,
    "painn, direct forces": PAINN,
    "painn, gradient forces": {**PAINN, "direct_forces": False},
    "painn, bessel": {**PAINN, "rbf": "spherical_bessel", "envelope": "exponential"},
    "painn, bernstein": {**PAINN, "rbf": "bernstein", "num_layers": 1},
}
GEMNETS: dict[str, Mapping[str, object]] = {
    "gemnet-oc, direct forces": {**GEMNET, "forces_coupled": True, "sbf": "spherical_harmonics"},
    "gemnet-oc, gradient forces": {
        **GEMNET, "direct_forces": False, "extensive": False, "cbf": "gaussian",
        "sbf": "gaussian_outer", "scale_basis": True, "rbf_spherical": "bernstein",
    },
}  # fmt: skip
BATCHES: dict[str, list[Atoms]] = {
    "molecules and a crystal": [molecule(5), crystal(), molecule(1)],
    "an atom alone": [molecule(1)],
}
# What the docstring of the model admits, each with its reason there.
GEMNET_WAITS = {
    "models/gemnet_oc/paths.py:__init__",
    "models/gemnet_oc/paths.py:reverse_edges",
    "models/gemnet_oc/mixing.py:pair_mixing",
    "models/gemnet_oc/inputs.py:_middle_edges",
    "models/gemnet_oc/quadruplet_mixing.py:_active_atoms",
}


class Case:
    """A student with its taps and a labelled batch, on the CPU until moved."""

    def __init__(self, model: Mapping[str, object], structures: str, precision: str) -> None:
        units = Normalizer(energy_scale=1.5, energy_shift=0.25, force_scale=1.5)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.rough = precision == "bf16"
        self.potential, probed = (
            Potential(build_model(model), units, {}).to(self.dtype) for _ in range(2)
        )
        self.taps = find_block_taps(probed)
        rule, further = self.potential.graph_rule, self.potential.further_graphs
        batch = make_batch(BATCHES[structures], rule, self.dtype, further)
        n, gap = batch.n_structures, torch.tensor(torch.nan)
        energy, forces = torch.ones(n), torch.ones_like(batch.positions)
        energy[0], forces[0] = gap, gap
        self.batch: Batch = replace(
            batch,
            energy=energy.to(self.dtype),
            forces=forces,
            weight=torch.ones(n, dtype=self.dtype),
            fixed=torch.zeros(batch.n_atoms, dtype=torch.bool),
            tags=torch.full((batch.n_atoms,), 2, dtype=torch.uint8),
        )

    def to(self, device: torch.device) -> None:
        self.potential.to(device)
        self.batch = self.batch.to(device)

    def learn(self) -> torch.Tensor:
        """A loss of everything the student gives, differentiated."""
        clock = Clock(10)
        device = self.batch.positions.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.rough):
            output = TappedPotential(self.potential, self.taps)(self.batch)
        loss = GroundTruthLoss(LossConfig(), clock)(output, self.batch, 0).total
        for feature in output.features.values():
            loss = loss + feature.square().mean()
        loss.backward()
        return loss


def learns(model: Mapping[str, object], structures: str, precision: str) -> None:
    """Without waiting, and with a gradient for every weight."""
    case = Case(model, structures, precision)
    with pretend.WithoutMemory():
        case.to(pretend.device())
        with pretend.Watch():
            check(case, case.learn())


def learns_with_answers(model: Mapping[str, object], structures: str, precision: str) -> None:
    """Waiting where GemNet-OC says it does, and with all tensors on one device."""
    told = pretend.recorded(Case(model, structures, precision).learn)
    case = Case(model, structures, precision)
    with pretend.WithoutMemory():
        case.to(pretend.device())
        with pretend.Watch(told) as watch:
            check(case, case.learn())
    assert watch.waited == told.places
    assert set(watch.waited) <= GEMNET_WAITS, set(watch.waited) - GEMNET_WAITS


def check(case: Case, loss: torch.Tensor) -> None:
    assert loss.device == pretend.device()
    assert loss.dtype == case.dtype
    weights = dict(case.potential.named_parameters())
    for name, weight in weights.items():
        assert weight.device == pretend.device(), name
        assert weight.grad is None or weight.grad.device == pretend.device(), name
    learnt = [name for name, weight in weights.items() if weight.grad is not None]
    assert len(learnt) > 0.8 * len(weights), sorted(set(weights) - set(learnt))


BASES = ("painn, bessel", "painn, bernstein")
STUDENTS = [name for name in MODELS if name not in BASES]
MIXED, ALONE = BATCHES
CHECKS: dict[str, tuple[object, ...]] = {
    f"{name}, {structures}, {precision}": (learns, MODELS[name], structures, precision)
    for name, structures, precision in (
        *product(STUDENTS, [MIXED], ["float32", "bf16"]),
        *product(STUDENTS, [ALONE], ["float32"]),
        *product(BASES, [MIXED], ["bf16"]),
    )
} | {
    f"{name}, {precision}": (learns_with_answers, GEMNETS[name], MIXED, precision)
    for name, precision in (
        ("gemnet-oc, direct forces", "float32"),
        ("gemnet-oc, direct forces", "bf16"),
        ("gemnet-oc, gradient forces", "bf16"),
    )
}
