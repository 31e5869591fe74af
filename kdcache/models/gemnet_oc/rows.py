"""Long chains of operations on edges, a few rows at a time.

On a CPU without gradients what lies between input and output then stays in the cache, and no memory
is asked for and given back: fresh pages cost a forward pass a fifth of its time.
Invariant: results do not depend on it, and whoever listens to a module hears all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Numbers in a part: 4 MB in float32.
PART = 2**20


class Scaled(NamedTuple):
    """A tensor times a number that is not multiplied out yet.

    Attributes:
        values: any shape.
        gain: the number.
        fresh: nobody else holds `values`, so they may be overwritten.
    """

    values: Tensor
    gain: float = 1.0
    fresh: bool = False

    def tensor(self) -> Tensor:
        """Multiplied out."""
        return self.values if self.gain == 1.0 else self.values * self.gain

    def times(self, gain: float) -> Scaled:
        """With another factor."""
        return Scaled(self.values, self.gain * gain, self.fresh)

    def plus(self, other: Tensor, gain: float = 1.0) -> Scaled:
        """The sum with `gain` times another tensor; this one is used up."""
        alpha = gain / self.gain
        # Under autocast the sum may need a wider type than these values have.
        fits = torch.result_type(self.values, other) == self.values.dtype
        if self.fresh and fits and not torch.is_grad_enabled():
            self.values.add_(other, alpha=alpha)
            return self
        return Scaled(torch.add(self.values, other, alpha=alpha), self.gain, fresh=True)


def row_parts(n: int, width: int, like: Tensor, modules: Iterable[nn.Module] = ()) -> list[slice]:
    """Which rows to take at a time: all of them, but on a CPU without gradients.

    Args:
        n: rows.
        width: numbers that are made of a row at a time.
        like: a tensor on the device.
        modules: that are called; where one has a hook, all rows go through it at once.
    """
    n_parts = -(-n * width // PART)
    if (
        n_parts <= 1
        or torch.is_grad_enabled()
        or like.device.type != "cpu"
        or any(_heard(module) for module in modules)
    ):
        return [slice(0, n)]
    size = -(-n // n_parts)
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def by_rows(
    step: Callable[..., tuple[Tensor | Scaled, ...]],
    inputs: Sequence[Tensor],
    width: int,
    modules: Iterable[nn.Module] = (),
) -> tuple[Tensor, ...]:
    """`step(*inputs)`, in parts of their rows.

    Args:
        step: from tensors with as many rows as the inputs to others, row by row.
        inputs: [n, …] each.
        width, modules: as for `row_parts`.

    Returns:
        What the step returns, multiplied out, [n, …] each.
    """
    n = len(inputs[0])
    rows = row_parts(n, width, inputs[0], modules)
    if len(rows) == 1:
        return tuple(p.tensor() if isinstance(p, Scaled) else p for p in step(*inputs))
    wholes: list[Tensor] = []
    for part in rows:
        found = [
            p if isinstance(p, Scaled) else Scaled(p) for p in step(*(t[part] for t in inputs))
        ]
        if not wholes:
            wholes = [p.values.new_empty(n, *p.values.shape[1:]) for p in found]
        for whole, (values, gain, _) in zip(wholes, found, strict=True):
            torch.mul(values, gain, out=whole[part])
    return tuple(wholes)


def _heard(module: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or getattr(m, "observer", None)
        for m in module.modules()
    )
