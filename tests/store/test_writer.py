"""What a writer refuses, and whom it names."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import ShapeError, StoreError, TeacherError
from kdcache.fields import ENERGY, FORCES, FieldSpec
from kdcache.store import (
    add_teacher,
    create_store,
    open_store,
    plan_blocks,
    shard_writer,
    verify_store,
)
from kdcache.store.codecs import PIECE_VALUES
from kdcache.store.shards import PARTIAL_SUFFIX
from kdcache.store.work import WORK
from tests.store.sample import (
    STRUCTURES,
    TEACHER,
    Sample,
    begin_structures,
    make_sample,
    teacher_entry,
    write_all,
)

NODE = FieldSpec("node", "atom", (5,), codec="half")
EDGE = FieldSpec("message", "edge", (2,), codec="half")
WIDE = FieldSpec("wide", "atom", (PIECE_VALUES // 4 + 1,), codec="half")  # three rows in a piece


@pytest.mark.parametrize(
    ("sizes"), [(1,), (12,), (1, 1, 1, 1), (12, 12, 12, 1)], ids=lambda s: f"{s}"
)
def test_small_and_full_stores_are_whole(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    sample = make_sample(sizes)
    path = tmp_path / "store.zarr"
    write_all(begin_structures(path, sample), sample)
    write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample)
    store = open_store(path)
    for spec in STRUCTURES:
        values = store.read(f"structures/{spec.name}")
        assert values.tobytes() == sample.values(spec).tobytes()
    assert verify_store(path, data=sample.dataset).problems == []


def test_fields_written_side_by_side_are_those_written_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_sample((12, 12, 12, 1))
    digests = []
    for processors in (1, 8):
        monkeypatch.setattr(shard_writer, "n_processors", lambda n=processors: n)
        path = tmp_path / f"{processors}.zarr"
        write_all(begin_structures(path, sample), sample)
        write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample)
        digests.append(open_store(path).manifest.root_digest)
        assert verify_store(path, data=sample.dataset).problems == []
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (70000.0, "is 70000, beyond what codec 'half' holds.*--codec exact.*--on-overflow clip"),
        (-np.inf, "is -inf.*--on-nonfinite zero"),
        (np.nan, "is nan.*--on-nonfinite zero"),
    ],
)
@pytest.mark.parametrize("spec", [NODE, EDGE, WIDE], ids=lambda s: s.name)
def test_a_value_that_cannot_be_stored_is_named_by_structure_and_place(
    copied: Path, sample: Sample, spec: FieldSpec, value: float, message: str
) -> None:
    plan, shard = sample.plan, 1
    rows = plan.shard_structures(shard)
    counts = plan.counts(spec.level)[rows]
    victim = int(np.flatnonzero(counts > 1)[-1])
    row = int(counts[:victim].sum()) + 1
    structure_id = sample.index.structure_id[rows.start + victim]
    arrays = sample.shard([spec], shard)
    arrays[spec.name][row, -1] = value
    pattern = f"Structure '{structure_id}': {spec.name} at {spec.level} 1 {message}"
    with (
        add_teacher(copied, "second", teacher_entry(), [spec]) as writer,
        pytest.raises(TeacherError, match=pattern),
    ):
        writer.write_shard(shard, arrays)


@pytest.mark.parametrize("processors", [1, 8])
def test_of_several_fields_the_first_that_fails_is_named_and_nothing_is_left(
    copied: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    monkeypatch.setattr(shard_writer, "n_processors", lambda: processors)
    specs = [FieldSpec("pooled", "structure", (2,)), NODE, EDGE]
    arrays = sample.shard(specs, 1)
    for spec in (NODE, EDGE):
        arrays[spec.name][-1] = np.inf
    before = set(threading.enumerate())  # a remote store keeps its own
    with add_teacher(copied, "second", teacher_entry(), specs) as writer:
        with pytest.raises(TeacherError, match=": node at atom"):
            writer.write_shard(1, arrays)
        assert list(copied.rglob(f"*{PARTIAL_SUFFIX}")) == []
        left = [t.name for t in threading.enumerate() if t not in before]
        assert [name for name in left if name.startswith("kdcache-")] == []
        assert 1 in writer.pending_shards()


def test_policies_store_replaced_values_and_count_them(copied: Path, sample: Sample) -> None:
    writer = add_teacher(
        copied, "second", teacher_entry(), [NODE], on_overflow="clip", on_nonfinite="zero"
    )
    with writer:
        for shard in writer.pending_shards():
            arrays = sample.shard([NODE], shard)
            arrays["node"][0, 2:4] = -1e6, np.nan
            writer.write_shard(shard, arrays)
        error = writer.commit().teachers["second"].errors["node"]
    assert (error.clipped, error.nonfinite) == (sample.plan.n_shards, sample.plan.n_shards)
    assert open_store(copied).read("teachers/second/node")[0, 2:4].tolist() == [-65504, 0]


def test_the_recorded_error_is_that_of_the_stored_values(finished: Path, sample: Sample) -> None:
    store = open_store(finished)
    for spec in TEACHER:
        values = sample.values(spec).astype(np.float64)
        change = values - store.read(f"teachers/painn/{spec.name}")
        expected = np.linalg.norm(change) / np.linalg.norm(values)
        recorded = store.teachers["painn"].errors[spec.name].relative
        assert recorded == pytest.approx(expected, rel=6e-3, abs=1e-12)
        assert recorded == 0 or spec.codec != "exact"


def test_ground_truth_may_be_missing_but_a_teacher_may_not(finished: Path, sample: Sample) -> None:
    stored = open_store(finished).read("structures/energy")
    assert np.isnan(stored).sum() == len(sample.dataset) // 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"extra": a["node"]}, r"needs fields \['node'\], got \['extra', 'node'\]"),
        (lambda a: {"node": a["node"][1:]}, r"node must be \[.*\], got"),
        (lambda a: {"node": a["node"][:, :4]}, "Rows would belong to other structures"),
        (lambda a: {"node": a["node"].astype(np.complex64)}, "must be float32, got complex64"),
    ],
)
def test_arrays_that_are_not_the_shards_are_refused(
    copied: Path,
    sample: Sample,
    change: object,
    message: str,
) -> None:
    arrays = change(sample.shard([NODE], 0))  # type: ignore[operator]
    with (
        add_teacher(copied, "second", teacher_entry(), [NODE]) as writer,
        pytest.raises(ShapeError, match=message),
    ):
        writer.write_shard(0, arrays)


def test_exact_fields_are_not_converted_with_a_loss(copied: Path, sample: Sample) -> None:
    spec = FieldSpec("node", "atom", (5,), codec="exact")
    wide = {"node": sample.shard([spec], 0)["node"].astype(np.float64)}
    with (
        add_teacher(copied, "second", teacher_entry(), [spec]) as writer,
        pytest.raises(ShapeError, match="must be float32, got float64"),
    ):
        writer.write_shard(0, wide)


def test_nothing_foreign_is_written_over(tmp_path: Path, sample: Sample) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(StoreError, match=r"is no kdcache store \(it holds thesis.tex\)"):
        begin_structures(tmp_path, sample)
    with pytest.raises(StoreError, match="is a file"):
        begin_structures(tmp_path / "thesis.tex", sample)
    assert not (tmp_path / WORK).exists()


def test_index_dataset_and_plan_must_belong_together(tmp_path: Path, sample: Sample) -> None:
    given = {
        "index": sample.index,
        "plan": sample.plan,
        "fields": STRUCTURES,
        "dataset": sample.entry,
    }
    other = plan_blocks(sample.plan.n_atoms, sample.plan.n_edges, atom_capacity=40)
    entry = sample.entry.model_copy(update={"digest": "0" * 64})
    for changed, message in (
        ({"plan": other}, "the layout gives"),
        ({"dataset": entry}, "not of one dataset"),
        ({"fields": [FieldSpec("forces", "atom", (3,), codec="half")]}, "kept exactly"),
    ):
        with pytest.raises(StoreError, match=message):
            create_store(tmp_path / "s.zarr", **(given | changed))  # type: ignore[arg-type]
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a b", "x" * 101])
def test_a_teachers_name_is_a_plain_folder_name(finished: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name a teacher"):
        add_teacher(finished, name, teacher_entry(), TEACHER)


def test_a_store_may_leave_out_fields_its_licence_forbids(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "store.zarr"
    writer = create_store(
        path, index=sample.index, plan=sample.plan, fields=[ENERGY, FORCES], dataset=sample.entry
    )
    write_all(writer, sample)
    store = open_store(path)
    assert set(store.fields("structures")) == {"energy", "forces"}
    with pytest.raises(StoreError, match="does not hold atomic_numbers, positions, cell, pbc"):
        store.structure(0)
    assert verify_store(path).problems == []
