"""On a GPU: one device, and no wait for it within a step. Proven on a device that is not there.

In a process of its own, since a device that is registered once stays so, and torch then says that
this machine has an accelerator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.store import Store

try:
    from tests.accelerator.run import CHECKS
except ImportError as error:  # private names of torch, which may move
    pytest.skip(f"torch has no place for a pretend device: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def failed(taught_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Traces of the checks that failed, by name."""
    results = tmp_path_factory.mktemp("accelerator") / "failed.json"
    command = [sys.executable, "-W", "error", "-m", "tests.accelerator.run"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(taught_store.path), str(results)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(results.read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_waits_and_all_is_on_one_device(check: str, failed: dict[str, str]) -> None:
    assert check not in failed, failed[check]


def test_this_process_has_no_pretend_device() -> None:
    import torch

    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    assert not hasattr(torch, "pretend")
