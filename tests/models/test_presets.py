from __future__ import annotations

import pytest
import torch

from kdcache.config import load_config
from kdcache.errors import ConfigError
from kdcache.models import build_model
from kdcache.models.presets import PRESETS, find_preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_layer_of_a_configuration(name: str) -> None:
    config = load_config(base=find_preset(name).config())
    # No numbers are needed, and the largest take seconds.
    with torch.device("meta" if "gemnet" in name else "cpu"):
        model = build_model({"name": config.model.name, **config.model.hyperparameters})
    assert name.startswith(model.name)
    assert config.loss.forces_weight.points == ((0.0, 100.0),)


def test_steps_follow_from_epochs_and_the_size_of_the_training_set() -> None:
    config = load_config(base=find_preset("painn-small-coll").config(n_structures=100_000))
    assert config.training.batch_size == 32
    assert config.training.max_steps == 375 * 3125
    assert find_preset("schnet").config(n_structures=1)["training"] == {
        "batch_size": 32,
        "max_steps": 500,
    }


def test_bare_names_mean_coll() -> None:
    for name in ("schnet", "painn", "painn-small"):
        assert PRESETS[name] is PRESETS[f"{name}-coll"]


def test_published_rates() -> None:
    """Ekström Kelvinius et al. 2023, Tables 5 and 6."""
    table = {
        "schnet-oc20": (1e-4, 192, 31250, [52083, 83333, 104166]),
        "painn-oc20": (1e-4, 32, 0, [160000, 320000, 480000, 640000]),
        "painn-small-coll": (1e-3, 32, 3750, []),
    }
    for name, (lr, batch_size, warmup, milestones) in table.items():
        config = load_config(base=find_preset(name).config())
        assert config.optimizer.lr == lr
        assert config.training.batch_size == batch_size
        assert config.schedule.warmup == warmup
        assert list(getattr(config.schedule, "milestones", [])) == milestones


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean painn-small\?"):
        find_preset("painn_small")
