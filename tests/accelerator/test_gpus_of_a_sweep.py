"""Which GPU a run of a sweep sees, on a machine that has several."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.devices import find_device
from kdcache.sweep import run
from tests.chain import student


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def task(device: str) -> Any:
    return SimpleNamespace(job=SimpleNamespace(config=student(f"training.device={device}")))


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("auto", None, ["0", "1", "0"]),
        ("cuda", "3,GPU-5f", ["3", "GPU-5f", "3"]),
        # The name counts among all that are visible, so all must stay so.
        ("cuda:1", None, [None, None, None]),
        ("cpu", None, [None, None, None]),
    ],
)
def test_a_run_sees_one_gpu_unless_it_names_one(
    device: str, visible: str | None, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [run._device(task(device), slot) for slot in range(3)] == expected
    assert find_device(device).type == ("cpu" if device == "cpu" else "cuda")
