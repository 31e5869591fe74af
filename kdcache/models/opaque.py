"""Sums over edges, and what undoes them, as operations that a compiler calls without looking in.

torch's compiler moves readers of such a sum before the sum in places, and then computes something
else (torch 2.13; seen on CPUs, reported for GPUs). Invariant: each gives torch's own result, and
can be differentiated as often as that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule


@torch.library.custom_op("kdcache::index_add", mutates_args=())
def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`x.index_add(dim, index, source)`."""
    return x.index_add(dim, index, source)


@torch.library.custom_op("kdcache::index_select", mutates_args=())
def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.index_select(dim, index)`."""
    return x.index_select(dim, index)


@torch.library.custom_op("kdcache::scatter_add", mutates_args=())
def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`x.scatter_add(dim, index, source)`."""
    return x.scatter_add(dim, index, source)


@torch.library.custom_op("kdcache::gather", mutates_args=())
def gather(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """`x.gather(dim, index)`."""
    return x.gather(dim, index)


def hide_sums(graph: GraphModule, *, with_gradients: bool) -> None:
    """Put these operations in the place of torch's in a traced graph.

    Args:
        graph: of torch's operations.
        with_gradients: it will be differentiated: also what has such sums as its gradient.
    """
    for node in graph.graph.nodes:
        if node.target in SUMS and len(node.args) == 4:
            node.target = SUMS[node.target]
        elif with_gradients and node.target in SELECTIONS and len(node.args) == 3:
            node.target = SELECTIONS[node.target]
        elif with_gradients and node.target == aten.embedding.default and len(node.args) == 2:
            node.target = torch.ops.kdcache.index_select.default
            node.args = (node.args[0], 0, node.args[1])
    graph.recompile()


aten = torch.ops.aten
# In place or not: what the sum is added to is of no further use in the graphs of autograd.
SUMS: Mapping[Any, Any] = {
    aten.index_add.default: torch.ops.kdcache.index_add.default,
    aten.index_add_.default: torch.ops.kdcache.index_add.default,
    aten.scatter_add.default: torch.ops.kdcache.scatter_add.default,
    aten.scatter_add_.default: torch.ops.kdcache.scatter_add.default,
}
SELECTIONS: Mapping[Any, Any] = {
    aten.index_select.default: torch.ops.kdcache.index_select.default,
    aten.gather.default: torch.ops.kdcache.gather.default,
}


@index_add.register_fake
@scatter_add.register_fake
def _(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@index_select.register_fake
def _(x: Tensor, dim: int, index: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[dim] = index.shape[0]
    return x.new_empty(shape)


@gather.register_fake
def _(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return x.new_empty(index.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, index = inputs[:3]
    ctx.shape = x.shape
    ctx.save_for_backward(index)


def _of_sum(select: Any) -> Any:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return gradient, None, None, select(gradient, ctx.dim, index)

    return backward


def _of_selection(add: Any) -> Any:
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return add(gradient.new_zeros(ctx.shape), ctx.dim, index, gradient), None, None

    return backward


index_add.register_autograd(_of_sum(index_select), setup_context=_keep)
index_select.register_autograd(_of_selection(index_add), setup_context=_keep)
scatter_add.register_autograd(_of_sum(gather), setup_context=_keep)
gather.register_autograd(_of_selection(scatter_add), setup_context=_keep)
