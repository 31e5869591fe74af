"""Autocast of a backend that has none, by the lists of operations that torch uses for CUDA.

The lists stand in a header that torch is shipped with, so they are those of the version installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
KEY = "AutocastPrivateUse1"
# Of CUDA alone, beside the lists: aten/src/ATen/autocast_mode.cpp.
CUDA_PROMOTES = ("cat", "stack")
_KEPT: list[torch.library.Library] = []

Overload = Callable[..., Any]


def listed(macro: str) -> list[Any]:
    """Operations of one list of the header."""
    text = HEADER.read_text().partition(f"#define {macro}(_)")[2].partition("\n\n")[0]
    found = re.findall(r"_\((\w+)(?:, (\w+))?\)", text)
    operations = (getattr(torch.ops.aten, name, None) for name, _ in found)
    return [
        getattr(operation, overload or "default")
        for operation, (_, overload) in zip(operations, found, strict=True)
        if operation is not None and (overload or "default") in operation.overloads()
    ]


def register(device: str) -> None:
    """Give the operations of a backend's autocast key what CUDA's do."""
    every, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _KEPT.extend([every, library])
    every.fallback(torch.library.fallthrough_kernel, KEY)
    policies: dict[Any, Callable[..., Any]] = {}
    for operation in listed("AT_FORALL_LOWER_PRECISION_FP"):
        policies[operation] = partial(_in, torch.bfloat16)
    for operation in listed("AT_FORALL_FP32"):
        policies[operation] = partial(_in, torch.float32)
    for operation in listed("AT_FORALL_FP32_SET_OPT_DTYPE"):
        policies[operation] = _gives_float32
    promoted = [getattr(torch.ops.aten, name).default for name in CUDA_PROMOTES]
    for operation in (*listed("AT_FORALL_PROMOTE"), *promoted):
        policies[operation] = _in_widest
    assert len(policies) > 90, "the header reads otherwise"

    def eligible(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.device.type == device
            and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        )

    for operation, policy in policies.items():
        library.impl(operation, partial(_outside, policy, operation, eligible), KEY)


def _outside(policy: Any, operation: Any, eligible: Any, *args: Any, **kwargs: Any) -> Any:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
    with torch._C._ExcludeDispatchKeyGuard(key):
        return policy(operation, eligible, args, kwargs)


def _in(dtype: torch.dtype, operation: Any, eligible: Any, args: Any, kwargs: Any) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if eligible(value) else value

    args, kwargs = pytree.tree_map((cast), (args, kwargs))
    return operation(*args, **kwargs)


def _gives_float32(operation: Any, eligible: Any, args: Any, kwargs: Any) -> Any:
    if eligible(args[0]) and kwargs.get("dtype") is None:
        kwargs = {**kwargs, "dtype": torch.float32}
    return operation(*args, **kwargs)


def _in_widest(operation: Any, eligible: Any, args: Any, kwargs: Any) -> Any:
    dtypes = [leaf.dtype for leaf in pytree.tree_leaves((args, kwargs)) if eligible(leaf)]
    widest = torch.float32 if torch.float32 in dtypes else torch.bfloat16
    return _in(widest, operation, eligible, args, kwargs)
