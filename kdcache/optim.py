"""Optimizers, learning rates and averaged weights.

Owns everything of a step but the gradient; clipping belongs to the training loop.
Invariant: all state is in state dicts, so a resumed run takes bitwise the same steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdcache.config import (
    ConstantRate,
    Cosine,
    LinearWarmupExponentialDecay,
    MultiStep,
    OptimizerConfig,
    Plateau,
    RateSchedule,
)
from kdcache.distill.schedules import Clock
from kdcache.errors import TrainingError


def build_optimizer(
    modules: Iterable[nn.Module], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """An optimizer over all trainable parameters of the modules, shared ones once.

    Args:
        modules: the student and its distillation terms, already on their device.
        settings: weight decay acts on matrices alone, not on biases, norms and scales.
    """
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    optimizer: torch.optim.Optimizer = kind(
        # One group where decay makes no difference: half the kernel launches.
        groups if settings.weight_decay else trained,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        amsgrad=settings.amsgrad,
        # 30 matrices of 24 × 24 on one CPU thread: 0.23 ms a step, 0.70 foreach, 1.36 one by one.
        fused=True,
    )
    return optimizer


class LearningRate:
    """The learning rate of every step: a pure function of it, but for the plateau schedule.

    Args:
        schedule: its kind and numbers.
        peak: the rate that factors multiply.
        clock: what lengths are measured against.

    Raises:
        ConfigError: the schedule counts epochs, and their length is not known.
    """

    def __init__(self, schedule: RateSchedule, peak: float, clock: Clock) -> None:
        self.schedule = schedule
        self.peak = peak
        self.max_steps = clock.max_steps
        self._unit = clock.length(schedule.unit)
        self._plateau_factor = 1.0
        self._best = math.inf
        self._waited = 0

    def at(self, step: int) -> float:
        """The rate of an optimizer step, counted from 0."""
        return self.peak * self.factor(step)

    def factor(self, step: int) -> float:
        """The share of the peak rate.

        Source: linear_warmup_exponential_decay and multi_step are Open Catalyst's, used in
        Ekström Kelvinius et al. 2023, Tables 5 and 6; plateau is torch's ReduceLROnPlateau.
        """
        schedule, unit = self.schedule, self._unit
        warmup = schedule.warmup * unit
        if isinstance(schedule, LinearWarmupExponentialDecay):
            decay = self.max_steps if schedule.decay is None else schedule.decay * unit
            return _rising(step, warmup) * float(schedule.factor ** (step / decay))
        if isinstance(schedule, MultiStep):
            if step < warmup:
                part = step / warmup
                return schedule.warmup_factor * (1 - part) + part
            milestones = [milestone * unit for milestone in schedule.milestones]
            return float(schedule.factor ** bisect_right(milestones, step))
        if isinstance(schedule, Plateau):
            return _rising(step, warmup) * self._plateau_factor
        if isinstance(schedule, Cosine):
            if step < warmup:
                return _rising(step, warmup)
            part = min(1.0, (step - warmup) / max(self.max_steps - warmup, 1))
            cosine = (1 + math.cos(math.pi * part)) / 2
            return schedule.min_factor + (1 - schedule.min_factor) * cosine
        assert isinstance(schedule, ConstantRate)
        return _rising(step, warmup)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give the optimizer the rate of this step, and return it."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def observe(self, metric: float) -> None:
        """Tell the plateau schedule how an evaluation went, lower being better."""
        schedule = self.schedule
        if not isinstance(schedule, Plateau):
            return
        if metric < self._best * (1 - schedule.threshold):
            self._best, self._waited = metric, 0
            return
        self._waited += 1
        if self._waited > schedule.patience:
            lowered = self._plateau_factor * schedule.factor
            self._plateau_factor, self._waited = max(lowered, schedule.min_factor), 0

    def state_dict(self) -> dict[str, float]:
        """Numbers only; `best` is left out before the first evaluation, JSON has no infinity."""
        state = {"plateau_factor": self._plateau_factor, "waited": float(self._waited)}
        return state if math.isinf(self._best) else {**state, "best": self._best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._plateau_factor = state["plateau_factor"]
        self._waited = int(state["waited"])
        self._best = state.get("best", math.inf)


class ExponentialAverage:
    """An exponential moving average of a model's trainable parameters.

    The decay at update n is min(decay, (1 + n) / (10 + n)): a short run is not held back by its
    random start, and from 9,000 updates on 0.999 is 0.999.

    Args:
        model: on its device and in its dtype for good; its parameters are followed.
        decay: 0.999 in the source; None follows nothing, and `swapped` changes nothing.

    Source: Ekström Kelvinius et al. 2023, Table 6; the start as in TensorFlow's
    ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.updates = 0
        # Listed once: walking a model's modules costs as much as the update itself.
        named = _trained(model) if decay is not None else {}
        self._names = list(named)
        self._followed = [parameter.detach() for parameter in named.values()]
        self._average = [parameter.clone() for parameter in self._followed]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model, after an optimizer step."""
        if self.decay is None:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, self._followed, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with averaged parameters inside the block, its own again after it."""
        if self.decay is None:
            yield
            return
        own = [parameter.clone() for parameter in self._followed]
        with torch.no_grad():
            torch._foreach_copy_(self._followed, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._followed, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages by parameter name, and the number of updates under "updates"."""
        named = zip(self._names, self._average, strict=True)
        return {"updates": torch.tensor(self.updates), **{f"average.{k}": v for k, v in named}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`.

        Raises:
            TrainingError: it belongs to a model with other parameters.
        """
        wanted = {"updates", *(f"average.{name}" for name in self._names)}
        if wanted != set(state):
            odd = sorted(wanted ^ set(state))[0]
            raise TrainingError(
                f"The checkpoint's averaged weights have {len(state) - 1} tensors, this model "
                f"{len(self._names)} ({odd} is in one only). Resume with the configuration it had."
            )
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[f"average.{name}"])
        self.updates = int(state["updates"])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    # Tied parameters appear once, under their first name.
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _rising(step: int, warmup: float) -> float:
    """Open Catalyst's linear warm-up: the first step is 1 / warmup, not 0."""
    return min(1.0, (step + 1) / warmup) if warmup > 1 else 1.0
