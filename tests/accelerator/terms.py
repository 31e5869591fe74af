"""Every strategy and every loss of a term on the pretend device: its value and its gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.config import StudentConfig, TermConfig
from kdcache.distill.binding import build_terms
from kdcache.distill.losses import GroundTruthLoss, find_loss, traits_of
from kdcache.distill.schedules import Clock
from kdcache.distill.shared import part_counts
from kdcache.distill.strategies import COMBINABLE, STRATEGIES, apply_strategy
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.registry import known_names
from kdcache.structures import Batch, ModelOutput
from tests.accelerator import pretend
from tests.chain import student
from tests.models.cases import crystal, make_batch, molecule

# When annealed teachers are half gone, and no weight of born-again is 0.
CLOCK, STEP = Clock(100, 10.0), 50


def fields(channels: int) -> tuple[FieldSpec, ...]:
    return (
        FieldSpec("node", "atom", (channels,)),
        FieldSpec("edge", "edge", (channels,)),
        FieldSpec("vector", "atom", (3, channels), symmetry="vector"),
        FieldSpec("edge_to_node", "atom", (channels,)),
        FieldSpec("edge_to_vector", "atom", (3, channels), symmetry="vector"),
        FieldSpec("atomic_energy", "atom", unit="eV"),
        FieldSpec("energy", "structure", unit="eV"),
        FieldSpec("forces", "atom", (3,), unit="eV/Å", symmetry="vector"),
    )


def values(spec: FieldSpec, batch: Batch, dtype: torch.dtype) -> Tensor:
    rows = {"atom": batch.n_atoms, "edge": batch.n_edges, "structure": batch.n_structures}
    return torch.ones((rows[spec.level], *spec.shape), dtype=dtype)


def taught_batch(mixed: bool) -> Batch:
    batch = make_batch([molecule(5), crystal(), molecule(1)], GraphRule(3.0), torch.float32)
    weight = torch.ones(batch.n_structures)
    return replace(
        batch,
        energy=torch.ones(batch.n_structures),
        forces=torch.ones_like(batch.positions),
        weight=weight if mixed else None,
        origin_weight=weight if mixed else None,
        fixed=torch.zeros(batch.n_atoms, dtype=torch.bool) if mixed else None,
        # As a store keeps them and a GPU gets them: features in half precision.
        teacher={
            f"teacher/{spec.name}": values(spec, batch, kept_as)
            for spec in fields(6)
            for kept_as in [torch.float16 if spec.shape else torch.float32]
        },
    )


def output(batch: Batch, dtype: torch.dtype) -> ModelOutput:
    """Features as bfloat16 autocast leaves them, or as plain float32 does."""
    made = {spec.name: values(spec, batch, dtype) for spec in fields(4)}
    for name in ("energy", "forces", "atomic_energy"):
        made[name] = made[name].float()
    return ModelOutput(
        made["energy"],
        made["forces"],
        made["atomic_energy"],
        {name: made[name] for name in ("node", "edge", "vector")},
    )


def teaches(config: StudentConfig, *, mixed: bool) -> None:
    """Value, gradient and shares of all terms and of the labels, without waiting."""
    terms = build_terms(
        config.terms,
        student_fields=fields(4),
        teacher_fields={"teacher": {spec.name: spec for spec in fields(6)}},
        clock=CLOCK,
        seed=0,
        field_rms={f"teacher/{spec.name}": 2.0 for spec in fields(6)},
    )
    if mixed:
        terms.expect_missing(["teacher"])
    truth = GroundTruthLoss(config.loss, CLOCK)
    assert terms.required_fields or not config.terms
    batch = taught_batch(mixed)
    given = output(batch, torch.bfloat16 if mixed else torch.float32)
    with pretend.WithoutMemory():
        batch = batch.to(pretend.device())
        terms.to(pretend.device())
        given = moved(given)
        with pretend.Watch():
            shares = part_counts(truth, terms, batch, STEP) if mixed else None
            loss = truth(given, batch, STEP, shares)
            loss += terms(given, batch, STEP, shares)
            loss.total.backward()
    assert loss.total.device == pretend.device()
    assert loss.total.dtype == torch.float32
    assert all(part.device == pretend.device() for part in loss.parts.values())
    assert len(loss.parts) == len(config.terms) + 2


def moved(given: ModelOutput) -> ModelOutput:
    def there(tensor: Tensor) -> Tensor:
        return tensor.detach().to(pretend.device()).requires_grad_()

    features = {name: there(feature) for name, feature in given.features.items()}
    return ModelOutput(
        there(given.energy), there(given.forces), there(given.atomic_energy), features
    )


def strategy(name: str, mixed: bool) -> None:
    weights = {part: 1.0 for part in name.split("+") if part in COMBINABLE}
    teaches(apply_strategy(student(), name, weights=weights), mixed=mixed)


def term(loss: str, mixed: bool) -> None:
    """One loss over everything that it takes, with every projection."""
    traits = traits_of(find_loss(loss))
    found: list[TermConfig] = []

    def add(field: str, **settings: object) -> None:
        name = f"t{len(found)}"
        base = {"name": name, "student": field, "teacher": field, "loss": loss}
        found.append(TermConfig.model_validate({**base, **settings}))

    linear, identity = {"kind": "linear"}, {"kind": "identity"}
    levels = ["atom", "edge"] if traits.level is None else [traits.level]
    for field, level, symmetry in (
        ("node", "atom", "invariant"), ("edge", "edge", "invariant"), ("vector", "atom", "vector")
    ):  # fmt: skip
        if level not in levels or traits.symmetry not in (None, symmetry):
            continue
        add(field, student_projection=linear, normalise="rms")
        add(field, student_projection={"kind": "linear", "trained": False})
        add(field, student_projection=linear, teacher_projection=linear)
        if symmetry == "invariant":
            add(field, student_projection={"kind": "mlp"})
        if traits.relational:
            add(field, student_projection=identity)
    if not traits.relational and traits.level is None and traits.symmetry is None:
        add("energy", student_projection=identity, per_atom=True)
        add("atomic_energy", student_projection=identity)
    config = student().model_copy(update={"terms": tuple(found)})
    assert found
    shared = mixed and traits.mean_over is not None
    teaches(config, mixed=shared)


CHECKS: dict[str, tuple[Any, ...]] = {
    f"strategy {name}": (strategy, name, False)
    for name in (*STRATEGIES, "n2n+v2v+vanilla1+vanilla2")
} | {
    f"loss {name}{', of several origins' * mixed}": (term, name, mixed)
    for name in known_names("kdcache.losses")
    for mixed in (False, True)
}
