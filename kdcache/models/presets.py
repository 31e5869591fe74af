"""The published sizes and training settings, as data.

Values are those of Ekström Kelvinius et al. 2023, Tables 5 (SchNet) and 6 (PaiNN); what a table
does not say is left to the defaults of the configuration.
Invariant: a preset is a layer of a training configuration, and anything laid over it wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import ConfigError, did_you_mean

Layer = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Preset:
    """A model with the training it was published with.

    Attributes:
        model: "name" and hyperparameters.
        training: settings of optimizer, schedule, ema, clip_norm, loss and batch size, nested as
            in a training configuration.
        epochs: passes over the training set; the number of steps follows from its size.
    """

    model: Layer
    training: Layer
    epochs: int

    def config(self, n_structures: int | None = None) -> dict[str, object]:
        """The layer of a training configuration.

        Args:
            n_structures: size of the training set, from which the published number of steps
                follows; the configuration's own default without.
        """
        training = {"batch_size": 32}
        layer = {"model": dict(self.model), **self.training}
        own = layer.get("training")
        if isinstance(own, Mapping):
            training |= own
        if n_structures is not None:
            steps_per_epoch = -(-n_structures // training["batch_size"])
            training["max_steps"] = max(1, self.epochs * steps_per_epoch)
        layer["training"] = training
        return layer


def _schnet(channels: int, filters: int, blocks: int, gaussians: int, cutoff: float) -> Layer:
    return {
        "name": "schnet",
        "hidden_channels": channels,
        "num_filters": filters,
        "num_interactions": blocks,
        "num_gaussians": gaussians,
        "cutoff": cutoff,
    }


def _painn(channels: int, layers: int) -> Layer:
    return {
        "name": "painn",
        "hidden_channels": channels,
        "num_layers": layers,
        "num_rbf": 128,
        "cutoff": 12.0,
        "max_neighbors": 50,
        "direct_forces": True,
        "num_elements": 83,
    }


_LOSS: Layer = {"energy": "mae", "forces": "l2mae", "energy_weight": 1, "forces_weight": 100}

_SCHNET_COLL: Layer = {
    "optimizer": {"name": "adamw", "lr": 1e-3, "amsgrad": False},
    "schedule": {
        "name": "linear_warmup_exponential_decay",
        "unit": "step",
        "warmup": 3750,
        "factor": 0.01,
    },
    "loss": _LOSS,
    "ema": None,
    "clip_norm": None,
    "training": {"batch_size": 32},
}

_SCHNET_OC20: Layer = {
    "optimizer": {"name": "adamw", "lr": 1e-4, "amsgrad": False},
    "schedule": {
        "name": "multi_step",
        "unit": "step",
        "warmup": 31250,
        "warmup_factor": 0.1,
        "factor": 0.1,
        "milestones": [52083, 83333, 104166],
    },
    "loss": _LOSS,
    "ema": None,
    "clip_norm": None,
    "training": {"batch_size": 192},
}

_PAINN_COLL: Layer = {
    "optimizer": {"name": "adamw", "lr": 1e-3, "amsgrad": True},
    "schedule": {
        "name": "linear_warmup_exponential_decay",
        "unit": "step",
        "warmup": 3750,
        "factor": 0.01,
    },
    "loss": _LOSS,
    "ema": 0.999,
    "clip_norm": 10.0,
    "training": {"batch_size": 32},
}

_PAINN_OC20: Layer = {
    "optimizer": {"name": "adamw", "lr": 1e-4, "amsgrad": True},
    "schedule": {
        "name": "multi_step",
        "unit": "step",
        "warmup": 0,
        "factor": 0.45,
        "milestones": [160000, 320000, 480000, 640000],
    },
    "loss": _LOSS,
    "ema": 0.999,
    "clip_norm": 10.0,
    "training": {"batch_size": 32},
}

_COLL: dict[str, Preset] = {
    "schnet": Preset(_schnet(128, 128, 6, 50, 12.0), _SCHNET_COLL, epochs=500),
    "painn": Preset(_painn(256, 6), _PAINN_COLL, epochs=375),
    "painn-small": Preset(_painn(128, 4), _PAINN_COLL, epochs=375),
}

PRESETS: dict[str, Preset] = {
    **_COLL,
    **{f"{name}-coll": preset for name, preset in _COLL.items()},
    # 50 neighbours: not in the table, fixed in the published periodic SchNet.
    "schnet-oc20": Preset(
        {**_schnet(1024, 256, 5, 200, 6.0), "max_neighbors": 50}, _SCHNET_OC20, epochs=30
    ),
    "painn-oc20": Preset(_painn(512, 6), _PAINN_OC20, epochs=16),
    "painn-small-oc20": Preset(_painn(256, 4), _PAINN_OC20, epochs=16),
}


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}: {did_you_mean(name, PRESETS)}.")
    return PRESETS[name]
