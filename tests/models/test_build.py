from __future__ import annotations

import pytest

from kdcache.errors import ConfigError
from kdcache.models import build_model
from kdcache.models.painn import PaiNN
from kdcache.models.presets import PRESETS


def test_what_a_card_says_builds_the_same_model() -> None:
    model = build_model({"name": "painn", "hidden_channels": 10, "rbf": "bernstein", "num_rbf": 5})
    again = build_model({"name": model.name, **model.hyperparameters.model_dump()}, seed=0)
    assert again.hyperparameters == model.hyperparameters
    assert str(again) == str(model)


def test_a_preset_builds_its_model_and_anything_laid_over_it_wins() -> None:
    model = build_model({"name": "painn-small", "num_rbf": 16})
    assert isinstance(model, PaiNN)
    assert model.name == "painn"
    sizes = model.hyperparameters
    assert (sizes.hidden_channels, sizes.num_layers, sizes.num_rbf) == (128, 4, 16)


def test_a_models_own_name_means_its_defaults_not_the_preset() -> None:
    assert build_model({"name": "painn"}).graph_rule.cutoff == 5.0
    assert PRESETS["painn"].model["cutoff"] == 12.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a name"),
        ({"name": "pain"}, r"did you mean painn\?"),
        ({"name": "painn", "hidden_chanels": 3}, r"did you mean hidden_channels\?"),
        ({"name": "painn", "hidden_channels": 7}, "hidden_channels = 7: .*multiple of 2"),
        ({"name": "painn", "hidden_channels": "wide"}, "hidden_channels = 'wide'"),
        ({"name": "painn", "rbf": "bernstein", "num_rbf": 200}, "bernstein takes at most 128"),
        ({"name": "painn", "rbf": "gausian"}, "rbf = 'gausian'"),
        ({"name": "schnet", "max_neighbors": 0}, "max_neighbors = 0"),
        ({"name": "json:loads"}, "would run its code"),
    ],
)
def test_wrong_configurations_are_one_line(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build_model(config)
    assert "\n" not in str(raised.value)


def test_an_import_path_must_lead_to_a_model() -> None:
    found = build_model({"name": "kdcache.models.painn:PaiNN", "num_layers": 1}, allow_import=True)
    assert isinstance(found, PaiNN)
    with pytest.raises(ConfigError, match=r"not a kdcache\.models\.Model"):
        build_model({"name": "json:loads"}, allow_import=True)
