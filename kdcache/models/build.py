"""A model from its name and hyperparameters, as configurations and checkpoints write them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import ValidationError

from kdcache.errors import ConfigError, did_you_mean
from kdcache.models.interface import Hyperparameters, Model
from kdcache.models.presets import PRESETS
from kdcache.registry import known_names, lookup

GROUP = "kdcache.models"


def build_model(
    config: Mapping[str, object], *, seed: int = 0, allow_import: bool = False
) -> Model:
    """A new model with initial weights.

    Args:
        config: "name" of a model or of a preset, and hyperparameters; those left out take the
            model's defaults, or the preset's values where the name is no model's.
        seed: equal seeds give equal weights. The global random state is left alone.
        allow_import: accept "package.module:Class" as the name.

    Raises:
        ConfigError: an unknown model, or hyperparameters that it does not take.
    """
    values = dict(config)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"model needs a name, got {name!r}. Write model: {{name: painn}}.")
    if name in PRESETS and name not in known_names(GROUP):
        values = {**PRESETS[name].model, **values}
        name = str(values.pop("name"))
    found = lookup(GROUP, name, allow_import=allow_import)
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise ConfigError(f"model {name} is {found!r}, not a kdcache.models.Model. Name a class.")
    hyperparameters = check_hyperparameters(name, found.hyperparameter_type, values)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # torch's own layers draw before we overwrite them
        return found(hyperparameters, generator)


def check_hyperparameters(
    name: str, kind: type[Hyperparameters], values: Mapping[str, object]
) -> Hyperparameters:
    """Hyperparameters of a model, or one line on the first that is wrong.

    Raises:
        ConfigError: an unknown name, or a value out of range or of another type.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = did_you_mean(key, kind.model_fields)
            raise ConfigError(f"model {name} has no hyperparameter {key!r}: {hint}.") from error
        where = f"{key} = {first['input']!r}" if key else "hyperparameters"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"model {name}, {where}: {message}.") from error
