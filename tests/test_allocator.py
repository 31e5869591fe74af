"""Memory that is freed is kept; counted in page faults, by processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from kdcache.allocator import keep_freed_memory

HAS_MALLOPT = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")

# Tensors of 4 to 16 MB, made and freed together as those of a layer are.
PASSES = """
import resource, torch
from kdcache.allocator import keep_freed_memory
{call}
def once():
    tensors = [torch.ones(n * 2**20) for n in (1, 2, 3, 4)]
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


IN_SILENCE = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): "
COMMAND = "from kdcache_cli.main import main; main(['keygen', '--help'], standalone_mode=False)"
CALLS = ["keep_freed_memory()", IN_SILENCE + COMMAND]


def page_faults(call: str) -> int:
    """As dask has it for its workers: what glibc does by itself changes from run to run."""
    done = subprocess.run(
        [sys.executable, "-c", PASSES.format(call=call)],
        env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not HAS_MALLOPT, reason="the C library is not glibc")
@pytest.mark.parametrize("call", CALLS, ids=["function", "command"])
def test_freed_memory_meets_few_fresh_pages(call: str) -> None:
    assert page_faults(call) * 10 < page_faults("")


def test_without_mallopt_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    keep_freed_memory()
