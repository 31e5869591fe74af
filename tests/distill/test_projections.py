"""Projections: their shapes, their own random numbers, and vectors that stay vectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdcache.config import ProjectionConfig
from kdcache.distill.projections import build_student_projection, build_teacher_projection
from kdcache.errors import ConfigError
from tests.distill.fields import rows


def student(
    kind: object,
    channels_in: int = 4,
    channels_out: int = 6,
    *,
    vector: bool = False,
    seed: int = 1,
) -> nn.Module:
    return build_student_projection(
        ProjectionConfig.model_validate(kind),
        channels_in,
        channels_out,
        vector=vector,
        generator=torch.Generator().manual_seed(seed),
        where="Term x",
    )


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
    settings = ProjectionConfig(kind="linear")
    projection, channels_out = build_teacher_projection(
        settings, channels_in, width, generator=torch.Generator().manual_seed(0), where="Term x"
    )
    assert channels_out == width
    assert not list(projection.parameters())
    weight = projection.get_buffer("weight")
    assert list(weight.shape) == [width, channels_in]
    gram = weight @ weight.T if width <= channels_in else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(len(gram)))
    assert projection(torch.zeros(2, 3, channels_in, dtype=torch.float16)).shape == (2, 3, width)


@pytest.mark.parametrize("kind", ["mlp", {"kind": "linear", "bias": True}])
def test_trained_teacher_maps_are_refused(kind: object) -> None:
    with pytest.raises(ConfigError, match="shrink both sides to zero"):
        build_teacher_projection(
            ProjectionConfig.model_validate(kind),
            4,
            4,
            generator=torch.Generator(),
            where="Term x",
        )
