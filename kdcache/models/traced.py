"""A forward pass as one list of tensor operations, the derivative for its forces included.

torch.compile differentiates what it compiles once, and a loss on gradient forces needs twice: here
the first derivative becomes operations like any other. Invariant: nothing is computed by compiled
code whose values or gradients were found to be other than the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from kdcache.errors import ConfigError, reason_of
from kdcache.models.interface import Model
from kdcache.models.opaque import hide_sums
from kdcache.structures import Batch, Graph, ModelOutput

INPUTS = (
    "atomic_numbers", "positions", "cell", "pbc", "structure_index", "edge_index", "edge_shift",
    "tags", "fixed",
)  # fmt: skip
# Sizes to trace with. Equal ones would count as one and the same, so they differ, also from 2 and
# 3; each further graph has a few edges more.
EXAMPLE_STRUCTURES, EXAMPLE_ATOMS, EXAMPLE_EDGES, MORE_EDGES = 5, 11, 23, 6
# ‖difference‖ over ‖values‖, output by output and weight by weight.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
TOLERANCE_BF16 = 0.1
# Share of all gradients' norm below which one of them is rounding.
ROUNDING = 1e-5

Arguments = tuple[Tensor, ...]


class TracedModel:
    """What computes a batch, traced at the first one and compiled for batches of any size.

    Once for training, where the caller has gradients enabled, and once for prediction.

    Args:
        compute: energies, forces and features of a batch; nothing in it may depend on values, as
            the length of a list that is found in a tensor does.
        model: whose weights are in it; they are trained where they are.

    Raises:
        ConfigError: a model that cannot be compiled; when called: `compute` cannot be traced, or
            what is compiled differs from it.

    Source: tracing with the derivative, as NequIP 0.7 compiles (Tan et al. 2025).
    """

    def __init__(self, compute: Callable[[Batch], ModelOutput], model: Model) -> None:
        self._compute = compute
        self._name = model.name
        self._parameters = [weight for weight in model.parameters() if weight.requires_grad]
        if not model.compiles:
            raise self._refused("how much it computes depends on the structures")
        self._features: tuple[str, ...] = ()
        self._compiled: dict[bool, Callable[..., tuple[Tensor, ...]]] = {}

    def __call__(self, batch: Batch) -> ModelOutput:
        """As `compute`."""
        names, arguments = _flat(batch)
        learns = torch.is_grad_enabled()
        if learns not in self._compiled:
            compiled = torch.compile(self._trace(names, batch), dynamic=True)
            self._check(compiled, batch, arguments)
            self._compiled[learns] = compiled
        # What autocast made of the operations is in the trace; once more would be once too often.
        with torch.autocast(batch.positions.device.type, enabled=False):
            energy, forces, atomic_energy, *features = self._compiled[learns](*arguments)
        named = dict(zip(self._features, features, strict=True))
        return ModelOutput(energy, forces, atomic_energy, named)

    def _trace(self, names: Sequence[str], batch: Batch) -> GraphModule:
        def compute(*arguments: Tensor) -> tuple[Tensor, ...]:
            output = self._compute(_batch(names, arguments))
            self._features = tuple(output.features)
            return _values(output)

        try:
            graph = make_fx(compute, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                *_example(names, batch)
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._refused(f"it cannot be traced ({reason_of(error)})") from error
        _let_gradients_through(graph)
        hide_sums(graph, with_gradients=torch.is_grad_enabled())
        return graph

    def _check(
        self, compiled: Callable[..., tuple[Tensor, ...]], batch: Batch, arguments: Arguments
    ) -> None:
        """What is compiled gives the model's values and gradients, on a batch of its own sizes."""
        values, gradients = self._differentiated(lambda: _values(self._compute(batch)))
        try:
            with torch.autocast(batch.positions.device.type, enabled=False):
                found, traced = self._differentiated(lambda: compiled(*arguments))
        except RuntimeError as error:
            raise self._refused(
                f"its trace fits one size of batch only ({reason_of(error)})"
            ) from error
        rough = torch.is_autocast_enabled(batch.positions.device.type)
        tolerance = TOLERANCE_BF16 if rough else TOLERANCE.get(batch.positions.dtype, 1e-2)
        for what, expected, actual in (
            ("outputs", values, found),
            ("gradients", gradients, traced),
        ):
            floor = ROUNDING * _norm(expected)
            for one, other in zip(expected, actual, strict=True):
                off = _norm([one - other]) if one.shape == other.shape else float("inf")
                if not off <= tolerance * _norm([one]) + floor:
                    raise self._refused(
                        f"what comes of it has other {what} than it ({off:.2g} off "
                        f"{_norm([one]):.2g}), which would give wrong forces or teach wrongly"
                    )

    def _differentiated(
        self, compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of a random sum of them; none where nothing is learnt."""
        outputs = compute()
        learnt = [output for output in outputs if output.requires_grad]
        if not learnt or not self._parameters or not torch.is_grad_enabled():
            return list(outputs), []
        generator = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in learnt
        ]
        gradients = torch.autograd.grad(learnt, self._parameters, weights, allow_unused=True)
        known = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self._parameters, gradients, strict=True)
        ]
        return [output.detach() for output in outputs], known

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(f"{self._name} is to be compiled, and {why}. Leave compile out.")


def _flat(batch: Batch) -> tuple[list[str], Arguments]:
    """What a model may see of a batch, by name; labels are not for it."""
    tensors = {name: getattr(batch, name) for name in INPUTS}
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, graph in batch.graphs.items():
        found |= {f"edge_index@{name}": graph.edge_index, f"edge_shift@{name}": graph.edge_shift}
    return list(found), tuple(found.values())


def _batch(names: Sequence[str], arguments: Arguments) -> Batch:
    named = dict(zip(names, arguments, strict=True))
    graphs = {
        name.partition("@")[2]: Graph(tensor, named[name.replace("index", "shift", 1)])
        for name, tensor in named.items()
        if name.startswith("edge_index@")
    }
    plain: dict[str, Any] = {name: tensor for name, tensor in named.items() if "@" not in name}
    return Batch(**plain, n_structures=named["cell"].shape[0], graphs=graphs)


def _values(output: ModelOutput) -> tuple[Tensor, ...]:
    return output.energy, output.forces, output.atomic_energy, *output.features.values()


def _example(names: Sequence[str], batch: Batch) -> Arguments:
    """Zeros of the example's sizes; only shapes and dtypes of them are looked at."""
    dtype, device = batch.positions.dtype, batch.positions.device
    n_edges = {name: EXAMPLE_EDGES + k * MORE_EDGES for k, name in enumerate(["", *batch.graphs])}
    structure, atom = (EXAMPLE_STRUCTURES,), (EXAMPLE_ATOMS,)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "atomic_numbers": (atom, torch.int64),
        "positions": ((*atom, 3), dtype),
        "cell": ((*structure, 3, 3), dtype),
        "pbc": ((*structure, 3), torch.bool),
        "structure_index": (atom, torch.int64),
        "tags": (atom, torch.uint8),
        "fixed": (atom, torch.bool),
    }
    for name in names:
        key, _, graph = name.partition("@")
        if key == "edge_index":
            shapes[name] = ((2, n_edges[graph]), torch.int64)
        elif key == "edge_shift":
            shapes[name] = ((n_edges[graph], 3), dtype)
    return tuple(
        torch.zeros(shape, dtype=kind, device=device)
        for shape, kind in (shapes[name] for name in names)
    )


def _let_gradients_through(graph: GraphModule) -> None:
    """Take out what autograd wrote when it kept an output for the derivative: two detachments.

    They stop no gradient where autograd itself differentiates twice, but would here.
    """
    detach = torch.ops.aten.detach.default
    nodes = graph.graph.find_nodes(op="call_function", target=detach)
    for node in nodes:
        (kept,) = node.args
        if kept in nodes:
            node.replace_all_uses_with(kept.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _norm(tensors: Sequence[Tensor]) -> float:
    squares = [tensor.double().square().sum() for tensor in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
