"""Who is trained on, who is watched, whose labels are seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.config import DataConfig
from kdcache.errors import TrainingError
from kdcache.selection import composition, elements_of, select
from kdcache.store import Store
from tests.chain import make_store

UNLABELLED = (1, 6, 20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("split"), 60, unlabelled=UNLABELLED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("whole"), 60, unlabelled=UNLABELLED, split=False)


def ids(store: Store, rows: np.ndarray) -> set[int]:
    return {int(name[1:]) for name in store.index.structure_id[rows]}


def test_splits_of_the_store_decide(store: Store) -> None:
    chosen = select(store, DataConfig())
    val = {s for s in range(60) if s % 7 == 6}
    assert ids(store, chosen.train) == set(range(60)) - val
    assert ids(store, chosen.validation) == val - set(UNLABELLED)
    assert ids(store, chosen.train_unlabelled) == set(UNLABELLED) - val
    assert ids(store, chosen.train_labelled) == set(range(60)) - val - set(UNLABELLED)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_without_a_split_a_fraction_of_the_labelled_is_held_out(
    fraction: float, whole: Store
) -> None:
    chosen = select(whole, DataConfig(val_fraction=fraction))
    assert len(chosen.validation) == round(fraction * 57)
    assert not ids(whole, chosen.validation) & set(UNLABELLED)
    assert not set(chosen.train) & set(chosen.validation)
    assert ids(whole, chosen.train) | ids(whole, chosen.validation) == set(range(60))


def test_a_validation_fraction_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, 3, split=False)
    with pytest.raises(TrainingError, match="holds out all 3"):
        select(store, DataConfig(val_fraction=0.9))


def test_fewer_labels_are_among_more_labels(store: Store, whole: Store) -> None:
    for made in (store, whole):
        every = select(made, DataConfig())
        before = set(every.train_labelled)
        for share in (0.5, 0.2, 0.05):
            chosen = select(made, DataConfig(labels=share))
            seen = set(chosen.train_labelled)
            assert len(seen) == max(1, round(share * len(every.train_labelled)))
            assert seen < before
            before = seen
            # The rest of the run is as it was: only labels are hidden.
            assert chosen.train.tolist() == every.train.tolist()
            assert chosen.validation.tolist() == every.validation.tolist()
            assert chosen.labelled[chosen.validation].all()


def test_another_seed_sees_other_labels(store: Store) -> None:
    one, other = (select(store, DataConfig(labels=0.3, labels_seed=s)) for s in (0, 1))
    assert set(one.train_labelled) != set(other.train_labelled)


def test_the_scale_is_the_rms_of_the_forces_that_are_seen(store: Store) -> None:
    for settings in (DataConfig(), DataConfig(labels=0.3)):
        chosen = select(store, settings)
        forces = [store.structure(int(row)).forces for row in chosen.train_labelled]
        expected = np.sqrt(np.mean(np.concatenate(forces) ** 2))  # type: ignore[arg-type]
        assert chosen.force_rms == pytest.approx(expected, rel=1e-12)


def test_composition_and_elements_are_those_of_the_rows(store: Store) -> None:
    rows = select(store, DataConfig(labels=0.3)).train_labelled
    numbers, owner, energies = composition(store, rows)
    structures = [store.structure(int(row)) for row in rows]
    assert numbers.tolist() == np.concatenate([s.atomic_numbers for s in structures]).tolist()
    assert (
        owner.tolist() == np.repeat(np.arange(len(rows)), [s.n_atoms for s in structures]).tolist()
    )
    assert energies.tolist() == [s.energy for s in structures]
    for row in range(0, 60, 7):
        expected = np.unique(store.structure(row).atomic_numbers)
        assert elements_of(store, np.array([row])).tolist() == expected.tolist()
    assert elements_of(store, rows).tolist() == [1, 6, 8]
