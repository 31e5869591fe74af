"""Published weights into a model: tied names, unfitted scale factors, leftovers of training.

Prefixes such as `module.` belong to the reader of a checkpoint.
Invariant: after loading, every tensor of the model came from the file, but for scale factors,
which are 0 (identity) where the file has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, ShapeError

# Names that published files carry beside the model: masses of old SchNets, and the maps that a
# student was distilled through.
EXTRAS = ("atomic_mass", "n2n_mapping", "n2e_mapping", "v2v_mapping", "e2e_mapping")


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy published tensors into a model, in the model's dtype.

    Of names that share one tensor, as SchNet's filter networks do, the file may hold any.

    Args:
        model: built with the file's hyperparameters.
        tensors: by state-dict name.

    Returns:
        The names left unused because they are no part of the model (`EXTRAS`).

    Raises:
        ConfigError: a name missing or unknown, or tied names with different values.
        ShapeError: a tensor of another shape.
    """
    own = model.state_dict(keep_vars=True)
    unused = [name for name in tensors if name not in own]
    unknown = [name for name in unused if name.split(".", 1)[0] not in EXTRAS]
    if unknown:
        raise ConfigError(
            f"the weights hold {unknown[0]}, which the model has not. "
            "Build it with the hyperparameters that the weights were trained with."
        )
    for names in _tied_names(own):
        found = [name for name in names if name in tensors]
        target = own[names[0]]
        if not found:
            if not names[0].endswith("scale_factor"):
                raise ConfigError(
                    f"the weights lack {names[0]}, {list(target.shape)}. "
                    "Build the model with the hyperparameters that they were trained with."
                )
            with torch.no_grad():
                target.zero_()
            continue
        value = tensors[found[0]]
        if value.shape != target.shape:
            raise ShapeError(
                f"{found[0]} is {list(value.shape)} in the weights and {list(target.shape)} in "
                "the model. Build it with the hyperparameters they were trained with."
            )
        for other in found[1:]:
            if not torch.equal(tensors[other], value):
                raise ConfigError(
                    f"{found[0]} and {other} are one tensor in the model and differ in the "
                    "weights. The file was changed after training: get it again."
                )
        with torch.no_grad():
            target.copy_(value)
    return unused


def _tied_names(own: Mapping[str, Tensor]) -> list[list[str]]:
    """State-dict names grouped by the tensor they name."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())
