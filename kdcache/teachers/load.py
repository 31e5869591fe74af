"""A teacher from the name of its kind and the path of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from kdcache.devices import find_device
from kdcache.errors import ConfigError
from kdcache.models.taps import Tap
from kdcache.registry import lookup
from kdcache.teachers.interface import Teacher, TeacherLoader

GROUP = "kdcache.teachers"


def load_teacher(
    kind: str,
    path: str,
    *,
    device: str = "cpu",
    precision: str = "float32",
    taps: Sequence[Tap] = (),
) -> Teacher:
    """A teacher ready to compute.

    Args:
        kind: name in the entry-point group kdcache.teachers, or "package.module:factory" of the
            user's own, which runs that code.
        path: of its checkpoint.
        device: torch device, or "auto".
        precision: "float32" or "float64".
        taps: inner modules to store as well.

    Raises:
        ConfigError: an unknown kind, device or precision.
        KdcacheError: whatever the loader says of the checkpoint.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(precision)
    if dtype is None:
        raise ConfigError(f"precision {precision} is unknown; say float32 or float64.")
    found = lookup(GROUP, kind, allow_import=True)
    if not callable(found):
        raise ConfigError(f"{kind} is {found!r}, not a function that opens a teacher. Name one.")
    loader = cast(TeacherLoader, found)
    return loader(path, device=str(find_device(device)), dtype=dtype, taps=taps)
