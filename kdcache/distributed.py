"""Several processes that train one student: who is here, sums over all, one before the others.

Started by torchrun, gloo between CPUs and NCCL between GPUs. Every process takes part in every
call, in the same order; with one process nothing is sent and nothing changes.
Invariant: weights are bitwise the same on every process, since all of them apply the same sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcache.config import TrainingConfig
from kdcache.errors import ConfigError, TrainingError, reason_of

# A process that is stuck, not gone: a lost connection is noticed at once.
STEP_TIMEOUT = timedelta(minutes=30)
# Neighbour lists of millions of structures, or a validation, while the others wait.
WAIT_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        local_rank: of this process on its machine.
        waiting: group that waits long, on the CPU; None with one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    waiting: Any = field(default=None, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and shows what the run has to say."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device of this process: with several of them, a GPU each.

        Args:
            name: as configured.

        Raises:
            ConfigError: several processes, and one GPU named for all.
        """
        if self.size == 1 or name not in ("auto", "cuda"):
            if self.size > 1 and name.startswith("cuda"):
                raise ConfigError(
                    f"training.device is {name}, one GPU for {self.size} processes. Say cuda: each "
                    f"process takes the GPU of its number."
                )
            return name
        return f"cuda:{self.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def check_batches(self, settings: TrainingConfig, fewest: int) -> None:
        """Refuse batches that the processes cannot share.

        Args:
            settings: what batches are made by.
            fewest: structures that the smallest batch has for certain.

        Raises:
            ConfigError: a number of structures that is no multiple of the processes', or batches
                that may have none for one of them.
        """
        limited = settings.max_atoms is not None or settings.max_edges is not None
        size = settings.batch_size
        if size % self.size and not limited:
            near = max(size // self.size, 1) * self.size
            raise ConfigError(
                f"training.batch_size is {size}, of all processes together, and {self.size} of "
                f"them cannot share it equally: some would wait at every step. Say {near}, or "
                f"start another number of processes."
            )
        if fewest < self.size:
            raise ConfigError(
                f"A batch may have only {fewest} structures, and there are {self.size} processes: "
                f"some would have nothing to do. Make batches larger (training.max_atoms, "
                f"max_edges or batch_size), or start fewer processes."
            )

    def shares(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a mean over all processes each local mean makes up.

        Args:
            counts: by name, what the local mean was divided by, a scalar, 0 for nothing.

        Returns:
            By name, local count over the sum of all; 0 where nothing counts anywhere. The sum over
            processes of share times local mean is the mean of the whole.
        """
        totals = self.totals(counts)
        return {
            name: count / torch.where(totals[name] > 0, totals[name], torch.ones_like(count))
            for name, count in counts.items()
        }

    def totals(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scalars by name, summed over all processes; the names are the same on each."""
        if self.size == 1 or not values:
            return dict(values)
        summed = torch.stack(list(values.values()))
        with _together():
            dist.all_reduce(summed)
        return dict(zip(values, summed.unbind(), strict=True))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all gradients, in one message.

        A parameter without a gradient on any process stays without, so that an optimizer skips it
        as in a run of one process.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # On the CPU: asked of a GPU, the answer would have to be waited for.
        has = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        with _together():
            dist.all_reduce(has, dist.ReduceOp.MAX)
        moved = [p for p, anywhere in zip(trained, has.tolist(), strict=True) if anywhere]
        if not moved:
            return
        for parameter in moved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _together():
            dist.all_reduce(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        summed = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, summed)

    def from_first(self, value: float) -> float:
        """The first process's value, waited for however long it takes."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        with _together():
            dist.broadcast(told, 0, group=self.waiting)
        return float(told)

    def check_same(self, value: int, what: str) -> None:
        """Refuse to go on where a process has another value than the first.

        Raises:
            TrainingError: naming both.
        """
        first = int(self.from_first(value))
        if first != value:
            raise TrainingError(
                f"Process {self.rank} finds {what} {value}, process 0 {first}: they would train "
                f"two models. Put the run where every machine sees the same files."
            )

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first process runs the block alone, so that the others find what it wrote."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            with _together():
                dist.barrier(group=self.waiting)


ALONE = World()


def launched() -> World:
    """The processes that torchrun started this one among, or that a script connected; else one."""
    if not dist.is_available():
        return ALONE
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        return World(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    if dist.is_torchelastic_launched():
        rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return World(rank, size, local)
    return ALONE


@contextmanager
def connected(world: World, device: torch.device) -> Iterator[World]:
    """The processes able to talk to each other, until the block ends.

    A process that leaves with an error ends the others: torchrun stops them, and without it they
    lose the connection, or wait `STEP_TIMEOUT`. What a script connected itself stays connected.

    Args:
        world: as `launched` gave it.
        device: of this process.

    Raises:
        TrainingError: from within, where another process is gone.
    """
    if world.size == 1:
        yield world
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    ours = not dist.is_initialized()
    with _together():
        if ours:
            dist.init_process_group(backend, timeout=STEP_TIMEOUT)
        waiting = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    yield replace(world, waiting=waiting)
    # Not after an error: this waits for the others, who may never come.
    if ours:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TrainingError(
            f"Another process of this run is gone or stuck ({reason_of(error)}). See what it said; "
            f"the same command goes on from the last checkpoint."
        ) from error
