"""Sums that a compiler does not look into are torch's own, to the second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache.models import opaque

INDEX = torch.tensor([0, 2, 2, 1, 0])
WIDE = INDEX[:, None].expand(5, 3).contiguous()


def values(*shape: int) -> Tensor:
    return torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (opaque.index_add, torch.index_add, (values(4, 3), 0, INDEX, values(5, 3))),
        (opaque.index_add, torch.index_add, (values(2, 4, 3), 1, INDEX, values(2, 5, 3))),
        (opaque.index_select, torch.index_select, (values(4, 3), 0, INDEX)),
        (opaque.index_select, torch.index_select, (values(2, 4, 3), 1, INDEX)),
        (opaque.scatter_add, torch.scatter_add, (values(4, 3), 0, WIDE, values(5, 3))),
        (opaque.gather, torch.gather, (values(4, 3), 0, WIDE)),
    ],
)
def test_values_and_derivatives_are_torchs(
    ours: Any, theirs: Callable[..., Tensor], arguments: tuple[object, ...]
) -> None:
    torch.library.opcheck(ours, arguments)
    assert torch.equal(ours(*arguments), theirs(*arguments))
    floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point()]
    learnt = [tensor.clone().requires_grad_() for tensor in floating]

    def applied(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        whole = [
            next(given) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
        ]
        found: Tensor = ours(*whole)
        return found.square()

    torch.autograd.gradcheck(applied, learnt)
    torch.autograd.gradgradcheck(applied, learnt)
