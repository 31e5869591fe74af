"""Terms on edges: what the teacher lacks teaches nothing, and spoils nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.config import TermConfig
from kdcache.distill.binding import build_terms
from kdcache.distill.schedules import Clock
from kdcache.distill.terms import Terms
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.structures import Batch, ModelOutput
from tests.models.cases import crystal, make_batch, molecule

KEY = "teacher/edge"


def edge(channels: int) -> FieldSpec:
    return FieldSpec("edge", "edge", (channels,))


def build(loss: str = "mse", **settings: object) -> Terms:
    values = {"name": "e2e", "student": "edge", "teacher": "edge", "loss": loss, **settings}
    values = {"student_projection": "linear", **values}
    return build_terms(
        [TermConfig.model_validate(values)],
        student_fields=[edge(5)],
        teacher_fields={"teacher": {"edge": edge(3)}},
        clock=Clock(10),
        seed=2,
    ).double()


@pytest.fixture
def batch() -> Batch:
    made = make_batch([molecule(5), crystal()], GraphRule(3.0))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(made.n_edges, 3, generator=generator, dtype=torch.float64)
    return replace(made, teacher={KEY: features})


def output(batch: Batch, features: Tensor) -> ModelOutput:
    none = torch.zeros(batch.n_atoms, dtype=torch.float64)
    energy = torch.zeros(batch.n_structures, dtype=torch.float64)
    return ModelOutput(energy, batch.positions, none, {"edge": features})


def student(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch.n_edges, 5, generator=generator, dtype=torch.float64)
    return features.requires_grad_()


@pytest.mark.parametrize("loss", ["mse", "mae", "huber", "rmse+mae"])
@pytest.mark.parametrize("projection", ["identity", "linear"])
def test_unmatched_edges_are_as_if_they_were_not_there(
    batch: Batch, loss: str, projection: str
) -> None:
    terms = build(loss, teacher_projection=projection)
    features = student(batch)
    absent = torch.arange(batch.n_edges) % 3 == 1
    holes = batch.teacher[KEY].masked_fill(absent[:, None], torch.nan)
    value = terms(output(batch, features), replace(batch, teacher={KEY: holes}), 0).total
    value.backward()
    assert features.grad is not None
    assert not features.grad[absent].any()
    assert features.grad[~absent].any(dim=1).all()
    index, shift = batch.edge_index[:, ~absent], batch.edge_shift[~absent]
    kept = replace(
        batch, edge_index=index, edge_shift=shift, teacher={KEY: batch.teacher[KEY][~absent]}
    )
    alone = terms(output(kept, features.detach()[~absent]), kept, 0).total
    assert value.item() == pytest.approx(alone.item(), rel=1e-12)


def test_with_every_edge_matched_the_loss_is_the_plain_one(batch: Batch) -> None:
    terms = build()
    (term,) = terms.terms
    features = student(batch)
    value = terms(output(batch, features), batch, 0).total
    mapped = term.student_projection(features)  # type: ignore[operator]
    expected = (mapped - batch.teacher[KEY]).square().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_without_a_single_match_loss_and_gradient_are_zero(batch: Batch) -> None:
    features = student(batch)
    nothing = torch.full_like(batch.teacher[KEY], torch.nan)
    value = build()(output(batch, features), replace(batch, teacher={KEY: nothing}), 0).total
    value.backward()
    assert value.item() == 0
    assert features.grad is not None
    assert not features.grad.any()
