"""The published sizes and training settings, as data.

Values are those of Ekström Kelvinius et al. 2023, Tables 5 (SchNet), 6 (PaiNN) and 7 (GemNet-OC);
what a table does not say is left to the defaults of the configuration.
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


def _gemnet_oc(atom: int, edge: int, blocks: int) -> Layer:
    return {
        "name": "gemnet-oc",
        "num_spherical": 7,
        "num_radial": 128,
        "num_blocks": blocks,
        "emb_size_atom": atom,
        "emb_size_edge": edge,
        "emb_size_trip_in": 64,
        "emb_size_trip_out": 64,
        "emb_size_quad_in": 32,
        "emb_size_quad_out": 32,
        "emb_size_aint_in": 64,
        "emb_size_aint_out": 64,
        "emb_size_rbf": 16,
        "emb_size_cbf": 16,
        "emb_size_sbf": 32,
        "num_before_skip": 2,
        "num_after_skip": 2,
        "num_concat": 1,
        "num_atom": 3,
        "num_output_afteratom": 3,
        "cutoff": 12.0,
        "cutoff_qint": 12.0,
        "cutoff_aeaint": 12.0,
        "cutoff_aint": 12.0,
        "max_neighbors": 30,
        "max_neighbors_qint": 8,
        "max_neighbors_aeaint": 20,
        "max_neighbors_aint": 1000,
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

# Table 7 has the same rate. Warm-up, decay factor and batch size are not in it: those of PaiNN.
_GEMNET_COLL: Layer = _PAINN_COLL

_GEMNET_OC20: Layer = {
    "optimizer": {"name": "adamw", "lr": 5e-4, "amsgrad": True},
    "schedule": {"name": "plateau"},
    "loss": _LOSS,
    "ema": 0.999,
    "clip_norm": 10.0,
    "training": {"batch_size": 32},
}

_COLL: dict[str, Preset] = {
    "schnet": Preset(_schnet(128, 128, 6, 50, 12.0), _SCHNET_COLL, epochs=500),
    "painn": Preset(_painn(256, 6), _PAINN_COLL, epochs=375),
    "painn-small": Preset(_painn(128, 4), _PAINN_COLL, epochs=375),
    "gemnet-oc": Preset(_gemnet_oc(128, 256, 4), _GEMNET_COLL, epochs=165),
    # Published for OC20 only: its sizes, trained as GemNet-OC is on COLL.
    "gemnet-oc-small": Preset(_gemnet_oc(128, 256, 3), _GEMNET_COLL, epochs=165),
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
    "gemnet-oc-oc20": Preset(_gemnet_oc(256, 512, 4), _GEMNET_OC20, epochs=80),
    "gemnet-oc-small-oc20": Preset(_gemnet_oc(128, 256, 3), _GEMNET_OC20, epochs=9),
}


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}: {did_you_mean(name, PRESETS)}.")
    return PRESETS[name]
