"""Where a teacher fails, the dump goes on as it was told, and what is missing is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from kdcache.dump import DumpOptions, DumpReport, dump_teacher
from kdcache.errors import DeviceError, StoreError, TeacherError
from kdcache.fields import Codec
from kdcache.store import Store, open_store, verify_store
from kdcache.store.failures import FAILURES, one_line
from kdcache.structures import Batch
from tests.chain import make_store
from tests.dump.failing import Behaviour, Failing

RAISES, NAN = (3, 30), (0, 17)
FAILED = sorted(RAISES + NAN)
FIELDS = ("node", "edge", "energy")


def run(store: Store, behaviour: Behaviour, **options: object) -> tuple[DumpReport, Failing]:
    teacher = Failing(behaviour)
    chosen = DumpOptions(**{"name": "t", "threads": 1, "fields": FIELDS, **options})  # type: ignore[arg-type]
    return dump_teacher(store.path, teacher, chosen), teacher


def owners(store: Store, field: str) -> np.ndarray:
    """The structure every row of a field belongs to."""
    group = f"teachers/{field}".rpartition("/")[0]
    counts = store.plans[group].counts(store.spec(f"teachers/{field}").level)
    return np.repeat(np.arange(len(store)), counts)


@pytest.mark.fault
@pytest.mark.parametrize("codec", ["half", "exact", "compact"])
def test_failed_structures_are_recorded_and_hold_nothing(codec: Codec, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    good, _ = run(store, Behaviour(), name="good", codec=codec)
    report, _ = run(store, Behaviour(raises=RAISES, nan=NAN), codec=codec, on_error="skip")
    found = open_store(store.path)
    ids = [found.index.structure_id[row] for row in FAILED]
    assert list(report.failed) == ids
    assert report.failed[ids[0]] == "node is not finite"
    # Whose table it was is nobody's business.
    assert report.failed[ids[1]] == "ValueError: no parameters for this in …"
    failures = found.failures("t")
    assert failures.row.tolist() == FAILED
    assert found.teachers["t"].n_failed == len(FAILED)
    assert (good.failed, len(found.failures("good"))) == ({}, 0)
    for field in FIELDS:
        gone = np.isin(owners(found, f"t/{field}"), FAILED)
        said, expected = (found.read(f"teachers/{name}/{field}") for name in ("t", "good"))
        kept = found.spec(f"teachers/t/{field}").codec
        if kept == "compact":
            assert not said[gone].any()
            # A block that lost its largest value has a finer scale, nothing else.
            np.testing.assert_allclose(said[~gone], expected[~gone], atol=0.5)
        else:
            assert np.isnan(said[gone]).all()
            np.testing.assert_array_equal(said[~gone], expected[~gone])
    np.testing.assert_array_equal(
        found.read("teachers/t/edge_index"), found.read("teachers/good/edge_index")
    )
    assert verify_store(store.path).problems == []


@pytest.mark.fault
def test_another_reader_sees_nan_where_the_teacher_failed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    run(store, Behaviour(raises=RAISES), on_error="skip", codec="half")
    found = open_store(store.path)
    values = zarr.open_group(str(store.path), mode="r")["teachers/t/node"][:]
    place = found.index.atom_start[RAISES[1]]
    assert np.isnan(values[place : place + found.index.n_atoms[RAISES[1]]]).all()
    assert int(np.isnan(values).any(axis=1).sum()) == found.index.n_atoms[list(RAISES)].sum()


@pytest.mark.fault
def test_unless_told_otherwise_a_failure_stops_and_names_the_structure(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    name = store.index.structure_id[3]
    with pytest.raises(TeacherError, match=f"Structure '{name}' .* the teacher failed on it"):
        run(store, Behaviour(raises=RAISES))
    # What was finished before it is gone on with, now leaving it out.
    report, _ = run(store, Behaviour(raises=RAISES), on_error="skip")
    assert len(report.failed) == len(RAISES)


@pytest.mark.fault
def test_a_teacher_that_fails_on_everything_gives_no_store(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(TeacherError, match=r"failed on all 40 structures \(ValueError"):
        run(store, Behaviour(raises=tuple(range(40))), on_error="skip")
    assert "t" not in open_store(store.path).teachers


@pytest.mark.fault
def test_a_batch_that_does_not_fit_the_memory_is_cut(tmp_path: Path) -> None:
    store = make_store(tmp_path, atom_capacity=64)
    largest = int(store.index.n_atoms.max())
    run(store, Behaviour(), name="whole")
    _, teacher = run(store, Behaviour(memory=largest))
    assert max(teacher.batches) <= largest
    assert sum(teacher.batches) == store.index.n_atoms.sum()
    found = open_store(store.path)
    for field in FIELDS:
        np.testing.assert_array_equal(
            found.read(f"teachers/t/{field}"), found.read(f"teachers/whole/{field}")
        )


@pytest.mark.fault
def test_a_structure_too_large_for_the_memory_is_named_or_recorded(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    largest = int(store.index.n_atoms.max())
    large = np.flatnonzero(store.index.n_atoms == largest)
    with pytest.raises(TeacherError, match=f"{largest} atoms.*does not fit the memory"):
        run(store, Behaviour(memory=largest - 1))
    report, _ = run(store, Behaviour(memory=largest - 1), on_error="skip")
    assert open_store(store.path).failures("t").row.tolist() == large.tolist()
    assert set(report.failed.values()) == {"it does not fit the memory"}


class Lost(Failing):
    """Its GPU has fallen off the bus."""

    def compute(self, batch: Batch) -> dict[str, object]:  # type: ignore[override]
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.fault
def test_a_lost_gpu_is_no_failure_of_the_structures(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    options = DumpOptions("t", threads=1, on_error="skip")
    with pytest.raises(DeviceError, match=r"cpu no longer computes .* repeat the command"):
        dump_teacher(store.path, Lost(Behaviour()), options)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["missing", "other", "rows"])
def test_a_damaged_list_of_failures_is_refused(damage: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    run(store, Behaviour(raises=RAISES), on_error="skip")
    run(store, Behaviour(raises=(1, 2)), on_error="skip", name="u")
    run(store, Behaviour(raises=(1,)), on_error="skip", name="v")
    file = store.path / "teachers" / "t" / FAILURES
    if damage == "missing":
        file.unlink()
    elif damage == "other":
        file.write_bytes(b"PAR1 nothing PAR1")
    else:
        file.write_bytes((store.path / "teachers" / "v" / FAILURES).read_bytes())
    with pytest.raises(StoreError, match=FAILURES):
        open_store(store.path).failures("t")
    assert any(FAILURES in problem for problem in verify_store(store.path).problems)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("\n\n  first\nsecond", "first"),
        ("no /home/jo/x.pt, nor ~/y or C:\\Users\\jo\\z.pt here", "no …, nor … or … here"),
        ("x" * 300, "x" * 199 + "…"),
        ("", ""),
    ],
)
def test_a_reason_is_one_short_line_without_paths(said: str, kept: str) -> None:
    assert one_line(said) == kept
