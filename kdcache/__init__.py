"""kdcache: run a large teacher GNN once, keep its features, train small students from them.

Importing the package imports neither torch nor the readers: a store can be read and verified on a
laptop without them.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.ase_calculator import calculator as calculator
    from kdcache.store import open_store as open_store

__version__ = version("kdcache")
__all__ = ["calculator", "open_store"]


def __getattr__(name: str) -> Any:
    if name == "calculator":
        # The module has another name: importing one called calculator would hide the function.
        from kdcache.ase_calculator import calculator

        return calculator
    if name == "open_store":
        from kdcache.store import open_store

        return open_store
    raise AttributeError(f"module kdcache has no attribute {name}")
