"""A GPU whose memory is full is not a lost one, whichever part of CUDA says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.structures import Batch
from tests.chain import make_store
from tests.dump.failing import Behaviour, Failing


class Full(Failing):
    """Its memory is full, in words of its own."""

    said = ""

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        try:
            return super().compute(batch)
        except torch.OutOfMemoryError:
            raise RuntimeError(self.said) from None


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_memory_that_is_full_is_told_from_a_lost_gpu(said: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    largest = int(store.index.n_atoms.max())
    teacher = Full(Behaviour(memory=largest))
    teacher.said = said
    report = dump_teacher(store.path, teacher, DumpOptions("t", threads=1))
    assert not report.failed
    assert max(teacher.batches) <= largest
