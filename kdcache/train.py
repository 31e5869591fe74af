"""Train a student (or, without terms, a teacher) from a store.

One straight line: selection, references, model, terms, stream, steps. The terms are trained with
the student and dropped from what is saved for use.
Invariant: a run continued from any checkpoint takes the same steps as one never stopped.
"""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.checkpoint import (
    MODEL_CARD,
    State,
    check_run_directory,
    check_state,
    load_optimizer_state,
    optimizer_state,
    read_json,
    save_potential,
    save_state,
    state_to_go_on_from,
    write_text,
)
from kdcache.config import StudentConfig, dump_config
from kdcache.devices import find_device
from kdcache.distill.binding import required_fields
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.distill.shared import check_shareable, part_counts
from kdcache.distributed import ALONE, World, connected, launched
from kdcache.errors import TrainingError, reason_of
from kdcache.evaluate import Metrics
from kdcache.logbook import Logbook
from kdcache.mixing import (
    Lane,
    check_teachers,
    failing_teachers,
    open_overlays,
    plan_lanes,
    steps_per_epoch,
)
from kdcache.optim import ExponentialAverage, LearningRate, build_optimizer
from kdcache.progress import Progress, silent
from kdcache.selection import select
from kdcache.store import Store, open_store
from kdcache.store.index import INDEX
from kdcache.stream.edges import check_edge_coverage
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import count_edges, further_neighbors, neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.transfer import on_device, pinning
from kdcache.structures import Batch, IntArray
from kdcache.student import build_potential, build_store_terms, stepping_student
from kdcache.validation import Validation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a finished run leaves to report.

    Attributes:
        run: its directory, ready for `load_potential`.
        steps: taken in all.
        seconds: spent stepping, over all parts of the run.
        structures_per_second: trained on, waiting and validation left out.
        validation: errors of the kept model, None without validation structures, and for all but
            the first of several processes.
    """

    run: Path
    steps: int
    seconds: float
    structures_per_second: float
    validation: Metrics | None


def train_student(
    store_path: str | Path,
    run: str | Path,
    config: StudentConfig,
    *,
    graph_cache: Path | None = None,
    stop_after: int | None = None,
    progress: Progress = silent,
) -> TrainingResult | None:
    """Train one model from a store, or go on with a run that was stopped.

    Args:
        store_path: a finished store.
        run: directory of the run; made if missing, gone on with if it holds a checkpoint of the
            same configuration on the same data.
        config: everything that decides the result; without terms this trains on labels alone.
        graph_cache: directory for neighbour lists the store does not keep; default run/graph.
        stop_after: leave after this step with a checkpoint, as a stop by hand would.
        progress: shows steps, rate and loss.

    Returns:
        The result, or None when stopped before the last step.

    Raises:
        TrainingError: nothing to train on, a finished run, another configuration, a loss that is
            not finite.
        ConfigError: a term names a field or a teacher the store does not have.
    """
    run = Path(run)
    check_run_directory(run)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    world = launched()
    device = find_device(world.device_name(config.training.device), "training.device")
    store = open_store(store_path)
    with connected(world, device) as world:
        state = state_to_go_on_from(run, run_identity(config, store), config.training.max_steps)
        world.check_same(state.step if state else 0, f"{run} at step")
        shown = progress if world.is_first else silent
        trainer = Trainer(store, run, config, graph_cache or run / "graph", shown, world)
        run.mkdir(parents=True, exist_ok=True)
        if state is not None:
            trainer.restore(state)
        elif world.is_first:
            # A run killed before its first checkpoint is gone on with, too.
            save_state(run, trainer.state())
        if world.is_first:
            write_text(run / "config.yaml", dump_config(config))
        return trainer.run_steps(stop_after)


def run_identity(config: StudentConfig, store: Store) -> dict[str, str]:
    """What must be the same for a run to be continued.

    Of the store, what the run learns from: a teacher that is added meanwhile changes nothing.
    """
    digest = _learnt_from(config, store)
    for overlay in config.data.overlays:
        whole = digest + open_store(overlay.store).manifest.root_digest
        digest = hashlib.sha256(whole.encode()).hexdigest()
    return {"configuration": dump_config(config), "store": digest}


def _learnt_from(config: StudentConfig, store: Store) -> str:
    teachers = {name.partition("/")[0] for name in required_fields(config.terms, store.teachers)}
    groups = ("structures/", *(f"teachers/{name}/" for name in sorted(teachers)))
    listed = store.manifest.digests
    used = [f"{name} {listed[name]}" for name in sorted(listed) if name.startswith(groups)]
    return hashlib.sha256("\n".join([listed[INDEX], *used]).encode()).hexdigest()


class Trainer:
    """A run in memory: everything between a store and the next step."""

    def __init__(
        self,
        store: Store,
        run: Path,
        config: StudentConfig,
        graph_cache: Path,
        progress: Progress,
        world: World = ALONE,
    ) -> None:
        self.store = store
        self.run = run
        self.config = config
        self.graph_cache = graph_cache
        self.progress = progress
        self.world = world
        training = config.training
        self.device = find_device(world.device_name(training.device), "training.device")
        self.dtype = torch.float64 if training.precision == "float64" else torch.float32
        self.selection = select(store, config.data)
        self.overlays = open_overlays(store, self.selection, config)
        self.potential = build_potential(store, config, self.selection)
        self.lanes = plan_lanes(store, self.selection, self.overlays, config, self._count_edges)
        self.samplers = [lane.sampler for lane in self.lanes]
        clock = Clock(training.max_steps, steps_per_epoch(self.lanes))
        self.potential.to(self.device, self.dtype)
        self.terms = build_store_terms(store, config, self.potential, clock)
        self.terms.to(self.device, self.dtype)
        check_teachers(store, self.overlays, self.terms.required_fields)
        self.terms.expect_missing(failing_teachers([store, *(o.store for o in self.overlays)]))
        self.truth = GroundTruthLoss(config.loss, clock)
        if world.size > 1:
            check_shareable(self.truth, self.terms)
            world.check_batches(config.training, sum(one.fewest for one in self.samplers))
        self.parameters = [*self.potential.parameters(), *self.terms.parameters()]
        self.optimizer = build_optimizer([self.potential, self.terms], config.optimizer)
        self.rate = LearningRate(config.schedule, config.optimizer.lr, clock)
        self.average = ExponentialAverage(self.potential.model, config.ema)
        with world.first_then_others():
            self.reader = self._reader(store, labelled=self.selection.labelled)
            self.stream = [(self._lane_reader(lane), lane.sampler) for lane in self.lanes]
        self.stepped = stepping_student(self.potential, config)
        rows = self.selection.validation
        self.validation = Validation(
            self.potential, self.average, self.reader, rows, config.loss, clock
        )
        self.clock = clock
        self.step = 0
        self.seconds = 0.0
        self.best = float("inf")
        self._sums: dict[str, Tensor] = {}
        self._summed: dict[str, int] = {}

    def run_steps(self, stop_after: int | None) -> TrainingResult | None:
        """All steps that are left, or those up to `stop_after`."""
        settings = self.config.training
        last = settings.max_steps if stop_after is None else min(stop_after, settings.max_steps)
        world = self.world
        with (
            self._logbook() as logbook,
            Loader(
                self.stream,
                start_step=self.step,
                rank=world.rank,
                n_processes=world.size,
                finish=pinning(self.device),
            ) as loader,
            self.progress(f"train {self.run.name}", settings.max_steps, "steps") as advance,
        ):
            advance(self.step)
            started = time.perf_counter()
            batches = on_device(loader, self.device, self.dtype)
            while self.step < last:
                self._take_step(next(batches))
                note = ""
                if self.step % settings.eval_every == 0 or self.step == settings.max_steps:
                    self.seconds += time.perf_counter() - started
                    note = self._evaluate(logbook)
                    started = time.perf_counter()
                advance(1, note=note)
                if self.step % settings.checkpoint_every == 0 or self.step == last:
                    self.seconds += time.perf_counter() - started
                    self._collect()
                    if world.is_first:
                        save_state(self.run, self.state())
                    started = time.perf_counter()
        if self.step < settings.max_steps:
            return None
        return self._finish()

    def _take_step(self, batch: Batch) -> None:
        self.rate.apply(self.optimizer, self.step)
        shares = None
        if self.world.size > 1:
            shares = self.world.shares(part_counts(self.truth, self.terms, batch, self.step))
        with torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.training.precision == "bf16",
        ):
            output = self.stepped(batch)
        loss = self.truth(output, batch, self.step, shares)
        loss += self.terms(output, batch, self.step, shares)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.world.sum_gradients(self.parameters)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
            # Counted one by one: a term whose weight is 0 at a step has no value there.
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._summed[name] = self._summed.get(name, 0) + 1

    def _evaluate(self, logbook: Logbook | None) -> str:
        """Let the first process validate and log while the others wait; the note for the bar."""
        self._collect()
        note, score = ("", 0.0) if logbook is None else self._report(logbook)
        self._sums, self._summed = {}, {}
        score = self.world.from_first(score)
        if len(self.selection.validation):
            self.rate.observe(score)
        return note

    def _report(self, logbook: Logbook) -> tuple[str, float]:
        """Log a row, keep the model if it is the best so far; the note for the bar, the score."""
        row: dict[str, float] = {
            "step": self.step,
            "epoch": self.step / (self.clock.steps_per_epoch or 1),
            "lr": self.rate.at(self.step - 1),
            "seconds": self.seconds,
        }
        means = {name: float(value) / self._summed[name] for name, value in self._sums.items()}
        row |= {f"train_{name}": value for name, value in means.items()}
        row |= {f"lambda_{k}": v for k, v in self.terms.weights(self.step - 1).items()}
        note = f"loss {means['loss']:.4g}"
        metrics = self.validation.metrics()
        score = 0.0
        if metrics is not None:
            row |= {f"val_{name}": value for name, value in metrics.as_dict().items()}
            score = self.validation.score(metrics)
            note = f"E {metrics.energy_mae_mev:.1f} meV  F {metrics.force_mae_mev_per_a:.1f} meV/Å"
        if metrics is None or score < self.best:
            self.best = score
            with self.average.swapped():
                save_potential(self.run, self.potential, self._notes(metrics))
        logbook.add(row)
        log.info("%s step %d: %s", self.run.name, self.step, note)
        return note, score

    def _collect(self) -> None:
        """Bring what was summed since the last row to the first process, and see it is finite.

        Now and then only: asking at every step would wait for the device.
        """
        self._sums = self.world.totals(self._sums)
        for name, value in self._sums.items():
            if not torch.isfinite(value):
                raise TrainingError(
                    f"{name} became {float(value)} before step {self.step}, and the run cannot "
                    f"recover. Start anew with a lower optimizer.lr (it is "
                    f"{self.config.optimizer.lr:g}) or clip_norm (it is {self.config.clip_norm})."
                )
        self._keep_sums_at_first()

    def _keep_sums_at_first(self) -> None:
        if not self.world.is_first:
            self._sums = {name: torch.zeros_like(value) for name, value in self._sums.items()}

    def state(self) -> State:
        """Everything the next steps depend on."""
        optimizer, groups = optimizer_state(self.optimizer)
        return State(
            step=self.step,
            tensors={
                "model": self.potential.model.state_dict(),
                "terms": self.terms.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": optimizer,
                "sums": dict(self._sums),
            },
            values={
                "optimizer": groups,
                "rate": self.rate.state_dict(),
                "summed": self._summed,
                "seconds": self.seconds,
                "best": self.best if np.isfinite(self.best) else None,
                "identity": run_identity(self.config, self.store),
            },
        )

    def restore(self, state: State) -> None:
        """Go back to a state that `state` gave, in this or another process.

        Raises:
            TrainingError: it is none of this run.
        """
        check_state(self.run, state, self.state(), self.optimizer)
        self.potential.model.load_state_dict(state.tensors["model"])
        self.terms.load_state_dict(state.tensors["terms"])
        self.average.load_state_dict(state.tensors["average"])
        load_optimizer_state(self.optimizer, state.tensors["optimizer"])
        self.rate.load_state_dict(state.values["rate"])
        self._sums = {k: v.to(self.device) for k, v in state.tensors.get("sums", {}).items()}
        self._keep_sums_at_first()
        self._summed = state.values["summed"]
        self.seconds = state.values["seconds"]
        best = state.values["best"]
        self.best = float("inf") if best is None else best
        self.step = state.step

    def _logbook(self) -> AbstractContextManager[Logbook | None]:
        if not self.world.is_first:
            return nullcontext()
        tensorboard = self.config.training.tensorboard
        return Logbook(self.run, step=self.step, tensorboard=tensorboard)

    def _count_edges(self, store: Store) -> IntArray:
        rule, cache = self.potential.graph_rule, self.graph_cache
        with self.world.first_then_others():
            return count_edges(store, neighbors_for(store, rule, cache, progress=self.progress))

    def _reader(self, store: Store, **settings: Any) -> WindowReader:
        potential, cache, progress = self.potential, self.graph_cache, self.progress
        neighbors = neighbors_for(store, potential.graph_rule, cache, progress=progress)
        least = self.config.data.min_edge_coverage
        check_edge_coverage(store, neighbors, self.terms.required_fields, least)
        return WindowReader(
            store,
            neighbors,
            further_neighbors(store, potential.further_graphs, cache, progress=progress),
            teacher_fields=self.terms.required_fields,
            references=potential.references,
            dtype=np.float64 if self.dtype == torch.float64 else np.float32,
            keep_half=self.device.type == "cuda",
            **settings,
        )

    def _lane_reader(self, lane: Lane) -> WindowReader:
        reader = self.reader
        if lane.overlay is not None:
            reader = self._reader(lane.overlay.store, truth=lane.overlay.truth)
        return replace(reader, origin_weight=lane.weight)

    def _notes(self, metrics: Metrics | None) -> dict[str, Any]:
        dataset = self.store.manifest.dataset.digest
        notes = {"step": self.step, "dataset": dataset, "training_seconds": self.seconds}
        return notes if metrics is None else {**notes, "validation": metrics.as_dict()}

    def _finish(self) -> TrainingResult:
        metrics = None
        if self.world.is_first:
            metrics = _kept_metrics(self.run)
        structures = self.step * sum(sampler.batch_size for sampler in self.samplers)
        return TrainingResult(
            run=self.run,
            steps=self.step,
            seconds=self.seconds,
            structures_per_second=structures / max(self.seconds, 1e-9),
            validation=metrics,
        )


def _kept_metrics(run: Path) -> Metrics | None:
    """Errors of the model that a run kept, None without validation structures."""
    card = read_json(run / MODEL_CARD, "describes no model")
    try:
        notes = card["notes"]
        return Metrics(**notes["validation"]) if "validation" in notes else None
    except (KeyError, TypeError) as error:
        raise TrainingError(
            f"{run / MODEL_CARD} does not tell the errors of the model it describes "
            f"({reason_of(error)}). It was edited or damaged. Training is finished: `kdcache "
            f"evaluate {run}` says whether the model is whole."
        ) from error
