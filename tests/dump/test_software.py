"""What a dump needs and what it records of its environment."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from kdcache.dump.software import software

TRAINING = (
    "kdcache.train", "kdcache.distill", "kdcache.optim", "kdcache.student", "kdcache.sweep",
    "kdcache.evaluate", "kdcache_cli",
)  # fmt: skip
# Heavy, or only of use elsewhere: an outside teacher's environment need not bear them.
FOREIGN = ("torch_geometric", "matplotlib", "tensorboard", "distributed", "h5py", "lmdb", "scipy")


def test_a_dump_loads_no_training_code_and_few_packages() -> None:
    program = (
        "import sys, kdcache.dump\n"
        f"print([m for m in {TRAINING + FOREIGN} if m in sys.modules], end='')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]"


def test_versions_that_compute_are_recorded() -> None:
    found = software(every=False)
    assert found["torch"] == torch.__version__
    assert found["numpy"] == metadata.version("numpy")
    assert "pytest" not in found


def test_all_versions_are_recorded_when_asked_for_and_no_paths() -> None:
    found = software(every=True)
    assert found["pytest"] == metadata.version("pytest")
    assert found["torch"] == torch.__version__
    home = str(Path.home())
    assert not [text for item in found.items() for text in item if "/" in text or home in text]
