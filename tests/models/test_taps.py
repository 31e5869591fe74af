from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.models import Model, build_model
from kdcache.models.taps import Tap, Taps, block_taps, tap_spec
from kdcache.structures import Batch
from tests.models.cases import make_batch, molecule

PAINN = {"name": "painn", "hidden_channels": 8, "num_layers": 3, "num_rbf": 4}
SCHNET = {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 2}


@pytest.fixture
def model() -> Model:
    return build_model(PAINN).double()


@pytest.fixture
def batch(model: Model) -> Batch:
    return make_batch([molecule(4), molecule(5)], model.graph_rule)


def test_notation_names_kind_field_and_path() -> None:
    tap = Tap.parse("vector/upd1=update_layers.1")
    assert tap == Tap("vector", "upd1", "update_layers.1")
    assert tap.field == "vector_upd1"


@pytest.mark.parametrize("text", ["msg=message_layers.2", "node/msg", "node/=x", "node/A=x", ""])
def test_another_notation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not written kind/name=path"):
        Tap.parse(text)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean node"):
        Tap.parse("nodes/a=message_layers.0")


def test_the_tensor_of_the_kind_is_taken_from_what_a_module_returns(
    model: Model, batch: Batch
) -> None:
    taps = [
        Tap.parse("node/last=update_layers.2"),
        Tap.parse("vector/last=update_layers.2"),
        Tap.parse("edge/filters=message_layers.1.rbf_proj"),
    ]
    plain = model(batch)
    with Taps(model, taps) as tapped:
        output = model(batch)
        found = tapped.outputs(batch)
    assert torch.equal(output.energy, plain.energy)
    assert torch.equal(found["vector_last"], output.features["vector"])
    assert torch.equal(found["node_last"], output.features["node"])  # scale factors are unfitted
    assert found["edge_filters"].shape == (batch.n_edges, 24)


def test_what_is_caught_can_be_trained_through(model: Model, batch: Batch) -> None:
    with Taps(model, [Tap.parse("node/first=message_layers.0")]) as tapped:
        model(batch)
        tapped.outputs(batch)["node_first"].sum().backward()
    assert model.get_parameter("message_layers.0.rbf_proj.weight").grad is not None
    assert model.get_parameter("message_layers.1.rbf_proj.weight").grad is None


def test_outside_the_context_nothing_listens(model: Model, batch: Batch) -> None:
    taps = Taps(model, [Tap.parse("node/first=message_layers.0")])
    with taps:
        model(batch)
    model(batch)
    with pytest.raises(ConfigError, match="did not run"):
        taps.outputs(batch)
    with taps as tapped:  # and it can be entered again
        model(batch)
        assert tapped.outputs(batch).keys() == {"node_first"}


def test_unknown_path_suggests_the_nearest(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"did you mean message_layers\.2 or .*\.0\?$"):
        Taps(model, [Tap.parse("node/a=message_layer.2")])


def test_a_path_like_no_other_lists_the_first_level_alone(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"Its parts are atom_emb, .*out_forces\.$") as caught:
        Taps(model, [Tap.parse("node/a=zzz")])
    assert "message_layers.0" not in str(caught.value)


def test_two_taps_of_one_field_are_refused(model: Model) -> None:
    taps = [Tap.parse("node/a=message_layers.0"), Tap.parse("node/a=message_layers.1")]
    with pytest.raises(ConfigError, match="two taps fill node_a"):
        Taps(model, taps)


def test_a_module_without_a_tensor_of_the_kind_is_refused(model: Model, batch: Batch) -> None:
    with Taps(model, [Tap.parse("vector/a=atom_emb")]) as tapped:
        model(batch)
        with pytest.raises(ConfigError, match=r"returned \[9, 8\], and vector needs \[9, 3, chan"):
            tapped.outputs(batch)


def test_tensors_are_found_in_nested_outputs(model: Model, batch: Batch) -> None:
    class Nested(nn.Module):
        def forward(self, node: Tensor, vector: Tensor) -> dict[str, object]:
            return {"count": 3, "features": [node, (vector, None)]}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Nested()

        def forward(self, node: Tensor, vector: Tensor) -> object:
            return self.inner(node, vector)

    features = model(batch).features
    outer = Outer()
    with Taps(outer, [Tap.parse("vector/v=inner"), Tap.parse("node/n=inner")]) as tapped:
        outer(features["node"], features["vector"])
        found = tapped.outputs(batch)
    assert found["vector_v"] is features["vector"]
    assert found["node_n"] is features["node"]


def test_every_block_of_painn_gives_scalars_and_vectors(model: Model, batch: Batch) -> None:
    taps = block_taps(model, lambda: model(batch), batch)
    assert [tap.field for tap in taps] == [
        f"{kind}_{part}_layers_{k}"
        for k in range(3)
        for part in ("message", "update")
        for kind in ("node", "vector")
    ]
    with Taps(model, taps) as tapped:
        output = model(batch)
        found = tapped.outputs(batch)
    for tap in taps:
        spec = tap_spec(tap, 8, "float64")
        assert spec.symmetry == ("vector" if tap.kind == "vector" else "invariant")
        assert found[tap.field].shape == (batch.n_atoms, *spec.shape)
    assert torch.equal(found["vector_update_layers_2"], output.features["vector"])
    assert not torch.equal(found["node_message_layers_0"], found["node_update_layers_0"])


def test_every_interaction_of_schnet_gives_its_increment_and_the_state_after_it() -> None:
    model = build_model(SCHNET).double()
    batch = make_batch([molecule(4), molecule(5)], model.graph_rule)
    taps = block_taps(model, lambda: model(batch), batch)
    assert [tap.path for tap in taps] == [
        "interactions.0", "states.0", "interactions.1", "states.1",
    ]  # fmt: skip
    with Taps(model, taps) as tapped:
        output = model(batch)
        found = tapped.outputs(batch)
        found["node_states_0"].sum().backward()
    assert torch.equal(found["node_states_1"], output.features["node"])
    torch.testing.assert_close(
        found["node_states_0"] + found["node_interactions_1"], found["node_states_1"]
    )
    assert model.get_parameter("embedding.weight").grad is not None
    assert not [key for key in model.state_dict() if key.startswith("states")]
