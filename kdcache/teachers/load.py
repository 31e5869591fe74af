"""A teacher from the name of its kind and the path of its checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from kdcache.devices import find_device
from kdcache.errors import ConfigError
from kdcache.models.taps import Tap
from kdcache.registry import lookup
from kdcache.teachers.interface import Teacher

GROUP = "kdcache.teachers"
# What the command line calls the keywords a loader may take.
OPTIONS = {"scale_file": "--scale-file", "config_file": "--teacher-config"}


def load_teacher(
    kind: str,
    path: str,
    *,
    device: str = "cpu",
    precision: str = "float32",
    taps: Sequence[Tap] = (),
    scale_file: str | None = None,
    config_file: str | None = None,
    allow_pickle: bool = False,
) -> Teacher:
    """A teacher ready to compute.

    Args:
        kind: name in the entry-point group kdcache.teachers, or "package.module:factory" of the
            user's own, which runs that code.
        path: of its checkpoint.
        device: torch device, or "auto".
        precision: "float32" or "float64".
        taps: inner modules to store as well.
        scale_file: scale factors kept apart from the checkpoint.
        config_file: the model's configuration, where the checkpoint does not hold it.
        allow_pickle: read checkpoints that are Python pickles, where the kind has such.

    Raises:
        ConfigError: an unknown kind, device or precision, or a file this kind does not take.
        KdcacheError: whatever the loader says of the checkpoint.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(precision)
    if dtype is None:
        raise ConfigError(f"precision {precision} is unknown; say float32 or float64.")
    found = lookup(GROUP, kind, allow_import=True)
    if not callable(found):
        raise ConfigError(f"{kind} is {found!r}, not a function that opens a teacher. Name one.")
    further: dict[str, Any] = {"scale_file": scale_file, "config_file": config_file}
    for name, value in list(further.items()):
        if value is None:
            del further[name]
        elif not _takes(found, name):
            raise ConfigError(
                f"teachers of the kind {kind} have no {name.replace('_', ' ')}. Leave "
                f"{OPTIONS[name]} out, or name the right --teacher-format."
            )
    if _takes(found, "allow_pickle"):
        further["allow_pickle"] = allow_pickle
    loader = cast(Callable[..., Teacher], found)
    return loader(path, device=str(find_device(device)), dtype=dtype, taps=taps, **further)


def _takes(loader: Callable[..., object], keyword: str) -> bool:
    """Whether a loader has use for a keyword; those that name none of them stay as they are."""
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(loader).parameters
    return keyword in parameters
