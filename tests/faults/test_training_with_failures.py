"""Structures that a teacher failed on count as if they had no teacher, whatever is distilled."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.fields import Codec
from kdcache.progress import silent
from kdcache.store import Store, open_store
from kdcache.stream.loader import Loader
from kdcache.stream.window import make_batch
from kdcache.structures import Batch
from kdcache.teachers import NativeTeacher
from kdcache.train import Trainer, train_student
from tests.chain import PAINN, dump, loss_curve, make_store, make_teacher, student

pytestmark = pytest.mark.fault

# Two next to each other, one at each end of the store.
FAILED = (0, 11, 12, 39)
STRATEGIES = ("n2n", "v2v", "vanilla1", "vanilla2")
STEPS = 10


class Failing:
    """A PaiNN that raises for some structures, and gives NaN for one of them."""

    def __init__(self, inner: NativeTeacher) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.rows is not None
        rows = batch.rows.tolist()
        if set(rows) & set(FAILED[1:]):
            raise ValueError("no convergence")
        said = self.inner.compute(batch)
        if FAILED[0] in rows:
            atoms = batch.structure_index == rows.index(FAILED[0])
            said["node"] = said["node"].masked_fill(atoms[:, None], torch.nan)
        return said


@pytest.fixture(scope="module", params=["half", "exact", "compact"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A teacher that failed, and the same one, "good", that did not."""
    codec: Codec = request.param
    folder = tmp_path_factory.mktemp("failures")
    made = make_store(folder)
    teacher = make_teacher(folder)
    options = DumpOptions("teacher", codec=codec, threads=1, on_error="skip")
    report = dump_teacher(made.path, Failing(teacher), options)  # type: ignore[arg-type]
    assert len(report.failed) == len(FAILED)
    dump(made, teacher, name="good", codec=codec)
    return open_store(made.path)


def trainer(store: Store, folder: Path, strategy: str, teacher: str = "teacher") -> Trainer:
    config = student(f"training.max_steps={STEPS}", strategy=strategy, model=PAINN)
    terms = [term.model_copy(update={"teacher_name": teacher}) for term in config.terms]
    config = config.model_copy(update={"terms": tuple(terms)})
    return Trainer(store, folder, config, folder / "graph", silent)


def values(made: Trainer, batch: Batch) -> dict[str, float]:
    """Every term of the loss of a batch."""
    loss = made.terms(made.stepped(batch), batch, made.step)
    return {name: float(value) for name, value in loss.parts.items()}


def batch_of(made: Trainer, rows: np.ndarray) -> Batch:
    """Structures of a store, in its order, as a training reads them."""
    window = made.stream[0][0].read(np.unique(made.store.index.block[rows]))
    return make_batch([window.gather(window.place(rows))])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_those_without_the_rows_of_failed_structures(
    strategy: str, store: Store, tmp_path: Path
) -> None:
    made = trainer(store, tmp_path, strategy)
    rows = np.array([0, 1, 2, 10, 11, 12, 13])
    found = values(made, batch_of(made, rows))
    kept = batch_of(made, np.setdiff1d(rows, FAILED))
    assert found == pytest.approx(values(made, kept), rel=1e-5)
    # Terms see the failures: another teacher, that gave all, says something else of the batch ...
    good = trainer(store, tmp_path, strategy, "good")
    assert values(good, batch_of(good, rows)) != pytest.approx(found, rel=1e-3)
    if store.spec("teachers/teacher/node").codec != "compact":  # whose scales failures change
        whole = values(good, batch_of(good, np.setdiff1d(rows, FAILED)))
        assert found == pytest.approx(whole, rel=1e-5)
    # ... and of structures that all failed, there is nothing to say.
    alone = batch_of(made, np.array(FAILED))
    assert set(values(made, alone).values()) == {0.0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_ends_with_finite_losses(strategy: str, store: Store, tmp_path: Path) -> None:
    made = trainer(store, tmp_path, strategy)
    train_student(store.path, tmp_path / "run", made.config)
    curves = [loss_curve(tmp_path / "run", f"train_{name}") for name in ("loss", *_names(made))]
    for curve in curves:
        assert len(curve) == STEPS
        assert np.isfinite(np.array(curve, float)).all()


def test_some_batches_of_a_training_hold_failed_structures(store: Store, tmp_path: Path) -> None:
    made = trainer(store, tmp_path, "n2n")
    with Loader(made.stream) as loader:
        batches = list(islice(loader, STEPS))
    failed = [np.isin(batch.rows, FAILED) for batch in batches]
    assert any(each.any() and not each.all() for each in failed)


def _names(made: Trainer) -> list[str]:
    return [term.name for term in made.config.terms]
