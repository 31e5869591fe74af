"""The stream: the batches of the sampler, whole, in order, from any step; no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.store import GroupWriter, Store, TeacherEntry, add_teacher, open_store
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import BlockEdges, count_edges, neighbors_for
from kdcache.stream.reader import WindowReader, sequential
from kdcache.stream.sampler import BlockShuffle, Budget
from kdcache.stream.window import collate
from kdcache.structures import Batch
from tests.chain import CUTOFF, REFERENCES, make_store

RULE = GraphRule(CUTOFF)
# A teacher whose atom k of structure s says (s, k), in every way a field can be kept.
FIELDS = (
    FieldSpec("node", "atom", (2,), codec="half"),
    FieldSpec("vector", "atom", (3, 1), symmetry="vector", codec="exact"),
    FieldSpec("global", "structure", (1,), codec="compact"),
    FieldSpec("energy", "structure", (), "float64", "eV"),
    FieldSpec("atomic_energy", "atom", (), "float64", "eV"),
)


def references_of(numbers: np.ndarray) -> np.ndarray:
    return np.array([REFERENCES[int(n)] for n in numbers])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Sixty structures in blocks of a few, with a teacher that numbers every atom."""
    made = make_store(tmp_path_factory.mktemp("store"), 60, unlabelled=[1, 2, 30], graph=RULE)
    entry = TeacherEntry.describe(
        digest="0" * 64, fields=FIELDS, model="numbers", architecture={}, graph=RULE,
        references=REFERENCES, precision="float64", licence="", software={},
    )  # fmt: skip
    with add_teacher(made.path, "numbers", entry, FIELDS) as writer:
        write_numbers(made, writer)
        writer.commit()
    return open_store(made.path)


def write_numbers(store: Store, writer: GroupWriter) -> None:
    for shard in writer.pending_shards():
        rows = np.arange(len(store.index))[store.plan.shard_structures(shard)]
        sizes = store.index.n_atoms[rows]
        s = np.repeat(rows, sizes).astype(float)
        k = np.concatenate([np.arange(n) for n in sizes]).astype(float)
        numbers = [store.structure(int(row)).atomic_numbers for row in rows]
        arrays = {
            "node": np.stack([s, k], 1).astype("f4"),
            "vector": np.stack([s, k, s + k / 8], 1)[:, :, None].astype("f4"),
            "global": rows[:, None].astype("f4"),
            "energy": rows + np.array([references_of(z).sum() for z in numbers]),
            "atomic_energy": s + k / 8 + references_of(np.concatenate(numbers)),
        }
        writer.write_shard(shard, arrays)


def reader(store: Store, **changes: object) -> WindowReader:
    arguments: dict[str, object] = {
        "teacher_fields": tuple(f"numbers/{spec.name}" for spec in FIELDS),
        "references": REFERENCES,
        "dtype": np.float64,
    }
    neighbors = neighbors_for(store, RULE, Path("unused"))
    return WindowReader(store, neighbors, **{**arguments, **changes})  # type: ignore[arg-type]


def sampler(store: Store, rows: Sequence[int] | None = None, **changes: int) -> BlockShuffle:
    chosen = np.arange(len(store.index)) if rows is None else np.array(rows)
    arguments = {"batch_size": 7, "seed": 3, "window_blocks": 4, **changes}
    return BlockShuffle(store.index.block, chosen, **arguments)


def batches(
    store: Store, samplers: Sequence[BlockShuffle], n: int, start: int = 0, **changes: object
) -> list[Batch]:
    lanes = [(reader(store, **changes), one) for one in samplers]
    with Loader(lanes, start_step=start) as loader:
        return list(islice(loader, n))


def assert_same(found: Batch, expected: Batch) -> None:
    for name in Batch.__slots__:
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype, name
            assert torch.equal(one.nan_to_num(1e30), other.nan_to_num(1e30)), name


@pytest.mark.parametrize("batch_size", [1, 7, 25, 60])
def test_every_batch_is_the_samplers_over_windows_and_epochs(store: Store, batch_size: int) -> None:
    order = sampler(store, batch_size=batch_size)
    assert len(order.windows(0)) > 3
    steps = 3 * order.steps_per_epoch + 2
    for step, batch in enumerate(batches(store, [order], steps)):
        assert batch.rows is not None
        assert batch.rows.tolist() == order.batch_rows(step).tolist()


def test_a_batch_holds_what_its_structures_hold(store: Store) -> None:
    order = sampler(store)
    for batch in batches(store, [order], 2 * order.steps_per_epoch):
        assert batch.rows is not None
        structures = [store.structure(int(row)) for row in batch.rows]
        expected = collate(structures, RULE, np.float64)
        assert expected.energy is not None
        for k, structure in enumerate(structures):
            # Off in float64: what is left has all its digits.
            expected.energy[k] -= float(references_of(structure.atomic_numbers).sum())
        assert batch.energy is not None
        assert torch.allclose(batch.energy, expected.energy, rtol=0, atol=1e-11, equal_nan=True)
        expected.energy = batch.energy
        assert_same(batch, expected)


def test_features_stay_with_their_atoms(store: Store) -> None:
    order = sampler(store)
    for batch in batches(store, [order], 2 * order.steps_per_epoch, dtype=np.float32):
        assert batch.rows is not None
        s = torch.from_numpy(batch.rows)[batch.structure_index].float()
        first = torch.searchsorted(batch.structure_index, torch.arange(batch.n_structures))
        k = (torch.arange(batch.n_atoms) - first[batch.structure_index]).float()
        rows = torch.from_numpy(batch.rows).float()
        teacher = {name.removeprefix("numbers/"): value for name, value in batch.teacher.items()}
        assert torch.equal(teacher["node"], torch.stack([s, k], 1))
        assert torch.equal(teacher["vector"], torch.stack([s, k, s + k / 8], 1)[:, :, None])
        assert torch.allclose(teacher["global"][:, 0], rows, atol=60 / 127)
        # A float32 that held 12,000 eV of references would be off by 1e-3.
        assert torch.allclose(teacher["energy"], rows, rtol=0, atol=4e-6)
        assert torch.allclose(teacher["atomic_energy"], s + k / 8, rtol=0, atol=4e-6)


def test_half_features_stay_half_for_a_bus_and_widen_to_the_same(store: Store) -> None:
    order = sampler(store)
    widened = batches(store, [order], order.steps_per_epoch, dtype=np.float32)
    kept = batches(store, [order], order.steps_per_epoch, dtype=np.float32, keep_half=True)
    for one, other in zip(kept, widened, strict=True):
        dtypes = {name: value.dtype for name, value in one.teacher.items()}
        assert dtypes.pop("numbers/node") == torch.float16
        assert set(dtypes.values()) == {torch.float32}
        moved = one.to(torch.device("cpu"), torch.float32)
        assert all(torch.equal(moved.teacher[name], other.teacher[name]) for name in other.teacher)


@pytest.mark.parametrize("start", [1, 6, 8, 9, 25, 1000])
def test_a_stream_from_any_step_gives_the_same_batches(store: Store, start: int) -> None:
    order = sampler(store)
    (batch,) = batches(store, [order], 1, start)
    assert batch.rows is not None
    assert batch.rows.tolist() == order.batch_rows(start).tolist()
    if start < 30:
        assert_same(batch, batches(store, [order], start + 1)[-1])


@settings(max_examples=15)
@given(
    n_processes=st.integers(1, 7),
    rule=st.sampled_from(["structures", "atoms", "edges", "both"]),
    seed=st.integers(0, 99),
    start=st.integers(0, 40),
    data=st.data(),
)
def test_processes_together_get_the_batches_of_one_from_any_step(
    n_processes: int, rule: str, seed: int, start: int, data: st.DataObject, store: Store
) -> None:
    n_edges = count_edges(store, neighbors_for(store, RULE, Path("unused")))
    room = data.draw(st.integers(n_processes + 1, n_processes + 9))
    cut: dict[str, Any] = {"batch_size": n_processes * data.draw(st.integers(1, 3))}
    if rule != "structures":
        max_atoms = None if rule == "edges" else 6 * room
        max_edges = None if rule == "atoms" else int(n_edges.max()) * room
        n_atoms = store.index.n_atoms
        cut = {"budget": Budget.of(n_atoms, n_edges, max_atoms=max_atoms, max_edges=max_edges)}
    order = BlockShuffle(store.index.block, np.arange(60), seed=seed, window_blocks=4, **cut)
    assume(order.fewest >= n_processes)
    held: list[list[list[int]]] = []
    for rank in range(n_processes):
        lanes = [(reader(store, teacher_fields=()), order)]
        with Loader(lanes, start_step=start, rank=rank, n_processes=n_processes) as loader:
            held.append([batch_rows(batch) for batch in islice(loader, 3)])
    for k in range(3):
        parts = [steps[k] for steps in held]
        assert all(parts)
        whole = order.batch_rows(start + k).tolist()
        assert sorted(row for part in parts for row in part) == sorted(whole)
        # Each in the order of the whole: a batch does not depend on where the stream began.
        assert all(part == [row for row in whole if row in part] for part in parts)


def batch_rows(batch: Batch) -> list[int]:
    assert batch.rows is not None
    return [int(row) for row in batch.rows]


def test_two_samplers_share_every_batch(store: Store) -> None:
    labelled, others = np.arange(0, 60, 4).tolist(), [r for r in range(60) if r % 4]
    orders = [sampler(store, labelled, batch_size=2), sampler(store, others, batch_size=5, seed=4)]
    for step, batch in enumerate(batches(store, orders, 40)):
        assert batch.rows is not None
        expected = np.concatenate([order.batch_rows(step) for order in orders])
        assert batch.rows.tolist() == expected.tolist()
        assert_same(batch, collated(store, expected, batch))


def collated(store: Store, rows: np.ndarray, found: Batch) -> Batch:
    """The structures as a batch, their energies as found: another test compares those."""
    expected = collate([store.structure(int(row)) for row in rows], RULE, np.float64)
    expected.energy = found.energy
    return expected


def test_hidden_labels_are_nan_and_no_others(store: Store) -> None:
    visible = np.arange(60) % 3 == 0
    whole = {int(row): k for k, row in enumerate(range(60))}
    truth = np.isfinite(store.read("structures/energy"))
    order = sampler(store)
    for batch in batches(store, [order], 2 * order.steps_per_epoch, labelled=visible):
        assert batch.rows is not None
        assert batch.energy is not None
        assert batch.forces is not None
        seen = torch.from_numpy((visible & truth)[[whole[int(r)] for r in batch.rows]])
        assert torch.equal(batch.energy.isfinite(), seen)
        assert torch.equal(batch.forces.isfinite().all(1), seen[batch.structure_index])
    # Hiding writes into the window, never into what the store keeps.
    assert np.array_equal(np.isfinite(store.read("structures/energy")), truth)


def test_a_reader_without_labels_gives_none(store: Store) -> None:
    (batch,) = batches(store, [sampler(store)], 1, labels=False, teacher_fields=())
    assert batch.energy is None
    assert batch.forces is None
    assert not batch.teacher


class Broken:
    """Neighbour lists that fail from the n-th read on."""

    def __init__(self, store: Store, after: int) -> None:
        self.whole = neighbors_for(store, RULE, Path("unused"))
        self.left = after

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.whole.read(blocks)


@pytest.mark.parametrize("after", [0, 2])
def test_an_error_of_the_reading_thread_reaches_the_consumer(store: Store, after: int) -> None:
    broken = WindowReader(store, Broken(store, after))
    with (
        pytest.raises(OSError, match="the disk is gone"),
        Loader([(broken, sampler(store))]) as found,
    ):
        for _ in found:
            pass


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_leaving_early_leaves_no_thread(store: Store, taken: int) -> None:
    def ours() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("kdcache")]

    with Loader([(reader(store), sampler(store))], ahead=2) as loader:
        assert len(list(islice(loader, taken))) == taken
        assert ours()
    assert not ours()


def test_sequential_batches_visit_every_row_once_within_the_bound(store: Store) -> None:
    rows = np.arange(1, 60, 2)
    found = list(sequential(reader(store), rows, 9))
    assert np.concatenate([batch.rows for batch in found]).tolist() == rows.tolist()  # type: ignore[misc]
    assert all(batch.n_atoms <= 9 for batch in found)
    for batch in found:
        assert batch.rows is not None
        assert_same(batch, collated(store, batch.rows, batch))
