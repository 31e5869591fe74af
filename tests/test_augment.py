"""Overlays: structures made from others, labelled by the teacher, held in a store of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.augment import AugmentOptions, augment
from kdcache.augment.overlay import Augmented
from kdcache.augment.rattle import ascent_steps, differences, random_step, scaled_to
from kdcache.augment.trajectories import frames
from kdcache.dump import DumpOptions
from kdcache.errors import ConfigError, DataError, StoreError
from kdcache.ingest import ImportOptions
from kdcache.models.potential import Potential
from kdcache.origins import parent_ids
from kdcache.readers import ReadOptions
from kdcache.store import Store, open_store, verify_store
from kdcache.stream.window import collate
from kdcache.structures import Structure
from kdcache.teachers import NativeTeacher
from tests.chain import PAINN, SCHNET, make_potential, make_store, structures

ASCENT = AugmentOptions(method="ascent", norm=1e-4)
RELAX = AugmentOptions(method="relax", keep=0.5, max_steps=12)
MD = AugmentOptions(method="md", keep=0.5, max_steps=6, temperature=50.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), 24)


@pytest.fixture(scope="module")
def teacher() -> Potential:
    return make_potential({**PAINN, "hidden_channels": 12})


@pytest.fixture(scope="module")
def student() -> Potential:
    return make_potential(seed=3)


def made(
    store: Store, teacher: Potential, options: AugmentOptions, student: Potential | None = None
) -> list[Structure]:
    """The structures of an overlay, without writing it."""
    read = ReadOptions(unlabelled=True)
    return list(Augmented((store.path,), read, made_by=options, teacher=teacher, student=student))


def write(
    store: Store, path: Path, teacher: Potential, options: AugmentOptions, **more: Any
) -> Store:
    augment(
        str(store.path),
        path,
        NativeTeacher(teacher),
        options,
        layout=ImportOptions(graph=teacher.graph_rule),
        dump=DumpOptions(name="teacher", codec="exact", threads=1),
        **more,
    )
    return open_store(path)


def chosen(options: AugmentOptions, student: Potential) -> Potential | None:
    return student if options.method == "ascent" else None


@given(st.integers(1, 6), st.floats(1e-3, 10.0), st.integers(0, 99))
def test_the_norm_is_exact(n_atoms: int, norm: float, seed: int) -> None:
    structure = replace(structures(3)[2], atomic_numbers=np.ones(n_atoms, np.int64))
    by_atom = random_step(structure, norm, "atom", np.random.default_rng(seed))
    assert np.linalg.norm(by_atom, axis=1) == pytest.approx(np.full(n_atoms, norm), rel=1e-12)
    whole = random_step(structure, norm, "structure", np.random.default_rng(seed))
    assert np.linalg.norm(whole) == pytest.approx(norm, rel=1e-12)
    # The same direction, seen from both.
    assert np.vdot(by_atom, whole) > 0


def test_a_tiny_direction_keeps_its_length_and_none_stays_none() -> None:
    direction = np.array([[3e-200, 0.0, 4e-200], [0.0, 0.0, 0.0]])
    assert scaled_to(direction, 0.5, "atom").tolist() == [[0.3, 0.0, 0.4], [0.0, 0.0, 0.0]]
    assert not scaled_to(np.zeros((2, 3)), 0.5, "structure").any()


def test_directions_are_uniform(store: Store, teacher: Potential) -> None:
    options = AugmentOptions(copies=40)
    parents = {s.structure_id: s.positions for s in store.structures()}
    steps = np.concatenate(
        [
            s.positions - parents[parent_ids(s.structure_id)[0]]
            for s in made(store, teacher, options)
        ]
    )
    assert len(steps) > 2500
    assert np.abs(steps.mean(axis=0)).max() < 0.005
    assert steps.T @ steps / len(steps) == pytest.approx(np.eye(3) * 0.01 / 3, abs=3e-4)


def test_fixed_atoms_stay(student: Potential, teacher: Potential) -> None:
    parent = structures(3)[2]
    parent.fixed = np.array([True, False, True, False, False, True])
    step = random_step(parent, 0.1, "atom", np.random.default_rng(0))
    assert not step[parent.fixed].any()
    assert step[~parent.fixed].all()
    (step,) = ascent_steps([parent], teacher, student, 0.1, "structure")
    assert not step[parent.fixed].any()
    assert np.linalg.norm(step) == pytest.approx(0.1)
    for options in (RELAX, MD):
        for _, frame in frames(parent, teacher, options, np.random.default_rng(0)):
            moved = frame.positions - parent.positions
            assert not moved[parent.fixed].any()
            assert moved[~parent.fixed].any()


@pytest.mark.parametrize("conservative", [False, True])
@pytest.mark.parametrize("norm_of", ["atom", "structure"])
def test_a_small_ascent_step_widens_the_difference(conservative: bool, norm_of: Any) -> None:
    one = SCHNET if conservative else PAINN
    teacher = make_potential({**one, "hidden_channels": 12}, dtype=torch.float64)
    student = make_potential(one, seed=3, dtype=torch.float64)
    found = [s for s in structures(18) if s.n_atoms > 1]
    steps = ascent_steps(found, teacher, student, 1e-5, norm_of)
    moving = [(s, step) for s, step in zip(found, steps, strict=True) if step.any()]
    assert len(moving) > 8
    before = differences([s for s, _ in moving], teacher, student)
    after = differences(
        [replace(s, positions=s.positions + step) for s, step in moving], teacher, student
    )
    back = differences(
        [replace(s, positions=s.positions - step) for s, step in moving], teacher, student
    )
    assert (after > before).all()
    assert (back < before).all()


def test_a_step_does_not_depend_on_what_it_is_computed_with(
    teacher: Potential, student: Potential
) -> None:
    found = structures(6)
    together = ascent_steps(found, teacher, student, 0.1, "structure")
    for structure, step in zip(found, together, strict=True):
        (alone,) = ascent_steps([structure], teacher, student, 0.1, "structure")
        assert alone == pytest.approx(step, abs=1e-4)


@pytest.mark.parametrize("options", [AugmentOptions(copies=2), ASCENT, RELAX, MD])
def test_structures_are_reproducible_and_come_from_what_is_trained_on(
    options: AugmentOptions, store: Store, teacher: Potential, student: Potential
) -> None:
    found, again = (made(store, teacher, options, student) for _ in range(2))
    assert found
    assert [s.structure_id for s in found] == [s.structure_id for s in again]
    assert all((a.positions == b.positions).all() for a, b in zip(found, again, strict=True))
    rows = {s.structure_id: s for s in store.structures()}
    for child in found:
        parent = rows[parent_ids(child.structure_id)[0]]
        assert parent.split == "train"
        assert child.split == "train"
        assert child.origin == options.origin
        assert child.group == parent.group
        assert (child.energy, child.forces) == (None, None)
        assert (child.atomic_numbers == parent.atomic_numbers).all()
        assert not (child.positions == parent.positions).all()
    if options.method != "ascent":
        other = made(store, teacher, replace(options, seed=1), student)
        assert {s.content_hash() for s in other} != {s.content_hash() for s in found}


def test_a_parent_gives_the_same_children_wherever_it_stands(
    store: Store, teacher: Potential, tmp_path: Path
) -> None:
    shuffled = make_store(tmp_path, found=list(reversed(structures(24))))
    for options in (AugmentOptions(share=0.5), MD):
        one, other = (made(source, teacher, options) for source in (store, shuffled))
        theirs = {s.structure_id: s.positions for s in other}
        common = [s for s in one if s.structure_id in theirs]
        assert len(common) > 3
        assert all((theirs[s.structure_id] == s.positions).all() for s in common)


def test_a_share_of_the_parents_and_of_the_frames_is_taken(
    store: Store, teacher: Potential
) -> None:
    n_parents = sum(s.split == "train" for s in store.structures())
    assert len(made(store, teacher, AugmentOptions())) == n_parents
    assert 3 < len(made(store, teacher, AugmentOptions(share=0.5))) < n_parents - 3
    every = made(store, teacher, replace(MD, keep=1.0))
    assert 0.2 * len(every) < len(made(store, teacher, MD)) < 0.8 * len(every)


def test_a_relaxation_lowers_the_teachers_energy() -> None:
    teacher = make_potential(SCHNET, dtype=torch.float64)
    options = replace(RELAX, force_goal=1e-4)
    lowered = 0
    for parent in structures(12):
        found = [s for _, s in frames(parent, teacher, options, np.random.default_rng(0))]
        if found:
            batch = collate([parent, found[-1]], teacher.graph_rule)
            before, after = teacher.predict(batch).energy.tolist()
            lowered += after < before
    assert lowered > 3


def test_a_trajectory_ends_before_forces_beyond_the_limit(teacher: Potential) -> None:
    parent = structures(3)[2]
    assert not list(frames(parent, teacher, replace(MD, max_force=1e-9), np.random.default_rng(0)))


@pytest.mark.parametrize("options", [AugmentOptions(), ASCENT, MD])
def test_an_overlay_is_a_store_labelled_by_the_teacher(
    options: AugmentOptions, store: Store, teacher: Potential, student: Potential, tmp_path: Path
) -> None:
    overlay = write(
        store, tmp_path / "overlay.zarr", teacher, options, student=chosen(options, student)
    )
    assert not verify_store(overlay.path).problems
    assert set(overlay.index.origin) == {options.origin}
    assert overlay.manifest.dataset.n_labelled == 0
    assert any(options.origin in note for note in overlay.manifest.dataset.notes)
    assert str(tmp_path) not in (overlay.path / "manifest.json").read_text()
    energies = overlay.read("teachers/teacher/energy")
    forces = overlay.read("teachers/teacher/forces")
    for row, structure in enumerate(overlay.structures("store")):
        output = teacher.predict(collate([structure], teacher.graph_rule))
        assert energies[row] == pytest.approx(float(output.energy[0]), abs=1e-4)
        first = int(overlay.index.n_atoms[:row].sum())
        assert forces[first : first + structure.n_atoms] == pytest.approx(
            output.forces.numpy(), abs=1e-4
        )


def test_an_overlay_killed_between_import_and_dump_is_gone_on_with(
    store: Store, teacher: Potential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "overlay.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.augment.overlay.dump_teacher", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(store, path, teacher, AugmentOptions())
    assert not open_store(path).teachers
    with pytest.raises(StoreError, match="was not made by rattled"):
        write(store, path, teacher, AugmentOptions(norm=0.2))
    assert write(store, path, teacher, AugmentOptions()).teachers
    with pytest.raises(StoreError, match="teachers/teacher already"):
        write(store, path, teacher, AugmentOptions())
    with pytest.raises(StoreError, match="finished store that was not made"):
        write(store, store.path, teacher, AugmentOptions())


def test_a_method_and_what_it_needs_are_checked(
    store: Store, teacher: Potential, student: Potential, tmp_path: Path
) -> None:
    path = tmp_path / "overlay.zarr"
    with pytest.raises(ConfigError, match="ascent needs a student"):
        write(store, path, teacher, ASCENT)
    with pytest.raises(ConfigError, match="random takes no student"):
        write(store, path, teacher, AugmentOptions(), student=student)
    with pytest.raises(DataError, match=r"Nothing was made: of 24 structures.*--share"):
        write(store, path, teacher, AugmentOptions(share=1e-9))
    assert not path.exists()
    for wrong in ({"norm": 0.0}, {"share": 1.5}, {"copies": 0}, {"max_force": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AugmentOptions(**wrong)  # type: ignore[arg-type]
