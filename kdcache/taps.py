"""How a feature from inside a model is named: `kind/name=path`, as in `node/msg2=message_layers.2`.

Notation only, no torch; listening to a module is `kdcache.models.taps`'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from kdcache.errors import ConfigError, did_you_mean

TapKind = Literal["node", "vector", "edge"]
KINDS: tuple[TapKind, ...] = get_args(TapKind)
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
        if kind not in KINDS:
            hint = did_you_mean(kind, KINDS)
            raise ConfigError(f"tap {text!r} has unknown kind {kind!r}: {hint}.")
        return cls(cast(TapKind, kind), found["name"], found["path"])
