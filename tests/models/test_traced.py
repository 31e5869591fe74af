"""A traced model: the same numbers and gradients as the model itself, for batches of any size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.models import Model, build_model
from kdcache.models import traced as traced_module
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Taps
from kdcache.models.traced import TracedModel
from kdcache.structures import Batch, ModelOutput
from kdcache.taps import Tap
from tests.models.cases import crystal, make_batch, molecule

SMALL = {
    "painn": {"name": "painn", "hidden_channels": 8, "num_layers": 2, "num_rbf": 4},
    "schnet": {"name": "schnet", "hidden_channels": 8, "num_filters": 8, "num_interactions": 2},
}
MODELS = {
    "direct": SMALL["painn"],
    "gradient": {**SMALL["painn"], "direct_forces": False},
    "bessel": {**SMALL["painn"], "direct_forces": False, "rbf": "spherical_bessel"},
    "schnet": SMALL["schnet"],
}
SIZES = (
    [molecule(5)] * 4,
    [molecule(6), molecule(4), crystal(), molecule(1), molecule(7)],
    [molecule(3), molecule(8)],
    [molecule(9)],
    [crystal(), molecule(2), molecule(9)] * 3,
)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces are computed as they are: a compiler takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda graph, *, dynamic: graph)


def potential(name: str) -> Potential:
    torch.manual_seed(0)
    model = build_model(MODELS[name], seed=1).to(torch.float64)
    return Potential(model, Normalizer(energy_scale=2.0, energy_shift=0.5), {})


def loss(output: ModelOutput) -> Tensor:
    everything = (output.energy, output.forces, *output.features.values())
    return torch.stack([values.square().mean() for values in everything]).sum()


def batches(rule: Model | Potential) -> Iterator[Batch]:
    return (make_batch(structures, rule.graph_rule) for structures in SIZES)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_models_for_all_sizes(name: str) -> None:
    eager = potential(name)
    other = copy.deepcopy(eager)
    traced = TracedModel(other, other.model)
    for batch in batches(eager):
        expected, found = eager(batch), traced(batch)
        assert found.features.keys() == expected.features.keys()
        torch.testing.assert_close(found.energy, expected.energy)
        torch.testing.assert_close(found.forces, expected.forces)
        eager.zero_grad()
        other.zero_grad()
        loss(expected).backward()  # type: ignore[no-untyped-call]
        loss(found).backward()  # type: ignore[no-untyped-call]
        for one, two in zip(eager.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)


def test_one_graph_serves_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    compiler = torch.compile

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def compiled(graph: torch.fx.GraphModule, *, dynamic: bool) -> Callable[..., object]:
        return compiler(graph, backend=keep, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compiled)
    eager = potential("gradient")
    traced = TracedModel(eager, eager.model)
    for batch in batches(eager):
        torch.testing.assert_close(traced(batch).forces, eager(batch).forces)
        # A batch of one structure is torch's own exception: it makes a second graph for that.
        assert len(graphs) == (2 if batch.n_structures == 1 or len(graphs) == 2 else 1)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", MODELS)
def test_predictions_need_no_graph_and_have_a_trace_of_their_own(
    name: str,
) -> None:
    eager = potential(name)
    traced = TracedModel(eager, eager.model)
    for batch in batches(eager):
        expected, found = eager.predict(batch), eager.predict(batch, traced)
        torch.testing.assert_close(found.energy, expected.energy)
        torch.testing.assert_close(found.forces, expected.forces)
        torch.testing.assert_close(found.atomic_energy, expected.atomic_energy)
        assert not found.forces.requires_grad
    assert traced(batch).energy.requires_grad


@pytest.mark.usefixtures("uncompiled")
def test_weights_may_change_after_the_trace() -> None:
    eager = potential("gradient")
    traced = TracedModel(eager, eager.model)
    batch = make_batch([molecule(5), molecule(4)], eager.graph_rule)
    before = traced(batch).energy.detach()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(1.5)
    found = traced(batch)
    assert not torch.allclose(found.energy, before)
    torch.testing.assert_close(found.forces, eager(batch).forces)


@pytest.mark.usefixtures("uncompiled")
def test_taps_are_traced() -> None:
    eager = potential("gradient")
    taps = Taps(eager.model, [Tap.parse("node/a=message_layers.0")])

    def tapped(batch: Batch) -> ModelOutput:
        with taps as listening:
            output: ModelOutput = eager(batch)
            return replace(output, features=output.features | listening.outputs(batch))

    traced = TracedModel(tapped, eager.model)
    for batch in batches(eager):
        torch.testing.assert_close(
            traced(batch).features["node_a"], tapped(batch).features["node_a"]
        )


@pytest.mark.usefixtures("uncompiled")
def test_what_autocast_does_is_in_the_trace() -> None:
    eager = potential("gradient").float()
    traced = TracedModel(eager, eager.model)
    batch = make_batch([molecule(5), molecule(4)], eager.graph_rule, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = eager(batch), traced(batch)
    assert found.energy.dtype == torch.float32
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.forces, expected.forces)
    torch.testing.assert_close(found.features, expected.features)


@pytest.mark.usefixtures("uncompiled")
def test_detachments_of_autograd_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced_module, "_let_gradients_through", lambda graph: None)
    eager = potential("gradient")
    batch = make_batch([molecule(5), molecule(4)], eager.graph_rule)
    with pytest.raises(
        ConfigError, match=r"painn is to be compiled, and what comes of it has other grad"
    ):
        TracedModel(eager, eager.model)(batch)


def _by_length(batch: Batch, energy: Tensor) -> Tensor:
    return energy * len(batch.positions)


def _by_value(batch: Batch, energy: Tensor) -> Tensor:
    return energy * 2 if energy.sum() > 0 else energy


def _by_first(batch: Batch, energy: Tensor) -> Tensor:
    return energy + batch.positions[: len(batch.cell)].sum(dim=1)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_by_length, "what comes of it has other outputs than it"),
        (_by_value, "it cannot be traced"),
        (_by_first, "its trace fits one size of batch only"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    change: Callable[[Batch, Tensor], Tensor], message: str
) -> None:
    eager = potential("direct")

    def changed(batch: Batch) -> ModelOutput:
        output: ModelOutput = eager(batch)
        return replace(output, energy=change(batch, output.energy))

    batch = make_batch([molecule(5), molecule(4)], eager.graph_rule)
    with pytest.raises(ConfigError, match=rf"painn is to be compiled, and {message}.*compile out"):
        TracedModel(changed, eager.model)(batch)


def test_a_model_that_counts_what_it_finds_is_refused_at_once() -> None:
    model = build_model({"name": "gemnet-oc"})
    with pytest.raises(ConfigError, match=r"gemnet-oc is to be compiled.*depends on the struct"):
        TracedModel(model, model)
