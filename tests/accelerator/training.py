"""The step of training, whole, on the pretend device: a real trainer over a real store."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kdcache.progress import silent
from kdcache.store import open_store
from kdcache.stream.loader import Loader
from kdcache.stream.transfer import on_device, pinning
from kdcache.train import Trainer
from tests.accelerator import pretend
from tests.chain import PAINN, SCHNET, student

DIRECT = {**PAINN, "num_layers": 1}
GRADIENT = {**DIRECT, "direct_forces": False}
TAPPED = "terms=[{name: t, student: node/a=message_layers.0, teacher: node, loss: cka}]"
RUNS: dict[str, tuple[Mapping[str, object], str, tuple[str, ...]]] = {
    "bf16": (DIRECT, "n2n+v2v+vanilla1+vanilla2", ("training.precision=bf16", "ema=0.99")),
    "bf16, gradient forces": (GRADIENT, "n2n+v2v", ("training.precision=bf16",)),
    "schnet": (SCHNET, "annealed:n2n+vanilla2", ("schedule.name=cosine", "clip_norm=null")),
    "gradient forces": (GRADIENT, "born-again", ("optimizer.weight_decay=0.01", "ema=0.9")),
    "a tap": (DIRECT, "control", (TAPPED, "schedule.name=multi_step", "optimizer.amsgrad=true")),
    "float64": (DIRECT, "hipnn", ("training.precision=float64", "optimizer.name=adam")),
}
STEPS = 2


def steps(case: str, store: Path) -> None:
    model, strategy, settings = RUNS[case]
    config = student(*settings, f"training.device={pretend.NAME}", strategy=strategy, model=model)
    opened = open_store(store)
    with TemporaryDirectory() as run, pretend.WithoutMemory():
        trainer = Trainer(opened, Path(run), config, Path(run) / "graph", silent)
        assert trainer.device.type == pretend.NAME
        with Loader(trainer.stream, finish=pinning(trainer.device)) as loader:
            batches = on_device(loader, trainer.device, trainer.dtype)
            with pretend.Watch():
                for batch in islice(batches, STEPS):
                    trainer._take_step(batch)
    assert trainer.step == STEPS
    assert trainer._summed["loss"] == STEPS
    check_devices(trainer)


def resumes(store: Path) -> None:
    """From a state of a CPU: all that a step adds to comes to the device."""
    settings, opened = ("ema=0.9", "optimizer.amsgrad=true"), open_store(store)
    with TemporaryDirectory() as run:
        directory = Path(run)
        config = student(*settings, strategy="n2n", model=DIRECT)
        begun = Trainer(opened, directory, config, directory / "graph", silent)
        with Loader(begun.stream) as loader:
            for batch in islice(loader, STEPS):
                begun._take_step(batch.to("cpu", begun.dtype))
        with pretend.WithoutMemory():
            config = student(
                *settings, f"training.device={pretend.NAME}", strategy="n2n", model=DIRECT
            )
            trainer = Trainer(opened, directory, config, directory / "graph", silent)
            trainer.restore(begun.state())
            with Loader(trainer.stream, start_step=STEPS) as loader:
                batches = on_device(loader, trainer.device, trainer.dtype)
                with pretend.Watch():
                    trainer._take_step(next(batches))
    assert trainer.step == STEPS + 1
    check_devices(trainer)


def check_devices(trainer: Trainer) -> None:
    """All that a step reads and writes."""
    state = trainer.optimizer.state
    assert len(state) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    held = [t for values in state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    held += [*trainer.average._average, *trainer.potential.buffers(), *trainer.terms.buffers()]
    held += [*trainer.parameters, *trainer._sums.values()]
    assert {tensor.device.type for tensor in held} == {pretend.NAME}


CHECKS: dict[str, tuple[object, ...]] = {
    **{f"steps, {case}": (steps, case) for case in RUNS},
    "steps, resumed": (resumes,),
}
