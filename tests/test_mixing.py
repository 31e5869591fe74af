"""Several stores in one run: shares of a batch, weights in every loss, nothing held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.augment import AugmentOptions, augment
from kdcache.checkpoint import load_state
from kdcache.config import StudentConfig, WeightSchedule
from kdcache.distill.losses import GroundTruthLoss
from kdcache.distill.schedules import Clock
from kdcache.distill.strategies import apply_strategy
from kdcache.dump import DumpOptions
from kdcache.errors import ConfigError, DataError, IdentityError, TrainingError
from kdcache.ingest import ImportOptions
from kdcache.mixing import steps_per_epoch
from kdcache.origins import parent_ids
from kdcache.progress import silent
from kdcache.store import Store, open_store
from kdcache.stream.loader import Loader
from kdcache.structures import Batch, ModelOutput
from kdcache.teachers import NativeTeacher
from kdcache.train import Trainer, train_student
from tests.chain import dump, loss_curve, make_potential, make_store, make_teacher, student
from tests.test_train import assert_equal_runs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> NativeTeacher:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def store(teacher: NativeTeacher, tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = make_store(tmp_path_factory.mktemp("store"))
    dump(made, teacher)
    return open_store(made.path)


@pytest.fixture(scope="module")
def rattled(store: Store, teacher: NativeTeacher) -> Store:
    return overlay(store, teacher, store.path.parent / "rattled.zarr", copies=2)


def overlay(
    source: Store, teacher: NativeTeacher, path: Path, *, name: str = "teacher", copies: int = 1
) -> Store:
    augment(
        str(source.path),
        path,
        teacher,
        AugmentOptions(copies=copies),
        layout=ImportOptions(graph=teacher.graph_rule),
        dump=DumpOptions(name=name, codec="exact", threads=1),
    )
    return open_store(path)


def mixed(*overlays: Store, settings: tuple[str, ...] = (), strategy: str = "n2n") -> StudentConfig:
    paths = ", ".join(f"{{store: {made.path}}}" for made in overlays)
    texts = (f"data.overlays=[{paths}]", "training.batch_size=8", "model.direct_forces=true")
    return student(*texts, *settings, strategy=strategy)


def trainer(store: Store, config: StudentConfig, run: Path) -> Trainer:
    return Trainer(store, run, config, run / "graph", silent)


def first_batch(made: Trainer) -> Batch:
    with Loader(made.stream) as loader:
        return next(iter(loader))


def test_a_batch_holds_every_origin_in_its_share(
    store: Store, rattled: Store, tmp_path: Path
) -> None:
    settings = ("data.overlays.0.share=0.375", "data.overlays.0.ratio=3")
    made = trainer(store, mixed(rattled, settings=settings), tmp_path)
    assert [sampler.batch_size for sampler in made.samplers] == [5, 3]
    batch = first_batch(made)
    assert batch.n_structures == 8
    assert batch.origin_weight is not None
    # Eqs. 10 and 11 with alpha 3/8 and r 3.
    w_dft = 1 / (5 / 8 + 3 * 3 / 8)
    expected = torch.tensor([w_dft] * 5 + [3 * w_dft] * 3)
    assert torch.allclose(batch.origin_weight, expected)
    assert batch.origin_weight.mean() == pytest.approx(1.0)
    assert torch.equal(batch.weight, batch.origin_weight)  # type: ignore[arg-type]
    assert sum(v.shape[0] == batch.n_atoms for v in batch.teacher.values()) == 1


def test_overlaid_structures_are_labelled_by_the_teacher_in_the_runs_frame(
    store: Store, rattled: Store, tmp_path: Path
) -> None:
    made = trainer(store, mixed(rattled), tmp_path)
    batch = first_batch(made)
    assert batch.rows is not None
    rows = batch.rows[4:]
    assert batch.energy is not None
    assert batch.forces is not None
    energies = rattled.read("teachers/teacher/energy")
    for place, row in enumerate(rows.tolist()):
        numbers = rattled.structure(row).atomic_numbers
        reference = sum(made.potential.references[int(n)] for n in numbers)
        assert float(batch.energy[4 + place]) == pytest.approx(energies[row] - reference, rel=1e-5)
    assert torch.isfinite(batch.forces).all()
    own = mixed(rattled, settings=("data.overlays.0.labels=own",))
    batch = first_batch(trainer(store, own, tmp_path))
    assert batch.energy is not None
    assert batch.energy[:4].isfinite().all()
    assert batch.energy[4:].isnan().all()


@pytest.mark.proof
@torch.no_grad()
def test_every_loss_is_the_sum_of_equations_9_to_11(
    store: Store, rattled: Store, tmp_path: Path
) -> None:
    settings = (
        "data.overlays.0.share=0.25", "data.overlays.0.ratio=0.4", "loss.energy=mse",
        "training.precision=float64", "terms.vanilla2.weight=1",
    )  # fmt: skip
    made = trainer(store, mixed(rattled, settings=settings, strategy="n2n+vanilla2"), tmp_path)
    batch = first_batch(made)
    output: ModelOutput = made.potential(batch)
    alpha, ratio, n = 2 / 8, 0.4, 8
    w_dft = 1 / (1 - alpha + alpha * ratio)
    weights = torch.tensor([w_dft] * 6 + [ratio * w_dft] * 2, dtype=torch.float64)
    assert weights.sum() / n == pytest.approx(1.0)  # Eq. 9
    one = WeightSchedule.model_validate(1)
    loss = made.config.loss.model_copy(update={"energy_weight": one})
    found = GroundTruthLoss(loss, Clock(10, 2))(output, batch, 0).parts
    assert batch.energy is not None
    by_structure = (output.energy - batch.energy).square()
    assert float(found["energy"]) == pytest.approx(float((weights * by_structure).sum() / n))
    # Rows of atoms are weighed by their structures, their weights averaging to 1 as well.
    rows = weights[batch.structure_index]
    rows = rows / rows.mean()
    terms = {term.settings.name: term for term in made.terms._bound()}
    for name, ours in (("n2n", output.features["node"]), ("vanilla2", output.atomic_energy)):
        term = terms[name]
        theirs = batch.teacher[term.key]
        gap = term.student_projection(ours) - theirs
        by_atom = gap.square().mean(dim=1) if name == "n2n" else gap.abs()
        expected = float((rows * by_atom).mean())
        assert float(term(output, batch)) == pytest.approx(expected), name


def test_without_overlays_nothing_is_weighed(store: Store, tmp_path: Path) -> None:
    batch = first_batch(trainer(store, student(strategy="n2n"), tmp_path))
    assert batch.origin_weight is None


def test_what_is_made_of_held_out_structures_is_not_trained_on(
    teacher: NativeTeacher, tmp_path: Path
) -> None:
    # Without splits in the store, validation structures are chosen by the run.
    store = make_store(tmp_path, split=False)
    dump(store, teacher)
    made = overlay(store, teacher, tmp_path / "overlay.zarr")
    assert len(made) >= 30
    config = mixed(made, settings=("data.val_fraction=0.25",))
    run = trainer(open_store(store.path), config, tmp_path / "run")
    watched = set(store.index.structure_id[run.selection.validation])
    (lane,) = [lane for lane in run.lanes if lane.overlay]
    parents = {parent_ids(str(made.index.structure_id[r]))[0] for r in lane.sampler.rows}
    assert watched
    assert not parents & watched
    assert parents <= set(store.index.structure_id[run.selection.train])
    assert len(lane.sampler.rows) < len(made)


def test_an_epoch_counts_all_stores(store: Store, rattled: Store, tmp_path: Path) -> None:
    made = trainer(store, mixed(rattled), tmp_path)
    n_structures = sum(len(lane.sampler.rows) for lane in made.lanes)
    assert steps_per_epoch(made.lanes) == n_structures // 8


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_mixed_run_goes_on_as_one_never_stopped(
    share: float, store: Store, rattled: Store, tmp_path: Path
) -> None:
    config = mixed(rattled, settings=(f"data.overlays.0.share={share}",), strategy="n2n+vanilla1")
    assert train_student(store.path, tmp_path / "whole", config)
    assert train_student(store.path, tmp_path / "parts", config, stop_after=5) is None
    assert train_student(store.path, tmp_path / "parts", config)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert all(np.isfinite([float(v) for v in loss_curve(tmp_path / "whole")]))


def test_another_overlay_of_the_same_path_is_refused(
    store: Store, teacher: NativeTeacher, tmp_path: Path
) -> None:
    path = tmp_path / "overlay.zarr"
    config = mixed(overlay(store, teacher, path))
    train_student(store.path, tmp_path / "run", config, stop_after=2)
    path.rename(tmp_path / "old.zarr")
    overlay(store, teacher, path, copies=2)
    with pytest.raises(TrainingError, match="was started on store"):
        train_student(store.path, tmp_path / "run", config)
    assert load_state(tmp_path / "run") is not None


def test_control_has_no_overlays(rattled: Store) -> None:
    assert not mixed(rattled, strategy="control").terms
    assert not apply_strategy(mixed(rattled), "control").data.overlays


def test_overlays_that_do_not_belong_are_refused(
    store: Store, rattled: Store, teacher: NativeTeacher, tmp_path: Path
) -> None:
    stranger = NativeTeacher(make_potential(seed=9))
    other = overlay(store, stranger, tmp_path / "other.zarr")
    with pytest.raises(IdentityError, match="Teacher teacher has digest"):
        trainer(store, mixed(other), tmp_path)
    named = overlay(store, teacher, tmp_path / "named.zarr", name="second")
    with pytest.raises(ConfigError, match=r"no teacher teacher.*kdcache dump-teacher --into"):
        trainer(store, mixed(named), tmp_path)
    with pytest.raises(ConfigError, match="has no teacher techer; did you mean teacher"):
        trainer(store, mixed(rattled, settings=("data.overlays.0.teacher_name=techer",)), tmp_path)
    nothing = mixed(rattled, settings=("data.overlays.0.labels=own", "terms=[]"))
    with pytest.raises(ConfigError, match="nothing would be learnt"):
        trainer(store, nothing, tmp_path)
    dump(named, teacher, name="third")
    with pytest.raises(ConfigError, match="several teachers"):
        trainer(store, mixed(named, settings=("terms=[]",)), tmp_path)
    copper = [
        replace(s, atomic_numbers=np.full(s.n_atoms, 29), energy=None, forces=None)
        for s in store.structures()
    ]
    metal = make_store(tmp_path, found=copper, unlabelled=range(40), name="metal.zarr")
    with pytest.raises(DataError, match="holds Cu, which"):
        trainer(store, mixed(metal, settings=("data.overlays.0.labels=own",)), tmp_path)
