"""The device a user named, refused early when torch does not have it."""

from __future__ import annotations

import torch

from kdcache.errors import ConfigError

# On a CPU the tensors of a small batch stay in the caches of its cores, and their memory is used
# again: a PaiNN predicts twice as fast with 256 atoms a thread as with 4096.
LARGEST_BATCH_ATOMS, THREAD_BATCH_ATOMS = 4096, 256


def find_device(name: str, setting: str = "device") -> torch.device:
    """The torch device called `name`.

    Args:
        name: auto (a GPU if there is one), cpu, cuda, cuda:1 and what else torch knows.
        setting: what the error calls it.

    Raises:
        ConfigError: no such device, or none on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{setting} {name} is no device; say auto, cpu or cuda.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"{count} GPUs" if count else "no GPU"
            raise ConfigError(f"{setting} is {name}, but torch sees {seen}. Say auto or cpu.")
    return device


def batch_atoms(wanted: int | None, device: torch.device) -> int:
    """Atoms in one batch of predictions: as many as are wanted, or as suit the device.

    Example:
        >>> cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
        >>> batch_atoms(None, gpu), batch_atoms(100, cpu)
        (4096, 100)
        >>> batch_atoms(None, cpu) == min(4096, 256 * torch.get_num_threads())
        True
    """
    if wanted is not None:
        return wanted
    if device.type != "cpu":
        return LARGEST_BATCH_ATOMS
    return min(LARGEST_BATCH_ATOMS, THREAD_BATCH_ATOMS * torch.get_num_threads())
