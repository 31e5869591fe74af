"""Training runs: what is learnt from, what a stop costs (nothing), what is refused."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdcache.checkpoint import load_potential, load_state
from kdcache.config import StudentConfig
from kdcache.errors import TrainingError
from kdcache.evaluate import predict_structures
from kdcache.graphs import GraphRule
from kdcache.progress import Advance, silent
from kdcache.selection import select
from kdcache.store import Store, open_store
from kdcache.teachers import NativeTeacher
from kdcache.train import Trainer, train_student
from tests.chain import PAINN, SCHNET, dump, loss_curve, make_store, make_teacher, student
from tests.chain import structures as small_structures

Weights = dict[str, torch.Tensor]

INNER = "{name: t, student: node/a=message_layers.0, teacher: node, student_projection: linear}"


@pytest.fixture(scope="module")
def store(taught_store: Store) -> Store:
    """Forty labelled structures and a teacher."""
    return taught_store


def weights(run: Path) -> Weights:
    """Of the newest checkpoint: the student, its average, its projections and the optimizer."""
    state = load_state(run)
    assert state is not None
    return {f"{part}/{k}": v for part, held in state.tensors.items() for k, v in held.items()}


def assert_equal_runs(one: Path, other: Path) -> None:
    """To the last bit, times left out."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept, other_kept = (load_potential(run).state_dict() for run in (one, other))
    assert all(torch.equal(kept[name], other_kept[name]) for name in kept)
    rows, other_rows = (
        list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (one, other)
    )
    for row in (*rows, *other_rows):
        del row["seconds"]
    assert rows == other_rows


RESUMED: dict[str, tuple[Mapping[str, object], str, tuple[str, ...]]] = {
    "painn": (PAINN, "n2n+v2v", ()),
    "schnet": (SCHNET, "n2n", ()),
    "average": (PAINN, "vanilla1+vanilla2", ("ema=0.99", "training.eval_every=3")),
    "plateau": (
        PAINN,
        "n2n",
        ("schedule={name: plateau, patience: 0, factor: 0.5, threshold: 0.5}",),
    ),
    "few labels": (PAINN, "v2v", ("data.labels=0.3", "data.labelled_share=0.4")),
    "annealed": (PAINN, "annealed", ("optimizer.weight_decay=0.01", "schedule.name=cosine")),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_stopped_run_ends_as_one_never_stopped(case: str, store: Store, tmp_path: Path) -> None:
    model, strategy, settings = RESUMED[case]
    config = student(*settings, strategy=strategy, model=model)
    whole = train_student(store.path, tmp_path / "whole", config)
    assert whole is not None
    for stop in (1, 5, 8):
        assert train_student(store.path, tmp_path / "parts", config, stop_after=stop) is None
    parts = train_student(store.path, tmp_path / "parts", config)
    assert parts is not None
    assert parts.steps == whole.steps == 12
    assert parts.validation == whole.validation
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


class Killed(BaseException):
    """What no handler of ours catches."""


class KillAfter:
    """A progress bar that kills the run after so many steps, between two checkpoints."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, label: str, total: int | None, unit: str) -> KillAfter:
        return self if unit == "steps" else silent(label, total, unit)  # type: ignore[return-value]

    def __enter__(self) -> Advance:
        return self.advance

    def __exit__(self, *raised: object) -> None: ...

    def advance(self, n: int = 1, /, note: str = "") -> None:
        self.steps -= n
        if self.steps < 0:
            raise Killed


@pytest.mark.parametrize("after", [0, 3, 4, 10])
def test_a_run_killed_between_checkpoints_ends_as_one_never_stopped(
    after: int, store: Store, tmp_path: Path
) -> None:
    config = student("training.checkpoint_every=4", strategy="n2n")
    train_student(store.path, tmp_path / "whole", config)
    with pytest.raises(Killed):
        train_student(store.path, tmp_path / "killed", config, progress=KillAfter(after))
    train_student(store.path, tmp_path / "killed", config)
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")
    assert loss_curve(tmp_path / "killed", "step") == [str(k) for k in range(1, 13)]


def trainer(store: Store, run: Path, config: StudentConfig) -> Trainer:
    return Trainer(store, run, config, run / "graph", silent)


def test_control_and_student_start_equal_and_see_the_same_batches(
    store: Store, tmp_path: Path
) -> None:
    control = trainer(store, tmp_path, student())
    taught = trainer(store, tmp_path, student(strategy="n2n+v2v+vanilla1+vanilla2"))
    ours, theirs = control.potential.state_dict(), taught.potential.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert control.potential.references == taught.potential.references
    assert control.potential.normalizer == taught.potential.normalizer
    (one,), (other,) = control.samplers, taught.samplers
    for step in range(30):
        assert one.batch_rows(step).tolist() == other.batch_rows(step).tolist()


def test_labelled_structures_have_at_least_their_share_of_a_batch(
    store: Store, tmp_path: Path
) -> None:
    for labels, share, parts in ((0.2, 0.6, [3, 2]), (0.9, 0.6, [5]), (0.2, None, [5])):
        settings = (f"data.labels={labels}", f"data.labelled_share={share or 'null'}")
        made = trainer(store, tmp_path, student(*settings, strategy="n2n"))
        assert [sampler.batch_size for sampler in made.samplers] == parts
        if len(parts) == 2:
            rows = [set(sampler.rows.tolist()) for sampler in made.samplers]
            assert rows[0] == set(made.selection.train_labelled.tolist())
            assert rows[1] == set(made.selection.train_unlabelled.tolist())


def test_labelled_structures_have_their_share_of_a_batchs_atoms(
    store: Store, tmp_path: Path
) -> None:
    settings = ("training.max_atoms=50", "data.labels=0.3", "data.labelled_share=0.6")
    made = trainer(store, tmp_path, student(*settings, strategy="n2n"))
    assert len(made.samplers) == 2
    assert made.clock.steps_per_epoch == max(s.steps_per_epoch for s in made.samplers)
    for step in range(3 * int(made.clock.steps_per_epoch)):
        atoms = [store.index.n_atoms[s.batch_rows(step)].sum() for s in made.samplers]
        assert atoms[0] <= 30
        assert atoms[1] <= 20


def test_a_store_without_any_label_is_taught_by_its_teacher(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24, unlabelled=range(24))
    dump(store, make_teacher(tmp_path))
    config = student("references={mode: given, values: {H: -13, C: -1029, O: -2041}}",
                     strategy="vanilla2")  # fmt: skip
    result = train_student(store.path, tmp_path / "run", config)
    assert result is not None
    assert result.validation is None
    curve = [float(value) for value in loss_curve(tmp_path / "run")]
    assert 0 < curve[-1] < curve[0]


@pytest.mark.parametrize("share", ["null", "0.4"])
def test_hidden_labels_reach_nothing(share: str, tmp_path: Path) -> None:
    config = student("data.labels=0.2", f"data.labelled_share={share}", strategy="n2n+vanilla2")
    honest = make_store(tmp_path)
    teacher = make_teacher(tmp_path)
    chosen = select(honest, config.data)
    hidden = set(honest.index.structure_id[chosen.train_unlabelled])
    assert len(chosen.train_labelled) == round(0.2 * len(chosen.train))
    poisoned = [
        replace(s, energy=1e9, forces=s.forces + 1e9)  # type: ignore[operator]
        if s.structure_id in hidden
        else s
        for s in small_structures(40)
    ]
    other = make_store(tmp_path, found=poisoned, name="poisoned.zarr")
    assert other.read("structures/energy").max() == 1e9
    for made, run in ((honest, "honest"), (other, "poisoned")):
        dump(made, teacher)
        train_student(made.path, tmp_path / run, config)
    assert_equal_runs(tmp_path / "honest", tmp_path / "poisoned")


def test_unlabelled_structures_are_taught_by_the_teacher(tmp_path: Path) -> None:
    unlabelled = [s for s in range(40) if s % 7 != 6 and s % 3]
    store = make_store(tmp_path, unlabelled=unlabelled)
    dump(store, make_teacher(tmp_path))
    ids = {f"s{s}" for s in unlabelled}
    seen: dict[str, set[str]] = {}
    for strategy in ("control", "n2n"):
        config = student("training.max_steps=20", "data.labelled_share=null", strategy=strategy)
        assert train_student(store.path, tmp_path / strategy, config) is not None
        made = trainer(open_store(store.path), tmp_path / strategy, config)
        rows = {int(r) for step in range(20) for r in made.samplers[0].batch_rows(step)}
        seen[strategy] = {str(store.index.structure_id[row]) for row in rows}
        assert all(torch.isfinite(w).all() for w in weights(tmp_path / strategy).values())
    assert not seen["control"] & ids
    assert seen["n2n"] >= ids


def test_a_store_without_any_label_is_learnt_in_the_teachers_frame(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24, unlabelled=range(24))
    teacher = make_teacher(tmp_path)
    dump(store, teacher)
    config = student("training.max_steps=5", strategy="vanilla1")
    assert train_student(store.path, tmp_path / "run", config) is not None
    assert teacher.references
    assert load_potential(tmp_path / "run").references == dict(teacher.references)


def test_a_batch_without_any_label_moves_the_student(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    dump(store, make_teacher(tmp_path))
    settings = ("data.labels=0.03", "data.labelled_share=null", "training.batch_size=2")
    config = student(*settings, strategy="n2n")
    assert train_student(store.path, tmp_path / "run", config) is not None
    curve = [float(value) for value in loss_curve(tmp_path / "run")]
    forces = [float(value) for value in loss_curve(tmp_path / "run", "train_forces")]
    assert 0.0 in forces
    assert min(curve) > 0.0


@pytest.mark.parametrize("precision", ["bf16", "float64"])
@pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
def test_other_precisions_follow_float32(
    precision: str, model: Mapping[str, object], store: Store, tmp_path: Path
) -> None:
    for name in ("float32", precision):
        config = student(f"training.precision={name}", strategy="n2n", model=model)
        train_student(store.path, tmp_path / name, config)
    one, other = (loss_curve(tmp_path / name) for name in ("float32", precision))
    tolerance = 0.05 if precision == "bf16" else 1e-4
    assert [float(v) for v in one] == pytest.approx([float(v) for v in other], rel=tolerance)
    assert one != other
    kept = next(load_potential(tmp_path / precision).parameters()).dtype
    assert kept == (torch.float64 if precision == "float64" else torch.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("n2n", ()), ("control", ("model.direct_forces=false", f"terms=[{INNER}]"))],
    ids=["direct", "gradient-tapped"],
)
def test_a_compiled_run_follows_an_eager_one(
    strategy: str, more: tuple[str, ...], store: Store, tmp_path: Path
) -> None:
    for name in ("true", "false"):
        settings = (f"training.compile={name}", "training.max_steps=2", "model.num_layers=1", *more)
        config = student(*settings, strategy=strategy)
        train_student(store.path, tmp_path / name, config)
    one, other = ([float(v) for v in loss_curve(tmp_path / name)] for name in ("true", "false"))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_finished_run_is_refused(store: Store, tmp_path: Path) -> None:
    train_student(store.path, tmp_path / "run", student())
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(TrainingError, match="finished: 12 of 12 steps"):
        train_student(store.path, tmp_path / "run", student())
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("optimizer.lr=0.5", "optimizer.lr = 0.001, now it is 0.5"),
        ("loss.forces_weight=7", "loss.forces_weight = 100.0, now it is 7.0"),
        ("terms.n2n.loss=mae", "terms.0.loss = mse, now it is mae"),
        ("model.num_layers=1", "model.num_layers = 2, now it is 1"),
        ("data.labels=0.5", "data.labels = 1.0, now it is 0.5"),
        ("terms=[]", "terms.0.name = n2n, now it is None"),
    ],
)
def test_another_configuration_is_refused_by_its_setting(
    setting: str, named: str, store: Store, tmp_path: Path
) -> None:
    train_student(store.path, tmp_path / "run", student(strategy="n2n"), stop_after=2)
    with pytest.raises(TrainingError) as refused:
        train_student(store.path, tmp_path / "run", student(setting, strategy="n2n"))
    assert f"started with {named}" in str(refused.value)


def test_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    train_student(store.path, tmp_path / "run", student(), stop_after=2)
    other = make_store(tmp_path, 24)
    with pytest.raises(TrainingError, match="was started on store"):
        train_student(other.path, tmp_path / "run", student())


def test_a_teacher_that_is_added_meanwhile_does_not_end_a_run(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine.zarr"
    shutil.copytree(store.path, mine)
    (name,) = store.teachers
    config = student(strategy="n2n")
    terms = [term.model_copy(update={"teacher_name": name}) for term in config.terms]
    config = config.model_copy(update={"terms": tuple(terms)})
    train_student(mine, tmp_path / "run", config, stop_after=5)
    dump(open_store(mine), make_teacher(tmp_path / "another"), name="another")
    train_student(mine, tmp_path / "run", config)
    train_student(store.path, tmp_path / "whole", config)
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_model_without_checkpoint_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    train_student(store.path, tmp_path / "run", student())
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(TrainingError, match="would overwrite"):
        train_student(store.path, tmp_path / "run", student())


@pytest.mark.parametrize("rhythm", ["training.eval_every=1", "training.checkpoint_every=1"])
def test_a_loss_that_is_not_finite_stops_the_run(rhythm: str, store: Store, tmp_path: Path) -> None:
    config = student("optimizer.lr=1e20", "training.eval_every=100", rhythm, "clip_norm=null")
    with pytest.raises(TrainingError, match=r"became nan.*lower optimizer\.lr"):
        train_student(store.path, tmp_path / "run", config)
    state = load_state(tmp_path / "run")
    assert state is not None
    assert all(torch.isfinite(v).all() for v in state.tensors["sums"].values())


def test_tensorboard_holds_the_loss_curve(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = student("training.tensorboard=true")
    train_student(store.path, tmp_path / "run", config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train_loss")]
    curve = [float(value) for value in loss_curve(tmp_path / "run")]
    assert found == pytest.approx(curve, rel=1e-6)


@pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
def test_the_loss_goes_down_and_the_kept_model_is_the_best(
    model: Mapping[str, object], store: Store, tmp_path: Path
) -> None:
    config = student(
        "training.max_steps=80", "training.eval_every=10", "optimizer.lr=1e-2", model=model
    )
    result = train_student(store.path, tmp_path / "run", config)
    curve = [float(value) for value in loss_curve(tmp_path / "run")]
    assert curve[-1] < 0.5 * curve[0]
    assert result is not None
    assert result.validation is not None
    kept = [s for s in store.structures() if s.split == "val"]
    found = predict_structures(load_potential(tmp_path / "run"), kept).metrics().as_dict()
    assert found == pytest.approx(result.validation.as_dict(), rel=1e-4)
    energy = map(float, loss_curve(tmp_path / "run", "val_energy_mae_mev"))
    forces = map(float, loss_curve(tmp_path / "run", "val_force_mae_mev_per_a"))
    scores = [e + 100 * f for e, f in zip(energy, forces, strict=True)]
    best = result.validation.energy_mae_mev + 100 * result.validation.force_mae_mev_per_a
    assert best == pytest.approx(min(scores), rel=1e-6)


def test_a_run_without_ground_truth_keeps_its_best_model(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    longer = ("training.max_steps=60", "training.eval_every=60", "optimizer.lr=1e-2")
    train_student(store.path, tmp_path / "teacher", student(*longer))
    dump(store, NativeTeacher(load_potential(tmp_path / "teacher")))
    config = student(
        "loss.energy_weight=0",
        "loss.forces_weight=0",
        "training.max_steps=20",
        "optimizer.lr=3e-3",
        "terms=[{name: e, student: energy, teacher: energy, loss: mae},"
        " {name: f, student: forces, teacher: forces, loss: l2mae, weight: 10}]",
    )
    result = train_student(store.path, tmp_path / "run", config)
    energy = map(float, loss_curve(tmp_path / "run", "val_energy_mae_mev"))
    forces = map(float, loss_curve(tmp_path / "run", "val_force_mae_mev_per_a"))
    scores = [e + f for e, f in zip(energy, forces, strict=True)]
    assert scores[0] != min(scores)
    assert result is not None
    assert result.validation is not None
    found = result.validation.energy_mae_mev + result.validation.force_mae_mev_per_a
    assert found == pytest.approx(min(scores), rel=1e-6)


def test_graph_of_the_store_is_the_students_or_is_cut_to_it(tmp_path: Path) -> None:
    curves = []
    for name, rule in (("none", None), ("same", GraphRule(3.0)), ("wider", GraphRule(4.5))):
        store = make_store(tmp_path, graph=rule, name=f"{name}.zarr")
        # Edges take room, so blocks differ: a window of all blocks gives one order to all three.
        train_student(store.path, tmp_path / name, student("training.max_steps=3"))
        assert (tmp_path / name / "graph").exists() == (rule is None)
        curves.append(loss_curve(tmp_path / name)[0])
    assert curves[0] == curves[1] == curves[2]


def test_structures_above_max_force_are_left_out(store: Store) -> None:
    forces = store.read("structures/forces")
    ends = store.index.n_atoms.cumsum()
    largest = torch.tensor(
        [abs(forces[end - n : end]).max() for n, end in zip(store.index.n_atoms, ends, strict=True)]
    )
    limit = float(largest.median())
    chosen = select(store, student(f"data.max_force={limit}").data)
    for rows in (chosen.train, chosen.validation):
        assert len(rows)
        assert (largest[torch.from_numpy(rows)] <= limit).all()
    assert len(chosen.train) < len(select(store, student().data).train)
    with pytest.raises(TrainingError, match="no structures to train on"):
        select(store, student("data.max_force=1e-30").data.model_copy(update={"max_force": -1.0}))
