"""Read what `torch.save` wrote, without running what a stranger put into it.

torch's own restricted loader comes first. Where it refuses a file and the user allows pickles,
objects of unknown classes become inert stand-ins.
Invariant: no name in a file is ever imported because the file holds it.
"""

from __future__ import annotations

import collections
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from kdcache.errors import KdcacheError, TeacherError, reason_of
from kdcache.pickles import ForbiddenGlobalError, Function, Record, refused_name


def read_torch_file(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """What a .pt file holds, tensors on the CPU.

    Args:
        path: a file of `torch.save`, of any version.
        allow_pickle: where torch's restricted loader refuses the file, read it all the same;
            objects of unknown classes become stand-ins without behaviour.

    Raises:
        TeacherError: no such file, a damaged one, one that needs `allow_pickle`, or one that names
            functions no checkpoint needs.
    """
    path = Path(path)
    if not path.is_file():
        raise TeacherError(f"{path} is no file. Check the path.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = refused_name(error)
        if name is None:
            raise _unreadable(path, error) from error
        refusal = error
    # torch raises RuntimeError, EOFError, ValueError, ... on a damaged file.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not allow_pickle:
        raise TeacherError(
            f"{path} holds {name} besides tensors and plain values, so torch's safe loader refuses "
            "it; reading it otherwise means to unpickle, which can run a stranger's code. If you "
            "trust where the file is from, pass --allow-pickle."
        ) from refusal
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Inert)
    except ForbiddenGlobalError as error:
        raise TeacherError(f"{path}: {error}") from error
    except KdcacheError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TeacherError:
    # torch advises to load without its safe loader, which runs what a stranger wrote.
    said = "" if "weights_only" in str(error) else f" ({reason_of(error)})"
    return TeacherError(f"{path} is no complete file of torch.save{said}. Get it again.")


class StandIn(Record):
    """In place of an object whose class is not known, a list or a mapping among others."""

    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...


def _numpy_scalar(dtype: np.dtype[Any], data: bytes) -> object:
    if not isinstance(dtype, np.dtype) or dtype.hasobject:
        raise ForbiddenGlobalError("a numpy scalar of objects")
    return np.frombuffer(data, dtype, 1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles write bytes."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


def _numpy_dtype(name: object, *_: object) -> np.dtype[Any]:
    dtype = np.dtype(str(name))
    if dtype.hasobject:
        raise ForbiddenGlobalError("a numpy dtype of objects")
    return dtype


# What trainers keep beside tensors: numpy's scalars (as metrics), arguments and paths.
ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): Function(_encode),
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): Function(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): Function(torch._utils._rebuild_parameter),
    ("numpy", "dtype"): Function(_numpy_dtype),
    ("numpy.core.multiarray", "scalar"): Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_numpy_scalar),
}
HARMLESS = ("argparse", "collections", "datetime", "pathlib")


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        root = module.partition(".")[0]
        if root in sys.stdlib_module_names and root not in HARMLESS:
            # No trainer keeps these: os.system, builtins.eval, subprocess.Popen, ...
            raise ForbiddenGlobalError(f"{module}.{name}")
        return StandIn


def _load(file: Any, **settings: Any) -> Any:
    return _InertUnpickler(file, **settings).load()


# torch.load takes a module that unpickles.
_Inert = ModuleType("kdcache_inert_pickle")
_Inert.__dict__.update(Unpickler=_InertUnpickler, load=_load)
