"""The versions that computed a teacher's features, as its manifest entry records them.

Names and versions only: where a package lies says who installed it.
"""

from __future__ import annotations

import platform
from importlib import metadata

import numpy as np
import torch

import kdcache


def software(*, every: bool) -> dict[str, str]:
    """Versions by package.

    Args:
        every: all that is installed, not only what computes.
    """
    found = {
        "kdcache": kdcache.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if every:
        for package in metadata.distributions():
            name = package.metadata["Name"]
            if name is not None:
                found.setdefault(name.lower(), package.version)
    return dict(sorted(found.items()))
