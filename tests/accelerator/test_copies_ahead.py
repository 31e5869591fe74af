"""Copies to a GPU: on a stream of their own, waited for by the step's, from pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.graphs import GraphRule
from kdcache.stream.transfer import on_device, pinning, tensors
from kdcache.stream.window import collate
from kdcache.structures import Batch
from tests.chain import CUTOFF, structures

GPU = torch.device("cuda:1")


@dataclass
class Stream:
    """Notes what is asked of it."""

    name: str
    said: list[tuple[str, ...]]
    n_events: int = 0

    def record_event(self) -> str:
        self.n_events += 1
        self.said.append(("recorded", self.name))
        return f"event {self.n_events}"

    def wait_event(self, event: str) -> None:
        self.said.append(("waits", self.name, event))


class Cuda:
    """What is asked of `torch.cuda` and of tensors, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[tuple[str, ...]] = []
        self.main, self.side = Stream("main", self.said), Stream("side", self.said)
        self.used: list[tuple[int, str]] = []
        self._current, self._device = self.main, "cuda:0"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self._on(device, self.side))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: self._on(device, self._current)
        )
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "device", self._device_of)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda tensor, by: self.used.append((id(tensor), by.name))
        )
        monkeypatch.setattr(Tensor, "pin_memory", self._pin)
        moved = Batch.to

        def to(batch: Batch, device: object, dtype: torch.dtype | None = None) -> Batch:
            assert device == GPU
            self.said.append(("copied", self._current.name, str(dtype)))
            return moved(batch, "cpu", dtype)

        monkeypatch.setattr(Batch, "to", to)

    def _on(self, device: torch.device, stream: Stream) -> Stream:
        assert device == GPU
        return stream

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    @contextmanager
    def _device_of(self, device: torch.device) -> Iterator[None]:
        before, self._device = self._device, str(device)
        yield
        self._device = before

    def _pin(self, tensor: Tensor) -> Tensor:
        self.said.append(("pinned", self._device))
        return tensor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def batches(n: int) -> list[Batch]:
    found = [collate(structures(k + 1)[k:], GraphRule(CUTOFF), np.float32) for k in range(n)]
    for batch in found:
        batch.teacher["t/node"] = torch.ones(batch.n_atoms, 2, dtype=torch.float16)
    return found


# In half precision over the bus, widened there.
COPIED = [("copied", "side", "None"), ("copied", "side", "torch.float32"), ("recorded", "side")]


def test_a_batch_is_copied_while_the_one_before_it_is_used(cuda: Cuda) -> None:
    given = on_device(batches(3), GPU, torch.float32)
    for k in range(3):
        batch = next(given)
        begun = COPIED * (2 if k == 0 else 1 if k == 1 else 0)
        assert cuda.said == [*begun, ("waits", "main", f"event {k + 1}")]
        # Its memory is of the side stream, and the step's uses it.
        assert cuda.used == [(id(tensor), "main") for tensor in tensors(batch)]
        assert batch.teacher["t/node"].dtype == torch.float32
        cuda.said.clear()
        cuda.used.clear()
    assert list(given) == []


def test_every_tensor_is_pinned_by_the_gpu_it_goes_to(cuda: Cuda) -> None:
    pinned = pinning(GPU)
    assert pinned is not None
    (batch,) = batches(1)
    pinned(batch)
    assert cuda.said == [("pinned", "cuda:1")] * len(list(tensors(batch)))
