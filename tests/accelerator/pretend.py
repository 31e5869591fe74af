"""A device that is not there, and a watch over what would make a real one wait or fail.

`torch` gives out a name for backends of others, and tensors that have shapes and no memory: models,
losses and optimizers run on it whole, and an operation between two devices is refused as on a GPU.
Invariant: nothing is registered on import; `register` changes the process for good.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import kdcache
from tests.accelerator import autocast

NAME = "pretend"
ROOT = f"{Path(kdcache.__file__).parent}/"


_tensors = FakeTensorMode()
_apply = nn.Module._apply
_aten, _asks_device = torch.ops.aten, torch.ops.prim.device.default
# How many numbers come out, or which, is known to the device alone.
VALUE_DEPENDENT = (
    _aten._local_scalar_dense, _aten.nonzero, _aten._unique2, _aten.unique_dim,
    _aten.unique_consecutive, _aten.masked_select, _aten.bincount, _aten.equal,
)  # fmt: skip
# Kernels of these take one floating dtype, which shapes alone do not ask for.
OF_ONE_DTYPE = (
    _aten.mm, _aten.bmm, _aten.addmm, _aten.index_add, _aten.index_add_, _aten.index_copy,
    _aten.index_copy_, _aten.scatter_add, _aten.scatter_add_, _aten.index_put, _aten.index_put_,
)  # fmt: skip
INDEXED = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)


class _Backend:
    """The module `torch.pretend`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Make the device known to this process, with autocast as on CUDA."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    autocast.register(NAME)
    nn.Module._apply = _applied_once  # type: ignore[method-assign]


def _applied_once(
    self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """A module under two names would be moved twice, which tensors without memory do not bear."""
    for module in self.modules() if recurse else [self]:
        _apply(module, fn, recurse=False)
    return self


def device() -> torch.device:
    """The device, once it is registered."""
    return torch.device(NAME, 0)


class WaitError(Exception):
    """The host would wait for the device here."""


class Told:
    """What a device would tell the host, from a run on the CPU: sizes of results, and numbers.

    Attributes:
        places: module and function that asked, in order.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self._answers: dict[str, list[Any]] = {}

    def note(self, answer: Any) -> None:
        """An answer to who asks now."""
        self.places.append(place())
        self._answers.setdefault(self.places[-1], []).append(answer)

    def next_answer(self, asking: str) -> Any:
        """In the order that each place asked in."""
        return self._answers[asking].pop(0)


class Recorder(TorchDispatchMode):
    """Notes on the CPU what a device would have to tell the host."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _asks(func, args):
            self.told.note(pytree.tree_map_only(Tensor, _shape, result))
        return result


class Watch(TorchDispatchMode):
    """Ends a run at the first operation that would make the host wait for the device.

    That is: reading a number, a result whose size depends on values, a copy to the host, a copy
    from the host that is not asked to be non-blocking, and an operation of tensors of both, which
    copies or fails. Ends it as well where tensors of two dtypes meet that must have one.

    Args:
        told: answers instead of an end, where the code is meant to ask.
        copies: places where copies between host and device are meant to be.

    Attributes:
        waited: where the host waited, of those told and copied.
    """

    def __init__(self, told: Told | None = None, *, copies: Sequence[str] = ()) -> None:
        super().__init__()
        self.waited: list[str] = []
        self._told = told
        self._copies = set(copies)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _asks_device:
            return func(*args, **kwargs)
        devices = _devices((args, kwargs))
        if NAME in devices and _asks(func, args):
            return self._answer(func)
        if NAME in devices and func.overloadpacket in OF_ONE_DTYPE:
            dtypes = {x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point()}
            if len(dtypes) > 1:
                raise TypeError(f"{place()}: {func} of {' and '.join(map(str, dtypes))}")
        copies = func in (_aten._to_copy.default, _aten.copy_.default)
        if len(devices) == 2 and not (copies and _non_blocking(func, args, kwargs)):
            self._copied(f"{func} of tensors on {' and '.join(sorted(devices))}")
        result = func(*args, **kwargs)
        made = _devices(result)
        if NAME in devices and "cpu" in made - devices:
            self._copied(f"{func} brings a tensor to the host")
        if devices == {"cpu"} and NAME in made and not _non_blocking(func, args, kwargs):
            self._copied(f"{func} brings a tensor from the host and waits for it")
        return result

    def _answer(self, func: Any) -> Any:
        here = place()
        if self._told is None:
            raise WaitError(f"{here}: {func} waits for the device")
        self.waited.append(here)
        return pytree.tree_map_only(Tensor, _empty, self._told.next_answer(here))

    def _copied(self, what: str) -> None:
        here = place()
        if here not in self._copies:
            raise WaitError(f"{here}: {what}")
        self.waited.append(here)


class WithoutMemory(TorchDispatchMode):
    """Tensors on the device have shapes alone; those on the CPU are what they are elsewhere.

    What the device would give back to the CPU is zeros.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _asks_device:
            return args[0].fake_device
        devices, wanted = _devices((args, kwargs)), kwargs.get("device")
        if NAME not in devices and (wanted is None or wanted.type != NAME):
            return func(*args, **kwargs)

        def taken(tensor: Tensor) -> Tensor:
            real = not isinstance(tensor, FakeTensor)
            return _tensors.from_tensor(tensor.detach()) if real else tensor

        if "cpu" in devices:
            args, kwargs = pytree.tree_map_only(Tensor, taken, (args, kwargs))
        result = _tensors.__torch_dispatch__(func, types, args, kwargs)
        if "cpu" in _devices(result):
            return pytree.tree_map_only(Tensor, _zeros_on_cpu, result)
        return result


def _zeros_on_cpu(tensor: Tensor) -> Tensor:
    there = tensor.device.type == NAME
    return tensor if there else torch.zeros(tensor.shape, dtype=tensor.dtype)


def recorded(run: Callable[[], object]) -> Told:
    """What `run` asks of the values of tensors, on the CPU."""
    with Recorder() as recorder:
        run()
    return recorder.told


def place() -> str:
    """The innermost function of kdcache that runs, as "models/schnet.py:forward"."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            return f"{code.co_filename.removeprefix(ROOT)}:{code.co_name}"
        frame = frame.f_back
    return "outside"


def _asks(func: Any, args: Any) -> bool:
    packet = func.overloadpacket
    if packet in VALUE_DEPENDENT or func is _aten.repeat_interleave.Tensor:
        return True
    if packet not in INDEXED:
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _devices(tree: Any) -> set[str]:
    # By hand: torch's pytrees take as long as the operation.
    if isinstance(tree, Tensor):
        return {tree.device.type}
    parts = tree.values() if isinstance(tree, dict) else tree
    if not isinstance(tree, tuple | list | dict):
        return set()
    return set().union(*(_devices(part) for part in parts))


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    if func is _aten.copy_.default and len(args) > 2:
        return bool(args[2])
    return bool(kwargs.get("non_blocking", False))


def _shape(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=NAME)
