"""Features from inside a model, by the path of the module that makes them.

How a tap is written is `kdcache.taps`'. Invariant: tapping changes nothing of what the model
computes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.structures import Batch
from kdcache.taps import KINDS, Tap, TapKind

__all__ = ["Tap", "Taps", "block_taps", "tap_spec"]


class Taps:
    """Taps on one model; within the context they hold what the last forward pass made.

    A module that runs several times in a pass gives its last output; if it runs on pieces of the
    edges, all of them.

    Args:
        model: whose modules the paths name.
        taps: with fields that differ.

    Raises:
        ConfigError: a path that names no module, or two taps of one field.

    Example:
        >>> with Taps(model, [Tap.parse("node/first=update_layers.0")]) as tapped:  # doctest: +SKIP
        ...     model(batch)
        ...     tapped.outputs(batch)["node_first"]
    """

    def __init__(self, model: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)
        modules = dict(model.named_modules())
        del modules[""]
        fields: set[str] = set()
        for tap in self.taps:
            if tap.path not in modules:
                raise ConfigError(
                    f"tap {tap.field} names {tap.path!r}, which is no module of the model: "
                    f"{_nearest(tap.path, modules)}"
                )
            if tap.field in fields:
                raise ConfigError(f"two taps fill {tap.field}. Give one of them another name.")
            fields.add(tap.field)
        self._modules = {tap.path: modules[tap.path] for tap in self.taps}
        self._handles: list[RemovableHandle] = []
        self._captured: dict[str, list[object]] = {}

    def __enter__(self) -> Self:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._keep(path)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._captured.clear()

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the taps caught, by field, still part of the model's graph.

        Args:
            batch: of the forward pass.

        Raises:
            ConfigError: a module that did not run, or returned no tensor of the tap's kind.
        """
        return {tap.field: self._choose(tap, batch) for tap in self.taps}

    def _choose(self, tap: Tap, batch: Batch) -> Tensor:
        if tap.path not in self._captured:
            raise ConfigError(
                f"tap {tap.field}: {tap.path} did not run in the forward pass. "
                "Tap a module that the model calls as a whole."
            )
        outputs = self._captured[tap.path]
        found = list(_tensors(outputs[-1]))
        for tensor in (*found, *_joined(outputs)):
            if _fits(tap.kind, tensor, batch):
                return tensor
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found) or "no tensor"
        raise ConfigError(
            f"tap {tap.field}: {tap.path} returned {shapes}, and {tap.kind} needs "
            f"{_wanted(tap.kind, batch)}. Tap another module, or as another kind."
        )

    def _keep(self, path: str) -> _Keep:
        return _Keep(self._captured, path)


def tap_spec(tap: Tap, width: int, dtype: str) -> FieldSpec:
    """The field a tap fills.

    Args:
        tap: of any kind.
        width: channels.
        dtype: of the model's numbers.
    """
    vector = tap.kind == "vector"
    return FieldSpec(
        tap.field,
        "edge" if tap.kind == "edge" else "atom",
        (3, width) if vector else (width,),
        dtype,
        symmetry="vector" if vector else "invariant",
    )


def block_taps(model: nn.Module, run: Callable[[], object], batch: Batch) -> tuple[Tap, ...]:
    """A tap on everything that each block of a model returns: what stands in its lists of modules.

    Args:
        model: with its blocks in lists right below it, as message_layers.0, message_layers.1, …
        run: a forward pass of the model over `batch`.
        batch: whose counts of atoms and edges differ, or kinds would be mistaken.

    Returns:
        In the order they ran: node, vector and edge taps named by their path. A block that
        returns several of one kind gives its first.
    """
    blocks = {
        f"{name}.{k}": block
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList)
        for k, block in child.named_children()
    }
    captured: dict[str, list[object]] = {}
    handles = [block.register_forward_hook(_Keep(captured, path)) for path, block in blocks.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(
        Tap(kind, re.sub(r"[^a-z0-9]+", "_", path.lower()), path)
        for path, outputs in captured.items()
        for kind in KINDS
        if any(_fits(kind, tensor, batch) for tensor in _tensors(outputs[-1]))
    )


@dataclass(frozen=True, slots=True)
class _Keep:
    """A forward hook that keeps the module's outputs."""

    captured: dict[str, list[object]]
    path: str

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        self.captured.setdefault(self.path, []).append(output)


def _nearest(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest modules, or what stands on the first level: all would be hundreds."""
    near = difflib.get_close_matches(path, modules, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"Its parts are {', '.join(name for name in modules if '.' not in name)}."


def _joined(outputs: Sequence[object]) -> Iterator[Tensor]:
    """What a module made of one piece of the edges after the other, as one tensor."""
    pieces = [output for output in outputs if isinstance(output, Tensor)]
    if 1 < len(pieces) == len(outputs) and len({piece.shape[1:] for piece in pieces}) == 1:
        yield torch.cat(pieces)


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, dict):
        for part in output.values():
            yield from _tensors(part)


def _fits(kind: TapKind, tensor: Tensor, batch: Batch) -> bool:
    if kind == "vector":
        return tensor.ndim == 3 and tensor.shape[:2] == (batch.n_atoms, 3)
    rows = batch.n_edges if kind == "edge" else batch.n_atoms
    return tensor.ndim == 2 and len(tensor) == rows and tensor.is_floating_point()


def _wanted(kind: TapKind, batch: Batch) -> str:
    if kind == "vector":
        return f"[{batch.n_atoms}, 3, channels]"
    rows = batch.n_edges if kind == "edge" else batch.n_atoms
    return f"[{rows}, channels]"
