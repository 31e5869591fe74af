from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.errors import ConfigError, ShapeError
from kdcache.models import Model, build_model
from kdcache.models.weights import load_weights
from tests.models.cases import make_batch, molecule

SCHNET = {"name": "schnet", "hidden_channels": 8, "num_filters": 6, "num_interactions": 2}
PAINN = {"name": "painn", "hidden_channels": 8, "num_layers": 2, "num_rbf": 4}


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.proof
@pytest.mark.parametrize("branch", ["main", "distill_branch"])
@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("schnet-coll", "schnet__coll"),
        ("schnet-oc20", "schnet__oc20"),
        ("painn-coll", "painn__coll"),
        ("painn-oc20", "painn__oc20"),
        ("painn-small-coll", "painn_small__coll"),
        ("painn-small-oc20", "painn_small__oc20"),
    ],
)
def test_presets_have_the_published_names_shapes_and_ties(
    shared: Path, branch: str, preset: str, published: str
) -> None:
    model = build_model({"name": preset})
    expected = json.loads((shared / "golden" / "keys" / branch / f"{published}.json").read_text())
    state = model.state_dict(keep_vars=True)
    ours = {name: list(tensor.shape) for name, tensor in state.items()}
    theirs = {name: entry["shape"] for name, entry in expected["keys"].items()}
    if branch == "distill_branch":  # scale factors are in a file of their own there
        ours = {name: s for name, s in ours.items() if not name.endswith("scale_factor")}
    assert ours == theirs
    for first, second in expected["tied_keys"]:
        assert state[first] is state[second]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == expected["num_trainable"]


@pytest.mark.parametrize("half", ["mlp", "conv.nn"])
def test_either_name_of_a_tied_tensor_is_enough(half: str) -> None:
    source, target = build_model(SCHNET, seed=1), build_model(SCHNET, seed=2)
    tensors = {k: v for k, v in weights_of(source).items() if f".{half}." not in k}
    assert load_weights(target, tensors) == []
    batch = make_batch([molecule(4)], source.graph_rule, torch.float32)
    assert torch.equal(target(batch).energy, source(batch).energy)


def test_tied_names_with_different_values_are_refused() -> None:
    tensors = weights_of(build_model(SCHNET))
    tensors["interactions.1.conv.nn.0.weight"] += 1.0
    with pytest.raises(ConfigError, match="are one tensor in the model and differ"):
        load_weights(build_model(SCHNET), tensors)


def test_leftovers_of_training_are_named_and_left_out() -> None:
    tensors = weights_of(build_model(SCHNET))
    extras = {"atomic_mass": torch.ones(100), "n2n_mapping.weight": torch.ones(3, 8)}
    assert load_weights(build_model(SCHNET), {**tensors, **extras}) == list(extras)


def test_missing_scale_factors_become_identity() -> None:
    source, target = build_model(PAINN, seed=1), build_model(PAINN, seed=2)
    target.state_dict()["upd_out_scalar_scale_1.scale_factor"].fill_(0.3)
    tensors = {k: v for k, v in weights_of(source).items() if not k.endswith("scale_factor")}
    load_weights(target, tensors)
    batch = make_batch([molecule(4)], source.graph_rule, torch.float32)
    assert torch.equal(target(batch).energy, source(batch).energy)


def test_weights_of_another_model_are_refused_naming_the_first_difference() -> None:
    tensors = weights_of(build_model(PAINN))
    with pytest.raises(ConfigError, match=r"hold message_layers\.1\..*which the model has not"):
        load_weights(build_model({**PAINN, "num_layers": 1}), tensors)
    with pytest.raises(ConfigError, match=r"lack message_layers\.2\."):
        load_weights(build_model({**PAINN, "num_layers": 3}), tensors)
    with pytest.raises(ShapeError, match=r"is \[100, 8\] in the weights and \[100, 16\] in the mo"):
        load_weights(build_model({**PAINN, "hidden_channels": 16}), tensors)
