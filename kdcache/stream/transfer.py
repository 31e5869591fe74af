"""Batches on the device that trains, copied ahead of the step where that is a GPU.

Pinned memory and a side stream, as PyTorch documents them; on a CPU nothing is added.
Invariant: the batches are those given, in their order, in the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from kdcache.structures import Batch

Item = TypeVar("Item")
Moved = TypeVar("Moved")


def on_device(
    batches: Iterable[Batch], device: torch.device, dtype: torch.dtype
) -> Iterator[Batch]:
    """The batches on `device`, their floating tensors in `dtype`.

    On a GPU a batch is copied while the step before it computes: give it pinned tensors
    (`pinning`), or the copy waits. Half precision crosses the bus as it is and widens there.

    Args:
        batches: on the CPU.
        device: that steps run on; its current stream may use a batch as soon as it is yielded.
        dtype: of floating tensors.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, dtype)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            # In two steps: a copy that also converts may convert before the bus.
            moved = batch.to(device).to(device, dtype)
            return moved, side.record_event()

    for moved, copied in one_ahead(batches, start):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in tensors(moved):
            # Made on the side stream: its memory must not be given out while the step uses it.
            tensor.record_stream(current)
        yield moved


def one_ahead(items: Iterable[Item], start: Callable[[Item], Moved]) -> Iterator[Moved]:
    """`start` of every item, each begun before the one in front of it is handed out."""
    waiting: list[Moved] = []
    for item in items:
        waiting.append(start(item))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def pinning(device: torch.device) -> Callable[[Batch], Batch] | None:
    """What puts a batch into page-locked memory, from which `device` copies by itself.

    None where the device is no GPU and there is nothing to do.
    """
    if device.type != "cuda":
        return None

    def pinned(batch: Batch) -> Batch:
        # A thread starts on GPU 0, and every process would leave a context there.
        with torch.cuda.device(device):
            return batch.map(Tensor.pin_memory)

    return pinned


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor of a batch."""
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor):
            yield value
    yield from batch.teacher.values()
    for graph in batch.graphs.values():
        yield from graph
