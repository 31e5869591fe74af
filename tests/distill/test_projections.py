"""Projections: their shapes, their own random numbers, and vectors that stay vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.config import ProjectionConfig
from kdcache.distill.projections import ChannelLinear, FrozenLinear, Sides, build_projections
from kdcache.errors import ConfigError
from tests.distill.fields import rows


def both(
    student: object = "identity",
    teacher: object = "identity",
    channels: tuple[int, int] = (4, 6),
    *,
    vector: bool = False,
    relational: bool = False,
    seed: int = 1,
) -> tuple[nn.Module, nn.Module]:
    return build_projections(
        ProjectionConfig.model_validate(student),
        ProjectionConfig.model_validate(teacher),
        Sides(*channels, vector, relational, "Term x"),
        torch.Generator().manual_seed(seed),
    )


def student(kind: object, *channels: int, vector: bool = False, seed: int = 1) -> nn.Module:
    ours, theirs = channels or (4, 6)
    return both(kind, channels=(ours, theirs), vector=vector, seed=seed)[0]


def test_initial_weights_are_torchs_distribution_and_depend_on_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, again = student("linear", 400, 300).weight, student("linear", 400, 300).weight
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(first, student("linear", 400, 300, seed=2).weight)
    # nn.Linear draws from ±1/sqrt(fan in), of standard deviation bound / sqrt(3).
    bound = 1 / 20
    assert first.abs().max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_vector_projection_turns_with_its_input() -> None:
    projection = student("linear", vector=True).double()
    vectors = rows(5, 3, 4, seed=3)
    rotation, _ = torch.linalg.qr(rows(3, 3, seed=4))
    turned = torch.einsum("xy,nyc->nxc", rotation, vectors)
    torch.testing.assert_close(
        projection(turned), torch.einsum("xy,nyc->nxc", rotation, projection(vectors))
    )
    assert len(list(projection.parameters())) == 1


def test_mlp_has_one_hidden_layer_of_twice_the_width() -> None:
    shapes = [list(p.shape) for p in student("mlp").parameters()]
    assert shapes == [[8, 4], [8], [6, 8], [6]]


@pytest.mark.parametrize(
    ("kind", "vector", "message"),
    [
        ("identity", False, "has 4 channels, the teacher's 6; identity cannot"),
        ("mlp", True, "mlp acts on x, y and z one by one"),
        ({"kind": "linear", "bias": True}, True, "bias on vectors"),
        ({"kind": "linear", "width": 5}, False, "width is 5, but the teacher's side has 6"),
    ],
)
def test_maps_that_make_no_sense_are_refused(kind: object, vector: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student(kind, vector=vector)


@pytest.mark.parametrize(("channels_in", "width"), [(6, 4), (4, 6), (5, 5)])
def test_frozen_teacher_map_is_orthonormal_and_untrained(channels_in: int, width: int) -> None:
    _, projection = both(teacher="linear", channels=(width, channels_in))
    assert not list(projection.parameters())
    weight = projection.get_buffer("weight")
    assert list(weight.shape) == [width, channels_in]
    gram = weight @ weight.T if width <= channels_in else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)))
    assert projection(torch.zeros(2, 3, channels_in, dtype=torch.float16)).shape == (2, 3, width)


def test_a_width_of_the_teachers_map_is_met_by_the_students() -> None:
    ours, theirs = both("linear", {"kind": "linear", "width": 5})
    assert ours.get_parameter("weight").shape == (5, 4)
    assert theirs.get_buffer("weight").shape == (5, 6)


@pytest.mark.parametrize(("kind", "n_parameters"), [("linear", 2), ("mlp", 4)])
def test_a_teachers_map_is_trained_where_asked_opposite_an_untrained_one(
    kind: str, n_parameters: int
) -> None:
    ours, theirs = both(teacher={"kind": kind, "trained": True})
    assert not list(ours.parameters())
    assert len(list(theirs.parameters())) == n_parameters
    assert theirs(torch.zeros(2, 6)).shape == (2, 4)
    frozen, trained = both({"kind": "linear", "trained": False}, {"kind": kind, "trained": True})
    assert isinstance(frozen, FrozenLinear)
    assert isinstance(trained, ChannelLinear | nn.Sequential)


def test_losses_of_relations_take_any_two_widths() -> None:
    ours, theirs = both(relational=True)
    assert isinstance(ours, nn.Identity)
    assert isinstance(theirs, nn.Identity)
    ours, _ = both({"kind": "linear", "width": 3}, relational=True)
    assert ours.get_parameter("weight").shape == (3, 4)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("identity", "mlp", "teacher_projection is frozen, and an mlp is of use only"),
        ("identity", {"kind": "linear", "bias": True}, "is frozen, and a bias"),
        ("linear", {"kind": "linear", "trained": True}, "both would shrink to zero"),
        ("linear", {"kind": "identity", "width": 5}, "teacher_projection.width is 5, and identity"),
        ({"kind": "mlp", "trained": False}, "identity", "student_projection is frozen"),
    ],
)
def test_maps_that_would_collapse_or_do_nothing_are_refused(
    ours: object, theirs: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        both(ours, theirs)
