"""The watch itself: each kind of wait is caught, in a forward pass and in its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

from tests.accelerator import pretend


def on_host() -> Tensor:
    return torch.ones(3)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number read": lambda x: x.sum().item(),
    "a truth asked": lambda x: bool((x > 0).all()),
    "a mask as index": lambda x: x[x > 0],
    "a mask assigned to": lambda x: x.detach().index_put_((x > 0,), x.sum()),
    "places of values": lambda x: x.nonzero(),
    "different values": lambda x: torch.unique(x.detach()),
    "repeats": lambda x: torch.repeat_interleave(x, x.long()),
    "counts": lambda x: torch.bincount(x.long()),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: on_host().to(x.device),
    "a copy into": lambda x: x.detach().copy_(on_host()),
    "an index on the host": lambda x: x[torch.tensor([0])],
    "a scalar on the host": lambda x: x * torch.tensor(2.0),
}
# Copies that torch makes of its own accord, below what can be watched: they end in errors instead.
MADE_THERE: dict[str, Callable[[Tensor], object]] = {
    "a constant": lambda x: torch.tensor([1.0], device=x.device),
    "a constant like": lambda x: x.new_tensor(1.0),
    "a list as index": lambda x: x[[0, 1]],
}
# Nothing of these makes a GPU wait.
PASSING: dict[str, Callable[[Tensor], object]] = {
    "numbers": lambda x: torch.where(x > 0, 1.0, x * 2.0 + 1),
    "a filled tensor": lambda x: x.new_full((2,), 3.0) + torch.zeros(2, device=x.device),
    "a copy ahead": lambda x: on_host().to(x.device, non_blocking=True) + x,
    "an index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "sums by index": lambda x: x.new_zeros(2).index_add(0, torch.zeros_like(x).long(), x),
    "values on the host alone": lambda x: float(on_host().sum()) * x,
}


def caught(kind: str, backward: bool) -> None:
    operation = (WAITS | MADE_THERE)[kind]
    error = NotImplementedError if kind in MADE_THERE else pretend.WaitError
    with pretend.WithoutMemory():
        x = torch.ones(3, device=pretend.device(), requires_grad=True)
        with pretend.Watch(), pytest.raises(error):
            _InGradient.apply(x, operation).sum().backward() if backward else operation(x)


def passed(kind: str, backward: bool) -> None:
    operation = PASSING[kind]
    with pretend.WithoutMemory():
        x = torch.ones(3, device=pretend.device(), requires_grad=True)
        with pretend.Watch():
            _InGradient.apply(x, operation).sum().backward() if backward else operation(x)


def refused() -> None:
    """Without the watch, too: what on a GPU is an error."""
    with pretend.WithoutMemory():
        x = torch.ones(3, device=pretend.device())
        with pytest.raises(FakeTensorDeviceMismatchError):
            x + on_host()


def two_dtypes() -> None:
    """What is an error of a kernel, and of no shape."""
    with pretend.WithoutMemory():
        x = torch.ones(3, device=pretend.device())
        rows = torch.zeros(3, dtype=torch.int64, device=pretend.device())
        with pretend.Watch(), pytest.raises(TypeError, match=r"index_add.*float"):
            x.index_add(0, rows, x.bfloat16())


def autocasts() -> None:
    """By CUDA's lists, where those of the CPU differ."""
    with pretend.WithoutMemory():
        x = torch.ones(3, 3, device=pretend.device())
        with torch.autocast(pretend.NAME, torch.bfloat16):
            product = x @ x
            assert product.dtype == torch.bfloat16
            assert (product * product).dtype == torch.bfloat16
            assert product.sum().dtype == torch.float32
            assert torch.nn.functional.layer_norm(product, (3,)).dtype == torch.float32
            assert torch.cat([product, x]).dtype == torch.float32
            with torch.autocast(pretend.NAME, enabled=False):
                assert (x @ x).dtype == torch.float32
            assert (x.double() @ x.double()).dtype == torch.float64


class _InGradient(torch.autograd.Function):
    """The identity, with an operation in its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Callable[[Tensor], object]) -> Tensor:
        ctx.operation = operation
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.operation(gradient)
        return gradient, None


CHECKS: dict[str, tuple[object, ...]] = {
    **{
        f"{kind} is caught{' in a gradient' * backward}": (caught, kind, backward)
        for kind in WAITS | MADE_THERE
        for backward in (False, True)
    },
    **{
        f"{kind} pass{' in a gradient' * backward}": (passed, kind, backward)
        for kind in PASSING
        for backward in (False, True)
    },
    "two devices are refused": (refused,),
    "two dtypes are refused": (two_dtypes,),
    "autocast is CUDA's": (autocasts,),
}
