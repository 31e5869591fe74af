"""Features from inside a model, by the path of the module that makes them.

A tap is written `kind/name=path`, as in `node/msg2=message_layers.2`.
Invariant: tapping changes nothing of what the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, cast, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdcache.errors import ConfigError, did_you_mean
from kdcache.structures import Batch

TapKind = Literal["node", "vector", "edge"]
_NOTATION = re.compile(r"(?P<kind>\w+)/(?P<name>[a-z0-9_]+)=(?P<path>[\w.]+)")


@dataclass(frozen=True, slots=True)
class Tap:
    """One module to listen to.

    Attributes:
        kind: node [n_atoms, C], vector [n_atoms, 3, C] or edge [n_edges, C]; chooses among the
            tensors that the module returns.
        name: lower-case letters, digits and underscores.
        path: of the module, as in `model.named_modules()`.
    """

    kind: TapKind
    name: str
    path: str

    @property
    def field(self) -> str:
        """The name of the field it fills."""
        return f"{self.kind}_{self.name}"

    @classmethod
    def parse(cls, text: str) -> Tap:
        """The tap that `kind/name=path` writes.

        Raises:
            ConfigError: another notation, or an unknown kind.

        Example:
            >>> Tap.parse("node/msg2=message_layers.2").field
            'node_msg2'
        """
        found = _NOTATION.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"tap {text!r} is not written kind/name=path. "
                "Write, for example, node/msg2=message_layers.2."
            )
        kind = found["kind"]
        if kind not in get_args(TapKind):
            hint = did_you_mean(kind, get_args(TapKind))
            raise ConfigError(f"tap {text!r} has unknown kind {kind!r}: {hint}.")
        return cls(cast(TapKind, kind), found["name"], found["path"])


class Taps:
    """Taps on one model; within the context they hold what the last forward pass made.

    A module that runs several times in a pass gives its last output.

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
                    f"{did_you_mean(tap.path, modules)}."
                )
            if tap.field in fields:
                raise ConfigError(f"two taps fill {tap.field}. Give one of them another name.")
            fields.add(tap.field)
        self._modules = {tap.path: modules[tap.path] for tap in self.taps}
        self._handles: list[RemovableHandle] = []
        self._captured: dict[str, object] = {}

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
        found = list(_tensors(self._captured[tap.path]))
        for tensor in found:
            if _fits(tap.kind, tensor, batch):
                return tensor
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found) or "no tensor"
        raise ConfigError(
            f"tap {tap.field}: {tap.path} returned {shapes}, and {tap.kind} needs "
            f"{_wanted(tap.kind, batch)}. Tap another module, or as another kind."
        )

    def _keep(self, path: str) -> _Keep:
        return _Keep(self._captured, path)


@dataclass(frozen=True, slots=True)
class _Keep:
    """A forward hook that keeps the module's output."""

    captured: dict[str, object]
    path: str

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        self.captured[self.path] = output


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
