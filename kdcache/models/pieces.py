"""Edges some hundreds at a time on a CPU, so that what is computed on them stays in its caches.

A tensor over all edges of a batch of slabs takes a hundred megabytes. glibc gives back whatever
is larger than 32 MiB as soon as it is free, so every such tensor meets fresh pages, which took more
than half of the time of a PaiNN. Invariant: every edge once, in order; gradients go through.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The widest tensor of a piece, for each thread: 1 MiB in float32, what the cache of a core holds.
PIECE_VALUES = 2**18


def edge_pieces(width: int, n_atoms: int, *edges: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors over edges, cut into pieces; in one piece on a GPU, and where a compiler looks on.

    Args:
        width: numbers an edge has in the widest tensor that will be made of a piece.
        n_atoms: of the batch.
        edges: of [n_edges, …] each.

    Yields:
        The same rows of each; at least once, also where there are no edges.
    """
    n_edges = edges[0].shape[0]
    # While a model is traced the number of edges is a symbol, and a loop would fix it.
    traced = torch.compiler.is_compiling() or not isinstance(n_edges, int)
    if traced or edges[0].device.type != "cpu":
        yield edges
    else:
        at_once = max(1, PIECE_VALUES * torch.get_num_threads() // width)
        if torch.is_grad_enabled():
            # Each piece has a gradient over all atoms, which may not take longer than the piece.
            at_once = max(at_once, n_atoms)
        yield from zip(*(torch.split(tensor, at_once) for tensor in edges), strict=True)
